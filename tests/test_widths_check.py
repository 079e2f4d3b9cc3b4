"""What the proof of two widths sees, and what cannot be matched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from widths_cases import IMAGE, mlp, spec_of

from fedrebasin import (
    InvalidSpecError,
    RebasinError,
    SpecMismatchError,
    check_widths,
    match_widths,
    merge_widths,
    resize,
    trace,
)
from fedrebasin.simulations.models import build_model


class Wrapped(nn.Module):
    """An LSTM whose states do not leave."""

    def __init__(self, lstm: nn.LSTM) -> None:
        super().__init__()
        self.lstm, self.out = lstm, nn.Linear(lstm.hidden_size, 2)
        torch.nn.init.ones_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0])


def test_a_dead_unit_stays_dead_behind_a_norm_and_the_proof_sees_what_looks_at_all_units() -> None:
    nets = [build_model("conv", (3, 16, 16), 3, width=width) for width in (9, 6)]
    assert all(spec.checked for spec in check_widths(*nets, IMAGE))
    specs = [trace(net, IMAGE) for net in nets]
    placed = resize(match_widths(*specs, nets[0].state_dict(), nets[1].state_dict()), nets[1].state_dict())
    dead = placed["1.weight"] == 0
    assert dead.sum() == 3
    assert placed["1.running_var"][dead].tolist() == [1, 1, 1]
    assert not placed["1.bias"][dead].any() and not placed["1.running_mean"][dead].any()
    with pytest.raises(InvalidSpecError, match="looks at all units at once"):
        check_widths(*(build_model("conv", (3, 16, 16), 3, width=width, norm="layer") for width in (9, 6)), IMAGE)
    with pytest.raises(SpecMismatchError, match="narrow: expected at most 6 units"):
        check_widths(*nets[::-1], IMAGE)


def test_what_cannot_be_matched_is_refused_with_the_way_out() -> None:
    nets = [mlp(5, 6), mlp(3, 4)]
    specs, states = [spec_of(net) for net in nets], [net.state_dict() for net in nets]
    with pytest.raises(RebasinError, match="unmatched: expected one of 'pad', 'fold', 'transport'; got 'drop'"):
        match_widths(*specs, *states, unmatched="drop")
    with pytest.raises(SpecMismatchError, match=r"reference: expected '0.weight' as \(5, 5\); got \(3, 5\)"):
        match_widths(*specs, *states[::-1])
    with pytest.raises(SpecMismatchError, match=r"model: expected finite weights; '0.bias'"):
        match_widths(*specs, states[0], {**states[1], "0.bias": torch.full((3,), torch.nan)})
    other = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 7))
    with pytest.raises(SpecMismatchError, match=r"axis 0 of '4.weight' .* got 4 and 7"):
        match_widths(specs[0], spec_of(other), states[0], other.state_dict())
    with pytest.raises(SpecMismatchError, match=r"networks of one kind; '4.bias' is in one only"):
        match_widths(specs[0], spec_of(nn.Sequential(*list(other)[:4])), states[0], states[1])
    with pytest.raises(RebasinError, match="specs: expected one for each model; got 1 for 2"):
        merge_widths(specs[:1], states)
    lstms = [nn.LSTM(4, n) for n in (6, 5)]
    with pytest.raises(RebasinError, match=r"'fold' needs to know which axis of '.*' is read.* take unmatched='pad'"):
        match_widths(*(trace(net, (torch.zeros(2, 3, 4),)) for net in [Wrapped(net) for net in lstms]),
                     *(Wrapped(net).state_dict() for net in lstms), unmatched="fold")  # fmt: skip
    big = [nn.Sequential(nn.Linear(5, n), nn.Linear(n, 2)) for n in (67, 71)]
    with pytest.raises(RebasinError, match="67 and 71 units make 4757 copies, over 4096"):
        match_widths(*(spec_of(net) for net in big), *(net.state_dict() for net in big), unmatched="transport")
