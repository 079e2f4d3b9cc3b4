"""A shared trunk is corrected by its own activations alone; heads have no say and stay."""

from __future__ import annotations

import pytest
import torch
from test_trunk import Net, made
from torch import Tensor, nn
from torch.func import functional_call

from fedrebasin import RebasinError, match_trunks, merge_trunks, permute, random_perms, trace, trunk_tensors
from fedrebasin.trunk_merge import TRUNK_CORRECTIONS, merge_trunk_modules

State = dict[str, Tensor]
DATA = torch.randn(400, 5, generator=torch.Generator().manual_seed(3))
SHARES = [0.7, 0.3]


def two(seed: int = 1) -> tuple[list[nn.Module], list[State]]:
    nets = [made("three classes", seed).float(), made("seven classes", seed + 1).float()]
    for place, net in enumerate(nets):
        assert isinstance(net, Net)
        net.train()
        net(DATA * (1 + place))  # running statistics of one's own
        net.eval()
    return nets, [net.state_dict() for net in nets]


def merged(nets: list[nn.Module], states: list[State], correction: str) -> list[State]:
    specs = [trace(net, (DATA[:3],)) for net in nets]
    given = {"net": nets[0], "calibration": [DATA[:200], DATA[200:]]} if correction else {}
    return merge_trunks(specs, states, until="second", coefficients=SHARES, correction=correction, **given)


def trunk_outputs(net: nn.Module, state: State) -> Tensor:
    found: list[Tensor] = []
    handle = net.second.register_forward_hook(lambda module, args, output: found.append(output))
    functional_call(net, state, DATA)
    handle.remove()
    return found[0].detach()


@pytest.mark.parametrize("correction", TRUNK_CORRECTIONS)
def test_the_corrected_trunk_is_shared_whatever_the_first_head_is_and_the_heads_stay(correction: str) -> None:
    nets, states = two()
    plain, found = merged(nets, states, ""), merged(nets, states, correction)
    names = trunk_tensors(trace(nets[0], (DATA[:3],)), "second")
    assert any(not torch.equal(found[0][name], plain[0][name]) for name in names)
    for name in names:
        assert torch.equal(found[0][name], found[1][name])
    for before, after in zip(plain, found, strict=True):
        assert torch.equal(before["head.weight"], after["head.weight"])
    other = {**states[0], "head.weight": torch.randn_like(states[0]["head.weight"])}
    again = merged(nets, [other, states[1]], correction)
    for name in names:
        assert torch.equal(found[0][name], again[0][name])


def test_repair_gives_the_trunks_outputs_the_mean_and_spread_of_the_aligned_trunks() -> None:
    nets, states = two()
    specs = [trace(net, (DATA[:3],)) for net in nets]
    perms = match_trunks(specs, states, until="second", coefficients=SHARES).perms
    ends = [
        trunk_outputs(net, permute(spec, one, state))
        for net, spec, one, state in zip(nets, specs, perms, states, strict=True)
    ]
    for measure in (Tensor.mean, Tensor.std):
        goal = sum(share * measure(end, dim=0) for share, end in zip(SHARES, ends, strict=True))
        found = [measure(trunk_outputs(nets[0], merged(nets, states, how)[0]), dim=0) for how in ("", "repair")]
        assert (found[1] - goal).norm() < 0.02 * (found[0] - goal).norm()


def test_copies_of_one_trunk_keep_their_functions_and_modules_take_a_correction_too() -> None:
    nets, states = two()
    trunk = {name: tensor for name, tensor in states[0].items() if not name.startswith("head")}
    spec = trace(nets[1], (DATA[:3],))
    states[1] = permute(spec, random_perms(spec, 2), {**states[1], **trunk})
    for net, state in zip(nets, states, strict=True):
        net.load_state_dict(state)
    expected = [net(DATA) for net in nets]
    for net, goal in zip(
        merge_trunk_modules(nets, (DATA[:3],), until="second", correction="repair", calibration=[DATA]),
        expected,
        strict=True,
    ):
        torch.testing.assert_close(net(DATA), goal, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("correction", TRUNK_CORRECTIONS)
def test_one_trunk_that_ends_before_its_batch_norm_keeps_both_functions(
    correction: str, caplog: pytest.LogCaptureFixture
) -> None:
    nets, states = two()
    body = {name: tensor for name, tensor in states[0].items() if not name.startswith("head")}
    nets[1].load_state_dict({**states[1], **body})
    expected = [net(DATA) for net in nets]
    with caplog.at_level("INFO", "fedrebasin"):
        found = merge_trunk_modules(nets, (DATA[:3],), until="first", correction=correction, calibration=[DATA])
    for net, goal in zip(found, expected, strict=True):
        torch.testing.assert_close(net(DATA), goal)
    assert "merge_trunks: 'first.weight' stays averaged: its BatchNorm lies beyond 'first'" in caplog.text


def test_a_correction_that_looks_at_outputs_or_lacks_data_is_refused() -> None:
    nets, states = two()
    with pytest.raises(RebasinError, match=r"correction: expected one of repair, .* got 'distill'$"):
        merged(nets, states, "distill")
    specs = [trace(net, (DATA[:3],)) for net in nets]
    with pytest.raises(RebasinError, match="with net and calibration; got 'repair' without them"):
        merge_trunks(specs, states, until="second", correction="repair")
    with pytest.raises(RebasinError, match="modules: expected one or more; got none"):
        merge_trunk_modules([], (DATA[:3],), until="second")
