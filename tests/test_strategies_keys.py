"""All replies with the same other keys: the message says why, and what to do, once."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from flower_messages import State, answer, configure, small_net, trained_copy, warnings
from flwr.serverapp.strategy import FedAvg
from test_strategies_exact import rebasin

from fedrebasin.strategies.arrays import explain_keys

__all__ = ["warnings"]

SENT: State = small_net().state_dict()
GOOD = [trained_copy(SENT, seed) for seed in (1, 2)]


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            lambda place, name: f"module.{name}",
            r"prefix 'module.' \(DataParallel\): send ArrayRecord\(model.module.state",
        ),
        (
            lambda place, name: f"_orig_mod.{name}",
            r"prefix '_orig_mod.' \(torch.compile\): send .*model._orig_mod.state",
        ),
        (
            lambda place, name: str(place),
            r"'0', '1', ..., as of a list of NumPy arrays.*send ArrayRecord\(model.state_dict",
        ),
        (
            lambda place, name: None if "running" in name else name,
            "9 of 11 tensors, without '1.running_mean': send the whole",
        ),
        (
            lambda place, name: f"net{place}",
            "a tensor 'net0' that the sent model lacks, and no '0.weight': send the state dict",
        ),
    ],
)
def test_the_same_other_keys_in_all_replies_are_explained_once(
    rename: Callable[[int, str], str | None], message: str, warnings: list[str]
) -> None:
    strategy = rebasin(FedAvg())
    for server_round in (1, 2):
        messages = configure(strategy, SENT, 2, server_round)
        states = [
            {key: t for place, (name, t) in enumerate(state.items()) if (key := rename(place, name)) is not None}
            for state in GOOD[:2]
        ]
        replies = [answer(sent, state) for sent, state in zip(messages, states, strict=True)]
        assert strategy.aggregate_train(server_round, replies) == (None, None)
    explanations = [line for line in warnings if re.search(message, line)]
    assert len(explanations) == 1, warnings
    assert explanations[0].startswith("rebasin: all 2 replies are left out: ")
    assert not any("node" in line for line in warnings)


def test_a_prefix_of_the_sent_model_is_the_servers_to_mend() -> None:
    line = explain_keys(["a", "b"], ["module.a", "module.b"])
    assert line == (
        "the sent model's keys have the prefix 'module.' (DataParallel): "
        "pass initial_arrays made from the same model as the clients', without its wrapper"
    )
