"""Small networks of the kinds that people bring, each with example inputs and the shapes of its permutations.

The shapes are worked out by hand: ``(n,)`` is one permutation, ``(outer, n)`` one for each index of an outer one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from networks_attention import ATTENTION
from networks_recurrent import RECURRENT
from networks_spectral import SPECTRAL
from torch import Tensor, nn

Case = tuple[nn.Module, tuple[Any, ...], list[tuple[int, ...]]]

IMAGE = (torch.zeros(2, 3, 8, 8),)
STEPS = (torch.zeros(2, 7, 5),)


class Convolutions(nn.Module):
    """1-d and 3-d convolutions, transposed ones with groups, GroupNorm and InstanceNorm, LPPool, reflection."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 8, 3, padding=1, padding_mode="circular")
        self.group, self.instance = nn.GroupNorm(4, 8), nn.InstanceNorm3d(6, affine=True, track_running_stats=True)
        self.up = nn.ConvTranspose1d(8, 12, 2, 2, groups=4)
        self.three = nn.Conv3d(3, 6, 2, padding=1, padding_mode="replicate")
        self.back = nn.ConvTranspose3d(6, 4, 2, output_padding=1, stride=2)
        self.head = nn.Linear(16, 3)

    def forward(self, line: Tensor, cube: Tensor) -> Tensor:
        line = F.lp_pool1d(F.pad(self.up(self.group(self.one(line))), (1, 1), "reflect"), 2, 3)
        cube = F.adaptive_max_pool3d(self.back(F.relu(self.instance(self.three(cube)))), 2)
        return self.head(torch.cat([line.amax(-1), cube.mean((2, 3, 4))], 1))


class UNet(nn.Module):
    """Down with unpooling indices, up by resampling and PixelShuffle, skip connections, constant padding."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.bottom = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 16, 1)
        self.merge, self.head = nn.Conv2d(6 + 4, 4, 1), nn.Conv2d(4 + 16, 2, 1)
        self.unshuffle = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = F.relu(self.down(x))
        low = self.bottom(F.max_pool2d(skip, 2))
        high = self.merge(torch.cat([skip, F.pixel_shuffle(low, 2)], 1))
        wide = F.interpolate(F.pixel_unshuffle(self.unshuffle(high), 2), scale_factor=2, mode="bilinear")
        return self.head(torch.cat([F.pad(high, (1, 1, 2, 0), value=0.3)[..., 2:, 1:-1], wide], 1))


class Shortcuts(nn.Module):
    """A zero-padded channel shortcut, squeeze-and-excitation, and a ShuffleNet unit."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(8, 3, 1), nn.Conv2d(3, 8, 1)
        self.branch = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4))
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(self.wide(x) + F.pad(x, (0, 0, 0, 0, 1, 3)))
        x = x * torch.sigmoid(self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        kept, changed = x.chunk(2, dim=1)
        return self.head(F.channel_shuffle(torch.cat([kept, self.branch(changed)], 1), 2))


class Windows(nn.Module):
    """Patches by unfold and Tensor.unfold, sampled at learned points."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.points = nn.Conv2d(3, 4, 1), nn.Conv2d(4 * 4, 5, 1), nn.Linear(5, 6)
        self.head = nn.Linear(5 + 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        columns = F.unfold(x, 2, stride=2)
        image = self.mix(columns.unflatten(-1, (4, 4)))
        theta = self.points(image.mean((2, 3))).view(-1, 2, 3)
        seen = F.grid_sample(image, F.affine_grid(theta, [2, 5, 3, 3], align_corners=False), align_corners=False)
        folded = F.fold(columns * 2, (8, 8), 2, stride=2).unfold(2, 3, 2).roll(1, 2).flip(-1)
        return self.head(torch.cat([seen.amax((2, 3)), folded.square().mean((2, 3, 4))], 1))


class Tied(nn.Module):
    """Token and position embeddings, RMSNorm, a gated unit, and the embedding again as the output."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 8), nn.Embedding(6, 8)
        self.norm, self.up, self.down = nn.RMSNorm(8), nn.Linear(8, 2 * 5), nn.Linear(5, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places(torch.arange(tokens.shape[1]))
        x = x + self.down(F.glu(self.up(self.norm(x))))
        return self.out(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale)


class Bags(nn.Module):
    """EmbeddingBag, Bilinear, lookups of all kinds, repeats."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.both = nn.EmbeddingBag(9, 6), nn.Bilinear(6, 4, 7)
        self.tables = nn.ParameterList(nn.Parameter(torch.zeros(9, 4)) for _ in range(5))
        self.rows, self.cube = nn.Parameter(torch.zeros(3, 9, 4)), nn.Parameter(torch.zeros(3, 4, 9))
        self.head = nn.Linear(7, 2)

    def forward(self, numbers: Tensor) -> Tensor:
        first, second, third, *_ = numbers.unbind(1)
        looked = self.tables[0][first] + self.rows[1, second] + self.rows[:, third].sum(0)
        looked = looked + self.cube[first % 3, :, second] + self.tables[1].index_select(0, first).tile(1, 1)
        looked = looked + self.tables[2].gather(0, numbers[:, :1].expand(-1, 4))
        looked = looked + F.one_hot(third, 9).to(looked.dtype) @ self.tables[3]
        looked = looked + self.tables[4].sum(0).repeat(len(numbers), 1)
        return self.head(torch.tanh(self.both(self.bag(numbers), looked)))


class Repeats(nn.Module):
    """Repeated features: the copies are equal, so what reads them may order them as it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.outer, self.inner, self.head = nn.Linear(3 * 4, 6), nn.Linear(4 * 3, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head(torch.relu(self.outer(x.repeat(1, 1, 3)) + self.inner(x.repeat_interleave(3, -1))))


class Slices(nn.Module):
    """Slices of several sizes, GLU, every second unit, writing in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.small, self.pairs = nn.Linear(5, 12), nn.Linear(4, 6), nn.Linear(5, 8)
        self.head, self.last = nn.Linear(3, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x, pairs = self.first(x), self.pairs(x)
        one, two, three = x[..., :4], x[..., 4:7], x[..., 7:]
        pairs = pairs[..., ::2] * pairs[..., 1::2]
        gated = F.glu(self.small(torch.relu(one) * pairs), dim=-1) * two
        board = torch.zeros(*x.shape[:-1], 6)
        board[..., :5] = three
        board[..., 5] += 1
        return self.head(gated) + self.last(torch.tanh(board))


class Reductions(nn.Module):
    """Reductions over units and over time, each unit by itself or all together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = torch.tanh(self.first(x))
        over_time = x.max(1)[0] + x.logsumexp(1) + x.cumsum(1).std(1) + x.topk(2, 1)[0].sum(1) + x.sort(1)[0][:, 0]
        over_time = over_time + x.median(1).values + x.prod(1) + torch.var_mean(x, 1)[0] + F.normalize(x, dim=1).sum(1)
        over_units = x.norm(dim=-1) + x.amin(-1) + x.max(-1).values + x.var(-1) + x.softmax(-1).square().sum(-1)
        over_units = over_units + x.topk(3, -1)[0][..., 1] + F.cosine_similarity(x, self.second(x), dim=-1)
        return self.head(over_time), over_units + torch.cdist(x, self.second(x)).mean(1), x.mean()


class Router(nn.Module):
    """Experts stacked in one parameter, chosen by number: their order is seen, their units are not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.gate = nn.Linear(5, 6), nn.Linear(6, 3)
        self.up, self.down = nn.Parameter(torch.zeros(3, 6, 7)), nn.Parameter(torch.zeros(3, 7, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).flatten(0, 1)
        weights, chosen = self.gate(x).softmax(-1).topk(1)
        hidden = torch.einsum("bi,eij->bej", x, self.up).relu()
        found = torch.einsum("bej,eji->bei", hidden, self.down)
        picked = found.take_along_dim(chosen[..., None], 1).squeeze(1)
        return self.head(x + weights * picked)


def _normed(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    first, second = wrap(nn.Conv2d(3, 6, 3)), wrap(nn.Linear(6, 5))
    return nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), second, nn.Tanh(), nn.Linear(5, 2))


def _transposed() -> Case:
    net, inputs = Convolutions(), (torch.zeros(2, 3, 9), torch.zeros(2, 3, 4, 4, 4))
    return net, inputs, [(4,), (4, 2), (4, 3), (6,), (4,)]


NUMBERS = torch.randint(9, (2, 5), generator=torch.Generator().manual_seed(0))


class Regions(nn.Module):
    """Deformable convolutions and a pooling of boxes, as detectors have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.where = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 18, 3, padding=1)
        self.moved = torchvision.ops.DeformConv2d(5, 6, 3, padding=1)
        self.masked = torchvision.ops.DeformConv2d(6, 4, 3, padding=1, bias=False)
        self.last = nn.Conv2d(4, 2, 3)
        self.register_buffer("boxes", torch.tensor([[0, 0, 0, 5, 5], [1, 1, 1, 4, 4]]))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        where = self.where(x)
        x = self.masked(F.relu(self.moved(x, where)), where, where[:, :9].sigmoid())
        found: Tensor = self.last(torchvision.ops.roi_align(x, self.boxes.to(x), 3))
        return found


ZOO: dict[str, Callable[[], Case]] = {
    "regions": lambda: (Regions(), IMAGE, [(4,), (5,), (6,)]),
    "convolutions": _transposed,
    "u-net": lambda: (UNet(), IMAGE, [(4,), (4,), (4,), (6,)]),
    "shortcuts": lambda: (Shortcuts(), IMAGE, [(3,), (3,), (3,), (4,)]),
    "windows": lambda: (Windows(), IMAGE, [(4,), (5,)]),
    "tied": lambda: (Tied(), (NUMBERS,), [(5,), (8,)]),
    "bags": lambda: (Bags(), (NUMBERS,), [(4,), (6,), (7,), (9,)]),
    "repeats": lambda: (Repeats(), STEPS, [(3,), (4,), (4, 3), (6,)]),
    "slices": lambda: (Slices(), STEPS, [(3,), (4,), (5,)]),
    "reductions": lambda: (Reductions(), STEPS, [(6,)]),
    "router": lambda: (Router(), STEPS, [(6,), (7,), (7,), (7,)]),
    "weight-norm": lambda: (_normed(nn.utils.parametrizations.weight_norm), IMAGE, [(5,), (6,)]),
    "weight-norm-old": lambda: (_normed(nn.utils.weight_norm), IMAGE, [(5,), (6,)]),
    "spectral-norm": lambda: (_normed(nn.utils.parametrizations.spectral_norm), IMAGE, [(5,), (6,)]),
    "spectral-norm-old": lambda: (_normed(nn.utils.spectral_norm), IMAGE, [(5,), (6,)]),
    **ATTENTION,
    **RECURRENT,
    **SPECTRAL,
}
