"""The permutation spec of a sequential network, read off the shapes of its weights alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fedrebasin.errors import SpecMismatchError
from fedrebasin.layout import Fixed, Free, Layout, Product
from fedrebasin.spec import PermutationSpec

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
#: As torch names the tensors of recurrent layers, whose states feed themselves.
_RECURRENT = re.compile(r"(weight|bias)_(ih|hh)(_l\d+)?(_reverse)?")
_REMEDY = "give a spec of fedrebasin.trace(model, inputs), which covers any network"


def chain_spec(weights: Mapping[str, Any]) -> PermutationSpec:
    """Tie the units of layers that feed one another, in the order of the keys.

    A tensor of two axes is a linear layer ``(out, in)``, one of three to five a convolution ``(out, in, ...)``; a
    vector (bias, norm, running statistics) belongs to the layer before it, or to the layer of its own module,
    ``conv1.weight`` and ``conv1.bias``. A linear layer after a convolution may read its channels flattened, each
    channel's pixels together. Shapes do not tell everything: residual connections between equal widths, norms that
    are not applied in the order of the keys, transposed convolutions of equal widths look like a chain, and must
    not be given.

    Parameters
    ----------
    weights : dict of str to array
        NumPy arrays or tensors in the order in which the network applies them.

    Returns
    -------
    PermutationSpec
        A permutation for each layer but the last, named after the layer. It is not proved: no network is there to run.

    Raises
    ------
    SpecMismatchError
        If the shapes are not those of a chain, or the names are those of a recurrent layer.

    Examples
    --------
    >>> import numpy as np
    >>> weights = {"conv.weight": np.zeros((4, 3, 3, 3)), "conv.bias": np.zeros(4), "fc.weight": np.zeros((2, 36))}
    >>> spec = chain_spec(weights)
    >>> spec.perm_shapes, spec.axes["fc.weight"][1]
    ({'conv': (4,)}, Product(factors=(Free(perm='conv', size=4, over=''), Fixed(size=9, reason='flattened', name=''))))
    """
    recurrent = next((name for name in weights if _RECURRENT.fullmatch(name.rpartition(".")[2])), None)
    if recurrent is not None:
        raise SpecMismatchError(
            f"weights: expected no recurrent layer, which is no chain; got {recurrent!r}; {_REMEDY}"
        )
    _check_numbers(list(weights))
    shapes = {name: tuple(int(size) for size in weights[name].shape) for name in _in_order(weights)}
    last = next((name for name in reversed(shapes) if len(shapes[name]) > 1), None)
    if last is None:
        raise SpecMismatchError("weights: expected a linear or convolutional layer; got vectors alone")
    axes: dict[str, tuple[Layout, ...]] = {}
    units: Layout | None = None
    flattens = False
    for name, shape in shapes.items():
        if len(shape) == 0 or shape == (1,):
            axes[name] = tuple(Fixed(size, "a single number") for size in shape)
        elif len(shape) == 1:
            axes[name] = (_vector(name, shape[0], units, flattens=flattens),)
        elif len(shape) > 5:
            raise SpecMismatchError(f"weights: expected up to five axes; got {name!r} of shape {shape}; {_REMEDY}")
        else:
            inner = _inner(name, shape, units, flattens=flattens)
            owner = name.rpartition(".")[0] or name
            units = Fixed(shape[0], "output") if name == last else Free(_new(owner, name, axes), shape[0])
            flattens = len(shape) > 2
            axes[name] = (units, inner, *(Fixed(size, "kernel") for size in shape[2:]))
    buffers = tuple(name for name in weights if name.rpartition(".")[2] in _STATISTICS)
    return PermutationSpec({name: axes[name] for name in weights}, buffers)


def _in_order(weights: Mapping[str, Any]) -> list[str]:
    """Modules in the order of their first keys, in each the weight before its vectors: files may sort otherwise."""
    modules: dict[str, list[str]] = {}
    for name in weights:
        modules.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return [name for names in modules.values() for name in sorted(names, key=lambda name: len(weights[name].shape) < 2)]


def _check_numbers(names: list[str]) -> None:
    """Refuse conv10 before conv2: an alphabetical order is no order of layers."""
    seen: dict[str, tuple[str, list[int]]] = {}
    for name in names:
        numbers = [int(number) for number in re.findall(r"\d+", name)]
        kind = re.sub(r"\d+", "#", name)
        before, highest = seen.get(kind, ("", numbers))
        if numbers < highest:
            raise SpecMismatchError(
                f"weights: expected the layers in the order in which the network applies them; got {before!r} before "
                f"{name!r}"
            )
        seen[kind] = name, numbers


def _new(owner: str, name: str, axes: Mapping[str, tuple[Layout, ...]]) -> str:
    """The layer's module as the permutation's name, or the tensor's own where the module has several layers."""
    taken = {layouts[0].perm for layouts in axes.values() if layouts and isinstance(layouts[0], Free)}
    return name if owner in taken else owner


def _vector(name: str, size: int, units: Layout | None, *, flattens: bool) -> Layout:
    if units is not None and size == units.size:
        return units
    if units is not None and flattens and size % units.size == 0:
        return Product((units, Fixed(size // units.size, "flattened")))
    what = "no layer before it" if units is None else f"a layer of {units.size} units before it"
    raise SpecMismatchError(f"weights: expected a vector of a layer's size; got {name!r} of {size}, {what}; {_REMEDY}")


def _inner(name: str, shape: tuple[int, ...], units: Layout | None, *, flattens: bool) -> Layout:
    if units is None:
        return Fixed(shape[1], "input")
    if len(shape) > 2 and not flattens:
        raise SpecMismatchError(f"weights: expected no convolution after a linear layer; got {name!r}; {_REMEDY}")
    if shape[1] == units.size:
        return units
    if len(shape) == 2 and flattens and shape[1] % units.size == 0:
        return Product((units, Fixed(shape[1] // units.size, "flattened")))
    raise SpecMismatchError(
        f"weights: expected {name!r} to read the {units.size} units of the layer before; got shape {shape}, "
        f"which reads {shape[1]} (no chain: grouped, residual, or not in order); {_REMEDY}"
    )
