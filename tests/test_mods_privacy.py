"""rebasin_mod among Flower's clipping and noise mods: the order, and what becomes of running statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flwr.client.mod as legacy
import pytest
import torch
from flower_clients import app_that_sends, arrays_of, call, train_message
from flower_messages import State, small_net, trained_copy
from flwr.app import Context, Message
from flwr.client.mod import make_ffn
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod, message_size_mod
from test_strategies_exact import spec_of

from fedrebasin import permute, random_perms
from fedrebasin.errors import UsageError
from fedrebasin.strategies import rebasin_mod
from fedrebasin.strategies.mod_order import mods_behind

SENT: State = small_net().state_dict()
NORM = 0.2
NOISELESS = LocalDpMod(clipping_norm=NORM, sensitivity=0.0, epsilon=1.0, delta=0.1)
CLIPPING: dict[str, Any] = {"fixed": fixedclipping_mod, "adaptive": adaptiveclipping_mod, "local": NOISELESS}
REFUSED = [fixedclipping_mod, adaptiveclipping_mod, NOISELESS, legacy.fixedclipping_mod, legacy.adaptiveclipping_mod,
           legacy.LocalDpMod(NORM, 0.0, 1.0, 0.1), legacy.secagg_mod, legacy.secaggplus_mod]  # fmt: skip


def shuffled(state: State) -> State:
    return permute(spec_of(), random_perms(spec_of(), 3), state)


def clipped(trained: State, mods: list[Any]) -> State:
    return arrays_of(call(app_that_sends(trained), train_message(SENT, clipping_norm=NORM), mods))


def length(state: State) -> float:
    """Norm of the update of the weights."""
    return float(sum((state[name] - SENT[name]).square().sum() for name in spec_of().parameters)) ** 0.5


@pytest.mark.parametrize("kind", CLIPPING)
def test_in_front_of_a_clipping_mod_a_permuted_model_is_clipped_as_the_unpermuted(kind: str) -> None:
    trained = trained_copy(SENT, 1)
    mods = [CLIPPING[kind], rebasin_mod(spec=spec_of())]
    expected, found = clipped(trained, mods), clipped(shuffled(trained), mods)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert length(found) == pytest.approx(NORM, rel=1e-4)
    assert length(trained) > 2 * NORM


@pytest.mark.parametrize("kind", CLIPPING)
def test_clipped_before_it_is_aligned_the_update_is_another_one(kind: str) -> None:
    """The measured reason for the order: a mod around the other way is not seen here, so nothing refuses it."""

    def hidden(message: Message, ctxt: Context, call_next: Any) -> Message:
        return CLIPPING[kind](message, ctxt, call_next)

    trained = trained_copy(SENT, 1)
    right = clipped(shuffled(trained), [CLIPPING[kind], rebasin_mod(spec=spec_of())])
    wrong = clipped(shuffled(trained), [rebasin_mod(spec=spec_of()), hidden])
    assert max(float((right[name] - wrong[name]).abs().max()) for name in spec_of().parameters) > 0.01


@pytest.mark.parametrize("mod", REFUSED, ids=lambda mod: f"{getattr(mod, '__name__', 'LocalDpMod')} {mod.__module__}")
def test_a_privacy_mod_behind_the_alignment_is_refused_before_the_client_trains(mod: Any) -> None:
    def never(message: Message) -> Message:
        raise AssertionError("trained")

    name = getattr(mod, "__name__", "LocalDpMod")
    with pytest.raises(UsageError, match=rf"{name} is behind .* last: mods=\[{name}, rebasin_mod\(\.\.\.\)\]"):
        call(never, train_message(SENT, clipping_norm=NORM), [message_size_mod, rebasin_mod(spec=spec_of()), mod])


def test_a_privacy_mod_is_seen_behind_others_and_a_harmless_one_is_let_be() -> None:
    mods = [rebasin_mod(spec=spec_of()), message_size_mod, fixedclipping_mod]
    with pytest.raises(UsageError, match="fixedclipping_mod is behind rebasin_mod"):
        call(app_that_sends(SENT), train_message(SENT, clipping_norm=NORM), mods)
    mods = [rebasin_mod(spec=spec_of()), message_size_mod]
    assert not call(app_that_sends(SENT), train_message(SENT, clipping_norm=NORM), mods).has_error()
    assert list(mods_behind(make_ffn(lambda message, context: message, mods))) == ["RebasinMod", "message_size_mod"]


@pytest.mark.parametrize("kind", CLIPPING)
def test_in_front_of_a_clipping_mod_statistics_go_back_as_received_and_do_not_swamp_the_norm(kind: str) -> None:
    trained = {**trained_copy(SENT, 1), "1.num_batches_tracked": torch.tensor(100)}
    found = clipped(trained, [CLIPPING[kind], rebasin_mod(spec=spec_of())])
    assert all(torch.equal(found[name], SENT[name]) for name in spec_of().buffers)
    assert length(found) == pytest.approx(NORM, rel=1e-4)
    swamped = clipped(trained, [CLIPPING[kind], rebasin_mod(spec=spec_of(), buffers="aligned")])
    assert length(swamped) < NORM / 50


def test_elsewhere_statistics_are_aligned_unless_they_are_to_go_back_as_received() -> None:
    trained = trained_copy(SENT, 1)
    for buffers, expected in (("auto", trained), ("aligned", trained), ("received", SENT)):
        found = clipped(shuffled(trained), [message_size_mod, rebasin_mod(spec=spec_of(), buffers=buffers)])
        assert all(torch.equal(found[name], expected[name]) for name in spec_of().buffers)
        assert all(torch.equal(found[name], trained[name]) for name in spec_of().parameters)


def test_a_users_own_function_of_a_known_name_does_not_count_as_flowers() -> None:
    def fixedclipping_mod(message: Message, ctxt: Context, call_next: Callable[..., Message]) -> Message:
        return call_next(message, ctxt)

    found = clipped(trained_copy(SENT, 1), [fixedclipping_mod, rebasin_mod(spec=spec_of())])
    assert torch.equal(found["1.running_mean"], trained_copy(SENT, 1)["1.running_mean"])
