"""Random ends, and what the corrections' tests ask of every correction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin import merge, reset_batchnorm

State = dict[str, Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_ends(net: nn.Module, calibration: Sequence[Any] = (), count: int = 2, noise: float = 0.3) -> list[State]:
    """Copies of the network's weights with noise; running statistics belong to them where there is data."""
    ends = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        state = {
            name: tensor + noise * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            if tensor.is_floating_point() and "running" not in name
            else tensor.clone()
            for name, tensor in net.state_dict().items()
        }
        has_norm = any("running" in name for name in state)
        ends.append(reset_batchnorm(net, state, calibration) if has_norm and calibration else state)
    return ends


def run(net: nn.Module, state: State, *inputs: Tensor) -> Any:
    """The network's output in evaluation mode."""
    net.load_state_dict(state)
    with torch.no_grad():
        return net.eval()(*inputs)


def check_keeps_form(correct: Callable[[State, list[State]], State], net: nn.Module, ends: list[State]) -> None:
    """Keys, order, dtypes and integer buffers stay, and nothing that was given is edited."""
    merged = merge(ends)
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in (merged, *ends)]
    own = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    result = correct(merged, ends)
    assert list(result) == list(merged)
    assert [tensor.dtype for tensor in result.values()] == [tensor.dtype for tensor in merged.values()]
    assert all(torch.equal(result[name], x) for name, x in merged.items() if not x.is_floating_point())
    for state, copy in zip((merged, *ends), before, strict=True):
        assert all(torch.equal(state[name], copy[name]) for name in copy)
    assert all(torch.equal(net.state_dict()[name], own[name]) for name in own)
    assert any(not torch.equal(result[name], merged[name]) for name in merged)
