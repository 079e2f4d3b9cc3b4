"""Least squares towards the average of probabilities, and what follows a closed form."""

from __future__ import annotations

import pytest
import torch
from test_correction_methods import DATA, network
from torch import Tensor, nn

from fedrebasin import RebasinError, least_squares, merge
from fedrebasin.corrections.distill import distill
from fedrebasin.corrections.methods import GENTLE_LR, PATIENT_EPOCHS, CorrectionSetting, correct
from fedrebasin.corrections.output_goals import logits_of_mean_probabilities


def _logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_goals_softmax_is_the_shares_average_of_softmaxes() -> None:
    logits, shares = [_logits(7, 4, seed=seed) for seed in range(3)], [0.5, 0.3, 0.2]
    goal = logits_of_mean_probabilities(logits, shares)
    expected = sum(share * one.softmax(1) for share, one in zip(shares, logits, strict=True))
    torch.testing.assert_close(goal.softmax(1), expected)
    level = sum(share * one.mean(1) for share, one in zip(shares, logits, strict=True))
    torch.testing.assert_close(goal.mean(1), level)


def test_equal_ends_get_their_own_logits_even_where_probabilities_underflow() -> None:
    one = torch.tensor([[1000.0, 0.0, -1000.0]])
    torch.testing.assert_close(logits_of_mean_probabilities([one, one], [0.4, 0.6]), one)


def test_with_inputs_in_plenty_the_last_layer_gives_the_average_of_probabilities() -> None:
    torch.manual_seed(0)
    net = nn.Linear(3, 4).double()
    ends = [nn.Linear(3, 4).double().state_dict() for _ in range(2)]
    data = [torch.eye(3, dtype=torch.float64).repeat(50, 1), torch.zeros(50, 3, dtype=torch.float64)]  # any map fits
    found = least_squares(net, merge(ends), ends, data, goals="probabilities", ridge=0.0)
    for rows in data:
        said = [rows @ end["weight"].T + end["bias"] for end in ends]
        got = rows @ found["weight"].T + found["bias"]
        torch.testing.assert_close(got.softmax(1), (said[0].softmax(1) + said[1].softmax(1)) / 2)


def test_layers_before_the_last_are_solved_alike() -> None:
    net = network()
    ends = [network(seed).state_dict() for seed in (1, 2)]
    plain, probable = (
        least_squares(net, merge(ends), ends, DATA, goals=goals) for goals in ("pre-activations", "probabilities")
    )
    assert torch.equal(plain["0.weight"], probable["0.weight"])
    assert not torch.equal(plain["2.weight"], probable["2.weight"])


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.Tanh()),
        nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)),
    ],
)
def test_a_network_whose_output_is_no_linear_layers_is_refused(net: nn.Module) -> None:
    state = net.state_dict()
    with pytest.raises(RebasinError, match="goals='probabilities' needs a network that ends in a linear layer"):
        least_squares(net, state, [state, state], [torch.randn(200, 4)], goals="probabilities")


def test_unknown_goals_are_refused() -> None:
    net = network()
    state = net.state_dict()
    with pytest.raises(RebasinError, match="goals: expected one of pre-activations, probabilities; got 'logits'"):
        least_squares(net, state, [state, state], DATA, goals="logits")


def test_least_squares_and_distill_is_distill_from_the_solution_at_a_gentle_rate() -> None:
    net = network()
    ends = [network(seed).state_dict() for seed in (1, 2)]
    merged = merge(ends)
    both = correct("least-squares+distill", CorrectionSetting(net, DATA, seed=3), merged, ends)
    expected = distill(net, least_squares(net, merged, ends, DATA), ends, DATA, lr=GENTLE_LR, seed=3)
    assert all(torch.equal(both[name], tensor) for name, tensor in expected.items())


def test_patient_distill_is_distill_from_the_solution_in_many_epochs_of_data_that_is_read_anew() -> None:
    net = network()
    ends = [network(seed).state_dict() for seed in (1, 2)]
    merged = merge(ends)
    both = correct("patient-distill", CorrectionSetting(net, DATA), merged, ends)
    expected = distill(net, least_squares(net, merged, ends, DATA), ends, DATA, epochs=PATIENT_EPOCHS, reread=True)
    assert all(torch.equal(both[name], tensor) for name, tensor in expected.items())
