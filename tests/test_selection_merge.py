"""``merge_modules(select="calibration")``: its candidates, and the data on which they are measured."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrebasin import CalibrationError, RebasinError, merge, merge_modules
from fedrebasin import selection as module

State = dict[str, Tensor]


def nets(count: int, seed: int = 0) -> list[nn.Module]:
    torch.manual_seed(seed)
    made: list[nn.Module] = [nn.Sequential(nn.Linear(4, 24), nn.ReLU(), nn.Linear(24, 3)) for _ in range(count)]
    return made


def test_merge_modules_keeps_the_aligned_average_of_permuted_copies() -> None:
    one = nets(1)[0]
    copies = [copy.deepcopy(one) for _ in range(3)]
    for seed, other in enumerate(copies[1:]):
        perm = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
        state = one.state_dict()
        moved = {"0.weight": state["0.weight"][perm], "0.bias": state["0.bias"][perm]}
        other.load_state_dict({**state, **moved, "2.weight": state["2.weight"][:, perm]})
    x = torch.randn(200, 4)
    merged = merge_modules(copies, (x[:2],), calibration=[x], coefficients=[3, 2, 1], select="calibration")
    torch.testing.assert_close(merged(x), one(x), rtol=1e-4, atol=1e-5)
    plain = merge([one.state_dict() for one in copies], coefficients=[3, 2, 1])
    assert not torch.allclose(merged.state_dict()["0.weight"], plain["0.weight"], atol=1e-3)


def test_merge_modules_measures_on_examples_that_no_correction_saw(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[float]] = {"corrected": set(), "measured": set()}
    names = []
    given: dict[str, Any] = {}
    correct, select = module.correct, merge_modules.__globals__["select_candidate"]

    def spy_on_correct(name: str, setting: Any, merged: State, ends: Any) -> State:
        names.append(name)
        seen["corrected"] |= {float(x) for batch in setting.calibration for x in batch[0][:, 0]}
        return dict(correct(name, setting, merged, ends))

    def spy_on_select(net: Any, candidates: Any, held_out: Any, **options: Any) -> Any:
        seen["measured"] |= {float(x) for batch in held_out for x in batch[0][:, 0]}
        found = select(net, candidates, held_out, **options)
        names.extend(found.figures)
        given.update(options)
        return found

    monkeypatch.setattr(module, "correct", spy_on_correct)
    monkeypatch.setitem(merge_modules.__globals__, "select_candidate", spy_on_select)
    data = [(torch.randn(100, 4), torch.randint(3, (100,))) for _ in range(2)]
    wanted = ["repair", "least-squares"]
    models = nets(2)
    merge_modules(
        *(models, (data[0][0],)),
        calibration=data,
        coefficients=[3, 1],
        correction=wanted,
        select="calibration",
        loss=F.cross_entropy,
    )
    assert given["coefficients"] == [0.75, 0.25]
    for end, model in zip(given["ends"], models, strict=True):
        assert all(torch.equal(end[name], tensor) for name, tensor in model.state_dict().items())
    assert names[:4] == wanted * 2
    paths = [f"{path}{end}" for path in ("plain", "aligned") for end in ("", *(f"+{name}" for name in wanted))]
    assert names[4:] == [*paths, "model 0", "model 1"]
    assert len(seen["measured"]) == 50
    assert len(seen["corrected"]) == 150
    assert not seen["measured"] & seen["corrected"]


def test_merge_modules_says_what_selection_lacks() -> None:
    inputs, data = (torch.randn(2, 4),), [torch.randn(20, 4)]
    with pytest.raises(CalibrationError, match="select='calibration' needs calibration"):
        merge_modules(nets(2), inputs, select="calibration")
    with pytest.raises(RebasinError, match="select: expected None or 'calibration'; got 'labels'"):
        merge_modules(nets(2), inputs, calibration=data, select="labels")
    with pytest.raises(RebasinError, match=r"correction: several need .* give select='calibration', or one name"):
        merge_modules(nets(2), inputs, calibration=data, correction=["repair", "regmean"])
    with pytest.raises(RebasinError, match=r"correction: expected None or one of repair, .*; got 'mend'"):
        merge_modules(nets(2), inputs, calibration=data, correction=["repair", "mend"], select="calibration")
    with pytest.raises(RebasinError, match="loss: only select='calibration' uses it; leave it out with select=None"):
        merge_modules(nets(2), inputs, calibration=data, loss=nn.functional.mse_loss)
    with pytest.raises(RebasinError, match="correction: expected each name once"):
        merge_modules(nets(2), inputs, calibration=data, correction=["repair", "repair"], select="calibration")
