"""Weight matching against planted truth, a slow oracle and limit cases."""

from __future__ import annotations

from itertools import permutations, product

import networks
import pytest
import torch
from torch import Tensor, nn

from fedrebasin import (
    PermutationSpec,
    RebasinError,
    SpecMismatchError,
    check_spec,
    identity_perms,
    invert,
    match_each,
    permute,
    random_perms,
    trace,
    weight_matching,
)
from fedrebasin.matching.problem import WeightProblem

State = dict[str, Tensor]


def _noisy(spec: PermutationSpec, state: State, relative: float, seed: int) -> State:
    """Noise on every parameter, ``relative`` to the size of its entries."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor
        if name in spec.buffers
        else tensor + relative * tensor.square().mean().sqrt() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in state.items()
    }


def _objective(spec: PermutationSpec, reference: State, model: State, perms: State) -> float:
    return WeightProblem(spec, reference, model, init=perms).objective()


def _train_a_little(net: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    net.train()
    for _ in range(8):
        x = torch.randn(16, *inputs[0].shape[1:])
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), torch.randint(0, 3, (16,))).backward()
        optimizer.step()


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("name", ["mlp", "vgg11", "resnet20-batchnorm", "resnet20-layernorm", "dense-block"])
def test_weight_matching_recovers_a_planted_permutation(name: str, noise: float, trained: bool) -> None:
    torch.manual_seed(0)
    net, inputs = networks.NETWORKS[name]()
    spec = trace(net, inputs)
    if trained:
        _train_a_little(net, inputs)
    reference = net.state_dict()
    perms = random_perms(spec, 7)
    model = _noisy(spec, permute(spec, perms, reference), noise, 7)
    matching = weight_matching(spec, reference, model)
    planted = _objective(spec, reference, model, invert(spec, perms))
    assert matching.objective >= planted - 1e-6 * abs(planted)
    if noise == 0 and name != "dense-block":
        assert all(torch.equal(matching.perms[key], truth) for key, truth in invert(spec, perms).items())


def test_no_choice_of_permutations_is_better_on_a_net_small_enough_to_try_all() -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    spec = trace(net.float(), (torch.zeros(1, 3),))
    reached = 0
    for seed in range(5):
        a, b = (
            {
                name: torch.randn(shape, generator=torch.Generator().manual_seed(2 * seed + k))
                for name, shape in spec.shapes.items()
            }
            for k in (0, 1)
        )
        best = max(
            _objective(spec, a, b, {"0": torch.tensor(first), "2": torch.tensor(second)})
            for first, second in product(permutations(range(4)), permutations(range(3)))
        )
        found = weight_matching(spec, a, b, restarts=5).objective
        assert found <= best + 1e-4
        reached += found >= best - 1e-4
    assert reached == 5


def test_the_similarity_sums_over_every_axis_that_a_permutation_ties() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    spec = trace(net, (torch.zeros(1, 3),))
    a, b = net.state_dict(), {name: torch.randn_like(tensor) for name, tensor in net.state_dict().items()}
    problem = WeightProblem(spec, a, b)
    slow = torch.tensor(
        [
            [
                float(
                    a["0.weight"][i] @ b["0.weight"][j]
                    + a["0.bias"][i] * b["0.bias"][j]
                    + a["2.weight"][:, i] @ b["2.weight"][:, j]
                )
                for j in range(4)
            ]
            for i in range(4)
        ]
    )
    torch.testing.assert_close(problem.similarity(problem.blocks[0]).float(), slow)


@pytest.mark.parametrize("name", ["mlp", "resnet20-batchnorm", "grouped", "two-inputs"])
def test_the_objective_rises_with_every_sweep_and_is_what_it_says(name: str) -> None:
    net, inputs = networks.NETWORKS[name]()
    spec = trace(net, inputs)
    a, b = (
        {n: torch.randn(s, generator=torch.Generator().manual_seed(k)) for n, s in spec.shapes.items()} for k in (1, 2)
    )
    matching = weight_matching(spec, a, b)
    assert list(matching.history) == sorted(matching.history)
    assert matching.objective > matching.objective_before
    assert matching.objective == pytest.approx(_objective(spec, a, b, matching.perms), rel=1e-5)
    assert matching.objective_before == pytest.approx(_objective(spec, a, b, identity_perms(spec)), rel=1e-5)


def test_a_perm_on_both_axes_of_one_tensor_never_lowers_the_objective() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.step, self.out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.into(x))
            return self.out(hidden + torch.tanh(self.step(hidden)))

    net = Recurrent()
    spec = check_spec(net, trace(net, (torch.zeros(1, 3),)), (torch.zeros(1, 3),))
    assert len(spec.perm_shapes) == 1
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        a, b = (
            {name: torch.randn(shape, generator=generator) for name, shape in spec.shapes.items()} for _ in range(2)
        )
        matching = weight_matching(spec, a, b, seed=seed)
        assert list(matching.history) == sorted(matching.history)
        assert matching.objective >= matching.objective_before


def test_matching_is_the_same_for_the_same_seed() -> None:
    net, inputs = networks.NETWORKS["resnet20-batchnorm"]()
    spec = trace(net, inputs)
    a, b = (
        {n: torch.randn(s, generator=torch.Generator().manual_seed(k)) for n, s in spec.shapes.items()} for k in (1, 2)
    )
    first, second = (weight_matching(spec, a, b, seed=4, restarts=1) for _ in range(2))
    assert all(torch.equal(first.perms[key], second.perms[key]) for key in first.perms)


def test_a_model_near_its_reference_is_not_moved() -> None:
    net, inputs = networks.NETWORKS["resnet20-batchnorm"]()
    spec = trace(net, inputs)
    state = net.state_dict()
    matching = weight_matching(spec, state, _noisy(spec, state, 0.1, 0))
    assert matching.moved_fraction == 0
    assert matching.objective == matching.objective_before


def test_running_statistics_do_not_vote() -> None:
    net, inputs = networks.NETWORKS["conv"]()
    spec = trace(net, inputs)
    state = net.state_dict()
    other = {name: torch.randn_like(tensor) * 1e6 if "running" in name else tensor for name, tensor in state.items()}
    assert weight_matching(spec, state, other).moved_fraction == 0


def test_a_net_without_perms_is_matched_by_nothing() -> None:
    net = nn.Linear(3, 2)
    matching = weight_matching(trace(net, (torch.zeros(1, 3),)), net.state_dict(), net.state_dict())
    assert matching.perms == {} and matching.moved_fraction == 0


def test_half_precision_is_matched_like_single() -> None:
    net, inputs = networks.mlp()
    spec, state = trace(net, inputs), net.half().state_dict()
    perms = random_perms(spec, 1)
    matching = weight_matching(spec, state, permute(spec, perms, state))
    assert all(torch.equal(matching.perms[key], truth) for key, truth in invert(spec, perms).items())


def test_bad_input_is_refused_by_name() -> None:
    net, inputs = networks.mlp()
    spec, state = trace(net, inputs), net.state_dict()
    broken = {**state, "3.bias": torch.full((12,), torch.nan)}
    with pytest.raises(SpecMismatchError, match=r"model: '3.bias' holds a NaN, an infinity or numbers"):
        weight_matching(spec, state, broken)
    with pytest.raises(RebasinError, match="restarts: expected 0 or more; got -1"):
        weight_matching(spec, state, state, restarts=-1)


def test_models_whose_products_leave_float32_are_matched() -> None:
    net, inputs = networks.NETWORKS["mlp"]()
    spec = trace(net, inputs)
    perms = random_perms(spec, 3)
    huge = {name: 1e25 * tensor for name, tensor in net.state_dict().items()}
    found = weight_matching(spec, huge, permute(spec, perms, huge))
    assert all(torch.equal(found.perms[key], truth) for key, truth in invert(spec, perms).items())


def test_numbers_whose_squares_leave_float64_are_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    spec = trace(net, (torch.zeros(1, 3),))
    huge = {name: 1e200 * tensor.double() for name, tensor in net.state_dict().items()}
    with pytest.raises(SpecMismatchError, match=r"model: '0.weight' holds .* numbers whose squares overflow"):
        weight_matching(spec, net.double().state_dict(), huge)


def test_a_start_that_is_no_permutation_of_the_spec_is_refused() -> None:
    net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    spec = trace(net, (torch.randn(2, 1),))
    a = {"0.weight": torch.ones(2, 1), "1.weight": torch.ones(1, 2)}
    b = {"0.weight": torch.tensor([[5.0], [1.0]]), "1.weight": torch.tensor([[5.0, 1.0]])}
    for init, message in (
        ({"0": torch.tensor([0, 0])}, "'0' is not a permutation"),
        ({}, "'0' is in one only"),
        ({**identity_perms(spec), "2": torch.tensor([0])}, "'2' is in one only"),
    ):
        with pytest.raises(SpecMismatchError, match=message):
            weight_matching(spec, a, b, init=init)
        with pytest.raises(SpecMismatchError, match=message):
            match_each(spec, a, [b], inits=[init])
