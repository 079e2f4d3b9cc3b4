"""What makes a gradient step fast: half precision and fused updates on a GPU, compilation where it is asked for."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

#: what matrix products are computed in; auto is bfloat16 on a GPU, and float32 on the CPU, bit for bit
PRECISIONS = ("auto", "float32", "bfloat16")


def mixed_precision(device: torch.device, precision: str = "auto") -> AbstractContextManager[Any]:
    """bfloat16 for matrix products, where ``precision``, one of ``PRECISIONS``, says so; weights stay float32."""
    half = precision == "bfloat16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=half)


def fused(device: torch.device, precision: str = "auto") -> bool | None:
    """The optimizer's keyword for one kernel over all parameters; None leaves it to torch, as ever in float32.

    >>> fused(torch.device("cpu")), fused(torch.device("cuda"))
    (None, True)
    """
    return True if device.type == "cuda" or precision == "bfloat16" else None


def compiled(model: nn.Module, *, wanted: bool) -> nn.Module:
    """``model`` or its compiled form, which shares its weights."""
    # torch.compile is typed as giving a callable; of a module it gives a module
    return torch.compile(model) if wanted else model  # type: ignore[return-value]


def choose_kernels(device: torch.device) -> None:
    """Let cuDNN time its convolutions once: every batch has the same shape."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True


def clock(device: torch.device) -> float:
    """Seconds, after everything that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
