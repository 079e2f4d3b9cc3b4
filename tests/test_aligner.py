"""PermutationAligner: planted permutations of plain dicts are found, the function stays, other networks are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedrebasin import PermutationAligner, chain_spec, check_spec, permute, random_perms, trace
from fedrebasin.errors import CalibrationError, SpecMismatchError

NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, 7, bias=False), nn.ReLU(), nn.Linear(7, 3)),
        torch.randn(40, 5),
    ),
    "conv": (
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.PReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8)),
            *(nn.Flatten(), nn.BatchNorm1d(32), nn.Linear(32, 10), nn.LayerNorm(10), nn.ReLU(), nn.Linear(10, 3)),
        ),
        torch.randn(40, 3, 6, 6),
    ),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 5, 3), nn.Flatten(), nn.Linear(10, 2)),
        torch.randn(40, 2, 6),
    ),
}


def made(name: str, seed: int) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(seed)
    net = NETS[name][0]().double()
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand_like(tensor) + 0.2 if tensor.ndim < 2 else torch.randn_like(tensor))
    return net.eval(), {key: tensor.clone() for key, tensor in net.state_dict().items()}


def planted(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    spec = chain_spec(state)
    return permute(spec, random_perms(spec, seed), state)


@pytest.mark.parametrize("name", NETS)
def test_the_spec_of_the_shapes_is_that_of_the_graph(name: str) -> None:
    net, state = made(name, 0)
    inputs = (NETS[name][1].double(),)
    spec, traced = chain_spec(state), trace(net, inputs)
    assert spec.perm_shapes == traced.perm_shapes
    assert check_spec(net, spec, inputs).checked
    assert all(set(spec.tied[perm]) == set(traced.tied[perm]) for perm in spec.perm_shapes)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_weights_in_another_order_are_found_and_the_function_stays(name: str, kind: str) -> None:
    net, state = made(name, 1)
    other = planted(state, 2)
    a, b = (({k: t.numpy() for k, t in s.items()} if kind == "numpy" else s) for s in (state, other))
    aligner = PermutationAligner()
    perms = aligner.weight_match(a, b)
    aligned = aligner.apply_permutations(b, perms)
    expected = np.ndarray if kind == "numpy" else Tensor
    assert all(isinstance(value, expected) for value in (*perms.values(), *aligned.values()))
    assert list(aligned) == list(state)
    for key, tensor in state.items():
        assert torch.as_tensor(aligned[key]).dtype == tensor.dtype
        assert torch.equal(torch.as_tensor(aligned[key]), tensor)
    before = net(NETS[name][1].double())
    net.load_state_dict({key: torch.as_tensor(array) for key, array in b.items()})
    torch.testing.assert_close(net(NETS[name][1].double()), before)


def test_signs_and_sizes_of_independent_networks_are_kept() -> None:
    net, state = made("conv", 1)
    other, moved = made("conv", 2)
    aligner = PermutationAligner()
    aligned = aligner.apply_permutations(moved, aligner.weight_match(state, moved))
    before = other(NETS["conv"][1].double())
    net.load_state_dict(aligned)
    torch.testing.assert_close(net(NETS["conv"][1].double()), before)
    distance = [
        sum(float((state[k] - s[k]).square().sum()) for k in chain_spec(state).parameters) for s in (aligned, moved)
    ]
    assert distance[0] < distance[1]


def test_alphabetical_keys_within_a_module_are_understood() -> None:
    _, state = made("mlp", 0)
    ordered = {key: state[key] for key in sorted(state)}
    assert next(iter(ordered)) == "0.bias"
    assert chain_spec(ordered).tied["0"] == tuple(sorted(chain_spec(state).tied["0"]))


@pytest.mark.parametrize("name", NETS)
def test_modules_are_matched_by_what_they_answer_to_data(name: str) -> None:
    net, state = made(name, 3)
    other = NETS[name][0]().double().eval()
    moved = planted(state, 4)
    other.load_state_dict(moved)
    aligner = PermutationAligner()
    perms = aligner.activation_match(net, other, [NETS[name][1].double()])
    aligned = aligner.apply_permutations(moved, perms)
    assert all(torch.equal(aligned[key], tensor) for key, tensor in state.items())


def test_a_network_that_is_no_chain_is_matched_as_a_module() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two, self.out = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            result: Tensor = self.out(x + self.two(torch.relu(self.one(x))))
            return result

    torch.manual_seed(0)
    net, other, inputs = Residual(), Residual(), torch.randn(30, 4)
    aligner = PermutationAligner()
    moved = aligner.apply_permutations(other.state_dict(), aligner.activation_match(net, other, [inputs]))
    before = other(inputs)
    other.load_state_dict(moved)
    torch.testing.assert_close(other(inputs), before)


def test_activations_are_matched_as_dicts_and_from_functions() -> None:
    _, state = made("mlp", 5)
    other = planted(state, 6)

    def hidden(weights: dict[str, Any]) -> Callable[[Any], dict[str, Any]]:
        def run(x: Any) -> dict[str, Any]:
            first = np.maximum(x @ weights["0.weight"].numpy().T + weights["0.bias"].numpy(), 0)
            return {"0": first, "2": np.maximum(first @ weights["2.weight"].numpy().T, 0)}

        return run

    data = [np.random.default_rng(seed).normal(size=(50, 5)) for seed in range(3)]
    aligner = PermutationAligner()
    streamed = aligner.activation_match(hidden(state), hidden(other), data)
    whole = aligner.activation_match(hidden(state)(np.concatenate(data)), hidden(other)(np.concatenate(data)))
    for perms in (streamed, whole):
        assert all(isinstance(perm, np.ndarray) for perm in perms.values())
        aligned = aligner.apply_permutations(other, perms)
        assert all(torch.equal(aligned[key], tensor) for key, tensor in state.items())
    half = aligner.apply_permutations(other, {"0": streamed["0"]})
    assert torch.equal(half["0.weight"], state["0.weight"]) and not torch.equal(half["2.weight"], state["2.weight"])


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.setflags(write=False)
    return array


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "how", [lambda x: x.astype(">f8"), lambda x: np.flip(np.flip(x).copy()), read_only], ids=["big", "reversed", "read"]
)
def test_arrays_that_torch_would_not_take_are_matched_and_permuted(how: Callable[[np.ndarray], np.ndarray]) -> None:
    rng, order = np.random.default_rng(0), np.array([3, 1, 0, 2])
    one = {"w1": rng.normal(size=(4, 3)), "b1": rng.normal(size=4), "w2": rng.normal(size=(2, 4))}
    other = {"w1": one["w1"][order], "b1": one["b1"][order], "w2": one["w2"][:, order]}
    aligner, odd = PermutationAligner(), {name: how(array) for name, array in other.items()}
    perms = aligner.weight_match(one, odd)
    for name, array in aligner.apply_permutations(odd, perms).items():
        np.testing.assert_array_equal(array, one[name])
    assert aligner.activation_match({"w1": one["w1"].T}, {"w1": how(other["w1"].T)})["w1"].tolist() == [2, 1, 3, 0]


def shaped(**shapes: tuple[int, ...]) -> dict[str, Any]:
    return {name: np.zeros(shape) for name, shape in shapes.items()}


NO_CHAINS = {
    "vectors alone": shaped(b=(3,)),
    "reads 5": shaped(w1=(4, 3), w2=(2, 5)),
    "which reads 1": shaped(c1=(8, 3, 3, 3), depthwise=(8, 1, 3, 3)),
    "no convolution after a linear layer": shaped(w1=(4, 3), c1=(2, 4, 3, 3)),
    "no layer before it": shaped(b=(3,), w=(3, 2)),
    "got 'b' of 5, a layer of 4 units before it": shaped(w=(4, 2), b=(5,)),
    "got 'conv10' before 'conv2'": shaped(conv1=(4, 4), conv10=(4, 4), conv2=(4, 4)),
    "no recurrent layer, which is no chain; got 'rnn.weight_hh_l0'": {
        "rnn.weight_hh_l0": np.zeros((6, 6)),
        "fc.weight": np.zeros((2, 6)),
    },
    "got 'weight_ih'": nn.RNNCell(4, 6).state_dict(),
    "got 'weight_ih_l0'": nn.GRU(4, 6, bidirectional=True).state_dict(),
    "up to five axes": shaped(w=(1, 1, 1, 1, 1, 1)),
}


@pytest.mark.parametrize("said", NO_CHAINS)
def test_what_is_no_chain_is_refused(said: str) -> None:
    with pytest.raises(SpecMismatchError, match=said):
        PermutationAligner().weight_match(NO_CHAINS[said], NO_CHAINS[said])


def test_arguments_that_do_not_fit_are_refused() -> None:
    aligner, weights = PermutationAligner(), shaped(w1=(4, 3), w2=(2, 4))
    net, one = nn.Linear(2, 2), {"w1": np.zeros((5, 4))}
    with pytest.raises(SpecMismatchError, match="some of 'w1'; got 'w2'"):
        aligner.apply_permutations(weights, {"w2": np.arange(2)})
    with pytest.raises(SpecMismatchError, match="not a permutation"):
        aligner.apply_permutations(weights, {"w1": np.zeros(4, dtype=np.int64)})
    with pytest.raises(SpecMismatchError, match="'w1' holds a NaN"):
        aligner.weight_match(weights, {**weights, "w1": np.full((4, 3), np.nan)})
    with pytest.raises(SpecMismatchError, match=r"'w1' as \(5, 3\); got \(4, 3\)"):
        aligner.weight_match(weights, shaped(w1=(5, 3), w2=(2, 5)))
    with pytest.raises(CalibrationError, match="got None"):
        aligner.activation_match(net, net)
    with pytest.raises(CalibrationError, match="got one module"):
        aligner.activation_match(net, one)
    with pytest.raises(CalibrationError, match="got one of each"):
        aligner.activation_match(one, lambda batch: one)
    with pytest.raises(CalibrationError, match="the same layers twice"):
        aligner.activation_match(one, {"w2": np.zeros((5, 4))})
    with pytest.raises(CalibrationError, match=r"twice as \(examples, units, ...\); got \(5, 4\) and \(5, 3\)"):
        aligner.activation_match(one, {"w1": np.zeros((5, 3))})
    with pytest.raises(CalibrationError, match="two finite observations"):
        aligner.activation_match({"w1": np.zeros((1, 4))}, {"w1": np.zeros((1, 4))})
