"""ArrayRecord <-> state dict."""

from __future__ import annotations

import struct
from io import BytesIO

import numpy as np
import pytest
import torch
from flower_messages import outside_a_run
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from torch import nn

from fedrebasin import permute, trace
from fedrebasin.errors import SpecMismatchError
from fedrebasin.strategies.aggregation import rewrite_replies
from fedrebasin.strategies.records import (
    DECODE_ERRORS,
    cast_arrays,
    record_to_state,
    select_arrays,
    state_to_record,
)
from fedrebasin.strategies.replaced import replace_array
from fedrebasin.strategies.reply import Reply

DTYPES = [
    torch.float16,
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (2, 1, 3)], ids=str)
def test_a_state_dict_comes_back_with_its_keys_dtypes_and_shapes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    state = {"z": (torch.rand(shape) * 100).to(dtype), "a": torch.zeros(2)}
    back = record_to_state(state_to_record(state))
    assert list(back) == ["z", "a"]
    assert back["z"].dtype == dtype
    assert back["z"].shape == shape
    assert torch.equal(back["z"], state["z"])


def test_a_transposed_tensor_and_one_in_channels_last_come_back_equal() -> None:
    state = {"t": torch.rand(3, 4).t(), "c": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)}
    back = record_to_state(state_to_record(state))
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_an_array_in_fortran_order_is_read_right() -> None:
    values = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert torch.equal(record_to_state(ArrayRecord({"a": Array(values)}))["a"], torch.from_numpy(values.copy()))


def test_a_decoded_tensor_owns_its_memory() -> None:
    record = state_to_record({"a": torch.zeros(3)})
    record_to_state(record)["a"].add_(1)
    assert torch.equal(record_to_state(record)["a"], torch.zeros(3))


def test_bfloat16_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        SpecMismatchError, match=r"torch.bfloat16, which Flower's wire does not carry; send it as float32"
    ):
        state_to_record({"a": torch.zeros(2, dtype=torch.bfloat16)})


def test_garbage_raises_one_of_the_decoding_errors() -> None:
    whole = Array(np.ones(3, np.float32))
    headers = ["{'descr': '<f4', 'shape': (2,", '"' * 3, "-" * 3000 + "1"]  # cut off, open, deep
    headers.append("{'descr': '<f4', 'fortran_order': False, 'shape': (9" + "9" * 30 + ",)}")
    damaged = [b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() for text in headers]
    later = BytesIO()
    np.savez(later, a=np.ones(3))  # and a zip of a version that is yet to come
    at = later.getvalue().index(b"PK\x01\x02") + 6
    damaged.append(later.getvalue()[:at] + b"\xff" + later.getvalue()[at + 1 :])
    damaged += [b"", b"garbage", whole.data[:-3], whole.data[:9], b"PK\x03\x04" + bytes(40), b"\x80\x04." + bytes(9)]
    for data in damaged:
        with pytest.raises(DECODE_ERRORS, match=r"."):
            record_to_state(ArrayRecord({"a": Array("float32", (3,), "numpy.ndarray", data)}))
    with pytest.raises(DECODE_ERRORS, match="serialization"):
        record_to_state(ArrayRecord({"a": Array("float32", (3,), "my.format", whole.data)}))


def test_rewriting_a_reply_replaces_its_arrays_in_place_and_keeps_their_order_and_shapes() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    state = dict(reversed(net.state_dict().items()))
    spec, perm = trace(net, (torch.zeros(2, 2),)), {"0": torch.tensor([2, 0, 1])}
    trained = [name for name in state if name in spec.parameters]
    record = state_to_record(state)
    reply = Reply(outside_message(), 1, 1.0, record, MetricRecord(), ("arrays", "metrics"))
    aligned = rewrite_replies(spec, [perm], [reply], trained, keep_ends=False)
    assert list(record) == trained
    moved = permute(spec, perm, state)
    found = {**record_to_state(record), **aligned.buffers[0]}
    assert found["1.num_batches_tracked"].shape == ()
    assert found.keys() == state.keys() and all(torch.equal(found[name], moved[name]) for name in state)


def outside_message() -> Message:
    outside_a_run()
    return Message(RecordDict(), dst_node_id=1, message_type="train")


def test_selecting_arrays_copies_none() -> None:
    record = state_to_record({"b": torch.zeros(2), "a": torch.zeros(1)})
    assert select_arrays(record, ["a", "b"])["b"] is record["b"]


def test_casting_restores_dtypes_and_order_and_leaves_right_arrays_alone() -> None:
    like = state_to_record({"b": torch.zeros(1), "a": torch.zeros((), dtype=torch.float16), "c": torch.zeros(1)})
    record = state_to_record({"a": torch.tensor(1.5, dtype=torch.float64), "b": torch.ones(1)})
    cast = cast_arrays(record, like)
    assert list(cast) == ["b", "a"]
    assert cast["b"] is record["b"]
    assert cast["a"].dtype == "float16"
    assert cast["a"].shape == ()
    assert record_to_state(cast)["a"] == 1.5


@pytest.mark.parametrize(
    "old", [np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32, order="F"), np.zeros((), np.complex64)]
)
def test_a_replaced_array_is_what_flower_would_have_made_of_it(old: np.ndarray) -> None:
    new = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).T if old.ndim else torch.tensor(0.5)
    new = new.to(torch.from_numpy(np.zeros(1, old.dtype)).dtype)
    record = ArrayRecord({"a": Array(old), "b": Array(old)})
    before = record["a"]
    kept = before.data
    replace_array(record, "a", new)
    assert list(record) == ["a", "b"] and record["a"].numpy().tobytes() == new.numpy().tobytes()
    assert record["a"].data == Array(np.array(new.numpy(), order="C")).data
    assert before.data == kept  # another record may hold it, as the model that was sent
