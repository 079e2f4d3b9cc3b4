"""Activation matching against slow oracles, in limit cases, and on bad input."""

from __future__ import annotations

import copy
from typing import Any

import networks
import pytest
import torch
from activation_cases import Mixer, State, assert_recovered, data_for, drawn, planted_case
from torch import Tensor, nn

from fedrebasin import (
    CalibrationError,
    PermutationSpec,
    SpecMismatchError,
    activation_matching,
    permute,
    random_perms,
    trace,
)
from fedrebasin.matching.correlation import CrossMoments
from fedrebasin.matching.similarity import measure_similarity


def tiny(dtype: torch.dtype = torch.float64) -> tuple[PermutationSpec, nn.Module, State, State]:
    torch.manual_seed(4)
    nets = [nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)) for _ in range(2)]
    spec = trace(nets[0], (torch.zeros(2, 3),))
    one, other = (copy.deepcopy(net.to(dtype).state_dict()) for net in nets)
    return spec, nets[0], one, other


def test_similarity_is_the_sum_of_the_correlations_before_and_after_the_nonlinearity() -> None:
    spec, net, one, other = tiny()
    data = torch.randn(50, 3, dtype=torch.float64)
    found = measure_similarity(spec, net, one, other, [data])
    for perm, layer in (("0", 0), ("2", 2)):
        expected = torch.zeros(0)
        for depth in (layer + 1, layer + 2):  # a layer's output, and the next one's input
            seen = []
            for state in (one, other):
                net.load_state_dict(state)
                seen.append(net[:depth](data).detach().T)
            units = len(seen[0])
            correlation = torch.corrcoef(torch.cat(seen)).nan_to_num()[:units, units:]
            expected = correlation if depth == layer + 1 else expected + correlation
        torch.testing.assert_close(found[perm, None].total, expected, rtol=0, atol=1e-12)
        assert found[perm, None].places == 2


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [7, 0, 23, 30]])
def test_the_same_data_in_other_batches_gives_the_same_similarity(sizes: list[int]) -> None:
    spec, net, one, other = tiny()
    data = 5 + torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = measure_similarity(spec, net, one, other, [data])
    parts = measure_similarity(spec, net, one, other, list(data.split(sizes)))
    for key, found in parts.items():
        torch.testing.assert_close(found.total, whole[key].total, rtol=0, atol=1e-12)
    assert same(activation_matching(spec, net, one, other, list(data.split(sizes))), spec, net, one, other, data)


def same(matching: Any, spec: PermutationSpec, net: nn.Module, one: State, other: State, data: Tensor) -> bool:
    whole = activation_matching(spec, net, one, other, [data]).perms
    return all(torch.equal(matching.perms[perm], order) for perm, order in whole.items())


def test_each_batch_is_read_once_and_sums_do_not_grow() -> None:
    spec, net, one, other = tiny()
    batch, reads = torch.randn(20, 3, dtype=torch.float64), []

    class Counted:
        def __iter__(self) -> Any:
            for index in range(50):
                reads.append(index)
                yield batch

    moments = CrossMoments()
    sizes = set()
    for _ in range(5):
        moments.add(batch.T, batch.T)
        sizes.add(sum(sums.numel() for sums in (*moments._means, *moments._squares, moments._crossed)))
    assert sizes == {3 + 3 + 3 + 3 + 9} and moments.count == 100
    activation_matching(spec, net, one, other, Counted())
    assert reads == list(range(50))


def test_float32_sums_stand_far_from_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 4000, generator=generator, dtype=torch.float64)
    expected = torch.corrcoef(values)
    moments = CrossMoments()
    for part in (1000 + values).float().split(100, dim=1):
        moments.add(part, part)
    torch.testing.assert_close(moments.correlation(), expected, rtol=0, atol=1e-3)


def test_dead_units_have_no_similarity_and_stay_where_the_data_does_not_choose() -> None:
    spec, net, one, other = tiny()
    for state in (one, other):
        state["0.weight"] = torch.cat([state["0.weight"][:3], torch.zeros(3, 3, dtype=torch.float64)])
        state["0.bias"] = torch.cat([state["0.bias"][:3].abs(), torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)])
    data = [torch.randn(50, 3, dtype=torch.float64)]
    similarity = measure_similarity(spec, net, one, other, data)["0", None].total
    assert bool((similarity[3:] == 0).all() and (similarity[:, 3:] == 0).all() and (similarity[:3, :3] != 0).all())
    assert activation_matching(spec, net, one, other, data).perms["0"][3:].tolist() == [3, 4, 5]
    init = {"0": torch.tensor([0, 1, 2, 5, 3, 4]), "2": torch.arange(5)}
    assert activation_matching(spec, net, one, other, data, init=init).perms["0"][3:].tolist() == [5, 3, 4]


def test_a_start_changes_neither_the_perms_that_data_chooses_nor_what_was_before() -> None:
    spec, net, one, other = tiny()
    data = [torch.randn(50, 3, dtype=torch.float64)]
    plain = activation_matching(spec, net, one, other, data)
    started = activation_matching(spec, net, one, other, data, init=random_perms(spec, 5))
    assert all(torch.equal(order, started.perms[perm]) for perm, order in plain.perms.items())
    assert started.objective == plain.objective and started.objective_before == plain.objective_before
    assert started.measures == pytest.approx(dict(plain.measures))


@pytest.mark.parametrize("name", ["resnet20-batchnorm", "two-inputs"])
def test_a_model_is_not_moved_against_itself(name: str) -> None:
    net, inputs = networks.NETWORKS[name]()
    spec, state = trace(net, inputs), net.state_dict()
    matching = activation_matching(spec, net, state, state, data_for(inputs))
    assert matching.moved_fraction == 0 and matching.objective == matching.objective_before


def test_activations_that_are_overwritten_in_place_are_seen_as_they_were() -> None:
    def net(inplace: bool) -> nn.Module:
        torch.manual_seed(1)
        relu = nn.ReLU(inplace=inplace)
        return nn.Sequential(nn.Linear(4, 9), relu, nn.Linear(9, 8), relu, nn.Linear(8, 2))

    spec = trace(net(False), (torch.zeros(2, 4),))
    one, other = net(False).state_dict(), {name: tensor.flip(0) for name, tensor in net(False).state_dict().items()}
    data = [torch.randn(30, 4) for _ in range(3)]
    plain, inplace = (measure_similarity(spec, net(flag), one, other, data) for flag in (False, True))
    for key, found in plain.items():
        torch.testing.assert_close(found.total, inplace[key].total, rtol=0, atol=1e-6)


def test_a_place_whose_other_axis_holds_units_is_not_believed() -> None:
    net = Mixer()
    spec = trace(net, (torch.zeros(2, 7, 5),))
    state = drawn(spec, net.state_dict())
    found = measure_similarity(spec, net, state, state, [torch.randn(30, 7, 5)])
    assert ("over_tokens", None) not in found and ("first", None) in found


def test_the_callers_model_and_data_are_left_as_they_were() -> None:
    spec, net, state, _, moved, data = planted_case(networks.NETWORKS["conv"], 0.0)
    net.train()
    net[0].weight.requires_grad_(False)
    before, batches = copy.deepcopy(net.state_dict()), copy.deepcopy(data)
    ends = copy.deepcopy((state, moved))
    activation_matching(spec, net, state, moved, data)
    assert net.training and all(module.training for module in net.modules())
    assert [parameter.requires_grad for parameter in net.parameters()].count(False) == 1
    assert not any(len(module._forward_hooks) for module in net.modules())
    for found, expected in ((net.state_dict(), before), (state, ends[0]), (moved, ends[1])):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert all(
        torch.equal(one, two) for pair in zip(data, batches, strict=True) for one, two in zip(*pair, strict=True)
    )


def test_half_precision_is_matched_on_a_net_of_either_precision() -> None:
    spec, net, state, planted, moved, data = planted_case(networks.mlp, 0.0)
    half, moved_half = ({name: t.bfloat16() for name, t in one.items()} for one in (state, moved))
    assert_recovered(spec, planted, activation_matching(spec, net, half, moved_half, data).perms)
    data = [(batch[0].bfloat16(),) for batch in data]
    narrow = copy.deepcopy(net).bfloat16()
    assert_recovered(spec, planted, activation_matching(spec, narrow, half, moved_half, data).perms)


def test_a_compiled_model_is_seen_as_it_was_before() -> None:
    net: Any = torch.compile(networks.mlp()[0])
    spec = trace(net, networks.mlp()[1])
    state, planted = drawn(spec, net.state_dict()), random_perms(spec, 1)
    found = activation_matching(spec, net, state, permute(spec, planted, state), data_for(networks.mlp()[1]))
    assert_recovered(spec, planted, found.perms)


class Chosen(nn.Module):
    """Goes by data, and so by model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.head(self.second(x) if not torch.compiler.is_exporting() and bool(x.sum() > 0) else x)


def test_bad_data_is_refused_with_the_remedy() -> None:
    spec, net, one, other = tiny(torch.float32)
    good = torch.randn(20, 3)
    for data, message in (
        ([torch.full((20, 3), torch.nan)], r"calibration: what '0.weight writes' holds a NaN or an infinity"),
        ([good, good * torch.inf], r"calibration: what '0.weight writes' holds a NaN or an infinity"),
        ([good[:1]], "calibration: a correlation needs two observations and more; got one"),
        ([], "calibration: expected at least one batch; got none"),
        (iter([good]), "calibration: expected a collection that can be read more than once"),
        ([(good, good, good)], "calibration: expected batches of 1 inputs"),
    ):
        with pytest.raises(CalibrationError, match=message):
            activation_matching(spec, net, one, other, data)
    with pytest.raises(CalibrationError, match=r"'0\.weight writes' holds a NaN"):
        activation_matching(spec, net, one, {**other, "0.bias": torch.full((6,), torch.nan)}, [good])


def test_models_that_do_not_fit_are_refused() -> None:
    spec, net, one, other = tiny(torch.float32)
    data = [torch.randn(20, 3)]
    with pytest.raises(SpecMismatchError, match=r"model: expected '0.bias' as \(6,\); got \(5,\)"):
        activation_matching(spec, net, one, {**other, "0.bias": torch.zeros(5)}, data)
    with pytest.raises(SpecMismatchError, match="net: expected a module of the state dict's architecture"):
        activation_matching(spec, nn.Linear(3, 2), one, other, data)
    with pytest.raises(SpecMismatchError, match="perms: expected exactly the spec's 2 perms"):
        activation_matching(spec, net, one, other, data, init={"0": torch.arange(6)})


def test_models_that_take_different_ways_are_refused() -> None:
    net = Chosen()
    spec = trace(net, (torch.zeros(2, 3),))
    state = {name: torch.ones_like(tensor) for name, tensor in net.state_dict().items()}
    with pytest.raises(CalibrationError, match=r"different ways through the network .* use weight_matching"):
        activation_matching(spec, net, state, {n: -t for n, t in state.items()}, [torch.ones(9, 3)])
