"""A layer as a matrix and a shift, with the BatchNorm behind it folded in; and its input as a matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedrebasin.corrections.layers import Layer

#: Inputs of a convolution are unfolded for so many numbers at a time: few enough for a CPU's cache.
CHUNK = 2**23


@dataclass(frozen=True)
class LinearMap:
    """``z = matrix @ x + shift`` in float64: matrix (out, in * kernel); ``shift`` is 0 where the layer has none."""

    matrix: Tensor
    shift: Tensor


def read_map(model: nn.Module, layer: Layer) -> LinearMap:
    """The map from a layer's input to its pre-activation, behind the BatchNorm if it has one.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.BatchNorm1d(1, eps=0))
    >>> state = {**net.state_dict(), "1.running_var": torch.tensor([4.0]), "0.weight": torch.ones(1, 2)}
    >>> _ = net.load_state_dict(state)
    >>> read_map(net, Layer("0.weight", None, "1", frozenset())).matrix
    tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """
    state = model.state_dict()
    weight = state[layer.weight].double()
    matrix = weight.T if layer.transposed else weight.flatten(1)
    scale, offset = behind(model, layer)
    bias = 0.0 if layer.bias is None else state[layer.bias].double()
    return LinearMap(matrix * scale.unsqueeze(1), scale * bias + offset)


def behind(model: nn.Module, layer: Layer) -> tuple[Tensor, Tensor]:
    """Scale and offset, (out,) in float64, that turn a layer's output into its pre-activation: its BatchNorm's."""
    weight = model.state_dict()[layer.weight]
    count = weight.shape[1] if layer.transposed else weight.shape[0]
    ones = torch.ones(count, dtype=torch.float64, device=weight.device)
    if layer.norm is None:
        return ones, 0 * ones
    norm = norm_of(model, layer)
    assert norm.running_mean is not None and norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    shift = 0.0 if norm.bias is None else norm.bias.detach().double()
    return scale, shift - norm.running_mean.double() * scale


def write_map(model: nn.Module, layer: Layer, found: LinearMap, mean: Tensor, covariance: Tensor) -> None:
    """Put a map into a layer, and into its BatchNorm: its statistics become those of what goes in.

    The rows of the weight keep their length, and the sign of the BatchNorm's scale stays, so that training goes on
    from a layer of the usual size.

    Parameters
    ----------
    mean : Tensor, shape (in * kernel,), float64
    covariance : Tensor, shape (in * kernel, in * kernel), float64
        Of the layer's input.
    """
    matrix, shift = found.matrix, found.shift
    if layer.norm is not None:
        norm = norm_of(model, layer)
        assert norm.running_mean is not None and norm.running_var is not None
        if norm.weight is None or norm.bias is None:  # nothing but the statistics can take scale and shift
            norm.running_var.fill_(1 - norm.eps)
            norm.running_mean.copy_(-shift)
        else:
            old = model.state_dict()[layer.weight].double()
            lengths = (old.T if layer.transposed else old.flatten(1)).norm(dim=1)
            scale = matrix.norm(dim=1) / lengths
            usable = scale.isfinite() & (scale > 0)
            scale = torch.where(usable, scale, 1.0) * torch.where(norm.weight.detach() < 0, -1.0, 1.0)
            matrix = matrix / scale.unsqueeze(1)
            variance = ((matrix @ covariance) * matrix).sum(1).clamp_min(0)
            with torch.no_grad():
                norm.running_mean.copy_(matrix @ mean)
                norm.running_var.copy_(variance)
                norm.weight.copy_(scale * (norm.running_var.double() + norm.eps).sqrt())
                norm.bias.copy_(shift + scale * norm.running_mean.double())
        shift = torch.zeros_like(shift)
    parameters = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        weight = parameters[layer.weight]
        weight.copy_(matrix.T if layer.transposed else matrix.view(weight.shape))
        if layer.bias is not None:
            parameters[layer.bias].copy_(shift)


def norm_of(model: nn.Module, layer: Layer) -> _BatchNorm:
    """The BatchNorm behind a layer."""
    module = model.get_submodule(layer.norm or "")
    assert isinstance(module, _BatchNorm)
    return module


def columns(layer: Layer, x: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """A layer's input as a matrix (in * kernel, samples): a sample is a position that the weight meets.

    Parameters
    ----------
    x : Tensor, shape (n, ..., in) or, for a convolution, (n, in, *spatial)
    kernel : tuple of int
        The weight's spatial axes; empty for a linear layer.

    Examples
    --------
    >>> layer = Layer("w", None, None, frozenset(), stride=(1,), padding=((1, 0),), dilation=(1,))
    >>> columns(layer, torch.tensor([[[1.0, 2.0, 3.0]]]), (2,))
    tensor([[0., 1., 2.],
            [1., 2., 3.]])
    """
    if not kernel:
        return x.flatten(0, -2).T
    x = F.pad(x, [size for before_after in reversed(layer.padding) for size in before_after])
    for dim, (size, stride, gap) in enumerate(zip(kernel, layer.stride, layer.dilation, strict=True), 2):
        x = x.unfold(dim, gap * (size - 1) + 1, stride)[..., ::gap]
    dims = len(kernel)
    places, offsets = range(2, 2 + dims), range(2 + dims, 2 + 2 * dims)
    return x.permute(1, *offsets, 0, *places).reshape(x.shape[1] * _product(kernel), -1)


def chunks(layer: Layer, x: Tensor, kernel: tuple[int, ...]) -> Iterator[slice]:
    """Examples whose unfolded inputs are at most ``CHUNK`` numbers, at least one example."""
    size = x[:1].numel() * _product(kernel)
    step = max(1, CHUNK // max(1, size))
    for start in range(0, len(x), step):
        yield slice(start, min(len(x), start + step))


def outputs(layer: Layer, z: Tensor) -> Tensor:
    """A layer's output as a matrix (out, samples), its samples in the order of :func:`columns`."""
    return z.transpose(0, 1).flatten(1) if layer.stride else z.flatten(0, -2).T


def per_channel(layer: Layer, values: Tensor, z: Tensor) -> Tensor:
    """``values`` (out,) so that they multiply a layer's output ``z`` channel by channel, in its dtype."""
    values = values.to(z.dtype)
    return values.view(-1, *([1] * len(layer.stride)))


def _product(sizes: tuple[int, ...]) -> int:
    return math.prod(sizes)
