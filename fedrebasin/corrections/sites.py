"""Where a network's activations can be corrected: calls of layers and norms that take an affine map per channel.

Sites are found by the functions that a pass calls with tensors of the state dict, so that layers written by hand are
found as well; a norm that computes by hand is known by its module.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrebasin.batches import Batches
from fedrebasin.corrections.calls import CONVOLUTIONS, TRANSPOSED, key_of
from fedrebasin.corrections.watch import Call, Watch, content_of, watch
from fedrebasin.errors import NoSiteError

LOGGER = logging.getLogger("fedrebasin")


@dataclass(frozen=True)
class Site:
    """A call whose output is corrected along ``dim``, which has so many channels.

    Attributes
    ----------
    name : str
        Of the module that holds the tensors; the key of the tensor where that is called otherwise than in torch.
    weight, bias : str or None
        Keys of the tensors into which the map is fused.
    weight_dim : int
        The weight's axis of channels.
    running : tuple of str, or None
        Keys of a BatchNorm's running mean and variance.
    eps : float
        The BatchNorm's.
    by_module : bool
        The call is the module's; otherwise that of a function with the tensor ``key``.
    corrected : bool
        False for a call that runs and stays as it is: it goes straight into a norm alone, is the model's output, or
        cannot take a map.
    after : frozenset of int
        Places, in the list of all calls, of those whose outputs reach its input.
    """

    name: str
    dim: int
    channels: int
    weight: str | None
    bias: str | None
    weight_dim: int = 0
    running: tuple[str, str] | None = None
    eps: float = 0.0
    by_module: bool = False
    corrected: bool = True
    after: frozenset[int] = frozenset()

    @property
    def key(self) -> str:
        """The tensor by which the call is known."""
        return self.running[0] if self.running is not None else str(self.weight)

    @property
    def keys(self) -> tuple[str, ...]:
        """All its tensors."""
        return tuple(key for key in (self.weight, self.bias, *(self.running or ())) if key is not None)


def find_sites(model: nn.Module, batches: Batches) -> list[Site]:
    """The calls of :func:`find_calls` that are corrected."""
    return [site for site in find_calls(model, batches) if site.corrected]


def check_found(sites: list[Site]) -> None:
    """Refuse a network without any site, and name what does without."""
    if not sites:
        raise NoSiteError(
            "net: expected a BatchNorm, another norm with weight and bias, or a hidden linear or convolution layer "
            "with a bias, used once, its tensors in the state dict as they are; found none. Give "
            "correction='least-squares' or 'regmean', which need no bias, or None"
        )


def find_calls(model: nn.Module, batches: Batches) -> list[Site]:
    """Run one batch and list the calls in their order; the log names what cannot be corrected, with the reason.

    Corrected are norms with weight and bias, BatchNorms, and linear and convolution layers with a bias whose output
    is neither the model's nor goes straight into a norm alone. What runs more than once or is tied is not in the list.
    """
    args, kwargs, _ = next(iter(batches))
    seen = watch(model, args, kwargs)
    left: dict[str, str] = {}
    ends = {content_of(tensor) for tensor in seen.outputs}
    by_hand = Counter(call.module for call in seen.calls if call.module is not None)
    known, places = set[str](), dict[int, bool]()
    for place, call in enumerate(seen.calls):
        tensors = [x for x in call.given.values() if id(x) in seen.names]
        known.update(seen.names[id(x)] for x in tensors)
        if call.module is None:
            once = all(seen.used_once(x) for x in tensors)
        else:  # a norm that computes by hand may read its tensors in several calls
            once = by_hand[call.module] == 1 and all(seen.tied[id(x)] == 1 for x in tensors)
        passes = not call.norm and (call.content in ends or seen.only_normed(call))
        reason = "" if passes else _refuse(call, seen) if once else "it is used more than once"
        if reason:
            left[seen.names[id(key_of(call.func, call.given))]] = reason
        if once and (call.module is None or not reason):
            places[place] = not passes and not reason
    for name, reason in (left | seen.unread(known)).items():
        LOGGER.info("correction: %r takes no affine map of its own: %s", name, reason)
    where = {place: index for index, place in enumerate(places)}
    return [
        _site(seen.calls[place], seen, corrected=corrected, after=seen.through(place, where))
        for place, corrected in places.items()
    ]


def _refuse(call: Call, seen: Watch) -> str:
    """Why a call cannot be corrected, or ``""``."""
    given, weight, bias = call.given, call.given.get("weight"), call.given.get("bias")
    own = [x for x in (weight, bias, given.get("running_mean")) if isinstance(x, Tensor)]
    if any(id(tensor) not in seen.names for tensor in own):
        return "its weight or bias is no tensor of the state dict"
    if any(tensor.is_complex() for tensor in own):
        return "its numbers are complex"
    if call.func is F.batch_norm and weight is None:
        return ""  # nothing but its statistics
    if weight is None or bias is None:
        return "it has no bias"
    if call.func in TRANSPOSED and given.get("groups", 1) != 1:
        return "a grouped transposed convolution"
    if given.get("alpha", 1) != 1 or given.get("beta", 1) != 1:
        return "a product that is no plain linear map"
    if call.module is not None and _dim(call) is None:
        return "its output is no affine map of its weight and bias"
    single = bias.ndim == 1 and (weight.ndim == 1 or not call.norm)
    return "" if single and _dim(call) is not None else "it has other numbers than one a channel"


def _dim(call: Call) -> int | None:
    """Along which axis of the output channels lie."""
    output, weight = call.output, call.given.get("weight")
    if call.module is not None:
        return _dim_by_hand(**call.given)
    if call.func in (*CONVOLUTIONS, *TRANSPOSED) and weight is not None:
        return output.ndim - int(weight.ndim) + 1
    return 1 if call.func in (F.batch_norm, F.instance_norm, F.group_norm) else output.ndim - 1


@torch.no_grad()
def _dim_by_hand(again: Callable[..., Tensor], weight: Tensor, bias: Tensor, **_: Any) -> int | None:
    """The axis along which a norm's output follows its weight and bias; ``None`` where it does not, as with a ReLU."""
    if bias.shape != weight.shape:
        return None
    before, steps = again({}), torch.linspace(0, 1, len(weight), device=weight.device).to(weight)
    size = before.abs().mean() + 1
    gain, shift = 1 + steps, (2 * steps - 1) * size
    after = again({"weight": weight * gain, "bias": bias * gain + shift})
    for dim in range(1, before.ndim):
        if before.shape[dim] == len(weight):
            shape = [-1 if dim == other else 1 for other in range(before.ndim)]
            expected = before * gain.view(shape) + shift.view(shape)
            if bool(((after - expected).abs() <= 0.02 * (expected.abs() + size)).all()):  # also in bfloat16
                return dim
    return None


def _site(call: Call, seen: Watch, *, corrected: bool, after: frozenset[int]) -> Site:
    dim, key = _dim(call) or 0, seen.names[id(key_of(call.func, call.given))]
    mean, variance, weight, bias = (
        seen.names.get(id(call.given.get(name))) for name in ("running_mean", "running_var", "weight", "bias")
    )
    running = None if call.func is not F.batch_norm or mean is None or variance is None else (mean, variance)
    prefix, _, leaf = key.rpartition(".")
    transposed = call.func in TRANSPOSED or (not call.norm and call.func not in (F.linear, *CONVOLUTIONS))
    return Site(
        name=prefix if leaf in ("weight", "running_mean") else key,
        dim=dim,
        channels=call.output.shape[dim],
        weight=weight,
        bias=bias,
        weight_dim=int(transposed),
        running=running,
        eps=call.given.get("eps", 1e-5) if running else 0.0,
        by_module=call.module is not None,
        corrected=corrected,
        after=after,
    )
