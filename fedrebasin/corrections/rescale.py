"""rescale: REPAIR's standard deviations alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.corrections.affine import Affine, correct_sites


@torch.inference_mode(False)
def rescale(
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
    """Set each pre-activation's standard deviation to the average of the ends'; its mean stays.

    Parameters, result, errors and warnings as for :func:`fedrebasin.repair`.

    References
    ----------
    Qu, Horvath (2024), arXiv 2402.05966: often better than REPAIR in networks without norms.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> loud = {name: 3 * tensor for name, tensor in net.state_dict().items()}
    >>> rescaled = rescale(net, net.state_dict(), [loud], [torch.randn(200, 4)])
    >>> bool(torch.allclose(rescaled["0.weight"], loud["0.weight"]))
    True
    """
    affine = Affine(shift=False, max_gain=max_gain)
    return correct_sites(
        *(net, merged, ends, calibration),
        affine=affine,
        sequential=sequential,
        memory=memory,
        coefficients=coefficients,
        device=device,
    )
