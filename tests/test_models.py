"""The simulations' networks build, run and train at several shapes and widths."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedrebasin.errors import UsageError
from fedrebasin.simulations.models import DEFAULT_WIDTHS, ChannelLayerNorm, build_model

SMALL = {"mlp": 5, "conv": 4, "vgg": 2, "resnet20": 1}


@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)], ids=str)
@pytest.mark.parametrize("name", sorted(DEFAULT_WIDTHS))
def test_every_network_gives_one_logit_per_class_and_trains(name, shape, norm):
    torch.manual_seed(0)  # three images can leave every unit of a narrow layer at zero
    net = build_model(name, shape, 7, width=SMALL[name], norm=norm)
    logits = net(torch.randn(3, *shape))
    assert logits.shape == (3, 7)
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in net.parameters())


@pytest.mark.parametrize("name", sorted(DEFAULT_WIDTHS))
def test_twice_the_width_is_more_parameters(name):
    def size(width: int) -> int:
        net = build_model(name, (3, 32, 32), 10, width=width)
        return sum(parameter.numel() for parameter in net.parameters())

    assert 1.5 * size(SMALL[name]) < size(2 * SMALL[name])


@pytest.mark.parametrize("name", sorted(DEFAULT_WIDTHS))
def test_the_default_width_is_the_tables(name):
    default, named = (build_model(name, (3, 32, 32), 10, width=width) for width in (None, DEFAULT_WIDTHS[name]))
    assert [p.shape for p in default.parameters()] == [p.shape for p in named.parameters()]


def test_a_resnet20_has_twenty_layers_with_weights_on_its_longest_path():
    net = build_model("resnet20", (3, 32, 32), 10, width=1)
    shortcuts = [name for name, _ in net.named_modules() if "shortcut" in name]
    layers = [n for n, m in net.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and n not in shortcuts]
    assert len(layers) == 20
    assert sum(parameter.numel() for parameter in net.parameters()) == pytest.approx(272_474, rel=0.02)


def test_layer_norm_normalises_every_pixel_over_its_channels():
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64) * 4 + 1
    normalised = ChannelLayerNorm(5).double()(x)
    torch.testing.assert_close(normalised.mean(1), torch.zeros(2, 3, 4, dtype=torch.float64))
    torch.testing.assert_close(
        normalised.var(1, correction=0), torch.ones(2, 3, 4, dtype=torch.float64), rtol=1e-3, atol=0
    )


def test_layer_norm_networks_have_no_batch_norm_and_batch_norm_networks_no_layer_norm():
    for norm, absent in (("layer", nn.BatchNorm2d), ("batch", ChannelLayerNorm)):
        for name in ("conv", "vgg", "resnet20"):
            modules = build_model(name, (3, 32, 32), 10, width=SMALL[name], norm=norm).modules()
            assert not any(isinstance(module, absent) for module in modules)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cnn"}, "--model: expected one of mlp, conv, vgg, resnet20; got 'cnn'"),
        ({"norm": "group"}, "--norm: expected one of batch, layer; got 'group'"),
        ({"width": 0}, "--width: expected a positive number; got 0"),
    ],
)
def test_an_unknown_network_norm_or_width_is_refused_with_what_there_is(options, message):
    chosen = {"name": "mlp", "width": 4, "norm": "batch"} | options
    with pytest.raises(UsageError, match=message):
        build_model(chosen["name"], (1, 8, 8), 10, width=chosen["width"], norm=chosen["norm"])
