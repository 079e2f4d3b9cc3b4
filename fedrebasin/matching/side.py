"""One of the two models of a matching: its tied parameters in the type that products are taken in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from fedrebasin.matching.numbers import as_real
from fedrebasin.stored import StoredState


class _Stored(dict[str, Tensor]):
    """Read and cast at each look-up; what is put in explicitly is held, and comes first."""

    def __init__(self, state: StoredState, names: Sequence[str], like: Tensor) -> None:
        super().__init__()
        self._state, self._names, self._of, self._like = state, names, set(names), like

    def __missing__(self, name: str) -> Tensor:
        if name not in self._of:
            raise KeyError(name)
        return as_real(self._state[name]).to(self._like)

    def __contains__(self, name: object) -> bool:
        return name in self._of

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def side_of(state: Mapping[str, Tensor], names: Sequence[str], like: Tensor) -> dict[str, Tensor]:
    """The tensors ``names`` of a state dict, complex ones as pairs, with the dtype and device of ``like``.

    >>> import torch
    >>> side_of({"w": torch.ones(2, dtype=torch.float16), "n": torch.tensor(3)}, ["w"], torch.empty(0))
    {'w': tensor([1., 1.])}
    """
    if isinstance(state, StoredState):
        return _Stored(state, names, like)
    return {name: as_real(state[name]).to(like) for name in names}
