"""Construction: what is refused, with which words; the settings in the log."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flower_messages import MemoryGrid, answer, configure, small_net, trained_copy, warnings
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import FedAdam, FedAvg
from test_strategies_exact import spec_of

from fedrebasin import trace
from fedrebasin.errors import InvalidSpecError, RebasinError, SpecMismatchError, UsageError
from fedrebasin.layout import Fixed
from fedrebasin.strategies import FederatedOptions, FedRebasin, Rebasin
from fedrebasin.strategies.records import state_to_record

__all__ = ["warnings"]

INPUTS = (torch.randn(4, 5),)
BATCHES = [torch.randn(200, 5)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"reference": "best"},
            "reference: expected one of 'auto', 'global', 'largest', 'merge-many', 'medoid', .*; got 'best'",
        ),
        ({"reference": "default"}, "reference: expected one of 'auto'"),
        ({"matching": "magic"}, "matching: expected one of 'weight', 'activation', .*; got 'magic'"),
        ({"matching": "activation"}, "matching='activation' needs calibration, a collection of input batches; give"),
        ({"matching": "straight-through"}, r"needs calibration, a collection of \(input, target\) batches; give"),
        (
            {"matching": "activation", "calibration": BATCHES, "correction": None, "model": None},
            "matching='activation' runs the model on calibration data, and a spec alone cannot; give model= too",
        ),
        (
            {"matching": "straight-through", "calibration": BATCHES},
            "matching='straight-through' needs loss=, a function of output and target",
        ),
        (
            {"matching": "straight-through", "calibration": BATCHES, "loss": torch.nn.functional.cross_entropy},
            r"batches: expected \(input, target\) pairs; got a batch without a target",
        ),
        (
            {"matching": "sinkhorn", "loss": torch.nn.functional.cross_entropy},
            r"matching='sinkhorn' needs calibration, a collection of \(input, target\) batches; give",
        ),
        (
            {"matching": "activation", "calibration": [torch.randn(200, 7)], "correction": None},
            "calibration: the model cannot run on its first batches: ",
        ),
        (
            {"reference": "straight-through-many", "loss": torch.nn.functional.cross_entropy},
            r"reference='straight-through-many' with a loss needs calibration, a collection of \(input, target\)",
        ),
        (
            {"matching": "activation", "calibration": BATCHES, "reference": "medoid"},
            "reference='medoid' is built for matching='weight' alone; with matching='activation' use",
        ),
        (
            {"matching": "activation", "calibration": BATCHES, "reference": "merge-many"},
            "reference='merge-many' is built for matching='weight' alone; with matching='activation' use",
        ),
        (
            {"correction": "federated-mean"},
            "correction: expected one of None, 'repair', .*'federated-regmean'; got",
        ),
        (
            {"correction": "federated-repair", "model": None},
            "correction='federated-repair' runs the model's layers, and a spec alone cannot; give model= and example",
        ),
        (
            {"federated": FederatedOptions()},
            "federated: options for federated-repair, federated-least-squares, federated-regmean alone; got",
        ),
        ({"correction": "least-squares"}, "correction='least-squares' needs calibration"),
        ({"select": "labels"}, "select: expected one of None, 'calibration', 'clients'; got 'labels'$"),
        (
            {"select": "calibration", "calibration": BATCHES, "correction": "federated-repair"},
            "select='calibration' measures on the server's data, and correction='federated-repair' asks the clients",
        ),
        (
            {"loss": torch.nn.functional.cross_entropy},
            "loss: only matching='straight-through' and 'sinkhorn', reference='straight-through-many' and select=",
        ),
        ({"correction": "repair"}, "correction='repair' needs calibration"),
        (
            {"calibration": BATCHES, "model": None},
            "correction='repair' runs the model on calibration data, and a spec alone",
        ),
        (
            {"calibration": (batch for batch in BATCHES)},
            "calibration: expected a collection that can be read more than once",
        ),
        ({"calibration": []}, "calibration: expected at least one batch; got none"),
        ({"calibration": [torch.randn(200, 7)]}, "calibration: the model cannot run on its first batch: "),
        ({"model": None, "spec": None}, r"model: give model= and example_inputs=.*or a checked spec="),
        ({"spec": 3}, "spec: expected a PermutationSpec, or the path of a saved one; got int"),
        ({"model": 3}, "model: expected an nn.Module or a function of no arguments that makes one; got int"),
        ({"model": dict}, "model: expected an nn.Module or a function of no arguments that makes one; got dict"),
        ({"example_inputs": None}, r"example_inputs: needed with model=, as \(images,\)"),
        ({"seed": "a"}, "seed: expected a whole number of at most 64 bits; got 'a'"),
        ({"device": "nowhere"}, "device='nowhere' cannot be used here"),
    ],
)
def test_options_that_do_not_fit_are_refused_with_what_fits(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"model": small_net(), "example_inputs": INPUTS, "spec": spec_of(), **options}
    with pytest.raises(RebasinError, match=message):
        FedRebasin(**given)


def test_reset_batchnorm_of_a_net_without_batchnorm_is_refused() -> None:
    with pytest.raises(RebasinError, match="needs a BatchNorm with running statistics"):
        FedRebasin(
            model=small_net(norm=False), example_inputs=INPUTS, calibration=BATCHES, correction="reset-batchnorm"
        )


def test_a_spec_without_the_mark_of_its_check_needs_the_model(tmp_path: Path) -> None:
    net = small_net()
    unchecked = trace(net, INPUTS)
    with pytest.raises(UsageError, match="spec: it lacks the mark of a passed check"):
        FedRebasin(spec=unchecked)
    assert FedRebasin(spec=unchecked, model=net, example_inputs=INPUTS).spec.checked
    spec_of().save(tmp_path / "spec.json")
    assert FedRebasin(spec=tmp_path / "spec.json").spec == FedRebasin(spec=spec_of()).spec
    text = (tmp_path / "spec.json").read_text(encoding="utf-8")
    (tmp_path / "spec.json").write_text(text.replace('"0"', '"zero"'), encoding="utf-8")
    with pytest.raises(RebasinError, match="spec: "):
        FedRebasin(spec=tmp_path / "spec.json")


def test_a_spec_that_changes_the_function_is_refused_at_construction() -> None:
    net = small_net()
    spec = trace(net, INPUTS)
    broken = replace(spec, axes={**spec.axes, "0.bias": (Fixed(12, "by hand"),)}, checked=True)
    with pytest.raises(InvalidSpecError, match=r"0\.bias"):
        FedRebasin(spec=broken, model=net, example_inputs=INPUTS)


def test_the_model_may_be_a_module_a_class_or_a_function() -> None:
    for model in (small_net(), small_net, lambda: small_net()):
        assert FedRebasin(model=model, example_inputs=INPUTS).spec.perm_shapes == spec_of().perm_shapes


def test_construction_leaves_the_model_as_it_was() -> None:
    net = small_net().train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    FedRebasin(model=net, example_inputs=INPUTS, calibration=BATCHES)
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_initial_arrays_of_another_model_are_refused_before_anything_is_sent() -> None:
    grid = MemoryGrid({1: lambda message: message, 2: lambda message: message})
    for arrays in (state_to_record(small_net(norm=False).state_dict()), ArrayRecord([torch.ones(2).numpy()])):
        with pytest.raises(SpecMismatchError, match="initial_arrays"):
            FedRebasin(spec=spec_of()).configure_train(1, arrays, ConfigRecord(), grid)


def test_the_keys_of_the_inner_strategy_are_used() -> None:
    strategy = Rebasin(FedAvg(weighted_by_key="n", arrayrecord_key="weights"), spec=spec_of())
    sent = small_net().state_dict()
    messages = configure(strategy, sent, 2)
    replies = []
    for seed, message in enumerate(messages):
        assert list(message.content.array_records) == ["weights"]
        reply = answer(message, trained_copy(sent, seed), examples=None, n=2)
        reply.content["weights"] = reply.content.pop("arrays")
        replies.append(reply)
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert arrays is not None
    assert metrics is not None
    assert list(arrays) == list(sent)
    assert metrics["rebasin-left-out"] == 0


def test_fedrebasin_hands_fedavgs_keywords_on() -> None:
    strategy = FedRebasin(
        spec=spec_of(), fraction_train=0.5, fraction_evaluate=0.25, min_train_nodes=3, min_evaluate_nodes=4,
        min_available_nodes=5, weighted_by_key="n", arrayrecord_key="a", configrecord_key="c",
    )  # fmt: skip
    given = vars(strategy.strategy)
    wanted = (0.5, 0.25, 3, 4, 5, "n", "a", "c")
    assert tuple(value for value in given.values() if not callable(value)) == wanted


def test_the_summary_is_a_tree_of_the_settings_and_of_the_inner_strategys() -> None:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler = Keep()
    logging.getLogger("flwr").addHandler(handler)
    try:
        Rebasin(FedAdam(eta=0.25), spec=spec_of(), reference="largest").summary()
    finally:
        logging.getLogger("flwr").removeHandler(handler)
    assert lines[:4] == [
        "\t├──> Rebasin settings:",
        "\t│\t├── reference: largest",
        "\t│\t├── matching: weight",
        "\t│\t├── correction: None",
    ]
    assert any("eta (0.25)" in line for line in lines)
    assert lines[-1] == "\t\t└── ConfigRecord key: 'config'"


def test_settings_of_fedavg_are_read_and_set_on_fedrebasin_as_there() -> None:
    here, there = FedRebasin(spec=spec_of(), fraction_evaluate=0.25), FedAvg(fraction_evaluate=0.25)
    assert {name: getattr(here, name) for name in vars(there)} == vars(there)
    here.fraction_train = 0.5
    assert len(configure(here, small_net().state_dict(), 8)) == 4
    with pytest.raises(AttributeError):
        here.weighted_by_key = "other"
