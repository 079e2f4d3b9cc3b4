"""Random weights and inputs on which a network is alive: what check_spec proves a spec on.

On the weights that a model comes with a proof sees little: zero heads, zero residual branches, equal statistics. On
weights that are merely random it sees little of a deep network, either: signals grow or shrink from layer to layer,
gates saturate, units die, and rounding is magnified. So all is drawn anew, and one forward pass sets every layer to
what comes in: linear maps so that their outputs are of unit size about each unit's mean, biases and running
statistics so that those means are small and most units take both signs.

The idea is that of Mishkin and Matas (2016), "All you need is a good init".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fedrebasin.layout import Fixed, leaves
from fedrebasin.memory import identity
from fedrebasin.spec import PermutationSpec

#: Linear ops that are left when torch runs a model: bias, input and weight by position (None where there is no bias),
#: and the axis of the output's units.
_LINEAR = {
    "aten::convolution": (2, (0, 1), 1),
    "aten::addmm": (0, (1, 2), -1),
    "aten::baddbmm": (0, (1, 2), -1),
    "aten::mm": (None, (0, 1), -1),
    "aten::bmm": (None, (0, 1), -1),
    "aten::addmv": (0, (1, 2), -1),
    "aten::mv": (None, (0, 1), -1),
}

#: A buffer with values below stands for minus infinity in places, as attention's masks do: drawn anew it may hide all.
_MASKED = -1e4

#: How running statistics end.
_STATISTICS = ("running_mean", "running_var")

#: Which floating inputs are not drawn anew.
Keep = Literal["none", "whole", "all"]


def redraw(
    state: Mapping[str, Tensor], parameters: Iterable[str], generator: torch.Generator, tables: Collection[str] = ()
) -> dict[str, Tensor]:
    """Draw every floating tensor anew: matrices about zero, vectors and all that is no parameter in [0.5, 1.5].

    Those that ``tables`` names keep their values.

    >>> drawn = redraw({"weight": torch.zeros(3, 4), "steps": torch.tensor(7)}, ["weight"], torch.Generator())
    >>> drawn["weight"].count_nonzero().item(), drawn["steps"].item()
    (12, 7)
    """
    parameters = set(parameters)
    drawn: dict[str, Tensor] = {}
    first: dict[object, str] = {}
    for name, tensor in state.items():
        alias = first.setdefault(identity(tensor), name)
        if alias != name:
            drawn[name] = drawn[alias]
        elif name in tables or not _can_be_drawn(tensor, is_parameter=name in parameters):
            drawn[name] = tensor.clone()
        elif name not in parameters or tensor.ndim <= 1:
            drawn[name] = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype, device="cpu") + 0.5
        else:
            fan_in = max(1, math.prod(tensor.shape[1:]))
            normal = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype, device="cpu")
            drawn[name] = normal * (2 / fan_in) ** 0.5
    return drawn


def stir(tensor: Tensor) -> Tensor:
    """Scale every entry by another number in [0.5, 1.5], without a draw; whole numbers stay.

    >>> stir(torch.ones(3))
    tensor([0.5000, 1.0000, 1.5000])
    """
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    factors = torch.linspace(0.5, 1.5, tensor.numel(), device=tensor.device, dtype=tensor.real.dtype)
    return tensor * factors.view_as(tensor)


def _can_be_drawn(tensor: Tensor, *, is_parameter: bool) -> bool:
    if not tensor.is_floating_point():
        return is_parameter and tensor.is_complex()
    return is_parameter or not tensor.numel() or bool(tensor.amin() > _MASKED)


def telling_tables(model: nn.Module, spec: PermutationSpec) -> Iterator[str]:
    """Buffers that stay and differ along every axis: a spec that is wrong about them shows on their own values.

    Running statistics are none: a fresh network's are all alike, and a trained one's are not these.
    """
    for name, buffer in model.named_buffers():
        fixed = name in spec.axes and all(isinstance(end, Fixed) for axis in spec.axes[name] for end in leaves(axis))
        if not fixed or name not in spec.buffers or name.endswith(_STATISTICS) or not buffer.is_floating_point():
            continue
        if all(torch.unique(buffer, dim=dim).shape[dim] == size for dim, size in enumerate(buffer.shape)):
            yield name


def redraw_inputs(value: Any, dtype: torch.dtype, generator: torch.Generator, keep: Keep = "none") -> Any:
    """Draw every floating tensor of the inputs anew, however nested; integers and the rest stay.

    With ``keep="whole"``, whole numbers in floating tensors stay, too: a model may use them to look something up.
    With ``"all"`` nothing is drawn.

    >>> redraw_inputs({"ids": torch.tensor([3])}, torch.float64, torch.Generator())
    {'ids': tensor([3])}
    >>> drawn = redraw_inputs(torch.tensor([3.0, 0.5]), torch.float64, torch.Generator(), keep="whole")
    >>> drawn[0].item(), drawn[1].item() != 0.5
    (3.0, True)
    """

    def draw(tensor: Tensor) -> Tensor:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return tensor.cpu()
        wide = torch.promote_types(dtype, torch.complex64) if tensor.is_complex() else dtype
        given = tensor.detach().cpu().to(wide)
        if keep == "all":
            return given
        drawn = torch.randn(tensor.shape, generator=generator, dtype=wide, device="cpu")
        return drawn if keep == "none" or tensor.is_complex() else torch.where(given == given.round(), given, drawn)

    return tree_map_only(Tensor, draw, value)


class Calibration(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for modes
    """While a model runs inside, its tensors are set in place so that the next layer's input is of unit size.

    Only ops are looked at, not modules: whatever calls a convolution with a tensor of ``state`` is calibrated.

    >>> state = {"weight": torch.full((3, 2), 1e6)}
    >>> with torch.no_grad(), Calibration(state):
    ...     _ = torch.nn.functional.linear(torch.randn(5, 2), state["weight"])
    >>> bool(state["weight"].max() < 1e3)
    True
    """

    supports_higher_order_operators = True

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.held = {tensor.untyped_storage().data_ptr() for tensor in state.values() if tensor.is_floating_point()}
        self.done: set[tuple[int, int]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not hasattr(func, "_schema"):  # torch.cond and its like
            return func(*args, **kwargs)
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        if self._ours(named.get("running_var")) and not named.get("training", False):
            _follow(named["running_mean"], named["running_var"], named["input"])
        elif func._schema.name in _LINEAR:
            at, factors, axis = _LINEAR[func._schema.name]
            weight = next((args[i] for i in reversed(factors) if self._ours(args[i])), None)
            if weight is not None:
                bias = args[at] if at is not None and self._ours(args[at]) else None
                _rescale(lambda: func(*args, **kwargs), weight, bias, axis)
        return func(*args, **kwargs)

    def _ours(self, tensor: Any) -> bool:
        """Whether this is a tensor of the state, or a view of one, that is seen for the first time."""
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or 0 in tensor.stride():
            return False
        key = (tensor.data_ptr(), tensor.numel())
        new = tensor.untyped_storage().data_ptr() in self.held and key not in self.done
        self.done.add(key)
        return new


def _follow(mean: Tensor, variance: Tensor, x: Tensor) -> None:
    """Running statistics of the input at hand; of the variances the mean, since one unit's may be next to nothing."""
    means, spread = _moments(x, 1)
    mean.copy_(means)
    variance.mul_(spread**2)


def _rescale(run: Callable[[], Tensor], weight: Tensor, bias: Tensor | None, axis: int) -> None:
    """Give the output unit size about each unit's mean, and the bias what takes that mean away."""
    drawn = None if bias is None else bias.clone()
    if bias is not None:
        bias.zero_()
    means, spread = _moments(run(), axis)
    weight.div_(spread)
    if bias is not None and drawn is not None:
        bias.copy_(drawn - (means / spread).expand_as(drawn))


def _moments(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """The mean of each unit, and the size of what is left without it.

    Where next to nothing would be left (one entry each, or equal ones), means are zero: rounding is no signal.
    """
    others = [dim for dim in range(x.ndim) if dim != axis % x.ndim]
    means, size = x.mean(others, keepdim=True), x.square().mean().sqrt()
    spread = (x - means).square().mean().sqrt()
    if not spread > 1e-3 * size:
        means, spread = torch.zeros_like(means), size
    return means.flatten(), spread if 0 < spread < torch.inf else torch.ones_like(spread)
