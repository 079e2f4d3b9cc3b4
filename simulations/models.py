"""The networks of the simulations, each with a width: mlp, conv, vgg, resnet20."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrebasin.errors import UsageError

Norm = Callable[[int], nn.Module]
DEFAULT_WIDTHS = {"mlp": 512, "conv": 128, "vgg": 64, "resnet20": 4}


def build_model(
    name: str, shape: tuple[int, int, int], classes: int, *, width: int | None = None, norm: str = "batch"
) -> nn.Module:
    """Build one of the simulations' networks with fresh weights.

    Parameters
    ----------
    name : {"mlp", "conv", "vgg", "resnet20"}
    shape : tuple of int
        Channels, height and width of the images.
    classes : int
        Number of outputs.
    width : int, optional
        Units of a hidden layer (mlp, conv), channels of the first layer (vgg), or the multiple of
        16, 32 and 64 channels (resnet20). Default 512, 128, 64 and 4.
    norm : {"batch", "layer"}
        LayerNorm normalises each pixel over its channels. The mlp has no norm.

    Examples
    --------
    >>> build_model("mlp", (1, 8, 8), 10, width=32)(torch.zeros(2, 1, 8, 8)).shape
    torch.Size([2, 10])
    """
    builders = {"mlp": _mlp, "conv": _conv, "vgg": _vgg, "resnet20": _resnet20}
    norms: dict[str, Norm] = {"batch": nn.BatchNorm2d, "layer": ChannelLayerNorm}
    if name not in builders:
        raise UsageError(f"--model: expected one of {', '.join(builders)}; got {name!r}")
    if norm not in norms:
        raise UsageError(f"--norm: expected one of {', '.join(norms)}; got {norm!r}")
    width = DEFAULT_WIDTHS[name] if width is None else width
    if width < 1:
        raise UsageError(f"--width: expected a positive number; got {width}")
    return builders[name](shape, classes, width, norms[norm])


class ChannelLayerNorm(nn.Module):
    """LayerNorm over the channels of each pixel of an image ``(n, channels, height, width)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias).permute(0, 3, 1, 2)


def _mlp(shape: tuple[int, int, int], classes: int, width: int, norm: Norm) -> nn.Module:
    del norm
    sizes = [shape[0] * shape[1] * shape[2], width, width, width]
    hidden = [layer for fan_in, fan_out in pairwise(sizes) for layer in (nn.Linear(fan_in, fan_out), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, classes))


def _conv_block(fan_in: int, fan_out: int, stride: int, norm: Norm) -> list[nn.Module]:
    convolution = nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False)
    return [convolution, norm(fan_out), nn.ReLU()]


def _conv(shape: tuple[int, int, int], classes: int, width: int, norm: Norm) -> nn.Module:
    blocks = [(shape[0], 2), (width, 2), (width, 1)]
    body = nn.Sequential(*[layer for fan_in, stride in blocks for layer in _conv_block(fan_in, width, stride, norm)])
    body.append(nn.AvgPool2d(2)).append(nn.Flatten())
    return nn.Sequential(*body, nn.Linear(_features(body, shape), classes))


def _vgg(shape: tuple[int, int, int], classes: int, width: int, norm: Norm) -> nn.Module:
    """VGG16's convolutions; an image too small for five poolings gets as many as it allows."""
    layers: list[nn.Module] = []
    channels, size = shape[0], min(shape[1:])
    for factor, repeats in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        for _ in range(repeats):
            layers += _conv_block(channels, factor * width, 1, norm)
            channels = factor * width
        if size >= 2:
            layers.append(nn.MaxPool2d(2))
            size //= 2
    body = nn.Sequential(*layers, nn.Flatten())
    return nn.Sequential(*body, nn.Linear(_features(body, shape), classes))


def _features(body: nn.Module, shape: tuple[int, int, int]) -> int:
    with torch.no_grad():
        return int(body.eval()(torch.zeros(1, *shape)).shape[1])


class _BasicBlock(nn.Module):
    def __init__(self, fan_in: int, fan_out: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = norm(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.norm2 = norm(fan_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or fan_in != fan_out:
            self.shortcut = nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride=stride, bias=False), norm(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


def _resnet20(shape: tuple[int, int, int], classes: int, width: int, norm: Norm) -> nn.Module:
    layers = _conv_block(shape[0], 16 * width, 1, norm)
    channels = 16 * width
    for fan_out, first_stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
        for stride in (first_stride, 1, 1):
            layers.append(_BasicBlock(channels, fan_out, stride, norm))
            channels = fan_out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))
