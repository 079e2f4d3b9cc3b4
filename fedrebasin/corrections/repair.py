"""repair: give a merged network the activation statistics of the networks that it was merged from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.corrections.affine import Affine, correct_sites


@torch.inference_mode(False)
def repair(
    net: nn.Module,
    merged: Mapping[str, Tensor],
    ends: Sequence[Mapping[str, Tensor]],
    calibration: Iterable[Any],
    *,
    coefficients: Sequence[float] | None = None,
    max_gain: float = 10.0,
    sequential: bool = True,
    memory: int = 2**30,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Set each pre-activation's mean and standard deviation to the average of the ends' (REPAIR).

    ``goal_mean = sum_k c_k mean_k`` and ``goal_std = sum_k c_k std_k``, per channel: standard deviations are
    averaged, not variances. Layer after layer in forward order, the merged layer's output is measured and an affine
    map, ``goal_std / std * (x - mean) + goal_mean``, is fused into the layer's weight and bias, so that the keys
    of the state dict stay. A BatchNorm gets the statistics of its input first.

    Corrected are the outputs of norms with weight and bias, and of linear and convolution layers with a bias, modules
    or functions alike, that are neither the model's outputs nor go straight into a norm alone. The log (INFO) names
    what takes no affine map of its own, with the reason.

    Parameters
    ----------
    net : nn.Module
        Of the architecture; its own weights are not used.
    merged : dict of str to Tensor
        The average of ``ends``; it is not changed.
    ends : sequence of dict of str to Tensor
        The aligned state dicts.
    calibration : iterable of batches
        Inputs, no labels; read once for each end, and once for each corrected layer or once in all; with ``memory``
        for them, not again for a layer.
    coefficients : sequence of float, optional
        The merge's; equal by default.
    max_gain : float
        Gains are kept in ``[1 / max_gain, max_gain]``. Dead channels are left alone.
    sequential : bool
        Measure each layer behind the corrected ones, so that every goal is met. ``False`` measures
        all at once, in one pass that normalises by batch statistics: cheaper, and exact in the first layer only.
    memory : int
        Bytes that may be kept between passes, besides a network and a batch: calibration inputs, and outputs of the
        layers that later ones read. With enough of it a layer costs its own computation, without it a pass up to it.
    device : str, optional
        Where the network runs; by default where ``merged`` is.

    Returns
    -------
    dict of str to Tensor
        Keys, order, dtypes and devices of ``merged``.

    Raises
    ------
    CalibrationError
        If the data is empty, can be read only once, or activations are not finite.
    RebasinError
        If coefficients do not fit, ``max_gain`` is below 1, ``memory`` is negative, or no layer can be corrected.

    Warns
    -----
    UserWarning
        If there are fewer than 100 observations per channel.

    References
    ----------
    Jordan, Sedghi, Saukh, Entezari, Neyshabur (2023), "REPAIR", arXiv 2211.08403.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> ends = [net.state_dict(), net.state_dict()]
    >>> list(repair(net, net.state_dict(), ends, [torch.randn(200, 4)]))
    ['0.weight', '0.bias', '2.weight', '2.bias']
    """
    affine = Affine(max_gain=max_gain)
    return correct_sites(
        *(net, merged, ends, calibration),
        affine=affine,
        sequential=sequential,
        memory=memory,
        coefficients=coefficients,
        device=device,
    )
