"""Activation matching against planted truth."""

from __future__ import annotations

from collections.abc import Callable

import networks
import networks_zoo
import pytest
import torch
from activation_cases import KINDS, Case, assert_recovered, planted_case, zoo

from fedrebasin import (
    PermutationSpec,
    activation_matching,
    invert,
    permute,
)
from fedrebasin.layout import Fixed, Free, Product, Sum
from fedrebasin.matching.correlation import parts_of
from fedrebasin.matching.methods import MatchingSetting, find_matching
from fedrebasin.matching.similarity import measure_similarity


@pytest.mark.parametrize("noise", [0.0, 0.2, 0.5])
@pytest.mark.parametrize("name", ["mlp", "conv", "resnet20-batchnorm", "resnet20-layernorm", "dense-block", "grouped"])
def test_no_permutation_correlates_more_than_the_one_that_is_found(name: str, noise: float) -> None:
    spec, net, state, planted, moved, data = planted_case(networks.NETWORKS[name], noise)
    matching = activation_matching(spec, net, state, moved, data)
    similarity = measure_similarity(spec, net, state, moved, data)
    truth = [one.sum_of(spec, invert(spec, planted)) for one in similarity.values()]
    assert matching.measures["correlation"] >= sum(total for total, _ in truth) / sum(n for _, n in truth) - 1e-6
    assert matching.measures["correlation"] > matching.measures["correlation-before"] + 0.2
    if noise == 0:
        assert_recovered(spec, planted, matching.perms)


@pytest.mark.parametrize("name", KINDS)
def test_planted_permutations_are_recovered(name: str) -> None:
    spec, net, state, planted, moved, data = planted_case(KINDS[name], 0.0)
    assert_recovered(spec, planted, activation_matching(spec, net, state, moved, data).perms)


UNSEEN = {
    "fused-norms": {"attention.qkv"},
    "lstm-projected-both-ways": {"core", "core#2", "core#3", "core#4", "core#5", "core#7"},
    "gru": {"core"},
    "cells": {"lstm", "gru"},
    "mixer": {"over_tokens"},
}


@pytest.mark.parametrize("name", [*KINDS, "grouped", "two-inputs", "dense-block", "fused-view", "encoder-layer"])
def test_data_decides_all_permutations_but_those_inside_recurrent_layers_and_beside_other_units(name: str) -> None:
    make = {**networks.NETWORKS, **KINDS}.get(name, zoo(name) if name in networks_zoo.ZOO else KINDS["mlp"])
    spec, net, state, _, moved, data = planted_case(make, 0.0)
    seen = {perm for perm, _ in measure_similarity(spec, net, state, moved, data)}
    outer = {spec.over[perm] for perm in seen if perm in spec.over}
    assert set(spec.perm_shapes) - seen - outer == UNSEEN.get(name, set())


def test_parts_side_by_side_are_places_of_their_own() -> None:
    gate = Product((Free("heads", 2), Free("units", 3, over="heads")))
    spec = PermutationSpec({"w": (Sum((gate, Fixed(2), gate, Product((Free("a", 2), Fixed(2))))),)})
    found = [(part.perm, part.units, part.index.tolist()) for part in parts_of(spec, spec.axes["w"][0])]
    assert found == [("units", 6, [0, 1, 2, 3, 4, 5]), ("units", 6, [8, 9, 10, 11, 12, 13]), ("a", 2, [14, 15, 16, 17])]
    perms = {"heads": torch.tensor([1, 0]), "units": torch.tensor([[2, 0, 1], [0, 1, 2]]), "a": torch.tensor([1, 0])}
    (part, *_) = parts_of(spec, spec.axes["w"][0])
    state = {"w": torch.arange(18)}
    assert torch.equal(permute(spec, perms, state)["w"][:6], state["w"][:6][part.order(spec, perms)])


@pytest.mark.parametrize("noise", [0.2, 0.5])
def test_planted_permutations_of_a_noisy_copy_are_recovered(noise: float) -> None:
    spec, net, state, planted, moved, data = planted_case(networks.mlp, noise)
    assert_recovered(spec, planted, activation_matching(spec, net, state, moved, data).perms)


@pytest.mark.parametrize("noise", [0.2, 0.5])
@pytest.mark.parametrize("name", ["vgg11", "encoder", "resnet20-batchnorm"])
def test_weights_mend_what_noise_that_adds_up_with_depth_hides_from_activations(name: str, noise: float) -> None:
    spec, net, state, planted, moved, data = planted_case({**networks.NETWORKS, **KINDS}[name], noise)
    found = find_matching("activation+weight", MatchingSetting(spec, net, data), state, moved)
    assert_recovered(spec, planted, found.perms)
    assert found.objective >= activation_matching(spec, net, state, moved, data).objective


@pytest.mark.parametrize("make", [networks.NETWORKS["two-inputs"], zoo("convolutions")])
def test_inputs_may_be_dicts_and_tuples_with_targets_or_without(make: Callable[[], Case]) -> None:
    spec, net, state, planted, moved, data = planted_case(make, 0.0)
    targets = torch.zeros(100, dtype=torch.int64)
    labelled = [(batch, targets) if isinstance(batch, dict) else (*batch, targets) for batch in data]
    for batches in (data, labelled):
        assert_recovered(spec, planted, activation_matching(spec, net, state, moved, batches).perms)
