"""The midpoint's loss: soft permutations at the corners are permutations, and the lowest is kept."""

from __future__ import annotations

from typing import Any

import networks
import networks_zoo
import pytest
import torch
import torch.nn.functional as F
from test_matching_families import encoder
from test_straight_through import case, data
from torch import Tensor

from fedrebasin import random_perms, sinkhorn_matching, straight_through_matching, trace, weight_matching
from fedrebasin.matching.midpoint import Midpoint, lowest_loss_matching
from fedrebasin.matching.relaxed import corner, no_logits, soften

MODULES: dict[str, Any] = {
    "encoder": encoder,
    **{name: networks.NETWORKS[name] for name in ("resnet20-batchnorm", "two-inputs")},
    **{name: networks_zoo.ZOO[name] for name in ("lstm", "gru", "weight-norm")},
}


@pytest.mark.parametrize("name", MODULES)
def test_soft_losses_at_permutations_are_those_of_permuted_models_and_have_gradients(name: str) -> None:
    torch.manual_seed(0)
    (net, inputs), other = MODULES[name]()[:2], MODULES[name]()[0]
    spec = trace(net, inputs)
    for tensor in [tensor for module in (net, other) for tensor in (*module.parameters(), *module.buffers())]:
        if tensor.is_floating_point():
            tensor.data.add_(torch.rand(tensor.shape), alpha=0.2)
    x = {k: torch.randn_like(t) for k, t in inputs.items()} if isinstance(inputs, dict) else torch.randn_like(inputs[0])
    pairs = [(x, torch.zeros(2, dtype=torch.int64))]

    def loss(output: Any, target: Tensor) -> Tensor:
        output = output["out"] + output["again"] if isinstance(output, dict) else output
        return F.cross_entropy((output[0] if isinstance(output, tuple) else output).flatten(0, -2)[:2], target)

    midpoint = Midpoint(spec, net, net.state_dict(), other.state_dict(), pairs, loss=loss, lam=0.3, device=None)
    perms = random_perms(spec, 2)
    (batch,) = midpoint.batches
    value = midpoint.soft_loss(corner(spec, perms, midpoint.like), 0.3, *batch)
    assert float(value) == pytest.approx(midpoint.mean_loss(perms), rel=1e-5)
    logits = {perm: torch.randn_like(zeros).requires_grad_() for perm, zeros in no_logits(spec, midpoint.like).items()}
    value = midpoint.soft_loss(soften(spec, logits), 0.3, *batch)
    assert all(float(gradient.abs().max()) > 0 for gradient in torch.autograd.grad(value, list(logits.values())))
    options: dict[str, Any] = {"net": net, "batches": pairs, "loss": loss, "steps": 3}
    found = sinkhorn_matching(spec, net.state_dict(), other.state_dict(), **options)
    assert found.measures["loss"] <= found.measures["loss-before"]


def test_the_candidate_with_the_lowest_loss_is_kept_wherever_it_comes() -> None:
    spec, net, a, b = case(16, 12)
    midpoint = Midpoint(spec, net, a, b, data(), loss=F.cross_entropy, lam=0.5, device=None)
    best, *others = weight_matching(spec, a, b).perms, *(random_perms(spec, seed) for seed in range(3))
    found = lowest_loss_matching(midpoint, a, b, others[0], [others[1], best, others[2]], 0.0)
    assert all(torch.equal(order, best[perm]) for perm, order in found.perms.items())


@pytest.mark.parametrize("wide", ["reference", "model"])
def test_models_of_two_types_are_matched_by_loss(wide: str) -> None:
    spec, net, a, b = case(16, 12)
    double = {name: tensor.double() for name, tensor in (a if wide == "reference" else b).items()}
    a, b = (double, b) if wide == "reference" else (a, double)
    for found in (
        sinkhorn_matching(spec, a, b, net=net, batches=data(), loss=F.cross_entropy, steps=2),
        straight_through_matching(spec, net, a, b, data(), loss=F.cross_entropy, epochs=1),
    ):
        assert found.measures["loss"] <= found.measures["loss-before"]
