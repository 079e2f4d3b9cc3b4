"""Small networks with attention, written in the ways that people write it, for :mod:`networks_zoo`.

All have 12 features in 3 heads of 4 unless they say otherwise; the shapes are worked out by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E, H, D = 12, 3, 4
STEPS = (torch.zeros(2, 7, 5),)
FULL: list[tuple[int, ...]] = [(E,), (H,), (H, D), (H, D)]  # features, heads, query-key and value-output dims


class Block(nn.Module):
    """An embedding of the steps, attention in a residual branch, a head."""

    def __init__(self, attention: nn.Module, width: int = E) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Linear(5, width), attention, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.attention(x))


class MultiHead(nn.Module):
    """nn.MultiheadAttention, with the averaged weights or without."""

    def __init__(self, weights: bool, **options: Any) -> None:
        super().__init__()
        self.core, self.weights = nn.MultiheadAttention(E, H, **options), weights

    def forward(self, x: Tensor) -> Tensor:
        out, weights = self.core(x, x, x, need_weights=self.weights)
        return out if weights is None else out * weights.square().sum(-1, keepdim=True)


class Fused(nn.Module):
    """One weight for query, key and value, taken apart by a view or in chunks; with a mask, perhaps with norms."""

    def __init__(self, how: str, *, norm: str = "", bias: bool = True) -> None:
        super().__init__()
        self.how = how
        self.qkv, self.out = nn.Linear(E, 3 * E, bias=bias), nn.Linear(E, E)
        self.norms = nn.ModuleList([nn.LayerNorm(D), nn.LayerNorm(D, bias=False)] if norm == "dims" else [])
        self.over_heads = nn.LayerNorm(H) if norm == "heads" else None
        self.slopes = nn.Parameter(torch.zeros(H, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        if self.how == "view":
            q, k, v = self.qkv(x).view(batch, length, 3, H, D).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = (part.view(batch, length, H, D).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if self.norms:
            q, k = self.norms[0](q), self.norms[1](k)
        if self.over_heads is not None:
            v = self.over_heads(v.transpose(1, -1)).transpose(1, -1)
        steps = torch.arange(length)
        mask = self.slopes * (steps[:, None] - steps)
        if self.how == "by hand":
            weights = (q @ k.transpose(-2, -1) / D**0.5 + mask).softmax(-1)
            x = weights @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(x.transpose(1, 2).reshape(batch, length, E))


class Rotary(nn.Module):
    """Grouped queries (6 heads on 2) with rotary positions as halves, pairs or complex: tables fix query and key."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.k, self.v = nn.Linear(E, 6 * D), nn.Linear(E, 2 * D), nn.Linear(E, 2 * D)
        self.out = nn.Linear(6 * D, E)
        angle = torch.arange(7)[:, None] * 0.1 ** torch.arange(D // 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.register_buffer("both", torch.polar(torch.ones(()), angle), persistent=False)

    def turn(self, x: Tensor) -> Tensor:
        if self.how == "halves":
            cos, sin = self.cos.repeat(1, 2), self.sin.repeat(1, 2)
            return x * cos + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1) * sin
        if self.how == "complex":
            return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * self.both).flatten(-2)
        one, other = x[..., ::2], x[..., 1::2]
        turned = torch.stack((one * self.cos - other * self.sin, one * self.sin + other * self.cos), -1)
        return turned.flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (layer(x).view(batch, length, -1, D).transpose(1, 2) for layer in (self.q, self.k, self.v))
        q, k = self.turn(q), self.turn(k)
        if self.how != "pairs":
            x = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            k, v = (part[:, :, None].expand(-1, -1, 3, -1, -1).flatten(1, 2) for part in (k, v))
            x = F.scaled_dot_product_attention(q, k, v)
        return self.out(x.transpose(1, 2).flatten(2))


class Alibi(nn.Module):
    """Heads whose distances weigh differently, multiplied as a batch of batch x heads, as in BLOOM."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(E, E, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, _ = x.shape
        q, k, v = (
            layer(x).view(batch, steps, H, D).transpose(1, 2).reshape(batch * H, steps, D)
            for layer in (self.q, self.k, self.v)
        )
        places = torch.arange(steps).to(x)
        far = (places - places[:, None]).abs() * torch.linspace(0.2, 0.7, H).to(x)[:, None, None]
        mixed = torch.bmm(torch.baddbmm(-far.repeat(batch, 1, 1), q, k.mT).softmax(-1), v)
        result: Tensor = self.out(mixed.view(batch, H, steps, D).transpose(1, 2).reshape(batch, steps, E))
        return result


class Letters(nn.Module):
    """Attention with einsum and parameters (heads, size, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.zeros(H, D, E)) for _ in range(3))
        self.out = nn.Parameter(torch.zeros(E, H, D))

    def forward(self, x: Tensor) -> Tensor:
        q, k = torch.einsum("b...e,hde->bh...d", x, self.q), torch.einsum("bse,hde->bshd", x, self.k)
        weights = torch.einsum("bhqd,bkhd->bhqk", q, k).softmax(-1)
        mixed = torch.einsum("bhqk,bke,hde->bqhd", weights, x, self.v)
        return torch.tensordot(mixed, self.out, dims=([2, 3], [1, 2]))


class Stacked(nn.Module):
    """Query, key and value in one parameter (3, features, features); one head."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.out = nn.Parameter(torch.zeros(3, E, E)), nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = torch.matmul(x[:, None], self.all[None]).unbind(1)
        return self.out(torch.baddbmm(x.new_zeros(1), q, k.mT).softmax(-1).bmm(v))


class Shifted(nn.Module):
    """Shifted windows with a table of relative positions, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.table = nn.Parameter(torch.zeros(9, H))
        rows = torch.arange(4) // 2
        columns = torch.arange(4) % 2
        index = (rows[:, None] - rows + 1) * 3 + columns[:, None] - columns + 1
        self.register_buffer("index", index.flatten())

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        x = F.pad(x, (0, 0, 0, 16 - length)).view(batch, 4, 4, E).roll((-1, -1), (1, 2))
        x = x.view(batch, 2, 2, 2, 2, E).permute(0, 1, 3, 2, 4, 5).reshape(batch * 4, 4, E)
        q, k, v = self.qkv(x).reshape(batch * 4, 4, 3, H, D).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index].view(4, 4, H).permute(2, 0, 1).contiguous()
        x = ((q * D**-0.5).matmul(k.transpose(-2, -1)) + bias[None]).softmax(-1).matmul(v)
        x = self.out(x.transpose(1, 2).reshape(batch * 4, 4, E)).view(batch, 2, 2, 2, 2, E)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(batch, 4, 4, E).roll((1, 1), (1, 2))
        return x.flatten(1, 2)[:, :length]


class Patches(nn.Module):
    """A vision transformer: patches, a class token, positions, a pre-norm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.token = nn.Conv2d(3, E, 4, 4), nn.Parameter(torch.zeros(1, 1, E))
        self.places = nn.Parameter(torch.zeros(1, 5, E))
        self.layer = nn.TransformerEncoderLayer(E, H, 10, batch_first=True, norm_first=True, activation="gelu")
        self.norm, self.head = nn.LayerNorm(E), nn.Linear(E, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.layer(x))[:, 0])


class Translator(nn.Module):
    """nn.Transformer over embeddings that source and target share, with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, E)
        self.core = nn.Transformer(E, H, 1, 1, 10, batch_first=True)
        self.head = nn.Linear(E, 11)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.head(self.core(self.tokens(source), self.tokens(target), tgt_mask=mask, tgt_is_causal=True))


def _translator() -> tuple[nn.Module, tuple[Any, ...], list[tuple[int, ...]]]:
    source, target = (torch.randint(11, (2, n), generator=torch.Generator().manual_seed(n)) for n in (6, 4))
    return Translator(), (source, target), [(E,), (10,), (10,), *[(H,), (H, D), (H, D)] * 3]


ATTENTION: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...], list[tuple[int, ...]]]]] = {
    "multihead": lambda: (Block(MultiHead(False, batch_first=True)), STEPS, FULL),
    "multihead-weights": lambda: (Block(MultiHead(True, batch_first=True)), STEPS, FULL),
    "multihead-biases": lambda: (Block(MultiHead(False, add_bias_kv=True, add_zero_attn=True)), STEPS, FULL),
    "multihead-kdim": lambda: (Block(MultiHead(False, kdim=E, vdim=E, bias=False)), STEPS, FULL),
    "fused-view": lambda: (Block(Fused("view")), STEPS, FULL),
    "fused-chunks": lambda: (Block(Fused("chunk", bias=False)), STEPS, FULL),
    "fused-by-hand": lambda: (Block(Fused("by hand")), STEPS, FULL),
    "fused-norms": lambda: (Block(Fused("view", norm="dims")), STEPS, [(E,), (H,), (H, D), (D,)]),
    "fused-norm-over-heads": lambda: (Block(Fused("view", norm="heads")), STEPS, [(E,), (H,), (H, D), (D,)]),
    "rotary-halves": lambda: (Block(Rotary("halves")), STEPS, [(E,), (2,), (2, 3), (2, D)]),
    "rotary-pairs": lambda: (Block(Rotary("pairs")), STEPS, [(E,), (2,), (2, 3), (2, D)]),
    "rotary-complex": lambda: (Block(Rotary("complex")), STEPS, [(E,), (2,), (2, 3), (2, D)]),
    "alibi": lambda: (Block(Alibi()), STEPS, [(E,), *[(D,)] * (2 * H)]),
    "letters": lambda: (Block(Letters()), STEPS, FULL),
    "stacked": lambda: (Block(Stacked()), STEPS, [(E,), (E,), (E,)]),
    "windows-shifted": lambda: (Block(Shifted()), STEPS, FULL),
    "encoder-layer": lambda: (Block(nn.TransformerEncoderLayer(E, H, 10, batch_first=True)), STEPS, [*FULL, (10,)]),
    "patches": lambda: (Patches(), (torch.zeros(2, 3, 8, 8),), [*FULL, (10,)]),
    "translator": _translator,
}
