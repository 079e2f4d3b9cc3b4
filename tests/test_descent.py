"""Weight matching's descents: who waits, who goes on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedrebasin import trace, weight_matching
from fedrebasin.matching import descent, weight
from fedrebasin.matching.plan import Block
from fedrebasin.matching.problem import WeightProblem


def test_a_dear_permutation_waits_until_no_cheaper_one_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 64), nn.Linear(64, 2))
    spec, state = trace(net, (torch.zeros(1, 3),)), net.state_dict()
    problem = WeightProblem(spec, state, state)
    gains = {"0": [1.0, 1.0, 0.0, 0.0], "1": [1.0, 0.0, 1.0, 0.0], "2": [1.0, 0.0]}
    visited: list[str] = []

    def improve(_: WeightProblem, block: Block) -> float:
        visited.append(block.perm)
        return gains[block.perm].pop(0)

    monkeypatch.setattr(descent, "improve", improve)
    assert {block.perm: tier for block, tier in descent.tiers(problem).items()} == {"0": 0, "1": 0, "2": 1}
    steps = descent.Descent(problem, list(problem.blocks), 10.0)
    assert steps.turn().history == [10.0, 12.0, 13.0, 14.0]
    assert visited == ["0", "1", "0", "1", "2"] and not steps.ended
    assert steps.finish().history == [10.0, 12.0, 13.0, 14.0, 15.0]
    assert visited == ["0", "1", "0", "1", "2", "1", "0", "2"] and steps.ended


@pytest.mark.parametrize("ahead", ["anchored", "the model as it is"])
def test_of_a_large_network_the_start_that_is_ahead_after_the_dearest_turn_goes_on_alone(
    monkeypatch: pytest.MonkeyPatch, ahead: str
) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2))
    spec, state = trace(net, (torch.zeros(1, 3),)), net.state_dict()
    torch.manual_seed(0)
    other = {name: torch.randn_like(tensor) for name, tensor in state.items()}
    gains = iter([3.0, 2.0] if ahead == "anchored" else [2.0, 3.0])
    turns: list[float] = []

    class Counted(descent.Descent):
        def turn(self) -> Counted:
            if len(self.history) == 1:
                self.gain = next(gains)
            turns.append(self.gain)
            self.history.append(self.history[0] + 1e3 * self.gain)
            if len(self.history) == 4:
                self._waiting.clear()
            return self

    monkeypatch.setattr(weight, "Descent", Counted)
    monkeypatch.setattr(weight, "_LARGE", 1)
    history = weight_matching(spec, state, other).history
    assert turns == ([3.0, 2.0, 3.0, 3.0] if ahead == "anchored" else [2.0, 3.0, 3.0, 3.0])
    assert history[1] - history[0] == pytest.approx(3e3)


@pytest.mark.parametrize(
    ("gains", "turns"),
    [
        ([6.0, 1.0, 1.0, 1.0, 1.0], 1),
        ([8.0, 0.2, 1.0, 1.0, 1.0], 2),
        ([8.0, 1.5, 0.2, 0.1, 0.3], 5),  # behind by 0.2, 0.05, 0.03, 0.02 of what the other one gained: never hopeless
        ([8.0, 1.0, 0.1, 0.1, 0.9], 3),
        ([11.0, 0.1, 0.1, 0.1, 0.1], 5),  # ahead
    ],
)
def test_a_descent_is_given_up_once_its_turns_gain_too_little_to_come_level(
    monkeypatch: pytest.MonkeyPatch, gains: list[float], turns: int
) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    spec, state = trace(net, (torch.zeros(1, 3),)), net.state_dict()
    problem = WeightProblem(spec, state, state)
    steps = descent.Descent(problem, list(problem.blocks), 10.0)
    left = list(gains)

    def improve(_: WeightProblem, block: Block) -> float:
        steps._waiting.update([block] if len(left) > 1 else [])
        return left.pop(0)

    monkeypatch.setattr(descent, "improve", improve)
    history = steps.finish(hurdle=20.0).history
    assert len(history) == turns + 1
    assert history[-1] == pytest.approx(10.0 + sum(gains[:turns]))
