"""``select="clients"``: nodes measure the models of a round on labelled data that they hold out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from federated_clients import EXAMPLES, GIVEN, SENT, client, data, end, expected, net, plain, play, same
from flower_messages import warnings
from flwr.app import Message
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAdam, FedAvg
from torch import Tensor
from torch.func import functional_call

from fedrebasin import merge
from fedrebasin.corrections.federated import Node, answer
from fedrebasin.corrections.queries import drive
from fedrebasin.corrections.votes import measure, tally, vote
from fedrebasin.errors import CalibrationError, RebasinError, UsageError
from fedrebasin.strategies import FedRebasin, Privacy, Rebasin, answer_queries
from fedrebasin.strategies.client_selection import ClientSelector
from fedrebasin.strategies.records import record_to_state, state_to_record

__all__ = ["warnings"]

State = dict[str, Tensor]
CORRECTIONS = ["federated-repair", "federated-regmean"]


def outputs(state: State, x: Tensor) -> Tensor:
    found: Tensor = functional_call(net().eval(), state, (x,))
    return found.detach()


def held_out(seed: int, says: State, rows: int = 40) -> list[Any]:
    """Labelled batches of unequal size whose targets are what ``says`` gives."""
    x = data(50 + seed)[0][0][:rows] - 50
    return [(part, outputs(says, part)) for part in x.split(rows - 7)]


def voters(says: State, count: int = 3, **others: Any) -> dict[int, Any]:
    return {
        place + 1: client(place, held_out=held_out(place, says, 30 + place), loss=F.mse_loss, **others)
        for place in range(count)
    }


def names(corrections: list[str]) -> tuple[str, ...]:
    chosen = FedRebasin(**GIVEN, correction=corrections, select="clients", reference="global")._finish.selector
    assert isinstance(chosen, ClientSelector)
    return chosen.names


def average() -> State:
    return merge([end(place) for place in range(3)], coefficients=[share / sum(EXAMPLES) for share in EXAMPLES])


@pytest.mark.parametrize("best", ["plain", "aligned", "aligned+federated-repair", "aligned+federated-regmean"])
def test_the_model_that_the_nodes_find_best_is_kept(best: str) -> None:
    states = {"plain": average(), "aligned": plain()[0]}
    for name in CORRECTIONS:
        states[f"aligned+{name}"] = expected(name)
    found, metrics, grid = play(CORRECTIONS, voters(states[best]), select="clients")
    assert names(CORRECTIONS)[int(metrics["rebasin-selected"])] == best  # type: ignore[call-overload]
    x = held_out(9, SENT)[0][0]
    torch.testing.assert_close(outputs(found, x), outputs(states[best], x))
    assert list(found) == list(SENT)
    if best == "aligned":
        same(found, states[best], 0.0)
    assert metrics[f"rebasin-loss-{best}"] == pytest.approx(0.0, abs=1e-9)
    assert len([name for name in metrics if name.startswith("rebasin-loss-")]) == 6
    assert metrics["rebasin-voters"] == 3
    # two paths, each repaired in two rounds and by RegMean in one; one for the votes
    assert metrics["rebasin-query-rounds"] == 2 * (2 + 1) + 1 == len(grid.queries)
    assert metrics["rebasin-query-bytes"] == grid.bytes
    assert metrics["rebasin-query-left-out"] == 0


def test_every_example_of_all_nodes_counts_once() -> None:
    says = plain()[0]
    _, metrics, _ = play(["federated-regmean"], voters(says), select="clients")
    pooled = [batch for place in range(3) for batch in held_out(place, says, 30 + place)]
    x, y = (torch.cat(part) for part in zip(*pooled, strict=True))
    for name, state in (("plain", average()), ("aligned+federated-regmean", expected("federated-regmean"))):
        assert metrics[f"rebasin-loss-{name}"] == pytest.approx(float(F.mse_loss(outputs(state, x), y)))


def test_a_correction_that_harms_is_not_kept() -> None:
    says = plain()[0]
    _, metrics, _ = play(["federated-repair"], voters(says), select="clients")
    assert names(["federated-repair"])[int(metrics["rebasin-selected"])] == "aligned"  # type: ignore[call-overload]
    harmed, left = (float(metrics[f"rebasin-loss-aligned{end}"]) for end in ("+federated-repair", ""))  # type: ignore[arg-type]
    assert harmed > left


def nans(message: Message, reply: Message) -> Message:
    sums = reply.content.array_records["sums"]
    if "losses" in sums:
        sums["losses"] = state_to_record({"losses": record_to_state(sums)["losses"] * math.nan})["losses"]
    return reply


def test_a_node_that_cannot_vote_costs_its_vote_alone(warnings: list[str]) -> None:
    says = expected("federated-regmean")
    nodes = voters(says)
    nodes[2] = client(1, nans, held_out=held_out(1, says), loss=F.mse_loss)
    nodes[3] = client(2)  # no data held out
    _, metrics, _ = play(["federated-regmean"], nodes, select="clients")
    assert names(["federated-regmean"])[int(metrics["rebasin-selected"])] == "aligned+federated-regmean"  # type: ignore[call-overload]
    assert metrics["rebasin-voters"] == 1
    assert metrics["rebasin-query-left-out"] == 1
    assert any("select='clients' needs held_out= and loss= of answer_queries" in line for line in warnings)


def test_a_late_node_is_not_waited_for_again(warnings: list[str]) -> None:
    _, metrics, grid = play(["federated-repair", "federated-regmean"], voters(plain()[0]), select="clients", lost=(3,))
    assert [3 in asked for asked in grid.queries] == [True] + [False] * (len(grid.queries) - 1)
    assert metrics["rebasin-voters"] == 2
    assert metrics["rebasin-query-left-out"] == 1


def test_where_nobody_votes_the_aggregate_stays(warnings: list[str]) -> None:
    found, metrics, _ = play(["federated-regmean"], {place + 1: client(place) for place in range(3)}, select="clients")
    same(found, plain()[0], 0.0)
    assert "rebasin-selected" not in metrics
    assert any("selection failed (RebasinError: no node gave an answer that can be used)" in line for line in warnings)


def test_private_nodes_answer_corrections_and_do_not_vote(warnings: list[str]) -> None:
    says = expected("federated-regmean")
    nodes = voters(says)
    nodes[3] = client(2, held_out=held_out(2, says), loss=F.mse_loss, privacy=Privacy(clip=1e3, noise=1e-12))
    _, metrics, _ = play(["federated-regmean"], nodes, select="clients")
    assert metrics["rebasin-voters"] == 2
    assert any("privacy: answers to 'losses' are not noised" in line for line in warnings)


def test_the_plain_average_is_no_candidate_where_the_inner_strategy_does_more() -> None:
    strategy = Rebasin(
        FedAdam(fraction_evaluate=0.0),
        **GIVEN,
        correction=["federated-regmean"],
        select="clients",
        reference="global",
    )
    _, metrics, _ = play(None, voters(SENT), strategy=strategy)
    losses = [name for name in metrics if name.startswith("rebasin-loss-")]
    assert losses == ["rebasin-loss-aligned", "rebasin-loss-aligned+federated-regmean"]


def test_a_model_without_finite_losses_at_most_nodes_is_out_and_not_its_voters() -> None:
    votes = [(1, torch.tensor([math.nan, 2.0])), (1, torch.tensor([math.inf, 3.0])), (1, torch.tensor([0.0, 4.0]))]
    found = tally(["a", "b"], votes)
    assert (found.name, found.voters, found.figures["b"]) == ("b", 3, 3.0)
    assert math.isnan(found.figures["a"])
    with pytest.raises(RebasinError, match="none of a, b has a finite loss at most nodes"):
        tally(["a", "b"], [(1, torch.full((2,), math.nan))])
    with pytest.raises(RebasinError, match="expected one state dict or more"):
        next(vote({}))


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ({"count": torch.tensor(0), "losses": torch.zeros(2).double()}, "losses without examples"),
        ({"count": torch.tensor(4), "losses": torch.zeros(3).double()}, r"'losses' as \\(3,\\)"),
        ({"losses": torch.zeros(2).double()}, "no 'count'"),
    ],
)
def test_an_answer_that_is_no_vote_is_refused(reply: State, message: str) -> None:
    query = next(vote({"a": SENT, "b": SENT}))
    with pytest.raises(RebasinError, match=message.replace("\\\\", "\\")):
        query.read(reply)


def test_one_process_votes_as_nodes_do() -> None:
    states = {"a": end(0), "b": end(1)}

    def ask(query: Any) -> dict[int, Any]:
        nodes = [Node(net(), query.merged, {}, held_out(place, end(1)), loss=F.mse_loss) for place in range(2)]
        return {place: query.read(answer(query.kind, query.about, node)) for place, node in enumerate(nodes)}

    assert drive(vote(states), ask).name == "b"


def test_batches_without_targets_are_refused() -> None:
    node = Node(net(), {"0/x": torch.zeros(1)}, {}, [data(0)[0][0]], loss=F.mse_loss)
    with pytest.raises(RebasinError, match="held_out: expected batches with targets"):
        measure({"candidates": ["a"]}, node)


def test_what_does_not_fit_is_refused_at_construction() -> None:
    private = DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, 1.0, 2)
    with pytest.raises(UsageError, match="select='clients': under DifferentialPrivacyServerSideFixedClipping"):
        Rebasin(private, **GIVEN, select="clients", correction=None)
    with pytest.raises(UsageError, match="select='clients' runs the model's layers"):
        FedRebasin(spec=GIVEN["spec"], select="clients", correction=None)
    with pytest.raises(CalibrationError, match="correction='repair' needs calibration"):
        FedRebasin(**GIVEN, select="clients", correction=["repair", "federated-repair"])
    with pytest.raises(RebasinError, match="expected each name once"):
        FedRebasin(**GIVEN, select="clients", correction=["federated-repair", "federated-repair"])
    with pytest.raises(RebasinError, match="correction: several need something that chooses"):
        FedRebasin(**GIVEN, correction=["federated-repair", "federated-regmean"])
    with pytest.raises(UsageError, match=r"loss: only matching=.* and select='calibration' use it"):
        FedRebasin(**GIVEN, select="clients", correction=None, loss=F.mse_loss)  # the clients have their own
    with pytest.raises(UsageError, match="held_out, loss: expected a function of message and context"):
        answer_queries(model=net, batches=lambda message, context: [], loss=F.mse_loss)
