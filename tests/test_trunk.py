"""Networks with different heads: the trunk is matched and averaged, each keeps its head and its function."""

from __future__ import annotations

from collections.abc import Callable

import networks
import pytest
import torch
from torch import Tensor, nn

from fedrebasin import (
    RebasinError,
    SpecMismatchError,
    match_trunks,
    merge,
    merge_trunk_modules,
    merge_trunks,
    permute,
    random_perms,
    trace,
    trunk_tensors,
)
from fedrebasin.simulations.models import build_model

X = (torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),)


class Net(nn.Module):
    """A trunk with a norm, and a head of one's own: declared before the trunk, so that orders differ."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.first, self.norm, self.second = nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x)).relu()).relu())


class Folded(nn.Module):
    """A head that ties unit i to unit i + 5: the border is not free in this network."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x[:, :5] + x[:, 5:])


HEADS: dict[str, Callable[[], nn.Module]] = {
    "three classes": lambda: nn.Linear(10, 3),
    "seven classes": lambda: nn.Linear(10, 7),
    "deeper": lambda: nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 2)),
}


def made(head: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net(HEADS[head]()).double().eval()


def planted() -> tuple[list[nn.Module], list[nn.Module]]:
    """Networks with one trunk and three heads; and copies of each with its units in another order."""
    nets = [made(head, seed) for seed, head in enumerate(HEADS)]
    trunk = {name: tensor for name, tensor in nets[0].state_dict().items() if not name.startswith("head")}
    copies = []
    for seed, (net, head) in enumerate(zip(nets, HEADS, strict=True)):
        net.load_state_dict({**net.state_dict(), **trunk})
        copy, spec = made(head), trace(net.float(), X)
        copy.load_state_dict(permute(spec, random_perms(spec, 10 + seed), net.double().state_dict()))
        copies.append(copy)
    return nets, copies


def specs_of(nets: list[nn.Module]) -> list:
    specs = [trace(net.float(), X) for net in nets]
    for net in nets:
        net.double()
    return specs


def test_permuted_copies_of_one_trunk_with_different_heads_merge_back_exactly() -> None:
    nets, copies = planted()
    specs = specs_of(copies)
    states = [copy.state_dict() for copy in copies]
    merged = merge_trunks(specs, states, until="second", coefficients=[0.5, 0.3, 0.2])
    x = torch.randn(20, 5, dtype=torch.float64)
    for net, copy, state in zip(nets, copies, merged, strict=True):
        assert all(torch.equal(state[name], merged[0][name]) for name in trunk_tensors(specs[0], "second"))
        assert list(state) == list(copy.state_dict())
        copy.load_state_dict(state)
        torch.testing.assert_close(copy(x), net(x), rtol=1e-12, atol=1e-12)


def test_before_the_average_each_network_keeps_its_function() -> None:
    nets = [made(head, 5 + seed) for seed, head in enumerate(HEADS)]
    specs = specs_of(nets)
    found = match_trunks(specs, [net.state_dict() for net in nets], until="second")
    x = torch.randn(20, 5, dtype=torch.float64)
    assert found.objective > found.objective_before
    for net, spec, perms in zip(nets, specs, found.perms, strict=True):
        before = net(x)
        net.load_state_dict(permute(spec, perms, net.state_dict()))
        torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)


def test_heads_have_no_say_in_the_matching() -> None:
    nets = [made("three classes", seed) for seed in (1, 2)]
    specs = specs_of(nets)
    states = [net.state_dict() for net in nets]
    found = match_trunks(specs, states, until="second")
    loud = [
        {
            k: v * 1e6 * (1 + k.startswith("head") * torch.rand_like(v)) if k.startswith("head") else v
            for k, v in state.items()
        }
        for state in states
    ]
    again = match_trunks(specs, loud, until="second")
    for one, other in zip(found.perms, again.perms, strict=True):
        assert all(torch.equal(one[perm], other[perm]) for perm in one)


def test_units_that_one_head_fixes_or_ties_stay_for_all() -> None:
    nets = [made("three classes", 1), Net(Folded()).double().eval(), made("seven classes", 2)]
    specs = specs_of(nets)
    found = match_trunks(specs, [net.state_dict() for net in nets], until="second")
    x = torch.randn(20, 5, dtype=torch.float64)
    assert any((perms["first"] != torch.arange(12)).any() for perms in found.perms)
    for net, spec, perms in zip(nets, specs, found.perms, strict=True):
        before = net(x)
        net.load_state_dict(permute(spec, perms, net.state_dict()))
        torch.testing.assert_close(net(x), before, rtol=1e-12, atol=1e-12)
    weights = [permute(s, p, n.state_dict())["second.bias"] for s, p, n in zip(specs, found.perms, nets, strict=True)]
    assert all(torch.equal(weight, net.state_dict()["second.bias"]) for weight, net in zip(weights, nets, strict=True))


def test_the_trunk_is_what_the_graph_uses_up_to_the_layer_with_its_counters() -> None:
    net = made("deeper")
    spec = trace(net.float(), X)
    statistics = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
    norm = ("first.weight", "first.bias", "norm.weight", "norm.bias", *statistics)
    assert trunk_tensors(spec, "norm") == norm
    assert trunk_tensors(spec, "second") == (*norm, "second.weight", "second.bias")
    assert set(trunk_tensors(spec, "head")) == set(spec.axes)
    assert trunk_tensors(spec, "first.weight") == ("first.weight",)


def test_a_residual_network_shares_its_blocks_up_to_one() -> None:
    nets = [build_model("resnet20", (3, 16, 16), classes, width=1).eval() for classes in (3, 8)]
    state = nets[0].state_dict()
    spec = trace(nets[0], networks.IMAGE)
    names = trunk_tensors(spec, "8")
    assert 20 < len(names) < len(spec.axes)
    shared = {name: state[name] for name in names}
    nets[1].load_state_dict({**nets[1].state_dict(), **shared})
    x = torch.randn(4, 3, 16, 16)
    expected = [net(x) for net in nets]
    other = trace(nets[1], networks.IMAGE)
    nets[1].load_state_dict(permute(other, random_perms(other, 3), nets[1].state_dict()))
    for net, expect in zip(merge_trunk_modules(nets, networks.IMAGE, until="8"), expected, strict=True):
        torch.testing.assert_close(net(x), expect, rtol=1e-3, atol=1e-3)


def test_the_trunk_is_the_weighted_mean_of_the_aligned_trunks() -> None:
    nets = [made(head, 5 + seed) for seed, head in enumerate(HEADS)]
    specs = specs_of(nets)
    states = [net.state_dict() for net in nets]
    merged = merge_trunks(specs, states, until="norm", coefficients=[1, 2, 5])
    found = match_trunks(specs, states, until="norm", coefficients=[1, 2, 5])
    aligned = [permute(s, p, m) for s, p, m in zip(specs, found.perms, states, strict=True)]
    expected = merge([{"w": state["first.weight"]} for state in aligned], coefficients=[1, 2, 5])["w"]
    assert torch.equal(merged[2]["first.weight"], expected)
    assert torch.equal(merged[1]["second.weight"], aligned[1]["second.weight"])


def test_what_does_not_fit_is_refused_with_the_way_out() -> None:
    nets = [made("three classes"), made("seven classes")]
    specs, states = specs_of(nets), [net.state_dict() for net in nets]
    with pytest.raises(RebasinError, match=r"until: expected a module .* one of \['first', 'norm', .* got 'third'"):
        merge_trunks(specs, states, until="third")
    with pytest.raises(SpecMismatchError, match=r"axis 0 of 'head.weight' .* got 3 and 7; share less"):
        merge_trunks(specs, states, until="head")
    with pytest.raises(RebasinError, match="specs: expected one for each model; got 1 for 2"):
        merge_trunks(specs[:1], states, until="first")
    with pytest.raises(SpecMismatchError, match=r"models\[1\]: the state dict has a tensor 'x'"):
        merge_trunks(specs, [states[0], {**states[1], "x": torch.zeros(1)}], until="first")
    tied, inputs = networks.NETWORKS["two-inputs"]()
    with pytest.raises(RebasinError, match=r"'again.weight' of models\[0\] .* one tensor with 'out.weight'"):
        merge_trunks([trace(tied, inputs)], [tied.state_dict()], until="gate")
