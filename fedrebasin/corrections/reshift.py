"""reshift: REPAIR's means alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.corrections.affine import Affine, correct_sites


@torch.inference_mode(False)
def reshift(
    net: nn.Module,
    merged: Mapping[str, Tensor],
    ends: Sequence[Mapping[str, Tensor]],
    calibration: Iterable[Any],
    *,
    coefficients: Sequence[float] | None = None,
    sequential: bool = True,
    memory: int = 2**30,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Set each pre-activation's mean to the average of the ends'; its standard deviation stays.

    Parameters, result, errors and warnings as for :func:`fedrebasin.repair`.

    References
    ----------
    Qu, Horvath (2024), arXiv 2402.05966.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> higher = {**net.state_dict(), "0.bias": net.state_dict()["0.bias"] + 1}
    >>> shifted = reshift(net, net.state_dict(), [higher], [torch.randn(200, 4)])
    >>> bool(torch.allclose(shifted["0.bias"], higher["0.bias"], atol=1e-5))
    True
    """
    affine = Affine(scale=False)
    return correct_sites(
        *(net, merged, ends, calibration),
        affine=affine,
        sequential=sequential,
        memory=memory,
        coefficients=coefficients,
        device=device,
    )
