"""The proof that a narrower network, padded with dead units, keeps its function in a wider one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fedrebasin.check import check_spec
from fedrebasin.errors import InvalidSpecError, SpecMismatchError
from fedrebasin.proof import Proof
from fedrebasin.seeds import generator_of
from fedrebasin.spec import PermutationSpec
from fedrebasin.trace import trace
from fedrebasin.widths.maps import WidthMatching, common_units, resize


def check_widths(
    wide: nn.Module, narrow: nn.Module, example_inputs: Any, *, seed: int = 0
) -> tuple[PermutationSpec, PermutationSpec]:
    """Trace and prove two networks of one kind, and prove that the narrow one can be placed in the wide one.

    Random weights of the narrow network are put at random units of the wide one; the outputs must not change. They do
    where a layer looks at all units at once: LayerNorm's mean, an attention's scale.

    Parameters
    ----------
    wide, narrow : nn.Module
        Only their architectures are used; no layer of ``narrow`` is wider.
    example_inputs : Tensor, tuple or dict
        Good for both.
    seed : int

    Returns
    -------
    tuple of two PermutationSpec
        The checked specs of the wide and of the narrow network.

    Raises
    ------
    InvalidSpecError
        If an output changes, or a spec fails its own check.
    SpecMismatchError
        If the networks are not of one kind, or ``narrow`` is wider somewhere.

    Examples
    --------
    >>> wide, narrow = (nn.Sequential(nn.Linear(4, n), nn.ReLU(), nn.Linear(n, 2)) for n in (8, 5))
    >>> [spec.perm_shapes for spec in check_widths(wide, narrow, (torch.randn(3, 4),))]
    [{'0': (8,)}, {'0': (5,)}]
    """
    specs = [check_spec(net, trace(net, example_inputs), example_inputs, seed=seed) for net in (wide, narrow)]
    generator = generator_of(seed)
    maps = {}
    for perm, other in common_units(*specs).items():
        units, fewer = specs[0].perm_shapes[perm][0], specs[1].perm_shapes[other][0]
        if fewer > units:
            raise SpecMismatchError(
                f"narrow: expected at most {units} units of {other!r}, as the wide network has; got {fewer}"
            )
        maps[perm] = torch.zeros(units, fewer, dtype=torch.float64, device="cpu")
        rows = torch.randperm(units, generator=generator, device="cpu")[:fewer]
        maps[perm][rows, torch.arange(fewer, device="cpu")] = 1.0
    proof, other_proof = Proof(narrow, specs[1], example_inputs, seed), Proof(wide, specs[0], example_inputs, seed)
    placed = resize(WidthMatching(specs[0], specs[1], maps, maps), proof.state)
    other_proof.inputs = proof.inputs
    as_narrow = {name: placed[name].to(tensor) for name, tensor in other_proof.state.items()}
    change = other_proof.change_to(as_narrow, proof.outputs)
    if change > proof.tolerance and change > proof.widen_tolerance():
        raise InvalidSpecError(
            f"narrow: placed among dead units of the wide network it changes an output by {change:.1g} of its size; "
            "a layer looks at all units at once (LayerNorm, an attention's scale), so that widths cannot differ there"
        )
    return replace(specs[0], checked=True), replace(specs[1], checked=True)
