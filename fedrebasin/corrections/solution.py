"""The solution of a layer's normal equations, and the ridge that it takes."""

from __future__ import annotations

import logging

from torch import nn

from fedrebasin.corrections.layers import Layer
from fedrebasin.corrections.linear_maps import LinearMap, read_map, write_map
from fedrebasin.corrections.normal_equations import NormalEquations
from fedrebasin.errors import CalibrationError, RebasinError

LOGGER = logging.getLogger("fedrebasin")

#: Ridges, as shares of the mean variance of a layer's inputs, of which the held-out examples choose one.
RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def solve_layer(
    model: nn.Module, layer: Layer, fit: NormalEquations, check: NormalEquations, ridge: float | None = None
) -> None:
    """Add the solution of all sums to a layer; the ridge is given, or chosen by ``check`` after a fit on ``fit``."""
    start, total = read_map(model, layer), fit + check if check.count else fit
    check_finite(layer, total)
    shifts = layer.bias is not None or layer.norm is not None
    chosen = choose_ridge(fit, check, intercept=shifts) if ridge is None else ridge
    D, d = total.solve(chosen, intercept=shifts)
    LOGGER.debug("least squares: %r, ridge %g", layer.weight, chosen)
    write_map(model, layer, LinearMap(start.matrix + D, start.shift + d), total.mean, total.covariance)


def check_ridge(ridge: float | None) -> None:
    """Raise :class:`RebasinError` unless a ridge is a number from 0, or None."""
    if ridge is not None and not 0 <= ridge < float("inf"):
        raise RebasinError(f"ridge: expected None or a number from 0; got {ridge}")


def check_finite(layer: Layer, sums: NormalEquations) -> None:
    """Raise :class:`CalibrationError` where a NaN or an infinity has come into a layer's sums."""
    if not bool(sums.gram.isfinite().all() and sums.cross.isfinite().all()):
        raise CalibrationError(
            f"calibration: the activations at {layer.weight!r} hold a NaN or an infinity; check the models and the "
            "inputs"
        )


def choose_ridge(fit: NormalEquations, check: NormalEquations, *, intercept: bool) -> float:
    """The ridge whose solution on one part has the smallest error on the other."""
    if not check.count or not fit.count:
        return RIDGES[-2]
    return min(RIDGES, key=lambda ridge: check.excess(*fit.solve(ridge, intercept=intercept)))
