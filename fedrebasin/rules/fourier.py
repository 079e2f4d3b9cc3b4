"""Rules for Fourier transforms: along the axes that are transformed every entry depends on every other's place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedrebasin import axes
from fedrebasin.axes import leaf
from fedrebasin.rules.registry import Traced, Value, rule

_FREQUENCIES = "positions and frequencies"


def _transformed(traced: Traced, x: Value, dims: Sequence[int]) -> Value:
    result = list(x.axes)
    for dim in dims:
        axes.fix(x.axes[dim], _FREQUENCIES)
        result[dim] = leaf(traced.output_shapes[0][dim], _FREQUENCIES)
    return Value(result)


@rule("fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft")
def along_one(traced: Traced, x: Value, n: Any = None, dim: int = -1, *_: Any, **__: Any) -> Value:
    """Along ``dim``; the other axes are free."""
    del n
    return _transformed(traced, x, [dim])


@rule("fft_fft2", "fft_ifft2", "fft_rfft2", "fft_irfft2", "fft_hfft2", "fft_ihfft2")
def along_two(traced: Traced, x: Value, s: Any = None, dim: Sequence[int] = (-2, -1), *_: Any, **__: Any) -> Value:
    """Along the two axes ``dim``."""
    del s
    return _transformed(traced, x, dim)


@rule("fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn", "fft_hfftn", "fft_ihfftn")
def along_several(
    traced: Traced, x: Value, s: Sequence[int] | None = None, dim: Sequence[int] | None = None, *_: Any, **__: Any
) -> Value:
    """Along the axes ``dim``, by default the last ones, for each length in ``s`` one, or all."""
    count = len(x.axes) if s is None else len(s)
    return _transformed(traced, x, range(len(x.axes) - count, len(x.axes)) if dim is None else dim)


@rule("fft_fftshift", "fft_ifftshift")
def shifted(traced: Traced, x: Value, dim: Sequence[int] | None = None) -> Value:
    """Frequencies in another order."""
    return _transformed(traced, x, range(len(x.axes)) if dim is None else dim)
