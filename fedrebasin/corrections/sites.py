"""Where a network's activations can be corrected: modules whose output takes an affine map per channel."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from fedrebasin.batches import Batches, tensors

LOGGER = logging.getLogger("fedrebasin")


@dataclass(frozen=True)
class Site:
    """A module whose output is corrected along ``dim``; ``weight_dim`` is the weight's axis of output channels."""

    name: str
    dim: int
    weight_dim: int = 0


def find_sites(model: nn.Module, batches: Batches) -> list[Site]:
    """Run one batch and list the sites in the order in which they run.

    A site is a norm with weight and bias, a BatchNorm, or a linear or convolution layer with a bias whose output
    is neither the model's nor goes straight into a norm. A module that runs more than once, or whose weight is
    tied to another's, is left out.
    """
    calls: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def record(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                calls.append((name, module, args[0], output))  # kept alive, so that memory addresses stay apart

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in model.named_modules() if _may_be(module)]
    try:
        with torch.no_grad():
            args, kwargs, _ = next(iter(batches))
            outputs = {tensor.data_ptr() for tensor in tensors(model(*args, **kwargs))}
    finally:
        for handle in handles:
            handle.remove()
    normed = {into.data_ptr() for _, module, into, _ in calls if not isinstance(module, nn.Linear | _ConvNd)}
    runs = Counter(name for name, *_ in calls)
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    sites = []
    for name, module, _, output in calls:
        plain = isinstance(module, nn.Linear | _ConvNd)
        if plain and (module.bias is None or output.data_ptr() in normed or output.data_ptr() in outputs):
            continue
        dim = _channel_dim(module, output)
        tied = any(uses[id(p)] > 1 for p in module.parameters(recurse=False))
        grouped = isinstance(module, _ConvTransposeNd) and module.groups > 1
        if runs[name] > 1 or tied or grouped or dim is None:
            LOGGER.info("correction: %r takes no affine map of its own (it runs twice, is tied or grouped)", name)
            continue
        sites.append(Site(name, dim, 1 if isinstance(module, _ConvTransposeNd) else 0))
    return sites


def _may_be(module: nn.Module) -> bool:
    own = module._parameters
    weight, bias = own.get("weight"), own.get("bias")
    if isinstance(module, _BatchNorm):
        return True
    if isinstance(module, nn.Linear | _ConvNd):
        return weight is not None
    return set(own) == {"weight", "bias"} and weight is not None and bias is not None and weight.ndim == bias.ndim == 1


def _channel_dim(module: nn.Module, output: Tensor) -> int | None:
    if isinstance(module, nn.Linear | nn.LayerNorm):
        return output.ndim - 1
    if isinstance(module, _ConvNd):
        return output.ndim - len(module.kernel_size) - 1
    if isinstance(module, _BatchNorm):
        return 1
    channels = module.weight.shape[0] if isinstance(module.weight, Tensor) else 0
    return next((dim for dim in (1, output.ndim - 1) if dim < output.ndim and output.shape[dim] == channels), None)
