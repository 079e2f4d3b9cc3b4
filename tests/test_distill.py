"""distill: nearer to the ensemble, the same under the same seed, without labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from corrections_ends import check_keeps_form, random_ends, run
from torch import Tensor, nn

from fedrebasin import CalibrationError, RebasinError, distill, merge, reset_batchnorm
from fedrebasin.simulations.models import build_model

DATA = [torch.randn(50, 4, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 3))


def test_the_probabilities_come_nearer_to_the_weighted_mean_of_the_ends() -> None:
    shares, model = [0.9, 0.1, 0.0], net()
    ends = random_ends(model, count=3, noise=1.0)
    merged = merge(ends, coefficients=shares)
    found = distill(model, merged, ends, DATA, coefficients=shares, epochs=40, lr=1e-2)
    x = torch.cat(DATA)
    goal = sum(share * run(model, end, x).softmax(1) for share, end in zip(shares, ends, strict=True))
    losses = [float(-(goal * run(model, state, x).log_softmax(1)).sum(1).mean()) for state in (merged, found)]
    best = float(-(goal * torch.as_tensor(goal).log()).sum(1).mean())
    assert losses[1] - best < 0.3 * (losses[0] - best)


def test_equal_seeds_give_equal_results_and_labels_are_not_used() -> None:
    model = net()
    ends = random_ends(model)
    labelled = [(x, torch.zeros(len(x), dtype=torch.int64)) for x in DATA]
    first, second, other = (
        distill(model, merge(ends), ends, data, epochs=2, seed=seed)
        for data, seed in ((DATA, 0), (labelled, 0), (DATA, 1))
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


class Drawn:
    """Data that is drawn anew each time that it is read."""

    def __init__(self) -> None:
        self.generator, self.read = torch.Generator().manual_seed(0), 0

    def __iter__(self) -> Iterator[Tensor]:
        self.read += 1
        yield from (torch.randn(50, 4, generator=self.generator) for _ in range(4))


def test_data_that_is_read_anew_teaches_more_than_data_that_is_held() -> None:
    torch.manual_seed(0)
    model, x = net(), torch.randn(1000, 4, generator=torch.Generator().manual_seed(9))
    ends = random_ends(model, noise=1.0)
    goal = sum(run(model, end, x).softmax(1) for end in ends) / 2

    def distance(state: Mapping[str, Tensor]) -> float:
        return float((run(model, state, x).softmax(1) - goal).square().sum(1).mean())

    data = {reread: Drawn() for reread in (False, True)}
    found = {
        reread: distill(model, merge(ends), ends, drawn, epochs=200, lr=1e-2, reread=reread)
        for reread, drawn in data.items()
    }
    assert data[False].read == 1
    assert data[True].read == 201  # once to count the steps
    assert distance(found[True]) < 0.8 * distance(found[False])


def test_data_that_is_the_same_each_time_teaches_the_same_when_it_is_read_anew() -> None:
    model = net()
    ends = random_ends(model)
    held, read = (distill(model, merge(ends), ends, DATA[:1], epochs=3, reread=reread) for reread in (False, True))
    assert all(torch.equal(held[name], read[name]) for name in held)


def test_an_end_merged_with_itself_has_nothing_to_learn() -> None:
    model = net()
    state = model.state_dict()
    found = distill(model, state, [state, state], DATA, epochs=1, lr=1e-6)
    for name, tensor in state.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("reread", [False, True])
@pytest.mark.parametrize(("momentum", "epochs"), [(0.1, 10), (None, 50)])
def test_a_few_steps_leave_no_statistics_of_the_merge(momentum: float | None, epochs: int, reread: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=momentum), nn.ReLU(), nn.Linear(6, 3))
    ends = random_ends(model, DATA)
    found = distill(model, merge(ends), ends, DATA[:1], epochs=epochs, reread=reread)
    renewed = reset_batchnorm(model, found, DATA[:1])
    assert all(torch.equal(found[name], renewed[name]) for name in found)


def test_many_steps_leave_the_average_over_them() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    ends = random_ends(model, DATA)
    found = distill(model, merge(ends), ends, DATA, epochs=12)
    assert not torch.equal(found["1.running_var"], reset_batchnorm(model, found, DATA)["1.running_var"])


@pytest.mark.parametrize("reread", [False, True])
def test_a_batch_of_one_that_a_batchnorm_cannot_go_by_is_left_out(reread: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    ends = random_ends(model, DATA)
    data = [DATA[0], DATA[1][:1]]
    found = distill(model, merge(ends), ends, data, reread=reread)
    assert all(tensor.isfinite().all() for tensor in found.values())
    assert all(torch.equal(found[name], x) for name, x in reset_batchnorm(model, found, DATA[:1]).items())
    with pytest.raises(CalibrationError, match="batches of more than one example; got none"):
        distill(model, merge(ends), ends, data[1:], reread=reread)


class Counted(nn.Module):
    """A network whose parameters are not all of floating numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.steps, self.layer = nn.Parameter(torch.tensor([2]), requires_grad=False), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.steps)


def test_integer_parameters_stay() -> None:
    model = Counted()
    ends = random_ends(model)
    found = distill(model, merge(ends), ends, DATA, epochs=1)
    assert torch.equal(found["steps"], torch.tensor([2]))
    assert not torch.equal(found["layer.weight"], merge(ends)["layer.weight"])


def test_frozen_parameters_stay_unless_all_are_frozen() -> None:
    model = net()
    ends = random_ends(model)
    merged = merge(ends)
    wanted = distill(model, merged, ends, DATA, epochs=1)
    frozen = distill(model.requires_grad_(False), merged, ends, DATA, epochs=1)
    assert all(torch.equal(frozen[name], x) for name, x in wanted.items())
    model.get_submodule("3").requires_grad_(True)
    part = distill(model, merged, ends, DATA, epochs=1)
    assert [name for name, x in part.items() if not torch.equal(x, merged[name])] == ["3.weight", "3.bias"]


@pytest.mark.parametrize("reread", [False, True])
def test_half_precision_is_trained_in_single(reread: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    ends = [{name: x.half() for name, x in end.items()} for end in random_ends(model)]
    merged = merge(ends)
    given = ([{name: x.float() for name, x in end.items()} for end in ends], [x.half().float() for x in DATA])
    wanted = distill(model, {name: x.float() for name, x in merged.items()}, *given, epochs=2, reread=reread)
    found = distill(model.half(), merged, ends, [x.half() for x in DATA], epochs=2, reread=reread)
    assert all(torch.equal(found[name], x.half()) for name, x in wanted.items())


def test_keys_order_and_dtypes_stay_and_inputs_are_not_edited() -> None:
    images: list[Tensor] = [torch.randn(30, 3, 8, 8)]
    model = build_model("conv", (3, 8, 8), 3, width=4)
    check_keeps_form(
        lambda merged, ends: distill(model, merged, ends, images, epochs=1), model, random_ends(model, images)
    )


@pytest.mark.parametrize("last", [nn.Linear(16, 1), nn.Sequential(nn.Linear(16, 1), nn.Flatten(0))], ids=str)
def test_numbers_are_no_classes(last: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), last)
    ends = random_ends(model)
    with pytest.raises(RebasinError, match=r"two or more classes on axis 1; got outputs of shape .* use least_squares"):
        distill(model, merge(ends), ends, DATA)


def test_what_does_not_fit_is_refused() -> None:
    model = net()
    state = model.state_dict()
    with pytest.raises(RebasinError, match="epochs: expected 1 or more; got 0"):
        distill(model, state, [state], DATA, epochs=0)
    with pytest.raises(RebasinError, match="lr: expected a positive number; got 0"):
        distill(model, state, [state], DATA, lr=0)
    with pytest.raises(CalibrationError, match="distill: the loss became nan"):
        distill(model, state, [state], [torch.full((5, 4), torch.nan)])
