"""Nodes that train narrower networks of the model's kind: their replies are made to fit, and what they get back is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from logging import WARNING
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.common.logger import log
from torch import Tensor, nn

from fedrebasin import PermutationSpec, RebasinError, check_widths, match_widths, resize
from fedrebasin.errors import UsageError
from fedrebasin.strategies.arrays import measure_arrays
from fedrebasin.strategies.messages import node_of_reply
from fedrebasin.strategies.network import Model
from fedrebasin.strategies.records import DECODE_ERRORS, record_to_state, state_to_record
from fedrebasin.strategies.trajectory import MOST, put_latest
from fedrebasin.strategies.wire import find_arrays, name_of_arrays
from fedrebasin.widths.merge import counts_of

State = dict[str, Tensor]
#: In a checkpoint, beside the nodes' ids: replies of the model's own width have come.
_OWN_WIDTH = "own width"


class Widths:
    """The node models' specs, and what each narrower node trained last, for the latest ``MOST`` nodes.

    A node's width is told by the shapes of its reply, and a node by its id, since it has to be known before it
    replies: with a new id it begins anew. So in its first round it gets the wide model, which it cannot load: it
    starts from its own initialisation. From then on it gets the global model in its own width: all of its units
    take part, by the transport plan between them and those of its last reply. Until some node has trained the wide
    model, the units that the narrower ones lack are random, and take part only where that is nearer to the last
    reply. A narrower reply goes up by assignment, each unit to one of the wide network's; entries that it lacks are
    those of the round's reference, which so says alone what they are: the reply of the model's own width with most
    examples, or else the model that was sent.

    Parameters
    ----------
    model : nn.Module or None
    node_models : sequence of nn.Module or functions of no arguments
        The narrower networks; no layer is wider than the model's.
    example_inputs : tuple
    seed : int
    unfit : dict of str to object
        Options that do not go with it, refused where they are set.
    weighted_by_key : str
        The inner strategy's: the metric that says how many examples are behind a reply.

    Raises
    ------
    RebasinError
        If there is no model, if one of them does not keep its function among dead units, or with an unfit option.
    """

    def __init__(
        self,
        model: nn.Module | None,
        node_models: Sequence[Model],
        example_inputs: Any,
        *,
        seed: int,
        unfit: Mapping[str, object],
        weighted_by_key: str = "num-examples",
    ) -> None:
        self.weighted_by_key = weighted_by_key
        self.specs: list[PermutationSpec] = []
        self._last: dict[int, tuple[PermutationSpec, State]] = {}
        self._trained = False
        if not node_models:
            return
        option = next((name for name, value in unfit.items() if value), None)
        if option is not None:
            raise UsageError(f"node_models: not built yet together with {option}; leave one of them out")
        if model is None:
            raise UsageError("node_models: give model= and example_inputs= too, from which the widths are proved")
        for one in node_models:
            net = one if isinstance(one, nn.Module) else one()
            self.spec, spec = check_widths(model, net, example_inputs, seed=seed)
            self.specs.append(spec)

    def forget(self) -> None:
        """Begin a new run, whose nodes may be others."""
        self._last.clear()
        self._trained = False

    def state_dict(self) -> dict[str, ArrayRecord]:
        """For a checkpoint: what each narrower node trained last."""
        kept = {str(node): state_to_record(state) for node, (_, state) in self._last.items()}
        return {**kept, _OWN_WIDTH: ArrayRecord()} if self._trained else kept

    def load_state_dict(self, state: Mapping[str, ArrayRecord]) -> None:
        """Take up what :meth:`state_dict` gave; what is of no node model's width any more is dropped."""
        self._trained = _OWN_WIDTH in state
        for node, record in state.items():
            spec = self._spec_of(_shapes(record))
            if spec is not None:
                self._last[int(node)] = spec, record_to_state(record)

    def attach(self, messages: Sequence[Message], key: str) -> None:
        """Give the nodes that trained a narrower network the model in their own width."""
        for message in messages:
            found = self._last.get(message.metadata.dst_node_id)
            record = message.content.get(key)
            if found is not None and isinstance(record, ArrayRecord):
                spec, last = found
                content = RecordDict(dict(message.content))  # the messages may share one
                content[key] = state_to_record(self._narrowed(spec, record_to_state(record), last))
                message.content = content

    def take(self, replies: Sequence[Message], key: str, sent: ArrayRecord, nodes: Mapping[str, int]) -> None:
        """Make the narrower replies fit, in place; one that cannot be is left to the screen, which names it."""
        if not self.specs:
            return
        reference: State | None = None
        for message in replies:
            node = node_of_reply(message, nodes)
            shapes = _shapes(_record_of(message, key))
            spec = self._spec_of(shapes)
            if spec is None:
                if shapes == self.spec.shapes:  # it trains the wide network now
                    self._last.pop(node, None)
                    self._trained = True
                continue
            if reference is None:
                reference = self._reference(replies, key, sent)
            try:
                state = record_to_state(_record_of(message, key))
                matching = match_widths(self.spec, spec, reference, state)
            except (RebasinError, *DECODE_ERRORS) as error:
                log(WARNING, "rebasin: a narrower reply cannot be made to fit: %s", error)
                continue
            fitted = resize(matching, state)
            for name, tensor in fitted.items():
                if tensor.is_floating_point():
                    fitted[name] = torch.where(counts_of(matching, name) > 0, tensor, reference[name].to(tensor))
            message.content[name_of_arrays(message.content, key) or key] = state_to_record(fitted)
            put_latest(self._last, node, (spec, state), MOST)

    def _narrowed(self, spec: PermutationSpec, model: State, last: State) -> State:
        matchings = [] if self._trained else [match_widths(self.spec, spec, model, last)]
        try:
            matchings.append(match_widths(self.spec, spec, model, last, unmatched="transport"))
        except RebasinError:  # widths without a common multiple, or an op that nobody knows
            matchings = matchings or [match_widths(self.spec, spec, model, last)]
        found = [resize(matching.inverse(), model) for matching in matchings]

        def distance(one: State) -> float:
            return sum(float((one[name] - last[name]).double().square().sum()) for name in spec.parameters)

        return min(found, key=distance)

    def _spec_of(self, shapes: dict[str, tuple[int, ...]]) -> PermutationSpec | None:
        return next((spec for spec in self.specs if spec.shapes == shapes != self.spec.shapes), None)

    def _reference(self, replies: Iterable[Message], key: str, sent: ArrayRecord) -> State:
        """The reply of the model's width with most examples that is sound, or the model that was sent."""
        whole = [message for message in replies if _shapes(_record_of(message, key)) == self.spec.shapes]
        for message in sorted(whole, key=self._examples, reverse=True):
            record = _record_of(message, key)
            if not isinstance(measure_arrays(record, sent), str):
                return record_to_state(record)
        return record_to_state(sent)

    def _examples(self, message: Message) -> float:
        counts = [record.get(self.weighted_by_key) for record in message.content.metric_records.values()]
        return max((float(count) for count in counts if isinstance(count, int | float)), default=0.0)


def _record_of(message: Message, key: str) -> ArrayRecord:
    """A reply's model; empty if it has none."""
    record = find_arrays(message.content, key) if message.has_content() else None
    return ArrayRecord() if record is None else record


def _shapes(record: ArrayRecord) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in record.items()}
