"""From aligned replies to one model: rewriting them, merging a round apart, putting the pieces together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from logging import INFO

import numpy as np
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.common.logger import log
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from torch import Tensor

from fedrebasin import PermutationSpec, merge, moved_fraction
from fedrebasin.allocator import return_freed_memory
from fedrebasin.permute import permute_tensor
from fedrebasin.strategies.alignment import shares
from fedrebasin.strategies.inner import chain, read_attribute
from fedrebasin.strategies.pairs import from_pairs, to_pairs
from fedrebasin.strategies.records import (
    array_to_tensor,
    cast_arrays,
    is_finite,
    select_arrays,
    state_to_record,
    tensor_to_array,
    tensor_view,
)
from fedrebasin.strategies.replaced import replace_array
from fedrebasin.strategies.replies import Screened
from fedrebasin.strategies.reply import Reply
from fedrebasin.strategies.to_one import Perms

State = dict[str, Tensor]


@dataclass(frozen=True)
class AlignedReplies:
    """What is taken from the replies before the inner strategy consumes them.

    Attributes
    ----------
    buffers : list of state dict
        The aligned buffers of each reply.
    ends : list of state dict
        The whole aligned models; empty unless asked for.
    """

    buffers: list[State]
    ends: list[State]


def rewrite_replies(
    spec: PermutationSpec, perms: Sequence[Perms], replies: Sequence[Reply], trained: Sequence[str], *, keep_ends: bool
) -> AlignedReplies:
    """Permute the replies' arrays in place, one by one, and take out all but ``trained``.

    Arrays of replies that do not move stay the very same bytes.
    """
    held = set(trained)
    buffers: list[State] = []
    ends: list[State] = []
    for perm, reply in zip(perms, replies, strict=True):
        moved = moved_fraction(perm) > 0
        kept: State = {}
        end: State = {}
        for name in list(reply.arrays):
            if not moved and not keep_ends and name in held:
                continue  # never decoded
            tensor = (
                permute_tensor(spec.axes[name], perm, tensor_view(reply.arrays[name]))
                if moved
                else array_to_tensor(reply.arrays[name])
            )
            if keep_ends:
                end[name] = tensor
            if name not in held:
                kept[name] = tensor
                del reply.arrays[name]
            elif moved:
                replace_array(reply.arrays, name, tensor)
        buffers.append(kept)
        if keep_ends:
            ends.append(end)
        if moved:
            return_freed_memory(sum(len(array.data) for array in reply.arrays.values()))
    return AlignedReplies(buffers, ends)


def aggregate(
    strategy: Strategy, server_round: int, screened: Screened, ends: Sequence[State] | None, trained: Sequence[str]
) -> tuple[ArrayRecord | None, MetricRecord | None]:
    """Let the strategy aggregate the rewritten replies, or merge ``ends`` outside it where they are given."""
    if ends is not None:
        log_received(screened)
        return merge_round_apart(strategy, screened.replies, ends, trained)
    for reply in screened.replies:
        reply.give_back()
        to_pairs(reply.arrays)
    messages = [*(reply.message for reply in screened.replies), *screened.failures]
    return strategy.aggregate_train(server_round, messages)


def log_received(screened: Screened) -> None:
    """Log what FedAvg would, in a round in which it is not asked."""
    failures = screened.failures
    log(INFO, "aggregate_train: Received %d results and %d failures", len(screened.replies), len(failures))
    for message in failures:
        node, reason = message.metadata.src_node_id, message.error.reason
        log(INFO, "\t> Received error in reply from node %d: %s", node, reason)


def merge_round_apart(
    strategy: Strategy, replies: Sequence[Reply], ends: Sequence[State], trained: Sequence[str]
) -> tuple[ArrayRecord, MetricRecord | None]:
    """Average the aligned replies and their metrics, outside the strategy that samples them.

    A server optimizer or a fair weighting would step from the model that was sent, which has no relation to the
    replies.
    """
    params = [{name: end[name] for name in trained} for end in ends]
    merged = merge(params, coefficients=shares(replies))
    combine: Callable[[list[RecordDict], str], MetricRecord] = read_attribute(
        strategy, "train_metrics_aggr_fn", aggregate_metricrecords
    )
    weighted_by_key = read_attribute(strategy, "weighted_by_key", None) or "num-examples"
    for reply in replies:
        reply.metrics.setdefault(weighted_by_key, reply.examples)  # where all weigh the same
    metrics = combine([reply.message.content for reply in replies], weighted_by_key)
    return state_to_record(merged), metrics


def complete_model(params: ArrayRecord, buffers: State, sent: ArrayRecord) -> ArrayRecord:
    """Put parameters and buffers together, in the order and with the dtypes of the model that was sent."""
    model = ArrayRecord()
    cast = cast_arrays(from_pairs(params, sent), sent)
    for name, array in sent.items():
        if name in cast:
            model[name] = cast[name]
        else:
            model[name] = tensor_to_array(buffers[name]) if name in buffers else array
    return model


def fault_of(model: ArrayRecord, sent: ArrayRecord) -> str:
    """What is wrong with a round's model, or ``""``.

    Examples
    --------
    >>> from flwr.app import Array
    >>> sent = ArrayRecord({"a": Array(np.ones(2))})
    >>> fault_of(ArrayRecord({"a": Array(np.ones((1, 2)))}), sent), fault_of(sent, sent)
    ("has 'a' as (1, 2), not (2,)", '')
    """
    for name, array in sent.items():
        if tuple(model[name].shape) != tuple(array.shape):
            return f"has {name!r} as {tuple(model[name].shape)}, not {tuple(array.shape)}"
    return "" if is_finite(model, sent) else "holds a NaN or an infinity"


def adopt_model(strategy: Strategy, model: ArrayRecord, trained: Sequence[str], *, anew: bool) -> None:
    """Make a model that the inner strategy did not compute its current one.

    FedAvgM keeps its own and never takes it from ``configure_train``; the others refresh theirs there. ``anew``: its
    units have an order of their own, so that moments of steps before it mean nothing.
    """
    for link in chain(strategy):
        current = getattr(link, "current_arrays", None)
        if isinstance(current, ArrayRecord):
            link.current_arrays = to_pairs(select_arrays(model, list(current)))
        if anew:
            for moments in ("m_t", "v_t"):
                if hasattr(link, moments):
                    setattr(link, moments, None)
            if hasattr(link, "momentum_vector"):  # the older FedAvgM wants one after round 1
                params = to_pairs(select_arrays(model, trained))
                link.momentum_vector = [np.zeros(array.shape, array.dtype) for array in params.values()]
