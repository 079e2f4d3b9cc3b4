"""Whether torch can compute on the device that was asked for: known before anything is trained or written."""

from __future__ import annotations

import torch

from fedrebasin.errors import UsageError
from fedrebasin.simulations.training import select_device


def usable_device(name: str) -> torch.device:
    """The device of that name, as :func:`select_device` finds it, if a number can go there and come back.

    Raises
    ------
    UsageError
        If torch does not know it, does not see it here, or it holds no numbers (``meta``).

    Examples
    --------
    >>> usable_device("cpu")
    device(type='cpu')
    """
    device = select_device(name)
    if device.type == "cuda":  # not touched: that would take memory in a process that trains nothing
        if (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"--device: expected one of {torch.cuda.device_count()} GPUs, from cuda:0; got {name!r}")
        return device
    try:
        torch.zeros(1, device=device).tolist()
    except Exception as error:  # what torch raises differs from device to device, and fills a page
        raise UsageError(f"--device: expected auto, cpu or cuda; torch cannot use {name!r} here") from error
    return device
