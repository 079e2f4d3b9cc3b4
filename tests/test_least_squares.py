"""least_squares: exact where the ends' average can be represented, and the same however it is computed."""

from __future__ import annotations

from collections.abc import Callable

import networks
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from corrections_ends import check_keeps_form, draw, random_ends, run
from networks_by_hand import Residual, deep, norm_free
from torch import Tensor, nn

from fedrebasin import CalibrationError, RebasinError, SpecMismatchError, merge
from fedrebasin.corrections.least_squares import least_squares
from fedrebasin.simulations.models import build_model

IMAGES = [draw(30, 3, 8, 8, seed=seed) for seed in range(4)]


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
