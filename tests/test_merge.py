"""Averages: limits, coefficients, dtypes; and everything in one call."""

from __future__ import annotations

from collections.abc import Callable

import networks
import pytest
import torch
from torch import Tensor, nn

from fedrebasin import (
    RebasinError,
    SpecMismatchError,
    align,
    interpolate,
    merge,
    merge_modules,
    merge_trunk_modules,
    permute,
    random_perms,
    trace,
)


def _models(count: int) -> list[dict[str, Tensor]]:
    return [
        {"w": torch.randn(3, 2, generator=torch.Generator().manual_seed(k)), "n": torch.tensor(k)} for k in range(count)
    ]


def test_interpolation_gives_both_ends_back_bit_for_bit() -> None:
    a, b = _models(2)
    assert torch.equal(interpolate(a, b, 0)["w"], a["w"])
    assert torch.equal(interpolate(a, b, 1)["w"], b["w"])


def test_the_merge_is_the_weighted_mean_and_coefficients_are_scaled() -> None:
    models = _models(3)
    expected = (models[0]["w"].double() * 2 + models[1]["w"].double() * 3 + models[2]["w"].double() * 5) / 10
    assert torch.equal(merge(models, coefficients=[2, 3, 5])["w"], expected.float())
    torch.testing.assert_close(merge(models)["w"], sum(model["w"] for model in models) / 3)


def test_integer_buffers_keep_their_dtype_and_come_from_the_heaviest() -> None:
    merged = merge(_models(3), coefficients=[0.2, 0.5, 0.3])
    assert merged["n"].dtype == torch.int64 and int(merged["n"]) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_dtypes_are_kept(dtype: torch.dtype) -> None:
    assert merge([{"w": torch.ones(2, dtype=dtype)}] * 3)["w"].dtype == dtype


def test_identical_models_merge_to_themselves_bit_for_bit() -> None:
    model = _models(1)[0]
    assert torch.equal(merge([model] * 7)["w"], model["w"])


def test_the_merge_shares_no_memory_with_its_models() -> None:
    model = _models(1)[0]
    merged = merge([model])
    merged["w"].zero_()
    merged["n"] += 1
    assert bool(model["w"].any()) and int(model["n"]) == 0


@pytest.mark.parametrize(
    ("coefficients", "message"),
    [
        ([1.0], "expected 2, one for each model; got 1"),
        ([1.0, -1.0], "none negative"),
        ([0, 0], "not all zero"),
        ([1, float("nan")], "finite"),
        ([1e308, 1e308], "finite"),
    ],
)
def test_coefficients_that_do_not_fit_are_refused(coefficients: list[float], message: str) -> None:
    with pytest.raises(RebasinError, match=message):
        merge(_models(2), coefficients=coefficients)


def test_models_that_do_not_fit_are_refused_by_tensor() -> None:
    with pytest.raises(SpecMismatchError, match=r"models\[1\]: expected 'w' as \(2,\); got \(3,\)"):
        merge([{"w": torch.zeros(2)}, {"w": torch.zeros(3)}])
    with pytest.raises(SpecMismatchError, match="'v' is in one only"):
        merge([{"w": torch.zeros(2)}, {"w": torch.zeros(2), "v": torch.zeros(1)}])
    with pytest.raises(RebasinError, match="at least one"):
        merge([])
    with pytest.raises(RebasinError, match=r"lam: expected a number in \[0, 1\]; got 2"):
        interpolate({}, {}, 2)


def test_aligning_a_permuted_copy_gives_the_original_back() -> None:
    net, inputs = networks.NETWORKS["vgg11"]()
    spec, state = trace(net, inputs), net.state_dict()
    copy = permute(spec, random_perms(spec, 3), state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in align(spec, state, copy).items())


def test_merge_modules_of_permuted_copies_keeps_the_function() -> None:
    net, inputs = networks.NETWORKS["resnet20-batchnorm"]()
    spec = trace(net, inputs)
    copies = []
    for seed in range(3):
        copy, _ = networks.NETWORKS["resnet20-batchnorm"]()
        copy.load_state_dict(permute(spec, random_perms(spec, seed), net.state_dict()))
        copies.append(copy)
    merged = merge_modules(copies, inputs)
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(merged(x), net.eval()(x), rtol=1e-4, atol=1e-4)
    assert not merged.training and merged is not copies[0]


def test_merge_modules_repairs_where_there_is_calibration_data() -> None:
    nets = [nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2)) for _ in range(2)]
    batches = [torch.randn(300, 4)]
    plain = merge_modules(nets, (torch.zeros(1, 4),))
    repaired = merge_modules(nets, (torch.zeros(1, 4),), calibration=batches)
    stds = [nets[0][0](batches[0]).std(0), nets[1][0](batches[0]).std(0)]
    assert repaired[0](batches[0]).std(0).mean() > plain[0](batches[0]).std(0).mean()
    torch.testing.assert_close(
        repaired[0](batches[0]).std(0).sum(), (stds[0].sum() + stds[1].sum()) / 2, rtol=1e-3, atol=0
    )


def _without_bias() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 16, bias=False), nn.RMSNorm(16), nn.ReLU(), nn.Linear(16, 2))


def _of_norm_and_direction() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 16))
    return nn.Sequential(normed, nn.ReLU(), nn.Linear(16, 2))


@pytest.mark.parametrize("net", [_without_bias, _of_norm_and_direction])
def test_what_repair_cannot_correct_is_merged_unless_repair_was_asked_for(net: Callable[[], nn.Module]) -> None:
    nets, example, batches = [net(), net()], (torch.zeros(1, 4),), [torch.randn(200, 4)]
    plain = merge_modules(nets, example, correction=None)
    with pytest.warns(UserWarning, match="the merged model is not corrected: net: expected a BatchNorm"):
        merged = merge_modules(nets, example, calibration=batches)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(merged.state_dict()[name], tensor, rtol=0, atol=0)
    with pytest.raises(RebasinError, match=r"found none. Give correction='least-squares' or 'regmean'"):
        merge_modules(nets, example, calibration=batches, correction="repair")


def test_merge_modules_warns_of_what_stays_fixed() -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
            self.decoder = nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            code: Tensor = self.encoder(x)
            return code

    with pytest.warns(UserWarning, match="model: forward uses 'decoder.weight' and others neither") as caught:
        merge_modules([Encoder(), Encoder()], (torch.zeros(2, 4),))
        merge_trunk_modules([Encoder(), Encoder()], (torch.zeros(2, 4),), until="encoder.0")
    assert [one.filename for one in caught] == [__file__] * 3


def test_counters_of_the_heaviest_model_take_the_types_of_the_first() -> None:
    merged = merge([{"n": torch.tensor(1, dtype=torch.int32)}, {"n": torch.tensor(2)}], coefficients=[1, 3])
    assert merged["n"].dtype == torch.int32 and int(merged["n"]) == 2
