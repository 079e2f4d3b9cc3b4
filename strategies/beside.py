"""Further ArrayRecords that travel beside the weights and are permuted with them.

Control variates (SCAFFOLD), moments, an EMA of the weights: an array of such a record has the name and shape of the
weight that it belongs to, and its entries mean what they say only in that weight's order. Here too are the
permutations on the wire, with which a client relabels what it keeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from logging import WARNING

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.common.logger import log
from torch import Tensor

from fedrebasin import PermutationSpec, identity_perms
from fedrebasin.errors import SpecMismatchError, UsageError
from fedrebasin.perms import check_perms
from fedrebasin.permute import permute_tensor
from fedrebasin.strategies.buffers import average_states
from fedrebasin.strategies.records import array_to_tensor, record_to_state, state_to_record, tensor_to_array
from fedrebasin.strategies.reply import Reply
from fedrebasin.strategies.trajectory import MOST, Trajectories, put_latest
from fedrebasin.strategies.wire import decode

PERMS = "rebasin-perms"  # the ArrayRecord in which permutations travel
Perms = dict[str, Tensor]


def check_beside(beside: Sequence[str], arrayrecord_key: str, guard: str = "") -> tuple[str, ...]:
    """Refuse names that are taken, and what privacy and selection do not bound.

    Examples
    --------
    >>> check_beside(["control"], "arrays")
    ('control',)
    """
    if isinstance(beside, str) or not all(isinstance(name, str) for name in beside):
        raise UsageError(f"beside: expected names of ArrayRecords, as ('control',); got {beside!r}")
    taken = next((name for name in beside if name in (arrayrecord_key, PERMS)), None)
    if taken is not None:
        raise UsageError(f"beside: {taken!r} is taken; give the names of further ArrayRecords, which you choose")
    if beside and guard:
        raise UsageError(
            f"beside={tuple(beside)!r}: under {guard} their average would go past clipping or selection; leave them "
            "out, or use a strategy without it"
        )
    return tuple(beside)


def check_record(spec: PermutationSpec, record: ArrayRecord) -> None:
    """Raise :class:`SpecMismatchError` unless every array has a weight's name and shape, and finite values."""
    unknown = next((name for name in record if name not in spec.axes), None)
    if unknown is not None:
        raise SpecMismatchError(f"a tensor {unknown!r} that is none of the weights; name its arrays as the weights")
    for name in record:
        tensor = decode(record, {name: name})[name]
        if tuple(tensor.shape) != spec.shapes[name]:
            raise SpecMismatchError(f"{name!r} as {tuple(tensor.shape)}, the weight has {spec.shapes[name]}")
        if tensor.is_complex() or not bool(torch.isfinite(tensor).all()):
            raise SpecMismatchError(f"{name!r} with a NaN, an infinity or complex numbers")


def permute_record(spec: PermutationSpec, perms: Perms, record: ArrayRecord) -> None:
    """Permute a record that fits (``check_record``) in place, array by array, each as the weight of its name.

    Examples
    --------
    >>> from fedrebasin import trace
    >>> spec = trace(torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Linear(2, 1)), (torch.ones(2, 1),))
    >>> record = state_to_record({"0.bias": torch.tensor([1.0, 2.0])})
    >>> permute_record(spec, {"0": torch.tensor([1, 0])}, record)
    >>> record_to_state(record)
    {'0.bias': tensor([2., 1.])}
    """
    for name in record:
        tensor = decode(record, {name: name})[name]
        record[name] = tensor_to_array(permute_tensor(spec.axes[name], perms, tensor))


def perms_from_record(spec: PermutationSpec, content: RecordDict) -> Perms | None:
    """Read the permutations out of a message's content, or a context's state.

    Parameters
    ----------
    spec : PermutationSpec
        Of the whole model.
    content : RecordDict
        ``message.content`` of a strategy with ``send_perms=True``, or ``context.state`` behind a mod with
        ``keep_perms=True``.

    Returns
    -------
    dict or None
        What did not travel, or was fixed, is the identity. ``None`` if there are none: the last upload of this client
        did not take part, or a round apart has made another order since, so that nothing is known of the order of what
        it kept, and its optimizer starts anew.

    Raises
    ------
    SpecMismatchError
        If they are not permutations of this spec.

    Examples
    --------
    >>> spec = PermutationSpec({})
    >>> perms_from_record(spec, RecordDict({"rebasin-perms": ArrayRecord()})), perms_from_record(spec, RecordDict())
    ({}, None)
    """
    record = content.array_records.get(PERMS)
    if record is None:
        return None
    perms = {**identity_perms(spec), **record_to_state(record)}
    check_perms(spec, perms)
    return perms


class Beside:
    """What a strategy keeps from round to round: the averages, and each node's last permutations.

    Parameters
    ----------
    names : collection of str
        The records that are permuted and averaged.
    send_perms : bool
        Whether nodes get the permutations of their last reply; they are held until a node is sampled again, those of
        the latest ``MOST`` nodes. One that comes back later gets none, as after a reply that was left out.
    """

    def __init__(self, names: Collection[str], send_perms: bool) -> None:
        self.names = tuple(names)
        self.send_perms = send_perms
        self.averages: dict[str, ArrayRecord] = {}
        self.trajectories = Trajectories()
        self._own: dict[str, ArrayRecord] = {}  # the averages that were not put there by hand
        self._perms: dict[int, ArrayRecord] = {}
        self._taken: dict[int, dict[str, ArrayRecord]] = {}

    def forget(self) -> None:
        """Begin a new run: what the last one left goes, averages that were put here by hand stay."""
        for name, record in self._own.items():
            if self.averages.get(name) is record:
                del self.averages[name]
        self._own, self._perms, self.trajectories = {}, {}, Trajectories()

    def state_dict(self) -> dict[str, object]:
        """For a checkpoint: the averages, the permutations that nodes have yet to get, and each node's last."""
        perms = {str(node): record for node, record in self._perms.items()}
        return {"averages": self.averages, "perms": perms, "trajectories": self.trajectories.state_dict()}

    def load_state_dict(self, state: dict[str, dict[str, ArrayRecord]]) -> None:
        """Take up what :meth:`state_dict` gave; a node that has another id by now starts anew."""
        averages, perms = (RecordDict(dict(state[kind])) for kind in ("averages", "perms"))  # refuses what is no record
        self.averages = dict(averages.array_records)
        self._own = dict(self.averages)
        self._perms = {int(node): record for node, record in perms.array_records.items()}
        self.trajectories.load_state_dict(state.get("trajectories", {}))  # older checkpoints have none

    def attach(self, messages: Sequence[Message]) -> None:
        """Add the averages, and the node's permutations, to what each node is sent."""
        if not (self.averages or self._perms):
            return
        for message in messages:
            content = RecordDict(dict(message.content))  # the messages may share one
            for name, record in self.averages.items():
                content[name] = record
            perms = self._perms.pop(message.metadata.dst_node_id, None)
            if perms is not None:
                content[PERMS] = perms
            message.content = content

    def take(self, replies: Iterable[Message]) -> list[Message]:
        """Take the records out of the replies: inner strategies refuse more than one ArrayRecord."""
        messages, self._taken = list(replies), {}
        for message in messages:
            if not message.has_error() and message.has_content():
                content = message.content
                found = {name: content.array_records[name] for name in self.names if name in content.array_records}
                for name in found:
                    del content[name]
                self._taken[id(message)] = found
        return messages

    def settle(
        self,
        spec: PermutationSpec,
        perms: Sequence[Perms],
        replies: Sequence[Reply],
        shares: Sequence[float],
        *,
        anew: bool,
    ) -> None:
        """Permute and average what was taken from the replies that took part, and remember their permutations.

        A record that does not fit is left out of its average, with a log line; the reply's weights count all the same.
        ``anew``: the round has an order of its own, and permutations into an older one mean nothing.
        """
        if anew:
            self.averages = {}
            self.forget()
        self.trajectories.remember(perms, replies)
        if self.send_perms:
            for perm, reply in zip(perms, replies, strict=True):
                put_latest(self._perms, reply.node, state_to_record(perm), MOST)
        for name in self.names:
            records = [self._taken.get(id(reply.message), {}).get(name, ArrayRecord()) for reply in replies]
            forms = [_form(spec, record) for record in records]
            counts = Counter(form for form in forms if not isinstance(form, str))
            usual = counts.most_common(1)[0][0] if counts else {}
            states, weights = [], []
            for place, (record, form) in enumerate(zip(records, forms, strict=True)):
                reason = form if isinstance(form, str) else "" if form == usual else "other tensors than most nodes"
                if reason:
                    node = replies[place].node
                    log(WARNING, "rebasin: node %d sent as %r %s; left out of its average", node, name, reason)
                    continue
                permute_record(spec, perms[place], record)
                states.append({key: array_to_tensor(record[key]) for key in record})
                weights.append(shares[place])
            if states:
                average = average_states(states, [weight / sum(weights) for weight in weights])
                self._own[name] = state_to_record({key: average[key] for key in spec.axes if key in average})
                self.averages[name] = self._own[name]
        self._taken = {}


def _form(spec: PermutationSpec, record: ArrayRecord) -> frozenset[tuple[str, torch.dtype]] | str:
    """The names and dtypes of a record, which must be alike to be averaged; or why it cannot be used."""
    if not record:
        return "nothing"
    try:
        check_record(spec, record)
    except SpecMismatchError as error:
        return str(error)
    return frozenset((name, array_to_tensor(record[name]).dtype) for name in record)
