"""Heads, groups and gates: planted permutations are found whatever depends on what."""

from __future__ import annotations

from collections.abc import Callable

import networks_zoo
import pytest
import torch
from torch import Tensor, nn

from fedrebasin import PermutationSpec, compose, match_many, permute, random_perms, trace, weight_matching
from fedrebasin.matching.nested import nested_step
from fedrebasin.matching.problem import WeightProblem


def encoder() -> tuple[nn.Module, tuple[Tensor, ...]]:
    layer = nn.TransformerEncoderLayer(24, 3, 40, batch_first=True)
    layers = [nn.Linear(6, 24), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(24, 5)]
    return nn.Sequential(*layers), (torch.zeros(2, 5, 6),)


class GroupedResidual(nn.Module):
    """Two bottlenecks with grouped convolutions, as in ResNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(32, 24, 1), nn.BatchNorm2d(24), nn.ReLU()),
                *(nn.Conv2d(24, 24, 3, padding=1, groups=4), nn.BatchNorm2d(24), nn.ReLU()),
                *(nn.Conv2d(24, 32, 1), nn.BatchNorm2d(32)),
            )
            for _ in range(2)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + block(x))
        return self.head(x.mean((2, 3)))


def zoo(name: str) -> Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]:
    return lambda: networks_zoo.ZOO[name]()[:2]


def noisy(spec: PermutationSpec, state: dict[str, Tensor], noise: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + noise * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if name in spec.parameters and tensor.numel() > 1
        else tensor
        for name, tensor in state.items()
    }


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("make", [encoder, zoo("lstm"), zoo("gru")])
def test_planted_permutations_of_heads_and_gates_are_recovered(make: Callable[..., object], noise: float) -> None:
    torch.manual_seed(0)
    net, inputs = make()  # type: ignore[misc]
    spec = trace(net, inputs)
    state = net.state_dict()
    planted = random_perms(spec, 1)
    copy = noisy(spec, state, noise, 2)
    matching = weight_matching(spec, state, permute(spec, planted, copy))
    for perm, order in compose(spec, planted, matching.perms).items():
        assert torch.equal(order, torch.arange(order.shape[-1]).expand(order.shape)), perm


def test_units_of_heads_that_are_fixed_by_hand_are_recovered() -> None:
    torch.manual_seed(0)
    net, inputs = encoder()
    whole, state = trace(net, inputs), net.state_dict()
    spec = whole.fix(*set(whole.over.values()))
    assert set(spec.over) == set(whole.over)
    planted = random_perms(spec, 1)
    moved = permute(spec, planted, noisy(spec, state, 0.2, 2))
    for found in (weight_matching(spec, state, moved).perms, match_many(spec, [state, moved]).perms[1]):
        for perm, order in compose(spec, planted, found).items():
            assert torch.equal(order, torch.arange(order.shape[-1]).expand(order.shape)), perm


def test_planted_groups_of_a_residual_network_are_recovered() -> None:
    torch.manual_seed(0)
    net = GroupedResidual()
    spec = trace(net, (torch.zeros(2, 3, 8, 8),))
    state = net.state_dict()
    assert sorted(spec.perm_shapes.values()) == [(4,), (4,), (4, 6), (4, 6), (4, 6), (4, 6), (32,)]
    for seed in range(3):
        planted = random_perms(spec, seed)
        moved = permute(spec, planted, noisy(spec, state, 0.2, seed))
        found = compose(spec, planted, weight_matching(spec, state, moved).perms)
        assert all(torch.equal(order, torch.arange(order.shape[-1]).expand(order.shape)) for order in found.values())


def test_a_step_for_heads_is_as_good_as_trying_all_orders_of_heads_and_dims() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.out = nn.Linear(2, 6, bias=False), nn.Linear(6, 2, bias=False)
            self.weigh = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            heads = self.value(x).unflatten(-1, (2, 3)) * torch.softmax(self.weigh(x).relu(), -1).unsqueeze(-1)
            return self.out(heads.flatten(-2))

    torch.manual_seed(3)
    one, two = Heads(), Heads()
    spec = trace(one, (torch.zeros(4, 2),))
    (outer,) = set(spec.over.values())
    problem = WeightProblem(spec, one.state_dict(), two.state_dict())
    block = next(block for block in problem.blocks if block.perm == outer)
    problem.move(nested_step(problem, block))
    found = problem.objective()
    best = -torch.inf
    for swap in ([0, 1], [1, 0]):
        total = 0.0
        problem.reset()
        problem.move({outer: torch.tensor(swap)})
        for row in [block for block in problem.blocks if block.row is not None]:
            similarity = problem.similarity(row)
            orders = torch.cartesian_prod(*[torch.arange(3)] * 3)
            orders = orders[[len(set(order.tolist())) == 3 for order in orders]]
            total += max(float(similarity[torch.arange(3), order].sum()) for order in orders)
        rest = problem.objective() - sum(
            float(problem.similarity(row).diagonal().sum()) for row in problem.blocks if row.row is not None
        )
        best = max(best, total + rest)
    assert found == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn-relu"])
def test_a_perm_on_both_axes_of_a_tensor_never_lowers_the_objective(name: str) -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        one, inputs = zoo(name)()
        two, _ = zoo(name)()
        matching = weight_matching(trace(one, inputs), one.state_dict(), two.state_dict())
        assert matching.objective >= matching.objective_before
        assert all(after >= before for before, after in zip(matching.history, matching.history[1:], strict=False))
