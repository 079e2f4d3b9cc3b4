"""Nodes with different heads share a trunk in Flower: it is aggregated, the heads stay at the nodes."""

from __future__ import annotations

import pytest
import torch
from flower_messages import State, configure, play_round, trained_copy
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp.strategy import FedAdam, FedAvg
from test_strategies_exact import same_bytes
from test_trunk import HEADS, Net, X

from fedrebasin import PermutationSpec, RebasinError, check_spec, permute, random_perms, trace, trunk_tensors
from fedrebasin.errors import UsageError
from fedrebasin.strategies import FedRebasin, Rebasin, legacy, perms_from_record
from fedrebasin.strategies.records import record_to_state


def planted() -> tuple[list[Net], list[PermutationSpec], list[State], list[State]]:
    """Networks with heads of their own, their specs, what each trained, and the same with units in another order."""
    torch.manual_seed(0)
    nets = [Net(head()).eval() for head in HEADS.values()]
    specs = [check_spec(net, trace(net, X), X) for net in nets]
    trunk = {name: nets[0].state_dict()[name] for name in trunk_tensors(specs[0], "second")}
    trained = [{**net.state_dict(), **trained_copy(trunk, seed)} for seed, net in enumerate(nets)]
    pairs = zip(specs, trained, strict=True)
    mixed = [permute(spec, random_perms(spec, 7 + k), state) for k, (spec, state) in enumerate(pairs)]
    return nets, specs, trained, mixed


@pytest.mark.parametrize("inner", [FedAvg, lambda: FedAdam(eta=0.01)], ids=["FedAvg", "FedAdam"])
def test_nodes_with_three_heads_get_the_aligned_trunk_back_and_relabel_their_heads(inner: type[FedAvg]) -> None:
    nets, specs, trained, mixed = planted()
    sent = nets[0].state_dict()
    names = trunk_tensors(specs[0], "second")
    strategy = Rebasin(inner(), spec=specs[0], until="second", send_perms=True, home="relabelled", reference="global")
    arrays, metrics = play_round(strategy, sent, mixed)
    plain = Rebasin(inner(), spec=specs[0], until="second", reference="global")
    expected, _ = play_round(plain, sent, [{name: state[name] for name in names} for state in trained])
    assert arrays is not None and expected is not None and metrics is not None
    assert tuple(arrays) == names
    assert metrics["rebasin-left-out"] == 0
    assert same_bytes(arrays, expected)
    x = torch.randn(20, 5)
    for node, message in enumerate(configure(strategy, record_to_state(arrays), len(nets), 2)):
        assert tuple(message.content.array_records["arrays"]) == names
        perms = perms_from_record(specs[node], message.content)
        assert perms is not None
        shared = record_to_state(message.content.array_records["arrays"])
        nets[node].load_state_dict({**trained[node], **shared})
        goal = nets[node](x)
        nets[node].load_state_dict({**permute(specs[node], perms, mixed[node]), **shared})
        torch.testing.assert_close(nets[node](x), goal)


def test_without_permutations_sent_the_units_that_heads_read_stay() -> None:
    _, specs, trained, _ = planted()
    strategy = FedRebasin(spec=specs[0], until="second")
    play_round(strategy, trained[0], trained)
    assert set(strategy.spec.perm_shapes) == {"first"}


def test_the_head_is_left_out_of_a_record_of_any_name() -> None:
    nets, specs, _, _ = planted()
    strategy = FedRebasin(spec=specs[0], until="norm")
    replies = [
        Message(RecordDict({"own": ArrayRecord(net.state_dict()), "m": MetricRecord({"num-examples": 1})}), reply_to=to)
        for net, to in zip(nets, configure(strategy, nets[0].state_dict(), len(nets)), strict=True)
    ]
    arrays, _ = strategy.aggregate_train(1, replies)
    assert arrays is not None and tuple(arrays) == trunk_tensors(specs[0], "norm")


def test_the_first_evaluation_too_is_of_the_trunk_alone() -> None:
    nets, specs, _, _ = planted()
    strategy = FedRebasin(spec=specs[0], until="norm")
    whole = ArrayRecord(nets[0].state_dict())
    seen: list[ArrayRecord] = []
    strategy.strategy.configure_evaluate = lambda _, arrays, *rest: seen.append(arrays) or []  # type: ignore
    strategy.configure_evaluate(1, whole, ConfigRecord(), None)  # type: ignore[arg-type]
    assert tuple(seen[0]) == trunk_tensors(specs[0], "norm")


def test_an_unknown_layer_and_the_older_interface_are_refused() -> None:
    nets, specs, _, _ = planted()
    with pytest.raises(RebasinError, match="until: expected a module that holds used tensors"):
        FedRebasin(spec=specs[0], until="third")
    with pytest.raises(UsageError, match="until='norm' needs the message API"):
        legacy.Rebasin(LegacyFedAvg(), model=nets[0], example_inputs=X, until="norm")
    with pytest.raises(UsageError, match=r"correction='repair' runs the whole model.* without until"):
        FedRebasin(model=nets[0], example_inputs=X, until="norm", calibration=[torch.randn(64, 5)])
