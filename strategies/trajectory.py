"""One permutation for a trajectory: what put a node's last reply into the global order is tried on its next one.

It helps where nodes keep an order of their own over the rounds (they ignore the model that is sent, or their personal
layers hold it fast). A node that trains the model that it was sent is in the global order, and has nothing to remember.

References
----------
Sharma et al. (2024), "Simultaneous linear connectivity of neural networks modulo permutation", arXiv 2404.06498.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from fedrebasin import Matching, PermutationSpec, moved_fraction, weight_matching
from fedrebasin.errors import SpecMismatchError
from fedrebasin.matching.result import inner_product
from fedrebasin.perms import check_perms
from fedrebasin.permute import permute_tensor
from fedrebasin.strategies.records import record_to_state, state_to_record
from fedrebasin.strategies.reply import Reply

Perms = dict[str, Tensor]
State = Mapping[str, Tensor]
#: Nodes whose permutations are kept, those of the latest rounds.
MOST = 1000
Node = TypeVar("Node")
Held = TypeVar("Held")


def put_latest(held: dict[Node, Held], node: Node, value: Held, most: int) -> None:
    """Put what belongs to a node last, and drop what is older than that of the latest ``most`` nodes.

    >>> held = {1: "a", 2: "b"}
    >>> put_latest(held, 1, "c", most=2)
    >>> put_latest(held, 3, "d", most=2)
    >>> held
    {1: 'c', 3: 'd'}
    """
    held.pop(node, None)
    held[node] = value
    for older in list(held)[:-most]:
        del held[older]


class Trajectories:
    """The permutations of each node's last reply that moved.

    A node is known by its ``partition-id`` where it sends one, as its id changes when it is started again.
    """

    def __init__(self) -> None:
        self._perms: dict[str, ArrayRecord] = {}

    def state_dict(self) -> dict[str, ArrayRecord]:
        """For a checkpoint."""
        return dict(self._perms)

    def load_state_dict(self, state: Mapping[str, ArrayRecord]) -> None:
        """Take up what :meth:`state_dict` gave."""
        self._perms = dict(RecordDict(dict(state)).array_records)  # refuses what is no record

    def last(self, spec: PermutationSpec, replies: Sequence[Reply]) -> list[Perms | None]:
        """For each reply the permutations of its node's last one; None where it did not move or is not known."""
        return [self._read(spec, _key(reply)) for reply in replies]

    def _read(self, spec: PermutationSpec, key: str) -> Perms | None:
        if key not in self._perms:
            return None
        perms = record_to_state(self._perms[key])
        try:
            check_perms(spec, perms)
        except SpecMismatchError:  # a checkpoint of another part of the model
            return None
        return perms

    def remember(self, perms: Sequence[Perms], replies: Sequence[Reply]) -> None:
        """Keep the permutations of the replies that moved, and drop what is older than the latest ``MOST``."""
        for perm, reply in zip(perms, replies, strict=True):
            self._perms.pop(_key(reply), None)
            if moved_fraction(perm) > 0:
                put_latest(self._perms, _key(reply), state_to_record(perm), MOST)


def _key(reply: Reply) -> str:
    partition = reply.metrics.get("partition-id")
    return f"node {reply.node}" if partition is None else f"partition {partition}"


class Permuted(Mapping[str, Tensor]):
    """A state dict in another order for reading: a tensor is permuted when it is asked for, and not kept.

    Examples
    --------
    >>> from fedrebasin.layout import Free
    >>> spec = PermutationSpec({"w": (Free("a", 2),)})
    >>> Permuted(spec, {"a": torch.tensor([1, 0])}, {"w": torch.tensor([3.0, 4.0])})["w"]
    tensor([4., 3.])
    """

    def __init__(self, spec: PermutationSpec, perms: Mapping[str, Tensor], state: State) -> None:
        self._spec, self._perms, self._state = spec, perms, state

    def __getitem__(self, name: str) -> Tensor:
        return permute_tensor(self._spec.axes[name], self._perms, self._state[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def same_order(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Whether two sets of permutations of one spec are equal."""
    return all(torch.equal(order, second[name]) for name, order in first.items())


def gain_of(spec: PermutationSpec, reference: State, model: State, perms: Perms) -> float:
    """How much permutations raise the inner product with the reference."""
    return inner_product(spec, reference, Permuted(spec, perms, model)) - inner_product(spec, reference, model)


def better_start(
    spec: PermutationSpec,
    reference: State,
    model: State,
    found: Matching,
    last: Perms,
    *,
    seed: int,
    device: torch.device | str | None,
) -> Matching:
    """What was found, unless the last permutations are better: then what weight matching makes of those."""
    if same_order(found.perms, last):
        return found
    if inner_product(spec, reference, Permuted(spec, last, model)) <= found.objective:
        return found
    return weight_matching(spec, reference, model, seed=seed, init=last, device=device)
