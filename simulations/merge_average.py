"""The average of permuted models, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedrebasin.coefficients import wide_type
from fedrebasin.perms import Perms, moved_fraction
from fedrebasin.permute import permute_tensor
from fedrebasin.spec import PermutationSpec
from fedrebasin.stored import described

#: entries that are added at once
_CHUNK = 1 << 20


def averaged(
    spec: PermutationSpec, states: Sequence[Mapping[str, Tensor]], perms: Sequence[Perms], weights: Sequence[float]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of ``merge([permute(spec, own, state), ...], coefficients=weights)``, bit for bit, one at a time.

    >>> from fedrebasin.layout import Free
    >>> spec = PermutationSpec({"w": (Free("a", 2),)})
    >>> states = [{"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([4.0, 3.0])}]
    >>> list(averaged(spec, states, [{"a": torch.tensor([0, 1])}, {"a": torch.tensor([1, 0])}], [0.5, 0.5]))
    [('w', tensor([2., 3.]))]
    """
    moves = [own if moved_fraction(own) > 0 else {} for own in perms]
    heaviest = weights.index(max(weights))
    for name, layouts in spec.axes.items():
        like = described(states[0])[name]
        wide = wide_type(like)
        if wide is None:
            yield name, permute_tensor(layouts, moves[heaviest], states[heaviest][name])
            continue
        total = torch.zeros(like.numel(), dtype=wide)
        for state, own, weight in zip(states, moves, weights, strict=True):
            if weight:
                moved = _permuted(spec, name, own, state[name]).reshape(-1)
                for start in range(0, len(moved), _CHUNK):
                    total[start : start + _CHUNK].add_(moved[start : start + _CHUNK].to(wide), alpha=weight)
                del moved
        yield name, total.to(like.dtype).view(like.shape)


def _permuted(spec: PermutationSpec, name: str, perms: Perms, tensor: Tensor) -> Tensor:
    if not perms:
        return tensor
    if tensor.dtype.itemsize == 1:  # torch indexes no 8-bit floats
        return permute_tensor(spec.axes[name], perms, tensor.view(torch.uint8)).view(tensor.dtype)
    return permute_tensor(spec.axes[name], perms, tensor)
