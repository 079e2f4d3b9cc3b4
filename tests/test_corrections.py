"""repair and reset_batchnorm: what they promise about activations, and what they refuse."""

from __future__ import annotations

import logging

import networks
import pytest
import torch
from networks_by_hand import Functions
from torch import Tensor, nn

from fedrebasin import CalibrationError, RebasinError, SpecMismatchError, merge, repair, reset_batchnorm
from fedrebasin.batches import Batches
from fedrebasin.corrections.moments import Moments
from fedrebasin.corrections.sites import find_sites
from fedrebasin.simulations.models import build_model

IMAGES = [torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(k)) for k in range(3)]
State = dict[str, Tensor]


def _ends(net: nn.Module, count: int = 2) -> list[State]:
    """Random ends with running statistics that belong to them."""
    ends = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        state = {
            name: tensor + 0.3 * torch.randn(tensor.shape, generator=generator)
            if tensor.is_floating_point() and "running" not in name
            else tensor.clone()
            for name, tensor in net.state_dict().items()
        }
        ends.append(reset_batchnorm(net, state, IMAGES) if any("running" in name for name in state) else state)
    return ends


def _outputs(net: nn.Module, state: State, name: str) -> Tensor:
    """The module's output over all calibration images, channels last dimension flattened: (channels, samples)."""
    net.load_state_dict(state)
    net.eval()
    found: list[Tensor] = []
    handle = net.get_submodule(name).register_forward_hook(lambda _m, _a, output: found.append(output.detach().clone()))
    with torch.no_grad():
        for batch in IMAGES:
            net(batch)
    handle.remove()
    return torch.cat(found).movedim(1, 0).flatten(1).double()


@pytest.mark.parametrize("name", ["conv", "conv-layernorm", "vgg11", "plain"])
def test_repaired_activations_have_the_weighted_mean_and_std_of_the_ends(name: str) -> None:
    if name == "plain":
        net: nn.Module = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(720, 3)
        )
    elif name == "conv-layernorm":
        net = build_model("conv", (3, 16, 16), 3, width=8, norm="layer")
    else:
        net, _ = networks.NETWORKS[name]()
    ends, weights = _ends(net), [0.7, 0.3]
    repaired = repair(net, merge(ends, coefficients=weights), ends, IMAGES, coefficients=weights, max_gain=1e6)
    sites = [site.name for site in find_sites(net.eval(), Batches(IMAGES))]
    assert len(sites) >= 2
    for site in sites:
        of_ends = [_outputs(net, end, site) for end in ends]
        goal_mean = sum(w * x.mean(1) for w, x in zip(weights, of_ends, strict=True))
        goal_std = sum(w * x.std(1, unbiased=False) for w, x in zip(weights, of_ends, strict=True))
        merged = _outputs(net, repaired, site)
        alive = (goal_std > 1e-5 * goal_std.max()) & (merged.std(1) > 1e-5 * merged.std(1).max())
        torch.testing.assert_close(
            merged.mean(1)[alive], goal_mean[alive], rtol=2e-2, atol=2e-2 * float(goal_std.max())
        )
        torch.testing.assert_close(merged.std(1, unbiased=False)[alive], goal_std[alive], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["conv", "mlp", "resnet20-layernorm"])
def test_repairing_an_end_towards_itself_changes_nothing(name: str) -> None:
    net, inputs = networks.NETWORKS[name]()
    calibration = [torch.randn(128, *inputs[0].shape[1:])]
    state = reset_batchnorm(net, net.state_dict(), calibration) if name == "conv" else net.state_dict()
    repaired = repair(net, state, [state, state], calibration)
    for key, tensor in state.items():
        torch.testing.assert_close(repaired[key], tensor, rtol=2e-3, atol=1e-3)


def test_keys_order_and_dtypes_stay_and_inputs_are_not_edited() -> None:
    net, _ = networks.NETWORKS["conv"]()
    ends = _ends(net)
    merged = merge(ends)
    before = {name: tensor.clone() for name, tensor in merged.items()}
    own = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for result in (repair(net, merged, ends, IMAGES), reset_batchnorm(net, merged, IMAGES)):
        assert list(result) == list(merged)
        assert [tensor.dtype for tensor in result.values()] == [tensor.dtype for tensor in merged.values()]
        assert torch.equal(result["1.num_batches_tracked"], merged["1.num_batches_tracked"])
    assert all(torch.equal(merged[name], before[name]) for name in merged)
    assert all(torch.equal(net.state_dict()[name], own[name]) for name in own)


def test_reset_gives_the_statistics_of_the_calibration_data() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    reset = reset_batchnorm(net, net.state_dict(), IMAGES)
    pixels = torch.stack(IMAGES)
    torch.testing.assert_close(reset["0.running_mean"], pixels.mean((0, 1, 3, 4)))
    variances = torch.stack([images.transpose(0, 1).flatten(1).var(1) for images in IMAGES])
    torch.testing.assert_close(reset["0.running_var"], variances.mean(0))


def test_reset_leaves_out_a_batch_of_one() -> None:
    net, data = nn.BatchNorm1d(4), torch.randn(51, 4)
    found, wanted = (reset_batchnorm(net, net.state_dict(), data[:n].split(50)) for n in (51, 50))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_reset_leaves_a_norm_that_no_batch_reaches_as_it_is() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    net[1].register_module("unused", nn.BatchNorm1d(2))
    state = {name: torch.full_like(tensor, 7) for name, tensor in net.state_dict().items()}
    reset = reset_batchnorm(net, state, IMAGES)
    assert all(torch.equal(reset[name], state[name]) == ("0.running" not in name) for name in state)


def test_dead_units_are_left_alone_and_gains_are_bounded() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state["0.weight"][0] = 0
    loud = {**state, "0.weight": state["0.weight"] * torch.tensor([[1.0], [1.0], [1000.0]])}
    repaired = repair(net, state, [loud], [torch.randn(500, 2)], max_gain=4)
    assert torch.equal(repaired["0.weight"][0], state["0.weight"][0]) and repaired["0.bias"][0] == state["0.bias"][0]
    torch.testing.assert_close(repaired["0.weight"][1], state["0.weight"][1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(repaired["0.weight"][2], 4 * state["0.weight"][2])


def test_the_output_layer_and_layers_in_front_of_a_norm_are_not_sites() -> None:
    net = build_model("conv", (3, 16, 16), 3, width=4)
    assert [site.name for site in find_sites(net.eval(), Batches(IMAGES))] == ["1", "4", "7"]
    plain = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    assert [site.name for site in find_sites(plain, Batches([torch.randn(2, 4)]))] == ["0"]


def test_streamed_moments_equal_those_of_all_data_at_once() -> None:
    data = torch.randn(100, 5, 3, generator=torch.Generator().manual_seed(0)).double() * 3 + 100
    moments = Moments()
    for part in data.split([1, 40, 59]):
        moments.add(part, dim=1)
    torch.testing.assert_close(moments.mean, data.mean((0, 2)))
    torch.testing.assert_close(moments.std, data.transpose(0, 1).flatten(1).std(1, unbiased=False))


def test_few_observations_are_warned_about_with_the_number_that_would_do() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.warns(UserWarning, match="8 observations per channel make noisy statistics; 100 and more would do"):
        repair(net, net.state_dict(), [net.state_dict()], [torch.randn(8, 4)])


def test_running_statistics_that_no_module_holds_are_named_and_stay(caplog: pytest.LogCaptureFixture) -> None:
    net = nn.Sequential(Functions(), nn.BatchNorm1d(2).double())
    state, images = net.state_dict(), [torch.randn(100, 3, 8, 8, dtype=torch.float64)]
    with caplog.at_level(logging.INFO, logger="fedrebasin"):
        found = reset_batchnorm(net, state, images)
    said = "reset_batchnorm: '0.%s' stays averaged: no BatchNorm module holds it; use repair"
    assert caplog.messages == [said % "center", said % "spread"]
    assert torch.equal(found["0.center"], state["0.center"])
    assert not torch.equal(found["1.running_mean"], state["1.running_mean"])


def test_labelled_batches_are_fine_for_calibration() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    x = torch.randn(200, 4)
    labelled = repair(net, net.state_dict(), [net.state_dict()], [(x, torch.zeros(200))])
    bare = repair(net, net.state_dict(), [net.state_dict()], [x])
    assert all(torch.equal(labelled[name], bare[name]) for name in bare)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ((x for x in IMAGES), "can be read more than once; got a generator"),
        ([], "at least one batch; got none"),
        (IMAGES[0], r"expected a list or DataLoader of batches; got a Tensor; pass \[batch\]"),
        ([torch.full((200, 3, 16, 16), torch.nan)], "hold a NaN or an infinity"),
        ([torch.zeros(0, 3, 16, 16)], "at least one batch; got none with examples"),
        ([(IMAGES[0],) * 3], "expected batches of 1 inputs, with or without a target; got 3 items"),
    ],
)
def test_bad_calibration_data_is_refused(calibration: object, message: str) -> None:
    net, _ = networks.NETWORKS["conv"]()
    state = net.state_dict()
    with pytest.raises(CalibrationError, match=message):
        repair(net, state, [state], calibration)  # type: ignore[arg-type]


def test_what_cannot_be_corrected_is_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    state, data = net.state_dict(), [torch.randn(200, 4)]
    with pytest.raises(RebasinError, match="this network has none; use repair"):
        reset_batchnorm(net, state, data)
    with pytest.raises(RebasinError, match=r"max_gain: expected 1 or more; got 0.5"):
        repair(net, state, [state], data, max_gain=0.5)
    with pytest.raises(RebasinError, match="found none"):
        repair(nn.Linear(4, 2), nn.Linear(4, 2).state_dict(), [nn.Linear(4, 2).state_dict()], data)
    with pytest.raises(SpecMismatchError, match="expected a module of the state dict's architecture"):
        repair(nn.Sequential(nn.Linear(4, 9)), state, [state], data)
    one_by_one = [torch.randn(1, 2) for _ in range(3)]
    norm = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(CalibrationError, match="batches of more than one example"):
        reset_batchnorm(norm, norm.state_dict(), one_by_one)
