"""best_end: one end as it is, but for its last layer."""

from __future__ import annotations

import logging

import pytest
import torch
from corrections_ends import run
from torch import Tensor, nn

from fedrebasin import CalibrationError, RebasinError, best_end, merge, merge_modules, select_candidate
from fedrebasin.corrections.output_goals import logits_of_mean_probabilities

DATA = [torch.randn(60, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(3)]


def network(seed: int = 0, bias: bool = True) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3, bias=bias)).double()


def features(end: dict[str, Tensor]) -> Tensor:
    return torch.cat([(rows @ end["0.weight"].T + end["0.bias"]).relu() for rows in DATA])


@pytest.mark.parametrize("goals", ["probabilities", "pre-activations"])
@pytest.mark.parametrize("bias", [True, False])
def test_an_end_is_kept_but_for_the_least_squares_solution_of_its_last_layer(goals: str, bias: bool) -> None:
    net, shares = network(bias=bias), [0.3, 0.7]
    ends = [network(seed, bias).state_dict() for seed in (1, 2)]
    found = best_end(net, merge(ends), ends, DATA, coefficients=shares, goals=goals, ridge=0.0)
    (kept,) = (end for end in ends if torch.equal(end["0.weight"], found["0.weight"]))
    assert torch.equal(found["0.bias"], kept["0.bias"])
    logits = [run(net, end, torch.cat(DATA)) for end in ends]
    goal = (
        logits_of_mean_probabilities(logits, shares) if goals == "probabilities" else 0.3 * logits[0] + 0.7 * logits[1]
    )
    X = features(kept)
    X = torch.cat([X, torch.ones(len(X), 1).double()], 1) if bias else X
    expected = torch.linalg.lstsq(X, goal).solution
    torch.testing.assert_close(found["2.weight"], expected[:6].T)
    if bias:
        torch.testing.assert_close(found["2.bias"], expected[6])


def test_the_end_is_kept_that_comes_nearest_on_what_it_was_not_fitted_on(caplog: pytest.LogCaptureFixture) -> None:
    net, good = network(), network(1).state_dict()
    dead = {name: torch.zeros_like(tensor) for name, tensor in good.items()}
    with caplog.at_level(logging.INFO, "fedrebasin"):
        for ends in ([dead, good], [good, dead]):
            found = best_end(net, good, ends, DATA)
            assert torch.equal(found["0.weight"], good["0.weight"])
    assert [record.message.split(";")[0] for record in caplog.records] == ["best end: 1 of 2", "best end: 0 of 2"]


def test_an_end_without_a_share_takes_no_part() -> None:
    net, ends = network(), [network(seed).state_dict() for seed in (1, 2)]
    found = best_end(net, merge(ends), ends, DATA, coefficients=[0.0, 1.0])
    assert all(torch.allclose(found[name], ends[1][name], atol=1e-8) for name in found)


def test_keys_and_dtypes_are_the_merges_and_nothing_given_is_changed() -> None:
    net, ends = network(), [network(seed).state_dict() for seed in (1, 2)]
    merged = {name: tensor.half() for name, tensor in merge(ends).items()}
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in (merged, *ends)]
    found = best_end(net, merged, ends, DATA)
    assert list(found) == list(merged) and {tensor.dtype for tensor in found.values()} == {torch.float16}
    for state, old in zip((merged, *ends), before, strict=True):
        assert all(torch.equal(state[name], old[name]) for name in old)


def test_where_hidden_layers_do_not_average_selection_keeps_the_best_end() -> None:
    net = network()
    ends = [network(seed).state_dict() for seed in (1, 2)]
    ends[1]["2.weight"] *= 0.1  # the ensemble says nearly what the first end says
    held_out = [torch.randn(200, 5, dtype=torch.float64)]
    candidates = {"plain": merge(ends), "plain+best-end": best_end(net, merge(ends), ends, DATA)}
    assert select_candidate(net, candidates, held_out, ends=ends).name == "plain+best-end"
    modules = [network(), network()]
    for module, end in zip(modules, ends, strict=True):
        module.load_state_dict(end)
    options = {"select": "calibration", "correction": ["best-end"]}
    merged = merge_modules(modules, (DATA[0],), calibration=[*DATA, *held_out], **options)
    assert torch.equal(merged.state_dict()["0.weight"], ends[0]["0.weight"])


def test_three_examples_leave_none_to_choose_by_and_are_warned_of() -> None:
    net, ends = network(), [network(seed).state_dict() for seed in (1, 2)]
    with pytest.warns(UserWarning, match="calibration: 3 examples are few for best_end; 100 and more would do"):
        found = best_end(net, merge(ends), ends, [DATA[0][:3]])
    assert torch.equal(found["0.weight"], ends[0]["0.weight"])


@pytest.mark.parametrize(
    ("net", "seen"),
    [
        (nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3), nn.Tanh()), "'2.weight'"),
        (nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Linear(5, 3)), r"\(60, 1, 3\)"),
    ],
)
def test_a_network_that_does_not_end_in_a_linear_layer_is_refused(net: nn.Module, seen: str) -> None:
    state = net.double().state_dict()
    with pytest.raises(RebasinError, match=f"best_end needs a network that ends in a linear layer.*{seen}.*another"):
        best_end(net, state, [state, state], DATA)


def test_bad_input_is_named() -> None:
    net, state = network(), network().state_dict()
    with pytest.raises(RebasinError, match="ridge: expected None or a number from 0; got -1"):
        best_end(net, state, [state], DATA, ridge=-1)
    with pytest.raises(RebasinError, match="goals: expected one of pre-activations, probabilities; got 'labels'"):
        best_end(net, state, [state], DATA, goals="labels")
    with pytest.raises(CalibrationError, match="NaN"):
        best_end(net, state, [state, state], [DATA[0] * float("inf"), *DATA])
