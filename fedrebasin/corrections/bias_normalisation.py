"""bias_normalisation: scale biases as averaging has scaled what reaches them. It needs no data."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fedrebasin.batches import copied, split_inputs
from fedrebasin.coefficients import check_coefficients, wide_type
from fedrebasin.corrections.watch import watch
from fedrebasin.corrections.working import extract, load, working_copy
from fedrebasin.errors import RebasinError

LOGGER = logging.getLogger("fedrebasin")

_NORMS = {F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm, F.local_response_norm, F.rms_norm, F.normalize}


@torch.inference_mode(False)
def bias_normalisation(
    net: nn.Module,
    merged: Mapping[str, Tensor],
    ends: Sequence[Mapping[str, Tensor]],
    example_inputs: Any,
    *,
    coefficients: Sequence[float] | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Give the layer at depth ``h`` the bias ``sum_k c_k^h b_k`` instead of ``sum_k c_k b_k``.

    Where units of the ends do not agree, averaged weights carry end k's share of an activation scaled by ``c_k`` in
    each layer; averaged biases would be scaled once alone and drown it. Outputs shrink with depth: the largest
    output may be right where the loss is not. For networks without norms. The log (INFO) names the vectors that
    stay averaged.

    Parameters
    ----------
    net, merged, ends, coefficients, device
        As for :func:`fedrebasin.repair`.
    example_inputs : Tensor, tuple or dict
        A batch, whose values do not matter: the depths are seen in one pass. A layer is one deeper than the deepest
        before it; recurrent ones are none.

    Returns
    -------
    dict of str to Tensor
        ``merged`` with other biases.

    Raises
    ------
    RebasinError
        If coefficients or ends do not fit, or if the network has a norm, which undoes any scale.

    References
    ----------
    Qu, Horvath (2024), arXiv 2402.05966; there for two models.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 1))
    >>> ones = {name: torch.ones_like(tensor) for name, tensor in net.state_dict().items()}
    >>> found = bias_normalisation(net, ones, [ones, ones], torch.zeros(1, 1))
    >>> found["0.bias"], found["2.bias"]
    (tensor([1.]), tensor([0.5000]))
    """
    weights = check_coefficients(coefficients, len(ends))
    used = [(end, weight) for end, weight in zip(ends, weights, strict=True) if weight]
    model = working_copy(net, merged, device)
    for state in (*(end for end, _ in used), merged):  # refuses an end of another architecture
        load(model, state)
    where = next(iter(model.state_dict().values())).device
    args, kwargs = copied(split_inputs(example_inputs), where)
    with torch.no_grad(), _NoNorm():
        model(*args, **kwargs)
    args, kwargs = copied(split_inputs(example_inputs), where)  # the model may have written into the first
    seen = watch(model, args, kwargs, computed=True)
    result, depths, done = extract(model, merged), list[int](), set[str]()
    for call in seen.calls:
        depths.append((not call.norm) + max((depths[place] for place in call.after), default=0))
        bias = call.given.get("bias")
        if not isinstance(bias, Tensor) or id(bias) not in seen.names:
            continue
        if call.norm or bias.is_complex() or not seen.used_once(bias):
            continue
        name = seen.names[id(bias)]
        old = result[name]
        new = torch.zeros_like(old, dtype=torch.float64)
        for end, weight in used:
            new += weight ** depths[-1] * end[name].to(new)
        result[name] = new.to(old.dtype)
        done.add(name)
    for name, tensor in result.items():
        if tensor.ndim == 1 and name not in done and wide_type(tensor) is not None:
            LOGGER.info("bias normalisation: %r stays averaged: it is not the bias of one layer, used once", name)
    return result


class _NoNorm(TorchFunctionMode):
    """Refuses a network that calls a norm."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` unless it is a norm's."""
        if func in _NORMS:
            raise RebasinError(
                f"net: bias_normalisation is for networks without norms; this one calls {func.__name__}; use repair"
            )
        return func(*args, **(kwargs or {}))
