"""rebasin_mod: on the client what the server would have done; which replies it refuses, and which it lets go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flower_clients import app_that_sends, arrays_of, call, context, train_message
from flower_messages import State, play_round, small_net, trained_copy, warnings
from flwr.app import Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from test_strategies_exact import rebasin, same_bytes, spec_of

from fedrebasin import permute, random_perms, trace, weight_matching
from fedrebasin.errors import RebasinError, UsageError
from fedrebasin.strategies import perms_from_record, rebasin_mod
from fedrebasin.strategies.records import record_to_state, state_to_record

__all__ = ["warnings"]

SENT: State = small_net().state_dict()


def shuffled(seed: int) -> State:
    """A client's model whose units are not in the sent model's order."""
    return permute(spec_of(), random_perms(spec_of(), seed), trained_copy(SENT, seed))


def through_the_mod(trained: State, sent: State = SENT) -> State:
    return arrays_of(call(app_that_sends(trained), train_message(sent), [rebasin_mod(spec=spec_of())]))


def test_what_the_mod_sends_is_bit_for_bit_what_the_server_would_have_aligned() -> None:
    states = [shuffled(seed) for seed in (1, 2, 3)]
    aligned = [through_the_mod(state) for state in states]
    for before, after in zip(states, aligned, strict=True):
        expected = permute(spec_of(), weight_matching(spec_of(), SENT, before).perms, before)
        assert list(after) == list(expected)
        assert all(torch.equal(after[name], expected[name]) for name in expected)
        assert not torch.equal(after["0.weight"], before["0.weight"])
    on_server, moved = play_round(rebasin(FedAvg()), SENT, states)
    on_client, still = play_round(rebasin(FedAvg()), SENT, aligned)
    assert on_server is not None
    assert on_client is not None
    assert same_bytes(on_server, on_client)
    assert moved is not None
    assert still is not None
    assert moved["rebasin-moved-fraction"] > 0.5  # type: ignore[operator]
    assert still["rebasin-moved-fraction"] == 0


def test_behind_the_mod_fedavg_alone_gives_the_parameters_of_rebasin_around_it() -> None:
    states = [shuffled(seed) for seed in (1, 2, 3)]
    with_rebasin, _ = play_round(rebasin(FedAvg()), SENT, states)
    alone, _ = play_round(FedAvg(), SENT, [through_the_mod(state) for state in states])
    assert with_rebasin is not None
    assert alone is not None
    assert all(with_rebasin[name].data == alone[name].data for name in spec_of().parameters)


def test_a_reply_in_the_received_order_goes_out_as_the_same_bytes() -> None:
    reply = call(app_that_sends(trained_copy(SENT, 1)), train_message(SENT), [rebasin_mod(spec=spec_of())])
    assert same_bytes(reply.content.array_records["arrays"], state_to_record(trained_copy(SENT, 1)))


def test_the_received_model_is_read_before_the_client_takes_it_away() -> None:
    reply = call(app_that_sends(shuffled(1), empties=True), train_message(SENT), [rebasin_mod(spec=spec_of())])
    found, expected = arrays_of(reply), through_the_mod(shuffled(1))
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected.values(), strict=True))


@pytest.mark.parametrize("kind", ["evaluate", "query"])
def test_messages_that_do_not_train_pass_through(kind: str) -> None:
    reply = call(app_that_sends(shuffled(1)), train_message(SENT, kind), [rebasin_mod(spec=spec_of())])
    assert same_bytes(reply.content.array_records["arrays"], state_to_record(shuffled(1)))


def test_the_spec_may_be_shipped_as_a_file_and_must_have_passed_its_check(tmp_path: Path) -> None:
    spec_of().save(tmp_path / "spec.json")
    assert rebasin_mod(spec=tmp_path / "spec.json").spec.axes == spec_of().axes
    made = rebasin_mod(model=small_net, example_inputs=(torch.randn(4, 5),))
    assert made.spec.axes == spec_of().axes
    with pytest.raises(RebasinError, match=r"spec: cannot read .*lost\.json"):
        rebasin_mod(spec=tmp_path / "lost.json")
    with pytest.raises(UsageError, match="spec: it lacks the mark of a passed check"):
        rebasin_mod(spec=trace(small_net(), (torch.randn(4, 5),)))
    with pytest.raises(UsageError, match=r"buffers: expected one of 'auto', 'aligned', 'received'; got 'sent'"):
        rebasin_mod(spec=spec_of(), buffers="sent")
    with pytest.raises(UsageError, match="names: expected names of the spec's tensors; got 'bias'"):
        rebasin_mod(spec=spec_of(), names=["bias"])
    with pytest.raises(UsageError, match="beside: 'arrays' is taken"):
        rebasin_mod(spec=spec_of(), beside=["arrays"])


def never(message: Message) -> Message:
    raise AssertionError("trained")


def test_a_received_model_that_is_not_the_specs_is_refused_before_the_client_trains() -> None:
    mods, other = [rebasin_mod(spec=spec_of())], small_net(width=13).state_dict()
    with pytest.raises(UsageError, match=r"the received model: expected '0\.weight' as \(12, 5\); got \(13, 5\)"):
        call(never, train_message(other), mods)
    with pytest.raises(UsageError, match=r"rebasin_mod: arrays: got a tensor 'module\.0\.weight' that"):
        call(never, train_message({f"module.{name}": t for name, t in SENT.items()}), mods)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: {name: t for name, t in state.items() if name != "0.bias"}, "the 11 that were received; got 10"),
        (lambda state: {**state, "0.bias": torch.zeros(13)}, r"expected '0.bias' as \(12,\); got \(13,\)"),
        (lambda state: {**state, "0.bias": torch.full((12,), torch.nan)}, "'0.bias' holds a NaN or an infinity"),
    ],
)
def test_a_trained_model_that_would_spoil_the_average_is_not_sent(
    change: Callable[[State], State], reason: str
) -> None:
    with pytest.raises(UsageError, match=f"rebasin_mod: the trained model does not fit .*{reason}"):
        call(app_that_sends(change(shuffled(1))), train_message(SENT), [rebasin_mod(spec=spec_of())])


def test_an_infinite_buffer_that_was_received_so_may_be_sent() -> None:
    mask = {"1.running_mean": torch.full((12,), -torch.inf)}
    found = through_the_mod({**shuffled(1), **mask}, {**SENT, **mask})
    assert torch.equal(found["1.running_mean"], mask["1.running_mean"])


def test_where_the_matching_fails_the_reply_goes_as_it_was_trained(warnings: list[str]) -> None:
    broken = {name: torch.full_like(t, torch.nan) if t.is_floating_point() else t for name, t in SENT.items()}
    found = through_the_mod(shuffled(1), broken)
    assert all(torch.equal(found[name], tensor) for name, tensor in shuffled(1).items())
    assert warnings[-1].startswith("rebasin_mod: alignment failed (SpecMismatchError: ")
    assert warnings[-1].endswith("the reply goes as it was trained")


def test_a_clients_own_error_and_a_message_without_a_model_pass_through(warnings: list[str]) -> None:
    def fails(message: Message) -> Message:
        return Message(Error(code=3, reason="no data today"), reply_to=message)

    reply = call(fails, train_message(SENT), [rebasin_mod(spec=spec_of())])
    assert reply.error.reason == "no data today"
    message = Message(RecordDict({"metrics": MetricRecord({"a": 1})}), dst_node_id=1, message_type="train")
    reply = call(app_that_sends(shuffled(1)), message, [rebasin_mod(spec=spec_of())])
    assert same_bytes(reply.content.array_records["arrays"], state_to_record(shuffled(1)))
    assert warnings == ["rebasin_mod: a message without a model; there is nothing to align to"]


def test_the_perms_of_the_upload_are_kept_for_the_next_round_if_asked_for() -> None:
    ctxt = context()
    mod = rebasin_mod(spec=spec_of(), keep_perms=True)
    reply = call(app_that_sends(shuffled(1)), train_message(SENT), [mod], ctxt)
    perms = perms_from_record(spec_of(), ctxt.state)
    assert perms is not None
    again = permute(spec_of(), perms, shuffled(1))
    assert all(torch.equal(again[name], tensor) for name, tensor in arrays_of(reply).items())
    broken = {name: torch.full_like(t, torch.nan) if t.is_floating_point() else t for name, t in SENT.items()}
    call(app_that_sends(shuffled(1)), train_message(broken), [mod], ctxt)
    assert perms_from_record(spec_of(), ctxt.state) is None
    call(app_that_sends(shuffled(1)), train_message(SENT), [rebasin_mod(spec=spec_of())], ctxt)
    assert not ctxt.state


def test_records_beside_the_weights_move_with_them_and_one_that_does_not_fit_is_not_sent(warnings: list[str]) -> None:
    control = {name: t for name, t in trained_copy(SENT, 9).items() if name in spec_of().parameters}
    perms = random_perms(spec_of(), 1)
    moved = permute(spec_of(), perms, {**SENT, **control})
    beside = {"control": {name: moved[name] for name in control}, "odd": {"0.bias": torch.zeros(3)}}
    mod = rebasin_mod(spec=spec_of(), beside=["control", "odd", "lost"])
    reply = call(app_that_sends(shuffled(1), beside=beside), train_message(SENT), [mod])
    found = record_to_state(reply.content.array_records["control"])
    assert all(torch.equal(found[name], control[name]) for name in control)
    assert set(reply.content.array_records) == {"arrays", "control"}
    assert warnings == [
        "rebasin_mod: beside: 'odd' holds '0.bias' as (3,), the weight has (12,); it is not sent",
        "rebasin_mod: beside: the reply has no ArrayRecord 'lost'",
    ]


def test_a_part_of_the_model_is_aligned_with_what_is_tied_to_the_rest_fixed() -> None:
    names = [name for name in SENT if not name.startswith("1.")]  # the norm stays at home, and its units with it
    sent = {name: SENT[name] for name in names}
    part = spec_of().only(names)
    perms = random_perms(part, 1)
    home = {name: trained_copy(SENT, 1)[name] for name in names}
    found = through_the_mod(permute(part, perms, home), sent)
    assert all(torch.equal(found[name], home[name]) for name in names)
    assert list(part.perm_shapes) == ["3"]


def test_units_tied_to_tensors_at_home_move_where_the_client_relabels_them() -> None:
    names, ctxt = [name for name in SENT if not name.startswith("1.")], context()
    mod = rebasin_mod(spec=spec_of(), keep_perms=True, home="relabelled")
    upload = {name: shuffled(1)[name] for name in names}
    reply = call(app_that_sends(upload), train_message({name: SENT[name] for name in names}), [mod], ctxt)
    perms = perms_from_record(spec_of(), ctxt.state)
    assert perms is not None
    whole = permute(spec_of(), perms, shuffled(1))
    assert all(torch.equal(whole[name], tensor) for name, tensor in trained_copy(SENT, 1).items())
    assert all(torch.equal(arrays_of(reply)[name], whole[name]) for name in names)


def test_replies_of_several_rounds_and_clients_do_not_touch_each_other() -> None:
    mod = rebasin_mod(spec=spec_of())
    first = arrays_of(call(app_that_sends(shuffled(1)), train_message(SENT), [mod]))
    call(app_that_sends(shuffled(2)), train_message(first), [mod])
    again = arrays_of(call(app_that_sends(shuffled(1)), train_message(SENT), [mod]))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_messages_of_other_parts_that_are_handled_meanwhile_do_not_matter() -> None:
    mod = rebasin_mod(spec=spec_of())
    part = {name: tensor for name, tensor in SENT.items() if name.startswith("0.")}
    trained = shuffled(3)

    def meanwhile(message: Message) -> Message:
        call(app_that_sends(part), train_message(part), [mod])
        return app_that_sends(trained)(message)

    found = arrays_of(call(meanwhile, train_message(SENT), [mod]))
    expected = through_the_mod(trained)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
