"""Federated corrections: RegMean and its sketches, what is sent and what not, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from corrections_ends import check_keeps_form, random_ends
from test_federated_corrections import OWN, SHARES, case_of, deep, draw, images
from torch import Tensor, nn

from fedrebasin import CalibrationError, RebasinError, input_grams, merge, regmean
from fedrebasin.corrections.federated import FEDERATED, Case, FederatedOptions, Node, answer, correct_federated
from fedrebasin.corrections.gram_sketch import check_gram, expand, rank_within, sketch
from fedrebasin.corrections.label_prior import log_prior
from fedrebasin.corrections.normal_equations import NormalEquations, pack, unpack
from fedrebasin.corrections.queries import LARGEST, Query, check_tensors
from fedrebasin.simulations.models import build_model

State = dict[str, Tensor]


def test_regmean_is_the_servers_with_the_grams_of_the_nodes() -> None:
    net = deep()
    ends = random_ends(net, count=3)
    case = case_of(net, ends, draw(2, 4))
    found = correct_federated("federated-regmean", case, OWN)
    grams = [input_grams(net, end, own) for end, own in zip(ends, OWN, strict=True)]
    expected = regmean(net, case.merged, ends, [draw(2, 4)], coefficients=SHARES, grams=grams)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-9, atol=1e-11)
    exact = correct_federated("federated-regmean", replace(case, options=FederatedOptions(off_diagonal=1.0)), OWN)
    assert not torch.allclose(exact["2.weight"], found["2.weight"], rtol=1e-3)


def test_regmean_of_diagonals_averages_every_weight_by_the_scatter_of_its_input() -> None:
    net = nn.Sequential(nn.Linear(4, 3)).double()
    ends = random_ends(net, count=3)
    centred = [[rows - rows.mean(0) for rows in [torch.cat(own)]] for own in OWN]
    case = case_of(net, ends, draw(2, 4), gram_limit=0)
    found = correct_federated("federated-regmean", case, centred)
    left = right = torch.zeros(())
    for share, end, own in zip(SHARES, ends, centred, strict=True):
        scatter = share * own[0].var(0, correction=0)
        left, right = left + end["0.weight"] * scatter, right + scatter
    torch.testing.assert_close(found["0.weight"], left / right, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found["0.bias"], case.merged["0.bias"], rtol=1e-9, atol=1e-11)


def test_a_sketch_keeps_diagonal_and_means_and_leading_directions_within_its_bytes() -> None:
    scales = torch.logspace(1, -3, 20, dtype=torch.float64)
    rows = draw(300, 20) * scales @ torch.linalg.qr(draw(20, 20, seed=1)).Q + 1
    X = torch.cat([rows, rows.new_ones(300, 1)], 1)
    gram = X.T @ X
    errors = []
    for limit in (0, 800, 1600, 10**6):
        rank = rank_within(21, limit)
        small = sketch(gram, rank)
        assert rank in (0, None) or sum(part.numel() for part in small.values()) * 8 <= limit
        whole = expand(small, 21)
        torch.testing.assert_close(whole.diagonal(), gram.diagonal())
        torch.testing.assert_close(whole[-1], gram[-1])
        assert float(torch.linalg.eigvalsh(whole)[0]) > -1e-8 * float(gram.diagonal().max())
        errors.append(float((whole - gram).norm() / gram.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 10 * errors[2] > 1e-9
    assert errors[3] < 1e-12


@pytest.mark.parametrize("name", FEDERATED)
def test_keys_order_and_dtypes_stay_and_inputs_are_not_edited(name: str) -> None:
    net, data = build_model("conv", (3, 8, 8), 3, width=4), [images(0).float(), images(1).float()]

    def correct(merged: State, ends: list[State]) -> State:
        case = Case(net, merged, ends, [0.5, 0.5], data[0][:2])
        return correct_federated(name, case, [[own] for own in data])

    check_keeps_form(correct, net, random_ends(net, data))


def poisoned(part: State, net: nn.Module) -> State:
    """Everything that was not sent is NaN."""
    lost = {key: tensor * torch.nan for key, tensor in net.state_dict().items() if tensor.is_floating_point()}
    return {**net.state_dict(), **lost, **part}


@pytest.mark.parametrize("name", ["federated-repair", "federated-least-squares"])
def test_what_a_query_leaves_out_of_the_models_is_not_read(name: str) -> None:
    net, data = build_model("conv", (3, 8, 8), 3, width=4).double(), [images(0), images(1)]
    ends = random_ends(net, data)
    case = Case(net, merge(ends), ends, [0.5, 0.5], images(9, 2))
    procedure, sizes = FEDERATED[name](case), []
    query: Query | None = next(procedure)
    while query is not None:
        found = {}
        for place, own in enumerate(data):
            end = {key: ends[place][key] for key in query.end_names}
            sizes.append(len(query.merged))
            whole = Node(net, poisoned(query.merged, net), poisoned(end, net) if end else {}, [own])
            found[place] = query.read(answer(query.kind, query.about, whole))
        try:
            query = procedure.send(found)
        except StopIteration:
            query = None
    assert sizes[0] < sizes[-2] <= len(case.merged)


def test_packing_halves_a_symmetric_matrix_and_unpacking_brings_it_back() -> None:
    for size in (1, 2, 7):
        matrix = draw(size, size)
        packed = pack(matrix + matrix.T)
        assert packed.shape == (size * (size + 1) // 2,)
        assert torch.equal(unpack(packed, size), matrix + matrix.T)


def test_lowered_goals_are_the_equations_of_lowered_goals() -> None:
    X, E, by = draw(3, 20), draw(2, 20, seed=1), draw(2, seed=2)
    sums, expected = NormalEquations(), NormalEquations()
    sums.add(X, E)
    expected.add(X, E - by.unsqueeze(1))
    torch.testing.assert_close(sums.lower_goals(by).cross, expected.cross)
    torch.testing.assert_close(sums.lower_goals(by).e, expected.e)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (None, "no 'x'"),
        (torch.zeros(3, dtype=torch.float64), r"'x' as \(3,\) of torch.float64; \(2,\) of torch.float64 is expected"),
        (torch.zeros(2), r"'x' as \(2,\) of torch.float32"),
        (torch.tensor([0, torch.nan]).double(), "'x' with a NaN, an infinity"),
        (torch.tensor([0, torch.inf]).double(), "'x' with a NaN, an infinity"),
        (torch.tensor([0, 2 * LARGEST]).double(), "'x' with a NaN, an infinity or a number of 1e"),
    ],
)
def test_answers_of_another_form_are_refused(tensor: Tensor | None, message: str) -> None:
    with pytest.raises(RebasinError, match=message):
        check_tensors({} if tensor is None else {"x": tensor}, {"x": (2,)})


def test_sums_that_no_data_has_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    ends = random_ends(net)
    with pytest.raises(RebasinError, match="a Gram matrix that no inputs have"):
        check_gram(torch.tensor([[-1.0, 0.0], [0.0, 4.0]]))
    for name, change, message in (
        ("federated-least-squares", {"fit.x": 1e6}, "'fit' sums that no inputs have"),
        ("federated-least-squares", {"fit.count": -1}, "'fit.count' = -60; a count from 0 is expected"),
        (
            "federated-least-squares",
            dict.fromkeys(("fit.count", "fit.x", "fit.gram", "fit.cross"), 0),
            "'fit' sums that",
        ),
        ("federated-repair", {"merged.0.squares": -1}, "'merged.0' without observations, or with a negative sum"),
        ("federated-regmean", {"0.weight.gram": -1}, "a Gram matrix that no inputs have"),
    ):
        query = next(FEDERATED[name](case_of(net, ends, draw(2, 4))))
        node = Node(net, query.merged, {key: ends[0][key] for key in query.end_names}, OWN[0])
        given = answer(query.kind, query.about, node)
        query.read(given)
        with pytest.raises(RebasinError, match=message):
            query.read({key: tensor * change.get(key, 1) for key, tensor in given.items()})


def test_what_does_not_fit_is_refused() -> None:
    net = deep()
    state, data = net.state_dict(), [draw(60, 4)]
    case = Case(net, state, [state], [1.0], draw(2, 4))
    for options, message in (
        ({"ridge": -1.0}, "ridge: expected None or a number from 0; got -1"),
        ({"gram_limit": -1}, "gram_limit: expected a number of bytes from 0; got -1"),
        ({"max_gain": 0.5}, "max_gain: expected 1 or more; got 0.5"),
        ({"off_diagonal": 2.0}, r"off_diagonal: expected a number in \[0, 1\]; got 2.0"),
    ):
        with pytest.raises(RebasinError, match=message):
            FederatedOptions(**options)  # type: ignore[arg-type]
    with pytest.raises(RebasinError, match=r"correction: expected one of federated-repair, .*; got 'repair'"):
        correct_federated("repair", case, [data])
    with pytest.raises(RebasinError, match="data: expected 1 collections of batches, one for each end; got 2"):
        correct_federated("federated-repair", case, [data, data])
    with pytest.raises(RebasinError, match="query: expected one of moments, equations, grams, losses; got 'weights'"):
        answer("weights", {}, Node(net, {}, {}, data))
    with pytest.raises(RebasinError, match="the server asks about 'other', which is no site of this node's network"):
        answer("moments", {"merged-sites": ["other"], "sequential": True}, Node(net, {}, {}, data))
    with pytest.raises(RebasinError, match=r"the server asks about 'other', which is no layer of this node's network"):
        answer("equations", {"step": "other", "split": True, "label-prior": False}, Node(net, {}, {}, data))
    squashed = nn.Sequential(nn.Linear(4, 2), nn.Softmax(1))
    case = Case(squashed, squashed.state_dict(), [squashed.state_dict()], [1.0], draw(2, 4).float())
    with pytest.raises(RebasinError, match="label_prior: expected a network whose last linear layer gives the logits"):
        next(FEDERATED["federated-least-squares"](replace(case, options=FederatedOptions(label_prior=True))))
    with pytest.raises(CalibrationError, match="label_prior needs integer targets; give"):
        log_prior(Node(net, {}, {}, data), 3)
    with pytest.raises(CalibrationError, match="expected targets from 0 to 2; got 3"):
        log_prior(Node(net, {}, {}, [(draw(2, 4), torch.tensor([0, 3]))]), 3)


@pytest.mark.filterwarnings("ignore:.*is a no-op")
@pytest.mark.parametrize("device", [None, "meta"])
def test_a_node_runs_where_its_network_is_wherever_the_parts_were_sent_from(device: str | None) -> None:
    net = deep()
    part = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    node = Node(net if device else net.to("meta"), part, {}, [draw(2, 4)], device)
    ((rows,), _, _) = next(iter(node.data()))
    assert {tensor.device.type for tensor in (rows, *node.model(part).state_dict().values())} == {"meta"}
