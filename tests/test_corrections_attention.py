"""least_squares and regmean inside nn.MultiheadAttention: what it computes is seen, and its projections are solved."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from corrections_ends import State, draw, run
from torch import Tensor, nn

from fedrebasin import least_squares, merge, permute, random_perms, regmean, trace
from fedrebasin.corrections.calls import attention_inside
from fedrebasin.corrections.layers import find_steps

PROJECTIONS = ("encoder.self_attn.in_proj_weight", "encoder.self_attn.out_proj.weight")


class Encoder(nn.Module):
    def __init__(self, *, batch_first: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first, dropout=0.0)
        self.head = nn.Linear(8, 3)
        self.axis = 1 if batch_first else 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(self.axis))


def planted(net: nn.Module, x: Tensor) -> tuple[State, State]:
    """The network's weights, and their average with those of a copy whose units have changed places."""
    own = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    spec = trace(net, (x,))
    assert "encoder.self_attn" in spec.perm_shapes
    return own, merge([own, permute(spec, random_perms(spec, 1), own)])


@pytest.mark.filterwarnings("ignore:calibration. 5 examples are few")
@pytest.mark.parametrize("batch_first", [True, False])
def test_ends_equal_up_to_a_permutation_give_their_function_whatever_the_average_was(batch_first: bool) -> None:
    net = Encoder(batch_first=batch_first).double().eval()
    x, new = (draw(150, 5, 6, seed=seed) if batch_first else draw(5, 150, 6, seed=seed) for seed in range(2))
    own, average = planted(net, x[:2])
    expected = run(net, own, new)
    assert float((run(net, average, new) - expected).abs().max()) > 1e-2
    found = least_squares(net, average, [own, own], [x], ridge=0.0)
    torch.testing.assert_close(run(net, found, new), expected, rtol=1e-6, atol=1e-6)
    for name in PROJECTIONS:
        assert not torch.allclose(found[name], average[name])
    found = regmean(net, average, [own, own], [x], off_diagonal=1.0)
    torch.testing.assert_close(run(net, found, new), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("memory", [2**30, 0])
def test_memory_does_not_change_what_attention_is_solved_to(memory: int) -> None:
    net, x = Encoder().double().eval(), [draw(60, 4, 6), draw(60, 4, 6, seed=1)]
    own, average = planted(net, x[0][:2])
    other = {name: tensor + 0.1 * draw(*tensor.shape, seed=3) for name, tensor in own.items()}
    found = least_squares(net, average, [own, other], x, memory=memory)
    expected = least_squares(net, average, [own, other], x)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-7, atol=1e-9)


def test_examples_are_counted_though_attention_puts_positions_first() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]  # type: ignore[no-any-return]

    net, x = Alone().double().eval(), draw(120, 4, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        least_squares(net, net.state_dict(), [net.state_dict()], [x])
    with pytest.warns(UserWarning, match="50 examples are few"):
        least_squares(net, net.state_dict(), [net.state_dict()], [x[:50]])


def test_ingoing_projections_of_several_tensors_stay_averaged_and_are_named() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention = nn.Linear(6, 6), nn.MultiheadAttention(6, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(self.first(x), x, x)[0]  # type: ignore[no-any-return]

    steps, left = find_steps(Cross().eval(), (torch.zeros(2, 4, 6),), {})
    assert [step.key for step in steps] == ["first.weight", "attention.out_proj.weight"]
    assert left == {"attention.in_proj_weight": "no linear or convolution layer reads it directly"}


@pytest.mark.parametrize("need_weights", [True, False])
def test_attention_from_inside_is_attention(need_weights: bool) -> None:
    attention, seen = nn.MultiheadAttention(6, 2, add_bias_kv=True).double(), dict[str, Any]()
    x, mask = draw(4, 3, 6), torch.ones(4, 4).triu(1).bool()

    def forward(function: Callable[..., Any]) -> Any:
        own = attention
        return function(
            *(x, x, x, 6, 2, own.in_proj_weight, own.in_proj_bias, own.bias_k, own.bias_v, False, 0.0),
            *(own.out_proj.weight, own.out_proj.bias),
            training=False,
            need_weights=need_weights,
            attn_mask=mask,
        )

    found, expected = forward(attention_inside), forward(F.multi_head_attention_forward)
    torch.testing.assert_close(found[0], expected[0])
    seen |= {"weights": found[1]}
    assert (seen["weights"] is None) == (not need_weights)
