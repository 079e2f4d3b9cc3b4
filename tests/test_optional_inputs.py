"""Where the example inputs have optional ones, calibration batches are read with them, too; some cannot be left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flower_messages import play_round, trained_copy
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from fedrebasin import TraceError, merge_modules, trace
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


class MakesMask(nn.Module):
    """Makes a mask where none is given, but not while it is exported, as some of transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Shape ``(batch, steps, 4)`` to ``(batch, steps, 3)``."""
        if mask is None and not torch.compiler.is_compiling():
            mask = x.new_ones(x.shape[:2])
        found: Tensor = self.out(self.into(x).tanh() * mask[:, :, None])  # type: ignore[index]  # what fails
        return found


def test_a_mask_that_a_model_does_not_make_while_it_is_exported_is_asked_for() -> None:
    net, x = MakesMask(), torch.randn(2, 5, 4)
    net(x)
    with pytest.raises(TraceError, match=r"runs, give it what it makes itself .* \(an attention_mask of ones\)"):
        trace(net, (x,))
    assert trace(net, (x, torch.rand(2, 5))).perm_shapes == {"into": (8,)}
