"""Dicts of permutations: draw, invert, compose and check them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedrebasin.errors import SpecMismatchError
from fedrebasin.seeds import generator_of
from fedrebasin.spec import PermutationSpec

Perms = dict[str, Tensor]


def identity_perms(spec: PermutationSpec) -> Perms:
    """The permutations that move nothing.

    Parameters
    ----------
    spec : PermutationSpec

    Returns
    -------
    dict of str to Tensor
        As for :func:`fedrebasin.permute`, on the CPU.

    Examples
    --------
    >>> from fedrebasin import trace
    >>> spec = trace(torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Linear(3, 1)), (torch.randn(2, 1),))
    >>> identity_perms(spec)
    {'0': tensor([0, 1, 2])}
    """
    shapes = spec.perm_shapes
    return {perm: torch.arange(shape[-1], device="cpu").expand(shape).clone() for perm, shape in shapes.items()}


def random_perms(spec: PermutationSpec, seed: int | torch.Generator = 0) -> Perms:
    """Uniformly random permutations, one for each entry of the spec and each row of a family.

    Parameters
    ----------
    spec : PermutationSpec
    seed : int or torch.Generator
        Equal seeds give equal permutations; a generator, on the CPU, is drawn from.

    Returns
    -------
    dict of str to Tensor
        As for :func:`fedrebasin.permute`, on the CPU.

    Examples
    --------
    >>> from fedrebasin import trace
    >>> spec = trace(torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Linear(3, 1)), (torch.randn(2, 1),))
    >>> random_perms(spec, seed=1)["0"].sort().values
    tensor([0, 1, 2])
    """
    generator = seed if isinstance(seed, torch.Generator) else generator_of(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        rows = shape[0] if len(shape) == 2 else 1
        drawn = [torch.randperm(shape[-1], generator=generator, device="cpu") for _ in range(rows)]
        return torch.stack(drawn).view(shape)

    return {perm: draw(shape) for perm, shape in spec.perm_shapes.items()}


def invert(spec: PermutationSpec, perms: Mapping[str, Tensor]) -> Perms:
    """The permutations that undo ``perms``.

    Parameters
    ----------
    spec : PermutationSpec
    perms : dict of str to Tensor
        As for :func:`fedrebasin.permute`.

    Returns
    -------
    dict of str to Tensor
        As for :func:`fedrebasin.permute`, on the CPU.

    Raises
    ------
    SpecMismatchError
        If ``perms`` are not permutations of this spec.

    Examples
    --------
    >>> from fedrebasin import trace
    >>> spec = trace(torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Linear(3, 1)), (torch.randn(2, 1),))
    >>> invert(spec, {"0": torch.tensor([2, 0, 1])})
    {'0': tensor([1, 2, 0])}
    """
    perms = checked_perms(spec, perms)
    result = {perm: perms[perm].argsort() for perm in spec.perm_shapes if perm not in spec.over}
    for perm, outer in spec.over.items():
        rows = perms[perm] if outer not in result else perms[perm][result[outer]]
        result[perm] = rows.argsort(dim=1)
    return {perm: result[perm] for perm in spec.perm_shapes}


def compose(spec: PermutationSpec, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> Perms:
    """The permutations that act like ``first`` and then ``second``.

    Parameters
    ----------
    spec : PermutationSpec
    first, second : dict of str to Tensor
        As for :func:`fedrebasin.permute`.

    Returns
    -------
    dict of str to Tensor
        As for :func:`fedrebasin.permute`, on the CPU.

    Raises
    ------
    SpecMismatchError
        If one of the two is not permutations of this spec.

    Examples
    --------
    >>> from fedrebasin import trace
    >>> spec = trace(torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Linear(3, 1)), (torch.randn(2, 1),))
    >>> compose(spec, {"0": torch.tensor([2, 0, 1])}, {"0": torch.tensor([1, 0, 2])})
    {'0': tensor([0, 2, 1])}
    """
    first, second = checked_perms(spec, first), checked_perms(spec, second)
    result = {}
    for perm in spec.perm_shapes:
        if perm not in spec.over:
            result[perm] = first[perm][second[perm]]
        else:
            outer = second.get(spec.over[perm])
            rows = first[perm] if outer is None else first[perm][outer]
            result[perm] = rows.gather(1, second[perm])
    return result


def moved_fraction(perms: Mapping[str, Tensor]) -> float:
    """Share of units that change place.

    Parameters
    ----------
    perms : dict of str to Tensor
        As for :func:`fedrebasin.permute`; they are not checked.

    Returns
    -------
    float
        In [0, 1]; 0 where there are no permutations.

    Examples
    --------
    >>> moved_fraction({"a": torch.tensor([1, 0, 2, 3])})
    0.5
    """
    moved = sum(int((perm.cpu() != torch.arange(perm.shape[-1], device="cpu")).sum()) for perm in perms.values())
    return moved / max(1, sum(perm.numel() for perm in perms.values()))


def checked_perms(spec: PermutationSpec, perms: Mapping[str, Tensor]) -> Perms:
    """``perms`` in the spec's order and on the CPU, checked as by :func:`check_perms`."""
    check_perms(spec, perms)
    return {perm: perms[perm].cpu() for perm in spec.perm_shapes}


def check_perms(spec: PermutationSpec, perms: Mapping[str, Tensor]) -> None:
    """Raise :class:`SpecMismatchError` unless ``perms`` are permutations of this spec."""
    if set(perms) != set(spec.perm_shapes):
        odd = sorted(set(perms) ^ set(spec.perm_shapes))
        raise SpecMismatchError(
            f"perms: expected exactly the spec's {len(spec.perm_shapes)} perms; {odd[0]!r} is in one only"
        )
    for name, shape in spec.perm_shapes.items():
        perm = perms[name]
        if not isinstance(perm, Tensor) or perm.dtype != torch.int64 or tuple(perm.shape) != shape:
            got = f"{perm.dtype} of shape {tuple(perm.shape)}" if isinstance(perm, Tensor) else type(perm).__name__
            raise SpecMismatchError(f"perms: expected {name!r} as int64 of shape {shape}; got {got}")
        if not bool((perm.sort(dim=-1).values.cpu() == torch.arange(shape[-1], device="cpu")).all()):
            raise SpecMismatchError(
                f"perms: {name!r} is not a permutation: each of 0..{shape[-1] - 1} must be there once"
            )
