"""Copies that follow a part of the network outside of the forward pass: tied by hand, pointed out by the trace."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from fedrebasin import RebasinError, check_spec, permute, random_perms, trace
from fedrebasin.copies import tie_copies
from fedrebasin.layout import Free, Product, Sum
from fedrebasin.strategies.network import build_network
from fedrebasin.ties import Axes, perm_shapes

INPUTS = (torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0)),)


class Follower(nn.Module):
    """An encoder, a predictor, and an average of the encoder's weights, as in BYOL."""

    def __init__(self, returns: str = "loss") -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.online = nn.Sequential(nn.Linear(6, 6), layer, nn.Linear(6, 5))
        self.predictor = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 5))
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.returns = returns

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Shape ``(batch, tokens, 6)`` to a loss for each token, to predictions, or to predictions and targets."""
        predicted: Tensor = self.predictor(self.online(x))
        if self.returns == "predictions":
            return predicted
        target: Tensor = self.target(x)
        return (predicted, target) if self.returns == "both" else nn.functional.cosine_similarity(predicted, target, -1)


def _followed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state after a step of the average."""
    originals = {name: state[name.replace("target.", "online.")] for name in state}
    return {
        name: 0.9 * tensor + 0.1 * originals[name] if name.startswith("target.") else tensor
        for name, tensor in state.items()
    }


@pytest.mark.parametrize("returns", ["loss", "predictions", "both"])
def test_a_tied_copy_can_follow_after_units_have_moved(returns: str) -> None:
    torch.manual_seed(0)
    net = Follower(returns)
    state = {name: torch.randn_like(tensor) for name, tensor in net.state_dict().items()}
    spec = trace(net, INPUTS)
    for tied, holds in ((spec, False), (check_spec(net, spec.tie({"target": "online"}), INPUTS), True)):
        perms = random_perms(tied, 1)
        first, second = _followed(permute(tied, perms, state)), permute(tied, perms, _followed(state))
        assert all(torch.equal(first[name], second[name]) for name in state) is holds
    online = {axis.name for perm in tied.perm_shapes for axis in tied.tied[perm] if axis.name.startswith("online.")}
    moved = {axis.name for perm in tied.perm_shapes for axis in tied.tied[perm]}
    assert {name.replace("online.", "target.") for name in online} <= moved and online


def test_where_only_one_of_the_two_is_free_both_stay() -> None:
    tied = trace(Follower("both"), INPUTS).tie({"target": "online"})
    assert "a copy's that stays" in str(tied) and "online.2" not in tied.perm_shapes
    free = [name for name in tied.perm_shapes if name.startswith("online")]
    assert all(any(axis.name.startswith("target.") for axis in tied.tied[name]) for name in free) and free


def test_a_checked_spec_stays_checked_and_single_tensors_can_be_tied() -> None:
    class Averages(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 2)
            self.register_buffer("slow", torch.zeros(8, 6))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.two(self.one(x).relu())
            return out

    net = Averages()
    spec = check_spec(net, trace(net, INPUTS), INPUTS).tie({"slow": "one.weight"})
    assert spec.checked and {axis.name for axis in spec.tied["one"]} >= {"slow", "one.weight"}


@pytest.mark.parametrize(
    ("copies", "message"),
    [
        ({"teacher": "online"}, "copies: expected modules or tensors of this spec; got 'teacher'"),
        ({"target": "predictor"}, "'predictor.0.weight' of one shape; got"),
        ({"target": "nothing"}, "expected 'nothing' to have what 'target' has; 'nothing.0.weight', the original of"),
    ],
)
def test_what_is_no_copy_is_refused(copies: dict[str, str], message: str) -> None:
    with pytest.raises(RebasinError, match=message):
        trace(Follower(), INPUTS).tie(copies)


def test_a_trace_points_out_what_looks_like_a_copy(caplog: pytest.LogCaptureFixture) -> None:
    net = Follower()
    with caplog.at_level(logging.WARNING, logger="flwr"):
        _, spec = build_network(net, INPUTS, None, 0)
    said = "'target' looks like a copy of 'online' that training does not reach"
    assert [note for note in spec.notes if said in note] and said in caplog.text
    assert not spec.tie({"target": "online"}).notes
    average = nn.ModuleDict({"net": nn.Linear(6, 3)})
    average["slow"] = torch.optim.swa_utils.AveragedModel(average["net"])  # trainable, but in no graph
    average.forward = average["net"].forward  # type: ignore[method-assign]
    assert "'slow.module' looks like a copy of 'net'" in trace(average, INPUTS).notes[0]
    with torch.no_grad():
        for matrix in (one for one in net.target.parameters() if one.ndim > 1):
            matrix += 1  # frozen, and not equal: a part that came trained
    assert not trace(net, INPUTS).notes


def test_axes_composed_of_different_parts_stay() -> None:
    parts = [Free("p", 2), Free("q", 2)], [Free("r", 2), Free("s", 2)]
    axes: Axes = {"a.w": (Product(tuple(parts[0])),), "b.w": (Sum(tuple(parts[1])),)}
    assert not perm_shapes(tie_copies(axes, {"b": "a"}, axes))


def test_families_over_other_units_stay() -> None:
    spec = trace(Follower("both"), INPUTS)
    heads = next(over for perm, over in spec.over.items() if spec.tied[perm][0].name.startswith("target."))
    tied = check_spec(Follower("both"), spec.fix(heads).tie({"target": "online"}), INPUTS)
    assert not tied.over and "a copy's over other units" in str(tied)
