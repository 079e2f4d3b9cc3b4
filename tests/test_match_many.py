"""Many models without a reference: merge-many against planted truth and in limit cases."""

from __future__ import annotations

import networks
import pytest
import torch

from fedrebasin import RebasinError, identity_perms, match_many, permute, random_perms, trace


def test_match_many_puts_planted_copies_into_the_order_of_the_heaviest() -> None:
    net, inputs = networks.NETWORKS["resnet20-batchnorm"]()
    spec, state = trace(net, inputs), net.state_dict()
    copies = [permute(spec, random_perms(spec, seed), state) for seed in range(4)]
    found = match_many(spec, copies, coefficients=[0.1, 0.5, 0.2, 0.2])
    aligned = [permute(spec, perms, copy) for perms, copy in zip(found.perms, copies, strict=True)]
    assert all(
        torch.equal(perm, truth)
        for perm, truth in zip(found.perms[1].values(), identity_perms(spec).values(), strict=True)
    )
    assert all(torch.equal(one[name], copies[1][name]) for one in aligned for name in copies[1])


def test_match_many_raises_its_objective_and_weighs_models() -> None:
    net, inputs = networks.mlp()
    spec = trace(net, inputs)
    models = [
        {n: torch.randn(s, generator=torch.Generator().manual_seed(k)) for n, s in spec.shapes.items()}
        for k in range(4)
    ]
    coefficients = [0.4, 0.3, 0.2, 0.1]
    found = match_many(spec, models, coefficients=coefficients)
    aligned = [permute(spec, perms, model) for perms, model in zip(found.perms, models, strict=True)]
    tied = {axis.name for axes in spec.tied.values() for axis in axes}
    slow = sum(
        coefficients[p] * coefficients[q] * float((aligned[p][name].double() * aligned[q][name].double()).sum())
        for p in range(4)
        for q in range(p)
        for name in tied
    )
    assert found.objective == pytest.approx(slow, rel=1e-9)
    assert list(found.history) == sorted(found.history) and found.objective > found.objective_before


def test_match_many_of_one_model_moves_nothing_and_of_none_is_refused() -> None:
    net, inputs = networks.mlp()
    spec = trace(net, inputs)
    assert match_many(spec, [net.state_dict()]).moved_fraction == 0
    with pytest.raises(RebasinError, match="expected at least one state dict"):
        match_many(spec, [])
    with pytest.raises(RebasinError, match="method: expected one of merge-many; got 'fastest'"):
        match_many(spec, [net.state_dict()], method="fastest")
