"""Selection: what is measured, on which data, and what is kept."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrebasin import CalibrationError, RebasinError, select_candidate

State = dict[str, Tensor]


def linear(weight: float, seed: int = 0) -> State:
    """A linear classifier: one random direction times ``weight``."""
    generator = torch.Generator().manual_seed(seed)
    w = weight * torch.randn(3, 4, generator=generator, dtype=torch.float64)
    return {"weight": w, "bias": torch.zeros(3, dtype=torch.float64)}


NET = nn.Linear(4, 3).double()


def batches(count: int = 8, size: int = 6, seed: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 4, generator=generator, dtype=torch.float64) for _ in range(count)]


def labelled(state: State, **options: int) -> list[tuple[Tensor, Tensor]]:
    """Batches whose targets are what ``state`` says."""
    return [(x, (x @ state["weight"].T + state["bias"]).argmax(1)) for x in batches(**options)]


def logits(state: State, x: Tensor) -> Tensor:
    return x @ state["weight"].T + state["bias"]


def test_the_best_by_loss_is_kept_whatever_its_place() -> None:
    best, others = linear(2.0), {f"other {seed}": linear(2.0, seed) for seed in (1, 2)}
    for place in range(3):
        names = list(others)
        names.insert(place, "best")
        candidates = {name: others.get(name, best) for name in names}
        found = select_candidate(NET, candidates, labelled(best), loss=F.cross_entropy)
        assert (found.name, found.measure, found.examples) == ("best", "loss", 48)
        assert list(found.figures) == names
        assert all(torch.equal(found.state[name], best[name]) for name in best)


def test_of_equal_candidates_the_first_is_kept() -> None:
    candidates = {name: linear(2.0) for name in ("first", "second")}
    assert select_candidate(NET, candidates, batches(), ends=[linear(1.0)]).name == "first"


def test_figures_are_mean_losses_over_batches_of_unequal_size() -> None:
    state, data = linear(1.0, 3), [*labelled(linear(1.0), size=7, count=2), *labelled(linear(1.0), size=1, count=1)]
    found = select_candidate(NET, {"one": state}, data, loss=F.cross_entropy)
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    assert found.figures["one"] == pytest.approx(float(F.cross_entropy(logits(state, x), y)), rel=1e-12)


def test_without_a_loss_targets_are_not_looked_at_and_agreement_decides() -> None:
    said, true = linear(2.0, 1), linear(2.0, 2)
    candidates = {"true": true, "said": said}
    by_loss = select_candidate(NET, candidates, labelled(true), ends=[said], loss=F.cross_entropy)
    by_agreement = select_candidate(NET, candidates, labelled(true), ends=[said])
    no_targets = select_candidate(NET, candidates, batches(), ends=[said], loss=F.cross_entropy)
    assert (by_loss.name, by_agreement.name, no_targets.name) == ("true", "said", "said")
    assert by_agreement.measure == no_targets.measure == "distance"
    assert by_agreement.figures["said"] == pytest.approx(0, abs=1e-12)


def test_agreement_is_the_distance_from_the_probabilities_of_the_weighted_mean_of_logits() -> None:
    ends, coefficients, state = [linear(1.0, seed) for seed in range(3)], [1.0, 2.0, 5.0], linear(1.5, 9)
    found = select_candidate(NET, {"one": state}, batches(), ends=ends, coefficients=coefficients)
    x = torch.cat(batches())
    mean = sum(c / 8 * logits(end, x) for c, end in zip(coefficients, ends, strict=True))
    expected = (logits(state, x).softmax(1) - torch.as_tensor(mean).softmax(1)).square().sum(1).mean()
    assert found.figures["one"] == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize(("coefficients", "kept"), [([0.9, 0.05, 0.05], "0"), ([0.1, 0.1, 0.8], "2")])
def test_coefficients_say_whom_the_ensemble_follows(coefficients: list[float], kept: str) -> None:
    ends = [linear(2.0, seed) for seed in range(3)]
    candidates = {str(place): end for place, end in enumerate(ends)}
    assert select_candidate(NET, candidates, batches(), ends=ends, coefficients=coefficients).name == kept


def test_a_network_that_ends_in_a_softmax_is_judged_like_its_logits() -> None:
    ends, candidates = [linear(1.0, 0), linear(1.0, 1)], {"a": linear(1.0, 2), "b": linear(2.0, 3)}
    raw = select_candidate(NET, candidates, batches(), ends=ends)

    def inside(state: State) -> State:
        return {f"0.{name}": tensor for name, tensor in state.items()}

    soft = select_candidate(
        nn.Sequential(NET, nn.Softmax(1)),
        {name: inside(state) for name, state in candidates.items()},
        batches(),
        ends=[inside(end) for end in ends],
    )
    assert list(soft.figures.values()) == pytest.approx(list(raw.figures.values()), rel=1e-6)


def test_outputs_that_are_no_logits_are_compared_by_relative_squared_distance() -> None:
    net = nn.Linear(4, 1).double()
    states = [{"weight": s["weight"][:1], "bias": s["bias"][:1]} for s in (linear(1.0, seed) for seed in range(3))]
    found = select_candidate(net, {"near": states[0], "far": states[2]}, batches(), ends=states[:2])
    x = torch.cat(batches())
    goal = (logits(states[0], x) + logits(states[1], x)) / 2
    expected = (logits(states[2], x) - goal).square().mean() / goal.var(correction=0)
    assert found.measure == "distance"
    assert found.figures["far"] == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("loss", [None, lambda output, target: output.nan_to_num(-1, -1, -1).mean() - 1e6])
def test_a_candidate_that_is_not_finite_is_never_kept(bad: float, loss: Any) -> None:
    good = linear(1.0)
    broken = {**good, "bias": torch.full((3,), bad, dtype=torch.float64)}
    found = select_candidate(NET, {"broken": broken, "good": good}, labelled(good), ends=[linear(1.0, 4)], loss=loss)
    assert found.name == "good"
    assert math.isnan(found.figures["broken"])
    with pytest.raises(RebasinError, match="candidates: expected one that is finite; none of broken is"):
        select_candidate(NET, {"broken": broken}, batches(), ends=[good])


def test_a_candidate_that_cannot_be_made_is_left_out_and_each_is_made_once() -> None:
    made: list[str] = []

    def fails() -> State:
        made.append("fails")
        raise RebasinError("no layer to repair")

    def works() -> State:
        made.append("works")
        return linear(1.0)

    found = select_candidate(NET, {"fails": fails, "works": works}, batches(), ends=[linear(2.0)])
    assert (found.name, made) == ("works", ["fails", "works"])
    assert math.isnan(found.figures["fails"])
    assert str(found).startswith("works is kept; distance from the ensemble on 48 examples: fails nan, works 0.")


def test_whatever_a_candidate_raises_and_one_of_another_architecture_leave_the_others() -> None:
    def breaks() -> State:
        raise KeyError("weight")

    candidates = {"breaks": breaks, "other": {"w": torch.ones(1)}, "works": linear(1.0)}
    found = select_candidate(NET, candidates, batches(), ends=[linear(2.0)])
    assert found.name == "works"
    assert math.isnan(found.figures["breaks"]) and math.isnan(found.figures["other"])


def constant(value: float) -> State:
    return {"weight": torch.zeros(3, 4).double(), "bias": torch.full((3,), value).double()}


@pytest.mark.parametrize(
    ("targets", "kept"),
    [
        ([0.8] * 8, "alone"),  # better everywhere
        ([2.0, -0.5] * 4, "merge"),  # losses lower by 3 and higher by 2: lower by 0.5 in the mean, by chance
        ([2.0, 0.45] * 4, "alone"),  # lower by 3 and higher by 0.1
        ([0.2] * 8, "merge"),
        ([0.8], "merge"),  # of one batch nothing is known of chance
    ],
)
def test_a_model_alone_is_kept_only_if_it_is_better_beyond_chance(targets: list[float], kept: str) -> None:
    data = [(torch.zeros(5, 4).double(), torch.full((5, 3), target).double()) for target in targets]
    options: dict[str, Any] = {"alone": {"worst": constant(9), "alone": constant(1)}, "loss": F.mse_loss}
    found = select_candidate(NET, {"merge": constant(0)}, data, **options)
    assert found.name == kept
    assert list(found.figures) == ["merge", "worst", "alone"]


def test_the_state_dict_comes_back_as_it_was_given_with_its_metadata() -> None:
    given = NET.state_dict()
    assert select_candidate(NET, {"one": given}, batches(), ends=[given]).state is given


def test_without_a_loss_no_model_alone_is_looked_at() -> None:
    found = select_candidate(NET, {"merge": linear(1.0, 1)}, batches(), ends=[linear(2.0)], alone={"end": linear(2.0)})
    assert (found.name, list(found.figures)) == ("merge", ["merge"])


def test_a_model_alone_is_kept_where_no_merge_is_finite() -> None:
    broken = {"merge": constant(math.nan)}
    found = select_candidate(NET, broken, labelled(linear(1.0)), alone={"end": linear(1.0)}, loss=F.cross_entropy)
    assert found.name == "end"


def test_missing_ensembles_targets_and_candidates_are_named() -> None:
    state = linear(1.0)
    with pytest.raises(CalibrationError, match=r"held_out: without targets and loss=, .* give ends="):
        select_candidate(NET, {"one": state}, batches(), loss=F.cross_entropy)
    with pytest.raises(CalibrationError, match="held_out: expected targets in all batches or in none"):
        select_candidate(NET, {"one": state}, [*batches(), *labelled(state)], ends=[state], loss=F.cross_entropy)
    with pytest.raises(RebasinError, match="candidates: expected one state dict or more; got none"):
        select_candidate(NET, {}, batches(), ends=[state])
