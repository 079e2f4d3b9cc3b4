"""Small networks whose layers are called in every way that corrections have to see through."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def norm_free() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.Flatten(), nn.Linear(64, 3))


class Residual(nn.Module):
    """A branch that starts with a norm of its own, one that ends with one, a shortcut, writing in place."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 5, 3, stride=2), nn.BatchNorm2d(5)
        self.inner, self.outer = nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(6, 5, 1, bias=False)
        self.end = nn.BatchNorm2d(5)
        self.side, self.head = nn.Conv2d(5, 5, 1), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        branch = self.inner(F.relu(self.norm(x)))
        x = F.relu(self.end(self.outer(F.relu(branch, inplace=True))) + self.side(x), inplace=True)
        return self.head(x.mean((2, 3)))


class InPlace(nn.Module):
    """Writes into layers' outputs, through a view too, and reads one of them in two later layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        h[:, :3].mul_(2).add_(1)
        both = torch.zeros_like(h)
        both[:, :4] = self.second(torch.tanh(h))[:, :4]
        return self.third(both.tanh_() + h)


class ByHand(nn.Module):
    """Weights used by functions: a linear, a product, a shared layer, an op that leaves no trace in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(6, 4))
        self.second = nn.Parameter(torch.randn(6, 6))
        self.shared = nn.Linear(6, 6)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.linear(x, self.first))
        x = F.relu(x @ self.second, inplace=True)
        x = self.shared(torch.tanh(self.shared(x))) + x
        return self.last(x)


class Functions(nn.Module):
    """A convolutional network with a BatchNorm of parameters and functions alone."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in {"kernel": (6, 3, 3, 3), "narrow": (10, 6), "wide": (10, 8), "last": (2, 8)}.items():
            setattr(self, name, nn.Parameter(_draw(*shape, seed=len(name)) / shape[-1] ** 0.5))
            size = shape[1] if name == "wide" else shape[0]
            setattr(self, f"{name}_shift", nn.Parameter(_draw(size, seed=size)))
        self.register_buffer("center", torch.zeros(6))
        self.register_buffer("spread", torch.ones(6))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.kernel, self.kernel_shift, padding=1)
        x = F.batch_norm(x, self.center, self.spread, eps=1e-3).relu().mean((2, 3))
        x = F.linear(x, self.narrow, self.narrow_shift).relu()
        x = torch.addmm(self.wide_shift, x, self.wide).relu()
        return F.linear(x, self.last, self.last_shift)


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class HandNorm(nn.Module):
    """ConvNeXt's first LayerNorm: over channels, computed by hand."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-5).sqrt()
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class LastNorm(HandNorm):
    """The same over the last axis."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT[..., None]).squeeze(-1).mT


class Rectified(HandNorm):
    """A norm with its activation."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()
