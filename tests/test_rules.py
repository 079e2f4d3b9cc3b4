"""Every kind of network in the zoo is traced without fixing an op, with all its freedom, and proven."""

from __future__ import annotations

from typing import Any

import networks_zoo
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrebasin import Axis, PermutationSpec, check_spec, trace
from fedrebasin.layout import Fixed
from fedrebasin.proof import Proof

Traced = tuple[nn.Module, PermutationSpec, Any, list[tuple[int, ...]]]


@pytest.fixture(scope="module", params=list(networks_zoo.ZOO))
def case(request: pytest.FixtureRequest) -> Traced:
    net, inputs, shapes = networks_zoo.ZOO[request.param]()
    return net, trace(net, inputs, strict=True), inputs, shapes


def test_no_freedom_is_lost(case: Traced) -> None:
    _, spec, _, shapes = case
    assert sorted(spec.perm_shapes.values()) == sorted(shapes)
    assert spec.notes == ()


def test_permuting_hidden_units_leaves_outputs_unchanged(case: Traced) -> None:
    net, spec, inputs, _ = case
    assert check_spec(net, spec, inputs).checked


def test_swapping_two_units_of_any_permuted_axis_alone_changes_an_output(case: Traced) -> None:
    net, spec, inputs, _ = case
    proof = Proof(net, spec, inputs, seed=0)
    for axis in sorted({axis for axes in spec.tied.values() for axis in axes}):
        tensor = proof.state[axis.name]
        order = torch.arange(tensor.shape[axis.dim])
        order[[0, -1]] = order[[-1, 0]]
        swapped = {
            name: value.index_select(axis.dim, order) if value is tensor else value
            for name, value in proof.state.items()
        }
        changes = [(a - b).abs().max() / b.abs().max() for a, b in zip(proof.run(swapped), proof.outputs, strict=True)]
        assert max(changes) > proof.tolerance or _may_move_alone(spec, axis), axis


def _may_move_alone(spec: PermutationSpec, axis: Axis) -> bool:
    """Whether no other axis is tied to this one: equal copies that are read by one weight only."""
    return all(axes == (axis,) for axes in spec.tied.values() if axis in axes)


def _sequential(*layers: nn.Module) -> PermutationSpec:
    net = nn.Sequential(*layers)
    return trace(net, (torch.zeros(2, 5),), strict=True)


class _Op(nn.Module):
    def __init__(self, op: Any) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


@pytest.mark.parametrize(
    "op",
    [
        lambda x: x.cumsum(-1),
        lambda x: x.flip(-1),
        lambda x: x.roll(1, -1),
        lambda x: x * x.argmax(-1, keepdim=True),
        lambda x: x + x.max(-1, keepdim=True)[1],
        lambda x: x + x.topk(2)[1].sum(-1, keepdim=True),
        lambda x: torch.diagonal(x[:, :, None] * x[:, None], 1, 1, 2).repeat(1, 6)[:, :6],
        lambda x: x[:, torch.tensor([1, 0, 2, 3, 5, 4])],
        lambda x: x.unfold(1, 3, 3).flatten(1),
        lambda x: x.triu(),
        lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(1, (3, 2)))).flip(1).flatten(1),
        lambda x: x + torch.rand_like(x),
    ],
)
def test_where_the_order_counts_the_axis_is_fixed(op: Any) -> None:
    spec = _sequential(nn.Linear(5, 6), _Op(op), nn.Linear(6, 2))
    assert isinstance(spec.axes["0.weight"][0], Fixed)


@pytest.mark.parametrize(
    "op",
    [
        lambda x: x + x.max(-1, keepdim=True)[0],
        lambda x: x + x.topk(2)[0].sum(-1, keepdim=True),
        lambda x: x * x.sort()[0][:, :1],
        lambda x: x - torch.std_mean(x, -1, keepdim=True)[1],
        lambda x: x.clone().index_put((torch.tensor([0]),), x[1:]),
        lambda x: x.slice_scatter(x[:1] * 2, 0, 1),
        lambda x: x.select_scatter(x[0] * 2, 0, 1),
        lambda x: x.scatter_add(0, torch.tensor([[1]]).expand(1, 6), x[:1]),
        lambda x: torch.diagonal(x[:, :, None] * x[:, None], 0, 1, 2),
        lambda x: torch.einsum("bi,bi->bi", x, torch.einsum("bii->bi", x[:, :, None] * x[:, None])),
        lambda x: torch.addmm(x, x.exp() @ x.T, x),
        lambda x: x * torch.linalg.vector_norm(x, 3, -1, keepdim=True) + torch.inner(x, x).sum(),
        lambda x: x + torch.outer(x.sum(1), x.sum(0)),
        lambda x: x + torch.bucketize(x, torch.tensor([-0.1, 0.1])) + torch.searchsorted(torch.arange(3.0), x),
        lambda x: torch.empty(2, 6).copy_(x),
        lambda x: torch.polar(x, x).real + torch.complex(x, x).imag,
        lambda x: torch.distributions.Normal(x, x.exp()).mean,
        lambda x: torch.where(torch.ops.aten._is_any_true(x > 0), x, -x),
        lambda x: x + torch.mv(x, x[0])[:, None] + torch.dot(x[0], x[1]) + torch.linalg.norm(x),
    ],
)
def test_where_the_order_does_not_count_the_axis_is_free(op: Any) -> None:
    net, inputs = nn.Sequential(nn.Linear(5, 6), _Op(op), nn.Linear(6, 2)), (torch.zeros(2, 5),)
    spec = trace(net, inputs, strict=True)
    assert list(spec.perm_shapes.values()) == [(6,)]
    assert check_spec(net, spec, inputs).checked


@pytest.mark.parametrize("spatial", [1, 2, 3])
def test_channels_are_free_between_a_pool_and_its_inverse(spatial: int) -> None:
    layer: Any = getattr(nn, f"Conv{spatial}d")

    class Unpooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = layer(3, 6, 3), layer(6, 6, 1), layer(6, 2, 3)

        def forward(self, x: Tensor) -> Tensor:
            pooled, places = getattr(F, f"max_pool{spatial}d")(self.first(x), 2, return_indices=True)
            out: Tensor = self.last(getattr(F, f"max_unpool{spatial}d")(self.inner(pooled).relu(), places, 2))
            return out

    net, inputs = Unpooled(), (torch.zeros(2, 3, *[6] * spatial),)
    spec = check_spec(net, trace(net, inputs, strict=True), inputs)
    assert list(spec.perm_shapes.values()) == [(6,)] and spec.notes == ()


class Experts(nn.Module):
    """Rows go to experts, whose matrices are applied in one grouped product, as transformers' models do it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.router, self.last = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)
        self.up, self.down = nn.Parameter(torch.randn(3, 6, 5)), nn.Parameter(torch.randn(3, 5, 6))

    def forward(self, x: Tensor) -> Tensor:
        grouped = torch.ops.transformers.grouped_mm_fallback
        x = self.first(x)
        experts = self.router(x).argmax(1)
        order, ends = experts.argsort(), F.one_hot(experts, 3).sum(0).cumsum(0)
        found = grouped(F.relu(grouped(x[order], self.up, ends)), self.down, ends)
        result: Tensor = self.last(x + found[order.argsort()])
        return result


def test_experts_in_a_grouped_product_share_the_orders_of_their_units() -> None:
    def product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        rows = torch.arange(len(x)).unsqueeze(1)
        return torch.einsum("rk,rkn->rn", x, weight[(rows >= ends).sum(1)])

    with torch.library._scoped_library("transformers", "FRAGMENT") as library:
        library.define("grouped_mm_fallback(Tensor input, Tensor weight, Tensor offs) -> Tensor")
        library.impl("grouped_mm_fallback", product, "CPU")
        torch.library.register_fake(
            "transformers::grouped_mm_fallback", lambda x, w, _: x.new_empty(len(x), w.shape[2]), lib=library
        )
        inputs = (torch.randn(7, 4),)
        spec = check_spec(Experts(), trace(Experts(), inputs, strict=True), inputs)
    assert sorted(spec.perm_shapes.values()) == [(5,), (6,)]
