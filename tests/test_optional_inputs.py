"""Where the example inputs have optional ones, calibration batches are read with them, too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flower_messages import play_round, trained_copy
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from fedrebasin import merge_modules
from fedrebasin.corrections.methods import CORRECTIONS
from fedrebasin.strategies import Rebasin


class Masked(nn.Module):
    """A model that notices when its optional input gets lost."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        assert mask is not None and mask.is_floating_point()
        out: Tensor = self.last(self.norm(self.first(x)).relu() * mask)
        return out


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Masked()


X, MASK, TARGET = torch.randn(120, 4), torch.rand(120, 1) + 0.5, torch.arange(120) % 3
FORMS: dict[str, tuple[Any, Any]] = {
    "inputs": ((X, MASK), (X, MASK)),
    "and target": ((X, MASK), (X, MASK, TARGET)),
    "keywords": ({"x": X, "mask": MASK}, {"x": X, "mask": MASK}),
    "keywords and target": ({"x": X, "mask": MASK}, ({"x": X, "mask": MASK}, TARGET)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("correction", [name for name, one in CORRECTIONS.items() if one.inputs and not one.rereads])
def test_every_correction_of_merged_modules_reads_them(correction: str, form: str) -> None:
    example, batch = FORMS[form]
    merge_modules([net(0), net(1)], example, calibration=[batch] * 2, correction=correction)


@pytest.mark.parametrize("form", ["and target", "keywords and target"])
def test_selection_reads_them(form: str) -> None:
    example, batch = FORMS[form]
    options: dict[str, Any] = {"select": "calibration", "correction": ["repair"], "calibration": [batch] * 4}
    merge_modules([net(0), net(1)], example, loss=F.cross_entropy, **options)
    strategy = Rebasin(FedAvg(), model=Masked, example_inputs=example, loss=F.cross_entropy, **options)
    _, metrics = play_round(strategy, net(0).state_dict(), [net(1).state_dict(), net(2).state_dict()])
    assert metrics is not None and "rebasin-loss-aligned+repair" in metrics


@pytest.mark.parametrize("form", FORMS)
def test_a_strategy_reads_them(form: str) -> None:
    example, batch = FORMS[form]
    strategy = Rebasin(FedAvg(), model=Masked, example_inputs=example, calibration=[batch], correction="least-squares")
    plain = Rebasin(FedAvg(), model=Masked, example_inputs=example)
    sent = net(0).state_dict()
    states = [trained_copy(sent, seed) for seed in (1, 2)]
    (found, _), (average, _) = play_round(strategy, sent, states), play_round(plain, sent, states)
    assert found is not None and average is not None
    assert found["first.weight"].data != average["first.weight"].data  # a correction that fails leaves the average
