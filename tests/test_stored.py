"""State dicts that stay in their files: what is read, what is refused, and matching that holds a few tensors."""

from __future__ import annotations

import json
import math
import pathlib
import re
import struct
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedrebasin import permute, random_perms, trace, weight_matching
from fedrebasin.errors import RebasinError
from fedrebasin.matching import plan
from fedrebasin.matching.problem import WeightProblem
from fedrebasin.stored import StoredState
from fedrebasin.stored_write import write_state

STATE = {
    "z.weight": torch.arange(12, dtype=torch.float32).view(3, 4),
    "a.half": torch.randn(5).bfloat16(),
    "count": torch.tensor(7),
    "mask": torch.tensor([True, False, True]),
    "empty": torch.zeros(0, 3),
    "narrow": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
    "waves": torch.tensor([[1 + 2j, -3j]]),
}


def test_what_safetensors_wrote_is_read_tensor_by_tensor(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.safetensors", metadata={"format": "pt"})
    stored = StoredState(tmp_path / "a.safetensors")
    assert stored.metadata == {"format": "pt"} and set(stored) == set(STATE)
    for name, tensor in STATE.items():
        assert stored[name].dtype == tensor.dtype and stored[name].shape == tensor.shape
        assert torch.equal(stored[name].to(torch.complex128), tensor.to(torch.complex128))
        assert torch.equal(
            torch.cat(
                [c.to(torch.complex128) for c in stored.chunks(name, 8)] or [torch.zeros(0).to(torch.complex128)]
            ),
            tensor.to(torch.complex128).flatten(),
        )
        assert stored.described[name].device.type == "meta"


def test_what_is_written_in_any_order_is_read_by_safetensors_in_the_order_of_the_header(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    write_state(path, STATE, [(name, STATE[name]) for name in sorted(STATE)], metadata={"format": "pt"})
    found = load_file(path)
    assert all(
        found[name].dtype == t.dtype and torch.equal(found[name].to(torch.complex128), t.to(torch.complex128))
        for name, t in STATE.items()
    )
    assert list(StoredState(path)) == list(STATE)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def _fails_midway() -> Iterator[tuple[str, Tensor]]:
    yield "z.weight", STATE["z.weight"]
    raise KeyboardInterrupt


def test_a_failure_midway_leaves_what_was_there_before_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt):
        write_state(path, STATE, _fails_midway())
    with pytest.raises(RebasinError, match="is missing"):
        write_state(path, STATE, [("z.weight", STATE["z.weight"])])
    with pytest.raises(RebasinError, match=r"expected 'z.weight' as torch.float32 \(3, 4\)"):
        write_state(path, STATE, [("z.weight", torch.zeros(3))])
    with pytest.raises(RebasinError, match="once; got 'other'"):
        write_state(path, STATE, [("other", torch.zeros(3))])
    assert [file.name for file in tmp_path.iterdir()] == ["c.safetensors"] and path.read_text() == "before"
    for wrong in ("absent/d.safetensors", "c.safetensors/d.safetensors", "d" * 1000):
        with pytest.raises(RebasinError, match="cannot write"):
            write_state(tmp_path / wrong, {}, [])


def _zip_to_come() -> bytes:
    """A NumPy archive that says it is of a version of zip that is yet to come."""
    written = BytesIO()
    np.savez(written, a=np.ones(3))
    data = bytearray(written.getvalue())
    data[data.index(b"PK\x01\x02") + 6] = 255
    return bytes(data)


def _file(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


BAD = {
    "expected a safetensors file; got a pickle": b"PK\x03\x04" + b"0" * 20,
    "got a pickle, which": b"\x80\x02}q\x00.",
    "a pickle, which can run code": _zip_to_come(),
    "its header is missing or cut off": b"\x10",
    "header is missing": struct.pack("<Q", 1 << 60) + b"{}",
    "header cannot be read": struct.pack("<Q", 4) + b"nope",
    "a dtype among": _file({"w": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}, b"0000"),
    "it is cut off": _file({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"0000"),
    "something follows": _file({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"000000"),
    "the place of 'w'": _file({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}, b"0000"),
    "KeyError": _file({"w": {"dtype": "F32", "shape": [3]}}),
    "RecursionError": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "OverflowError": _file({"w": {"dtype": "F32", "shape": [math.inf], "data_offsets": [0, 4]}}, b"0000"),
}


@pytest.mark.parametrize("said", BAD)
def test_what_is_no_whole_safetensors_file_is_refused(said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(BAD[said])
    with pytest.raises(RebasinError, match=said):
        StoredState(tmp_path / "bad.safetensors")


def test_a_missing_file_and_one_that_was_cut_off_later_are_named(tmp_path: Path) -> None:
    with pytest.raises(RebasinError, match=r"absent.safetensors: .*No such file"):
        StoredState(tmp_path / "absent.safetensors")
    torch.save({}, tmp_path / "old.pth")
    with pytest.raises(RebasinError, match=r"weights_only=True"):
        StoredState(tmp_path / "old.pth")
    save_file(STATE, tmp_path / "a.safetensors")
    stored = StoredState(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-8])
    with pytest.raises(RebasinError, match="ended before its tensors"):
        _ = [stored[name] for name in stored]

    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(RebasinError, match=r"a\.safetensors: cannot read the file any more"):
        write_state(tmp_path / "b.safetensors", stored.described, ((name, stored[name]) for name in stored))


def test_a_type_that_safetensors_lacks_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RebasinError, match=r"like: safetensors has no torch.complex128, the type of 'w'"):
        write_state(tmp_path / "a.safetensors", {"w": torch.zeros(1, dtype=torch.complex128)}, [])
    assert not list(tmp_path.iterdir())


class Residual(nn.Module):
    """Permutations on both axes, a stream that many layers share, heads, and layers that no other perm moves."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(5, 8), nn.Linear(8, 3)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.block(self.stem(x)))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matching_of_stored_states_is_that_of_held_ones(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    spec = trace(Residual(), (torch.randn(2, 4, 5),))
    first, other = ({k: v.to(dtype) for k, v in Residual().state_dict().items()} for _ in range(2))
    planted = permute(spec, random_perms(spec, 3), {k: v + 0.01 * torch.randn_like(v) for k, v in first.items()})
    for name, state in (("a", first), ("b", planted), ("c", other)):
        save_file(state, tmp_path / f"{name}.safetensors")
    stored = {n: StoredState(tmp_path / f"{n}.safetensors", scratch=tmp_path) for n in "abc"}
    for n, model in (("b", planted), ("c", other)):
        held, found = weight_matching(spec, first, model), weight_matching(spec, stored["a"], stored[n])
        assert found.objective == held.objective and found.objective_before == held.objective_before
        assert all(torch.equal(found.perms[perm], held.perms[perm]) for perm in held.perms)
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".safetensors"] * 3


def test_what_never_changes_is_the_same_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    spec = trace(Residual(), (torch.randn(2, 4, 5),))
    first, other = ({k: v.double() for k, v in Residual().state_dict().items()} for _ in range(2))
    whole, parts = WeightProblem(spec, first, other), WeightProblem(spec, first, other)
    expected = [whole.similarity(block) for block in whole.blocks]
    monkeypatch.setattr(plan, "_PART", 30)
    assert any(len(plan.in_parts(terms, parts.entries_of)) > 2 for terms in parts.plan.terms.values())
    for block, similarity in zip(parts.blocks, expected, strict=True):
        torch.testing.assert_close(parts.similarity(block), similarity)


def test_a_file_is_what_it_holds_whatever_its_name_and_the_length_of_its_header(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "a.pt")
    assert set(StoredState(tmp_path / "a.pt")) == set(STATE)
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).ljust(640).encode()
    assert struct.pack("<Q", len(header)).startswith(b"\x80\x02")  # as a pickle does
    (tmp_path / "b.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
    assert set(StoredState(tmp_path / "b.safetensors")) == {"w"}
    np.savez(tmp_path / "c.npz", w=np.zeros(3, np.float32))
    with pytest.raises(RebasinError, match=r"c\.npz: expected a safetensors file; got NumPy's \.npz"):
        StoredState(tmp_path / "c.npz")
    (tmp_path / "d.bin").write_bytes(b"(dp0\n.")  # of protocol 0
    with pytest.raises(RebasinError, match="got a pickle"):
        StoredState(tmp_path / "d.bin")


def test_the_advice_for_pickles_converts_plain_nested_and_whole_models(tmp_path: Path) -> None:
    net, path = nn.Linear(2, 3), tmp_path / "a.pt"
    for saved, line in {
        "plain": (net.state_dict(), "torch.load(path, weights_only=True)"),
        "state_dict": ({"state_dict": net.state_dict()}, "torch.load(path, weights_only=True)['state_dict']"),
        "whole": (net, "torch.load(path, weights_only=False).state_dict()"),
    }.values():
        torch.save(saved, path)
        with pytest.raises(RebasinError, match=re.escape(line)):
            StoredState(path)
        save_file(eval(line, {"torch": torch, "path": path}), tmp_path / "b.safetensors")
        assert torch.equal(StoredState(tmp_path / "b.safetensors")["weight"], net.weight)


def test_the_advice_for_shards_joins_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for place, name in enumerate(STATE):
        save_file({name: STATE[name]}, folder / f"model-{place}.safetensors")
    (folder / "model.safetensors.index.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for path in (folder, folder / "model.safetensors.index.json"):
        with pytest.raises(RebasinError, match="expected one safetensors file") as caught:
            StoredState(path)
    line = str(caught.value).partition("Join its shards: ")[2]
    exec(line, {"safetensors": safetensors, "pathlib": pathlib, "folder": folder})
    assert set(StoredState("joined.safetensors")) == set(STATE)
