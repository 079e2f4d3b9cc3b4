"""Training makes the loss smaller, the same way each time."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedrebasin.errors import UsageError
from fedrebasin.simulations.augment import flip_and_shift
from fedrebasin.simulations.data import load_dataset
from fedrebasin.simulations.models import build_model
from fedrebasin.simulations.training import RECIPES, Recipe, predict, select_device, train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def trained(
    digits,
    *,
    recipe=RECIPES["mlp"],
    epochs=3,
    seed=0,
    model="mlp",
    width=16,
    compile_model=False,
    precision="auto",
    **changes,
):
    data = dataclasses.replace(digits, **changes)
    torch.manual_seed(0)
    net = build_model(model, data.shape, data.classes, width=width)
    losses = []
    train(
        net,
        data,
        data.train_images[:600],
        data.train_labels[:600],
        recipe=recipe,
        epochs=epochs,
        seed=seed,
        device=CPU,
        progress=lambda epoch, loss: losses.append(loss),
        compile_model=compile_model,
        precision=precision,
    )
    return net, losses


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_training_decreases_the_loss(digits, model):
    _, losses = trained(digits, model=model, recipe=RECIPES[model], epochs=6, width=64 if model == "mlp" else 8)
    assert len(losses) == 6
    assert losses[-1] < 0.8 * losses[0]


def test_training_is_the_same_under_one_seed_and_another_under_another(digits):
    (first, _), (again, _), (other, _) = (trained(digits, epochs=1, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))


def test_training_does_not_depend_on_the_global_generator(digits):
    first, _ = trained(digits, epochs=1)
    torch.rand(5)
    again, _ = trained(digits, epochs=1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


def test_augmented_training_runs(digits):
    _, losses = trained(digits, epochs=1, augment=True)
    assert losses[0] > 0


def test_training_on_the_cpu_has_the_bits_of_a_plain_loop(digits):
    data = dataclasses.replace(digits, augment=True)
    recipe, images, labels = RECIPES["conv"], data.train_images[:300], data.train_labels[:300]
    torch.manual_seed(0)
    net = build_model("conv", data.shape, 10, width=4).to(memory_format=torch.channels_last)
    fast = copy.deepcopy(net)
    train(fast, data, images, labels, recipe=recipe, epochs=3, seed=1, device=CPU)

    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay)
    warm_up, steps = 2, 6  # 300 images are two batches of 128
    net.train()
    for step in range(steps):
        if step % 2 == 0:
            order = torch.randperm(300, generator=generator)
        rows = order[(step % 2) * 128 :][:128]
        rise, fall = (step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))
        optimizer.param_groups[0]["lr"] = 0.1 * (rise if step < warm_up else fall)
        x = flip_and_shift(data.normalise(images[rows]), generator).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels[rows]).backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), fast.parameters(), strict=True))


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_training_in_bfloat16_computes_in_it_and_keeps_weights_in_float32(digits, model):
    settings = {"model": model, "recipe": RECIPES[model], "epochs": 6, "width": 64 if model == "mlp" else 8}
    (same, losses), (half, rounded) = (trained(digits, precision=name, **settings) for name in ("float32", "bfloat16"))
    assert rounded != losses and rounded == pytest.approx(losses, rel=0.1)
    assert {tensor.dtype for tensor in half.parameters()} == {torch.float32}
    auto, _ = trained(digits, **settings)
    assert all(torch.equal(a, b) for a, b in zip(auto.parameters(), same.parameters(), strict=True))


def test_a_compiled_network_trains_the_same_weights_up_to_rounding(digits, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    (plain, first), (fast, second) = (
        trained(digits, model="conv", width=4, epochs=2, compile_model=on) for on in (0, 1)
    )
    assert first == pytest.approx(second, rel=1e-4)
    for a, b in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_fewer_images_than_a_batch_still_make_a_step(digits):
    net = build_model("mlp", digits.shape, 10, width=4)
    before = [parameter.clone() for parameter in net.parameters()]
    train(
        net,
        digits,
        digits.train_images[:5],
        digits.train_labels[:5],
        recipe=RECIPES["mlp"],
        epochs=1,
        seed=0,
        device=CPU,
    )
    assert not torch.equal(before[0], next(net.parameters()))


def test_a_large_proximal_term_keeps_the_model_near_its_start(digits):
    def distance(prox: float) -> float:
        torch.manual_seed(0)
        start = [parameter.clone() for parameter in build_model("mlp", digits.shape, 10, width=16).parameters()]
        net, _ = trained(digits, epochs=1, recipe=Recipe("sgd", 0.02, 64, "constant", prox=prox))
        return sum(float((a - b).detach().square().sum()) for a, b in zip(start, net.parameters(), strict=True))

    assert distance(10.0) < 0.5 * distance(0.0)


def test_predictions_do_not_depend_on_the_batch_size_and_leave_the_weights_alone(digits):
    torch.manual_seed(0)
    net = build_model("conv", digits.shape, 10, width=4)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    whole, parts = (predict(net, digits, digits.test_images[:50], device=CPU, batch=batch) for batch in (50, 7))
    torch.testing.assert_close(whole, parts)
    assert whole.dtype == torch.float32 and whole.shape == (50, 10)
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())


def test_a_batch_norm_network_is_evaluated_with_its_running_statistics(digits):
    net = nn.Sequential(nn.BatchNorm2d(1, affine=False), nn.Flatten())
    expected = digits.normalise(digits.test_images[:3]).flatten(1) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(predict(net, digits, digits.test_images[:3], device=CPU), expected)


def test_an_unknown_device_is_refused_with_what_there_is():
    with pytest.raises(UsageError, match="--device: expected auto, cpu or cuda; got 'tpux'"):
        select_device("tpux")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="use --device cpu"):
        select_device("cuda")
