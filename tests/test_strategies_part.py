"""A part of the model travels: adapters, norms that stay at home, a frozen trunk."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from flower_messages import MemoryGrid, State, answer, configure, play_round, trained_copy, warnings
from flwr.app import ConfigRecord, Message
from flwr.serverapp.strategy import FedAdam, FedAvg
from test_strategies_exact import same_bytes
from torch import Tensor, nn

from fedrebasin import PermutationSpec, check_spec, moved_fraction, permute, random_perms, trace
from fedrebasin.errors import SpecMismatchError, UsageError
from fedrebasin.strategies import FedRebasin, Rebasin, perms_from_record, rebasin_mod
from fedrebasin.strategies.records import record_to_state, state_to_record

__all__ = ["warnings"]

INPUTS = (torch.randn(4, 5),)


class Net(nn.Module):
    """A trunk with a norm, an adapter beside it, and a head of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.norm, self.deep = nn.Linear(5, 12), nn.BatchNorm1d(12), nn.Linear(12, 10)
        self.down, self.up = nn.Linear(10, 4), nn.Linear(4, 10)
        self.head, self.out = nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = self.deep(self.norm(self.trunk(x)).relu()).relu()
        features = features + self.up(self.down(features).relu())
        return self.out(self.head(features).relu())


@cache
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


@cache
def spec() -> PermutationSpec:
    return check_spec(net(), trace(net(), INPUTS), INPUTS)


#: what travels, and the perms that are left free
PARTS: dict[str, tuple[Callable[[str], bool], set[str]]] = {
    "adapters": (lambda name: name.startswith(("down", "up")), {"down"}),
    "frozen trunk": (lambda name: name.startswith(("head", "out")), {"head"}),
    "FedBN": (lambda name: not name.startswith("norm"), {"deep", "down", "head"}),
    "a personal head": (lambda name: not name.startswith(("head", "out")), {"trunk", "down"}),
}


def part_of(kind: str) -> State:
    return {name: tensor for name, tensor in net().state_dict().items() if PARTS[kind][0](name)}


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("inner", [FedAvg, lambda: FedAdam(eta=0.01)], ids=["FedAvg", "FedAdam"])
def test_replies_in_any_order_of_their_free_units_give_exactly_the_same(kind: str, inner: Callable[[], FedAvg]) -> None:
    sent = part_of(kind)
    part = spec().only(sent)
    states = [trained_copy(sent, seed) for seed in range(3)]
    mixed = [permute(part, random_perms(part, seed), state) for seed, state in enumerate(states)]
    results = []
    for replies in (states, mixed):
        strategy = Rebasin(inner(), spec=spec(), reference="global")
        arrays, metrics = play_round(strategy, sent, replies)
        assert arrays is not None
        assert metrics is not None
        assert list(arrays) == list(sent)
        assert (metrics["rebasin-moved-fraction"] > 0) == (replies is mixed)  # type: ignore[operator]
        results.append(arrays)
    assert same_bytes(*results)
    assert len(strategy.spec.perm_shapes) == len(PARTS[kind][1])
    moved = {axis.name.split(".")[0] for axes in strategy.spec.tied.values() for axis in axes}
    assert PARTS[kind][1] <= moved


@pytest.mark.parametrize("kind", PARTS)
def test_with_what_stays_at_home_the_merged_part_works_for_every_client(kind: str) -> None:
    """Had units moved that are tied to tensors at home, a client's function would change."""
    home, sent = net().state_dict(), part_of(kind)
    part = spec().only(sent)
    client = {**home, **trained_copy(sent, 1)}
    replies = [permute(part, random_perms(part, seed), {name: client[name] for name in sent}) for seed in range(3)]
    arrays, _ = play_round(Rebasin(FedAvg(), spec=spec(), reference="auto"), sent, replies)
    assert arrays is not None
    model = Net().eval()
    x = torch.randn(50, 5)
    model.load_state_dict(client)
    expected = model(x)
    model.load_state_dict({**home, **record_to_state(arrays)})
    torch.testing.assert_close(model(x), expected)


def test_units_that_are_tied_to_tensors_at_home_may_move_if_each_client_relabels_what_it_keeps() -> None:
    """FedBN: the norm stays at home, and its units are aligned all the same."""
    home, sent = net().state_dict(), part_of("FedBN")
    clients = [trained_copy(home, seed) for seed in range(3)]
    mixed = [permute(spec(), random_perms(spec(), 20 + seed), state) for seed, state in enumerate(clients)]
    strategy = Rebasin(FedAvg(), spec=spec(), reference="global", send_perms=True, home="relabelled")
    arrays, metrics = play_round(strategy, sent, [{name: state[name] for name in sent} for state in mixed])
    expected, _ = play_round(FedAvg(), sent, [{name: state[name] for name in sent} for state in clients])
    assert arrays is not None
    assert expected is not None
    assert metrics is not None
    assert set(strategy.spec.perm_shapes) == set(spec().perm_shapes)
    assert all(arrays[name].data == expected[name].data for name in strategy.spec.parameters)
    for node, message in enumerate(configure(strategy, record_to_state(arrays), 3, 2)):
        perms = perms_from_record(spec(), message.content)
        assert perms is not None
        kept = permute(spec(), perms, mixed[node])
        assert all(torch.equal(kept[name], clients[node][name]) for name in home)


def test_perms_of_a_part_leave_what_did_not_travel_as_it_was() -> None:
    sent = part_of("frozen trunk")
    strategy = FedRebasin(spec=spec(), send_perms=True, reference="global")
    play_round(strategy, sent, [permute(spec().only(sent), random_perms(spec().only(sent), s), sent) for s in range(2)])
    perms = perms_from_record(spec(), configure(strategy, sent, 2, 2)[1].content)
    assert perms is not None
    assert {name for name, perm in perms.items() if moved_fraction({name: perm})} == {"head"}


def test_units_tied_to_tensors_at_home_do_not_move_where_nobody_would_learn_of_it() -> None:
    with pytest.raises(UsageError, match=r"home='relabelled': clients relabel .* add send_perms=True"):
        FedRebasin(spec=spec(), home="relabelled")
    with pytest.raises(UsageError, match=r"home='relabelled': clients relabel .* add keep_perms=True"):
        rebasin_mod(spec=spec(), home="relabelled")
    with pytest.raises(UsageError, match="home: expected one of 'fixed', 'relabelled'; got 'free'"):
        FedRebasin(spec=spec(), home="free")


def test_the_log_says_how_many_units_stay_free(warnings: list[str]) -> None:
    strategy = FedRebasin(spec=spec())
    configure(strategy, {"norm.weight": net().state_dict()["norm.weight"]}, 2)
    assert warnings == ["rebasin: 1 of 17 tensors travel; 0 of 34 hidden units are free"]


def test_a_part_is_refused_with_whatever_runs_the_whole_model() -> None:
    options = {"model": net(), "example_inputs": INPUTS, "calibration": [torch.randn(200, 5)]}
    strategy = FedRebasin(**options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"correction='repair' runs the whole model, .* 4 of its 17 .*=None"):
        configure(strategy, part_of("adapters"), 2)
    strategy = FedRebasin(**options, correction=None, matching="activation")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="matching='activation' runs the whole model, and 4 of its 17 tensors travel"):
        configure(strategy, part_of("adapters"), 2)


def test_a_tensor_that_the_model_lacks_is_not_a_part_of_it() -> None:
    grid = MemoryGrid({1: lambda message: message, 2: lambda message: message})
    for state in (
        {"down.weight": torch.zeros(4, 10), "other": torch.zeros(1)},
        {"down.weight": torch.zeros(4, 11)},
        {},
    ):
        with pytest.raises(SpecMismatchError, match="initial_arrays"):
            FedRebasin(spec=spec()).configure_train(1, state_to_record(state), ConfigRecord(), grid)


def test_every_run_of_one_strategy_finds_anew_which_part_travels() -> None:
    def node(message: Message) -> Message:
        sent = record_to_state(message.content.array_records["arrays"])
        return answer(message, permute(spec().only(sent), random_perms(spec().only(sent), 1), sent))

    grid, head, whole = MemoryGrid({1: node, 2: node}), part_of("frozen trunk"), net().state_dict()
    strategy = Rebasin(FedAvg(fraction_evaluate=0.0), spec=spec(), reference="global")
    for state in (head, whole, head):
        result = strategy.start(grid, state_to_record(state), num_rounds=1)
        assert strategy.spec.perm_shapes == spec().only(state).perm_shapes
        found = record_to_state(result.arrays)
        assert all(torch.equal(found[name], state[name]) for name in state)
