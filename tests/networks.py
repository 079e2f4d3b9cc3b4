"""Small networks of every kind that this release traces, each with example inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from fedrebasin.simulations.models import build_model

IMAGE = (torch.zeros(2, 3, 16, 16),)


class DenseBlock(nn.Module):
    """Concatenation of all features so far, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(6 + 4 * index) for index in range(3)])
        self.convs = nn.ModuleList([nn.Conv2d(6 + 4 * index, 4, 3, padding=1) for index in range(3)])
        self.head = nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            features = torch.cat([features, conv(F.relu(norm(features)))], 1)
        return self.head(features.mean((2, 3)))


class Grouped(nn.Module):
    """A grouped and a depthwise convolution, GroupNorm, PReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3)
        self.grouped = nn.Conv2d(12, 24, 3, groups=4)
        self.norm = nn.GroupNorm(4, 24)
        self.slope = nn.PReLU(24)
        self.depthwise = nn.Conv2d(24, 24, 3, groups=24)
        self.last = nn.Conv2d(24, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.depthwise(self.slope(self.norm(self.grouped(self.first(x)))))).mean((2, 3))


class TwoInputs(nn.Module):
    """Keywords, two streams joined by a broadcast product, a dict of outputs, a tied weight, a scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 8), nn.Linear(5, 8)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(()))
        self.gate = nn.Linear(8, 1)
        self.out = nn.Linear(8, 4, bias=False)
        self.back = nn.Linear(4, 8, bias=False)
        self.back.weight = nn.Parameter(torch.zeros(8, 4))
        self.again = nn.Linear(8, 4, bias=False)
        self.again.weight = self.out.weight

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        both = self.norm(torch.tanh(self.left(left)) + self.right(right).unsqueeze(1)) * self.scale
        gated = both * torch.sigmoid(self.gate(both))
        return {"out": self.out(gated), "again": self.again(F.relu(self.back(self.out(gated))))}


class Unknown(nn.Module):
    """Places in a row that are filled one after the other, which no rule covers: the axes that it touches must stay."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        found = self.first(x)
        return self.third(F.relu(self.second(found.masked_scatter(found > 0, found))))


def mlp() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return build_model("mlp", (1, 4, 4), 3, width=12), (torch.zeros(2, 1, 4, 4),)


def vgg11() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """VGG11 with BatchNorm at an eighth of its width."""
    layers: list[nn.Module] = []
    channels = 3
    for width, pool in (
        (8, True),
        (16, True),
        (32, False),
        (32, True),
        (64, False),
        (64, True),
        (64, False),
        (64, False),
    ):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if pool else []
        channels = width
    head = [nn.AdaptiveAvgPool2d((2, 2)), nn.Flatten(), nn.Linear(256, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 3)]
    return nn.Sequential(*layers, *head), IMAGE


def _simulation(name: str, norm: str = "batch", width: int = 8) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return build_model(name, (3, 16, 16), 3, width=width, norm=norm), IMAGE


def densenet121() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return torchvision.models.densenet121(weights=None), (torch.zeros(2, 3, 32, 32),)


NETWORKS = {
    "mlp": mlp,
    "conv": lambda: _simulation("conv"),
    "vgg": lambda: _simulation("vgg", width=4),
    "vgg11": vgg11,
    "resnet20-batchnorm": lambda: _simulation("resnet20", width=1),
    "resnet20-layernorm": lambda: _simulation("resnet20", "layer", width=1),
    "dense-block": lambda: (DenseBlock(), IMAGE),
    "grouped": lambda: (Grouped(), IMAGE),
    "two-inputs": lambda: (TwoInputs(), {"left": torch.zeros(2, 3, 4), "right": torch.zeros(2, 5)}),
    "unknown-op": lambda: (Unknown(), (torch.zeros(2, 4),)),
    "one-unit": lambda: (nn.Sequential(nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 2)), (torch.zeros(2, 3),)),
}
