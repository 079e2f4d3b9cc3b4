"""least_squares: exact where the ends' average can be represented, and the same however it is computed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from corrections_ends import check_keeps_form, random_ends, run
from torch import Tensor, nn

from fedrebasin import CalibrationError, RebasinError, SpecMismatchError, merge
from fedrebasin.corrections.layers import Layer, find_steps
from fedrebasin.corrections.least_squares import RIDGES, choose_ridge, least_squares
from fedrebasin.corrections.linear_maps import columns, outputs
from fedrebasin.corrections.normal_equations import NormalEquations, gram_product
from fedrebasin.corrections.passes import Runner
from fedrebasin.simulations.models import build_model


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


IMAGES = [draw(30, 3, 8, 8, seed=seed) for seed in range(4)]


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def test_every_layer_equals_numpys_least_squares_on_the_networks_own_inputs() -> None:
    net, batches, shares = deep(), [draw(60, 4), draw(40, 4, seed=1)], [0.5, 0.2, 0.3]
    ends = random_ends(net, count=3)
    found = least_squares(net, merge(ends, coefficients=shares), ends, batches, coefficients=shares, ridge=0.0)
    x = torch.cat(batches)
    own, theirs = x, [x] * 3
    for place in ("0", "2", "4"):
        z = [F.linear(h, end[f"{place}.weight"], end[f"{place}.bias"]) for h, end in zip(theirs, ends, strict=True)]
        goal = sum(share * one for share, one in zip(shares, z, strict=True))
        design = np.column_stack([own.numpy(), np.ones(len(own))])
        expected = np.linalg.lstsq(design, torch.as_tensor(goal).numpy(), rcond=None)[0]
        np.testing.assert_allclose(found[f"{place}.weight"].numpy(), expected[:-1].T, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(found[f"{place}.bias"].numpy(), expected[-1], rtol=1e-6, atol=1e-8)
        own = torch.tanh(F.linear(own, found[f"{place}.weight"], found[f"{place}.bias"]))
        theirs = [torch.tanh(one) for one in z]


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


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "norm-free": norm_free,
    "batchnorm": lambda: build_model("conv", (3, 8, 8), 3, width=6),
    "layernorm": lambda: build_model("conv", (3, 8, 8), 3, width=6, norm="layer"),
    "residual": Residual,
    "groupnorm": networks.Grouped,
}


@pytest.mark.parametrize("name", MAKERS)
def test_an_end_merged_with_itself_keeps_its_function(name: str) -> None:
    net = MAKERS[name]().double()
    if name == "batchnorm":
        nn.init.constant_(net.get_parameter("1.weight"), -1.0)
    images = [torch.cat(IMAGES)]  # one batch, so that a BatchNorm's reset has the statistics of all images
    (end,) = random_ends(net, images, count=1, noise=0.1)
    found = least_squares(net, end, [end, end], images, coefficients=[0.3, 0.7])
    torch.testing.assert_close(run(net, found, IMAGES[0]), run(net, end, IMAGES[0]), rtol=1e-6, atol=1e-6)
    for key, tensor in end.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(found[key], tensor, rtol=1e-2, atol=2e-3)  # statistics: biased or not


@pytest.mark.parametrize("name", MAKERS)
def test_the_outputs_come_nearer_to_the_ends_mean(name: str) -> None:
    net = MAKERS[name]().double()
    ends = random_ends(net, IMAGES)
    merged = merge(ends)
    found = least_squares(net, merged, ends, IMAGES)
    new = draw(50, 3, 8, 8, seed=9)
    goal = (run(net, ends[0], new) + run(net, ends[1], new)) / 2
    errors = [float((run(net, state, new) - goal).square().mean()) for state in (merged, found)]
    assert errors[1] < errors[0]


def test_a_first_layer_with_batchnorm_gives_the_mean_of_what_the_ends_give() -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5)).double()
    ends = random_ends(net, IMAGES, count=3)
    ends[1]["1.weight"].neg_()
    shares = [0.2, 0.3, 0.5]
    found = least_squares(net, merge(ends, coefficients=shares), ends, IMAGES, coefficients=shares, ridge=1e-12)
    goal = sum(share * run(net, end, IMAGES[0]) for share, end in zip(shares, ends, strict=True))
    torch.testing.assert_close(run(net, found, IMAGES[0]), goal, rtol=1e-6, atol=1e-6)


def test_the_batchnorms_statistics_are_those_of_its_input() -> None:
    net = build_model("conv", (3, 8, 8), 3, width=6).double()
    ends = random_ends(net, IMAGES)
    found = least_squares(net, merge(ends), ends, IMAGES)
    seen: list[Tensor] = []
    handle = net[4].register_forward_hook(lambda _m, args, _o: seen.append(args[0]))
    for batch in IMAGES:
        run(net, found, batch)
    handle.remove()
    rows = torch.cat(seen).transpose(0, 1).flatten(1)
    torch.testing.assert_close(found["4.running_mean"], rows.mean(1), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found["4.running_var"], rows.var(1), rtol=1e-6, atol=0)


def test_a_batchnorm_that_follows_no_layer_directly_gets_the_statistics_of_its_input() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()
    calibration = [draw(60, 3), draw(40, 3, seed=1)]
    ends = random_ends(net, calibration)
    found = least_squares(net, merge(ends), ends, calibration)
    x = torch.tanh(F.linear(torch.cat(calibration), found["0.weight"], found["0.bias"]))
    torch.testing.assert_close(found["2.running_mean"], x.mean(0), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found["2.running_var"], x.var(0), rtol=1e-6, atol=0)


def test_a_batchnorm_without_affine_keeps_the_function_exactly() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False), nn.ReLU(), nn.Linear(4, 2)).double()
    calibration = [draw(100, 3)]
    (end,) = random_ends(net, calibration, count=1)
    found = least_squares(net, end, [end], calibration)
    torch.testing.assert_close(run(net, found, calibration[0]), run(net, end, calibration[0]), rtol=1e-6, atol=1e-6)


class Shuffled:
    """A loader that gives its examples in another order each time."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.generator = x, torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.x[torch.randperm(len(self.x), generator=self.generator)].split(20))


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


@pytest.mark.parametrize("name", ["norm-free", "residual", "groupnorm", "in-place"])
def test_memory_changes_the_cost_and_not_the_result(name: str) -> None:
    net = InPlace().double() if name == "in-place" else MAKERS[name]().double()
    batches = [draw(60, 4), draw(50, 4, seed=1)] if name == "in-place" else IMAGES
    ends = random_ends(net)
    inputs = sum(batch.numel() * 8 for batch in batches)
    results = [
        least_squares(net, merge(ends), ends, batches, ridge=1e-3, memory=memory)
        for memory in (2**30, 0, inputs, inputs + 6000, inputs + 100_000)
    ]
    for key in results[0]:
        for other in results[1:]:
            torch.testing.assert_close(other[key], results[0][key], rtol=1e-7, atol=1e-9)


def test_a_loader_that_shuffles_gives_the_same_with_memory_and_without() -> None:
    net, x = deep(), draw(100, 4)
    ends = random_ends(net)
    found = [
        least_squares(net, merge(ends), ends, batches, ridge=1e-3, memory=memory)
        for batches, memory in ((Shuffled(x), 2**30), (Shuffled(x), 0), ([x], 2**30))
    ]
    for key in found[0]:
        torch.testing.assert_close(found[1][key], found[0][key], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(found[2][key], found[0][key], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("memory", "expected"), [(2**30, 2 * 3 + 3 + 2), (0, 2 * (1 + 2 + 3) + 1 + 2 + 3)])
def test_with_memory_no_layer_is_computed_again(monkeypatch: pytest.MonkeyPatch, memory: int, expected: int) -> None:
    # a layer of the merged network runs as it was, and again with what was solved
    net = deep()
    ends = random_ends(net)
    computed, keep = [], Runner.keep

    def counted(self: Runner, index: int, number: int, output: Tensor, *, final: bool = True) -> None:
        computed.append(index)
        keep(self, index, number, output, final=final)

    monkeypatch.setattr(Runner, "keep", counted)
    least_squares(net, merge(ends), ends, [draw(100, 4)], memory=memory)
    assert len(computed) == expected


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


def test_layers_are_found_by_what_they_call_and_the_log_names_what_stays(caplog: pytest.LogCaptureFixture) -> None:
    net = ByHand().double()
    ends = random_ends(net)
    merged = merge(ends)
    with caplog.at_level(logging.INFO, logger="fedrebasin"):
        found = least_squares(net, merged, ends, [draw(200, 4)])
    assert "'shared.weight' stays averaged: it is used more than once" in caplog.text
    assert torch.equal(found["shared.weight"], merged["shared.weight"])
    steps, _ = find_steps(net.eval(), (draw(2, 4),), {})
    assert [step.key for step in steps] == ["first", "second", "last.weight"]
    assert [set(step.after) for step in steps] == [set(), {0}, {1}]
    assert not torch.equal(found["second"], merged["second"])
    steps, _ = find_steps(InPlace().eval(), (torch.zeros(2, 4),), {})
    assert [set(step.after) for step in steps] == [set(), {0}, {0, 1}]


def test_what_has_no_matrix_of_its_own_is_left_with_a_reason() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=2), nn.ConvTranspose2d(6, 2, 3)).eval()
    steps, left = find_steps(net, (torch.zeros(1, 3, 8, 8),), {})
    assert [step.key for step in steps] == ["0.weight"]
    assert left == {"1.weight": "a grouped convolution", "2.weight": "no linear or convolution layer reads it directly"}


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(2, 3, 3, stride=2, padding=1),
        nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1)),
        nn.Conv2d(2, 3, 3, padding="same"),
        nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"),
        nn.Conv3d(2, 3, 2, padding=1),
    ],
)
def test_an_unfolded_convolution_is_a_matrix_product(layer: nn.Module) -> None:
    weight = layer.get_parameter("weight")
    x = draw(3, 2, *([7] * (weight.ndim - 2)))
    net = nn.Sequential(layer).double().eval()
    (step,), _ = find_steps(net, (x,), {})
    assert isinstance(step, Layer)
    seen = F.pad(x, (1, 1, 1, 1), mode="circular") if getattr(layer, "padding_mode", "") == "circular" else x
    product = net[0].weight.flatten(1) @ columns(step, seen, tuple(weight.shape[2:])) + net[0].bias.unsqueeze(1)
    torch.testing.assert_close(product, outputs(step, net(x)))


@pytest.mark.parametrize(("noise", "expected"), [(0.0, RIDGES[:1]), (10.0, RIDGES[-2:])])
def test_the_ridge_is_chosen_by_what_was_held_out(noise: float, expected: tuple[float, ...]) -> None:
    true = draw(3, 40)
    inputs = [draw(40, 60, seed=seed) for seed in (1, 2)]
    targets = [true @ X + noise * draw(3, 60, seed=seed) for X, seed in zip(inputs, (3, 4), strict=True)]
    fit, check = NormalEquations(), NormalEquations()
    fit.add(inputs[0], targets[0])
    check.add(inputs[1], targets[1])
    chosen = choose_ridge(fit, check, intercept=True)
    assert chosen in expected
    D, d = fit.solve(chosen, intercept=True)
    error = (targets[1] - D @ inputs[1] - d.unsqueeze(1)).square().sum() - targets[1].square().sum()
    assert check.excess(D, d) == pytest.approx(float(error) / 60)


def test_a_gram_matrix_in_blocks_is_the_whole_product() -> None:
    X = draw(600, 20)
    torch.testing.assert_close(gram_product(X), X @ X.T)


def test_keys_order_and_dtypes_stay_and_inputs_are_not_edited() -> None:
    net = build_model("conv", (3, 8, 8), 3, width=4)
    images = [batch.float() for batch in IMAGES]
    ends = random_ends(net, images)
    check_keeps_form(lambda merged, ends: least_squares(net, merged, ends, images), net, ends)


def test_units_that_never_fire_keep_their_weights() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    ends = random_ends(net)
    for end in ends:
        end["0.weight"][1], end["0.bias"][1] = 0, -1
    merged = merge(ends)
    found = least_squares(net, merged, ends, [draw(200, 3)])
    torch.testing.assert_close(found["2.weight"][:, 1], merged["2.weight"][:, 1])


def test_few_examples_are_warned_about_with_the_number_that_would_do() -> None:
    net = deep()
    with pytest.warns(UserWarning, match="8 examples are few for least squares; 100 and more would do"):
        least_squares(net, net.state_dict(), [net.state_dict()], [draw(8, 4)])


def test_what_does_not_fit_is_refused() -> None:
    net, data = deep(), [draw(200, 4)]
    state = net.state_dict()
    with pytest.raises(RebasinError, match=r"ridge: expected None or a number from 0; got -1"):
        least_squares(net, state, [state], data, ridge=-1)
    with pytest.raises(RebasinError, match=r"memory: expected a number of bytes from 0; got -1"):
        least_squares(net, state, [state], data, memory=-1)
    with pytest.raises(RebasinError, match=r"coefficients: expected 1, one for each model; got 2"):
        least_squares(net, state, [state], data, coefficients=[1, 1])
    with pytest.raises(CalibrationError, match=r"'0\.weight' hold a NaN or an infinity"):
        least_squares(net, state, [state], [torch.full((200, 4), torch.nan, dtype=torch.float64)])
    with pytest.raises(CalibrationError, match="can be read more than once; got a generator"):
        least_squares(net, state, [state], (x for x in data))
    with pytest.raises(RebasinError, match="expected a linear or convolution layer"):
        least_squares(nn.LayerNorm(4).double(), nn.LayerNorm(4).double().state_dict(), [{}], data)
    with pytest.raises(SpecMismatchError, match="expected a module of the state dict's architecture"):
        least_squares(nn.Sequential(nn.Linear(4, 9)), state, [state], data)
