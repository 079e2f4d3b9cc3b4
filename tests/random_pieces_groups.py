"""More pieces for :mod:`random_networks`: attention, recurrent layers, stacked parameters, groups and products."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from random_pieces import Block, divisor, parameter, piece
from torch import Tensor, nn


@piece
def attention(f: int, a: int, b: int, c: int) -> Block:
    heads, size, shared = 1 + a % 3, 1 + b % 3, 1 + a // 3
    full, few = heads * shared * size, heads * size
    parts = {"q": nn.Linear(f, full), "k": nn.Linear(f, few), "v": nn.Linear(f, few), "out": nn.Linear(full, f)}

    def attend(net: Any, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, size)).transpose(1, 2) for part in (net.q, net.k, net.v))
        if c % 2:
            mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = (part.repeat_interleave(shared, 1) for part in (k, v))
            mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return net.out(mixed.transpose(1, 2).flatten(2))

    return Block(f, attend, **parts)


@piece
def fused_attention(f: int, a: int, b: int, c: int) -> Block:
    heads, size = 1 + a % 3, 1 + b % 3

    def attend(net: Any, x: Tensor) -> Tensor:
        if c % 3 == 0:
            q, k, v = net.qkv(x).unflatten(-1, (3, heads, size)).permute(2, 0, 3, 1, 4)
        elif c % 3 == 1:
            q, k, v = (part.unflatten(-1, (heads, size)).transpose(1, 2) for part in net.qkv(x).chunk(3, -1))
        else:
            q, k, v = net.qkv(x).unflatten(-1, (heads, 3 * size)).transpose(1, 2).split(size, -1)
        return net.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    qkv, out = nn.Linear(f, 3 * heads * size, bias=c < 3), nn.Linear(heads * size, 1 + b)
    return Block(1 + b, attend, qkv=qkv, out=out)


@piece
def multihead(f: int, a: int, b: int, c: int) -> Block:
    core = nn.MultiheadAttention(f, divisor(f, a), batch_first=True, bias=b % 2 == 0, add_bias_kv=b == 5)
    return Block(f, lambda net, x: net.core(x, x, x, need_weights=bool(c % 2))[0], core=core)


@piece
def recurrent(f: int, a: int, b: int, c: int) -> Block:
    kind, ways, size = [nn.LSTM, nn.GRU, nn.RNN][b % 3], 1 + c % 2, a + 1
    options = {"proj_size": a} if b == 3 and a else {}
    core = kind(f, size, 1 + c // 3, batch_first=True, bidirectional=ways == 2, **options)
    return Block(ways * options.get("proj_size", size), lambda net, x: net.core(x)[0], core=core)


@piece
def stacked(f: int, a: int, b: int, c: int) -> Block:
    count, size = 1 + a % 3, 1 + b % 3
    up, down = parameter(count, f, size), parameter(count, size, f)
    if c % 3 == 0:
        return Block(count * size, lambda net, x: torch.einsum("btf,nfh->btnh", x, net.up).flatten(2), up=up)
    if c % 3 == 1:
        return Block(size, lambda net, x: (x[:, None] @ net.up).relu().sum(1), up=up)

    def mix(net: Any, x: Tensor) -> Tensor:
        hidden = torch.einsum("btf,nfh->btnh", x, net.up).relu()
        return torch.einsum("btnh,nhf,btn->btf", hidden, net.down, net.gate(x).softmax(-1))

    return Block(f, mix, up=up, down=down, gate=nn.Linear(f, count))


@piece
def group_linear(f: int, a: int, b: int, c: int) -> Block:
    groups, size = divisor(f, a), 1 + b % 3

    def run(net: Any, x: Tensor) -> Tensor:
        return torch.einsum("btgu,guv->btgv", x.unflatten(-1, (groups, -1)), net.core).flatten(2)

    return Block(groups * size, run, core=parameter(groups, f // groups, size))


@piece
def within_groups(f: int, a: int, b: int, c: int) -> Block:
    groups = divisor(f, a)
    size = f // groups
    if b % 3 == 0:
        return Block(f, lambda net, x: net.core(x.unflatten(-1, (groups, size))).flatten(2), core=nn.LayerNorm(size))
    if b % 3 == 1:
        return Block(groups, lambda net, x: x.unflatten(-1, (groups, size)).amax(-1))
    return Block(size, lambda net, x: x.unflatten(-1, (groups, size)).mean(-2))


@piece
def between_groups(f: int, a: int, b: int, c: int) -> Block:
    groups = divisor(f, a)

    def run(net: Any, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (groups, -1))
        mixed = torch.einsum("btgu,mgu->btm", x, net.core)
        return mixed + x.sum(-1) if b % 2 else mixed

    return Block(groups, run, core=parameter(groups, groups, f // groups))


@piece
def products_of_groups(f: int, a: int, b: int, c: int) -> Block:
    groups = 1 + a % 3

    def run(net: Any, x: Tensor) -> Tensor:
        x = net.core(x).unflatten(-1, (groups, -1))
        products = x @ x.mT
        return products.flatten(2) if c % 2 else products.softmax(-1).amax(-1)

    return Block(groups * groups if c % 2 else groups, run, core=nn.Linear(f, groups * (1 + b % 3)))


@piece
def outer(f: int, a: int, b: int, c: int) -> Block:
    core = nn.Linear(f, 1 + a % 3)
    if b % 2:
        return Block(f * (1 + a % 3), lambda net, x: (x[..., None] * net.core(x)[..., None, :]).flatten(2), core=core)
    return Block(f * (1 + a % 3), lambda net, x: (x[..., None, :] * net.core(x)[..., None]).flatten(2), core=core)


@piece
def bilinear(f: int, a: int, b: int, c: int) -> Block:
    return Block(a + 1, lambda net, x: net.core(x, x), core=nn.Bilinear(f, f, a + 1))
