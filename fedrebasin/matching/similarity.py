"""The pass over calibration data: two models side by side, and how alike their units are."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.batches import Batches, copied
from fedrebasin.corrections.working import load, working_copy
from fedrebasin.errors import CalibrationError
from fedrebasin.layout import Layout
from fedrebasin.matching.correlation import CrossMoments, Part, parts_of
from fedrebasin.matching.places import See, Watch
from fedrebasin.perms import identity_perms
from fedrebasin.permute import permute
from fedrebasin.spec import PermutationSpec

LOGGER = logging.getLogger("fedrebasin")

#: A permutation, and the row of a family over a fixed leaf.
Key = tuple[str, int | None]
_Parts = dict[str, list[Part]]
#: A place is believed if permuted activations differ from the permuted network's by less than this share.
_PROOF = 1e-2


@dataclass
class Similarity:
    """The sum over ``places`` of the correlations of the units of ``part``: float64 ``(units, units)``."""

    part: Part
    total: Tensor
    places: int = 1

    def sum_of(self, spec: PermutationSpec, perms: Mapping[str, Tensor]) -> tuple[float, int]:
        """Sum and number of the correlations of units that ``perms`` put together."""
        order = self.part.order(spec, perms)
        return float(self.total[torch.arange(len(order), device="cpu"), order].sum()), len(order) * self.places


@torch.no_grad()
def measure_similarity(
    spec: PermutationSpec,
    net: nn.Module,
    reference: Mapping[str, Tensor],
    model: Mapping[str, Tensor],
    calibration: Iterable[Any],
    *,
    device: torch.device | str | None = None,
) -> dict[Key, Similarity]:
    """Correlate the units of two models at every place where they can be seen.

    Parameters and raised errors as for :func:`fedrebasin.activation_matching`.

    Returns
    -------
    dict of (str, int or None) to Similarity
        Without the permutations that no place shows.
    """
    first = working_copy(net, reference, device)
    where = device if device is not None else next(iter(reference.values()), torch.zeros(0, device="cpu")).device
    second = working_copy(net, reference, device)
    parts: _Parts | None = None
    sums: dict[tuple[str, int], CrossMoments] = {}
    for args, kwargs, _ in Batches(calibration, inputs=spec.inputs, device=where):
        if parts is None:
            parts = _believed(spec, first, second, reference, args, kwargs)
            load(second, model)
        seen = _record(spec, first, parts, args, kwargs)
        _compare(spec, second, parts, args, kwargs, seen, sums)
    found: dict[Key, Similarity] = {}
    for (name, number), moments in sums.items():
        if not moments.finite:
            raise CalibrationError(
                f"calibration: what {name!r} holds a NaN or an infinity; check the models and the inputs"
            )
        if moments.count < 2:
            raise CalibrationError("calibration: a correlation needs two observations and more; got one")
        part = (parts or {})[name][number]
        correlation = moments.correlation()
        if (part.perm, part.row) in found:
            found[part.perm, part.row].total += correlation
            found[part.perm, part.row].places += 1
        else:
            found[part.perm, part.row] = Similarity(part, correlation)
    return found


def _run(spec: PermutationSpec, net: nn.Module, args: Any, kwargs: Any, see: See) -> None:
    args, kwargs = copied((args, kwargs))  # the batch goes through both models
    with Watch(net, spec, see):
        getattr(net, "_orig_mod", net)(*args, **kwargs)  # a compiled model is run as it was before


def _record(
    spec: PermutationSpec, net: nn.Module, parts: _Parts, args: Any, kwargs: Any
) -> list[tuple[str, list[Tensor]]]:
    """Everything that is seen in one forward pass, kept apart from what the network may still write."""
    seen: list[tuple[str, list[Tensor]]] = []

    def see(name: str, layout: Layout, activations: Tensor) -> None:
        if name not in parts:
            parts[name] = parts_of(spec, layout)
        seen.append((name, [_kept(part.rows(activations), activations) for part in parts[name]]))

    _run(spec, net, args, kwargs, see)
    return seen


def _kept(rows: Tensor, activations: Tensor) -> Tensor:
    shared = rows.untyped_storage().data_ptr() == activations.untyped_storage().data_ptr()
    return rows.clone() if shared else rows


def _compare(
    spec: PermutationSpec,
    net: nn.Module,
    parts: _Parts,
    args: Any,
    kwargs: Any,
    seen: list[tuple[str, list[Tensor]]],
    sums: dict[tuple[str, int], CrossMoments],
) -> None:
    """Run the other model on the same batch and add what it shows, place by place, to the sums."""
    waiting = iter(seen)

    def see(name: str, layout: Layout, activations: Tensor) -> None:
        expected, kept = next(waiting, ("nothing more", []))
        rows = [part.rows(activations) for part in parts.get(name, [])]
        if name != expected or any(a.shape != b.shape for a, b in zip(kept, rows, strict=True)):
            raise CalibrationError(
                f"calibration: the models take different ways through the network (the reference's {expected!r} met "
                f"the model's {name!r}, or examples are routed by value); use weight_matching"
            )
        for number, (one, other) in enumerate(zip(kept, rows, strict=True)):
            sums.setdefault((name, number), CrossMoments()).add(one, other)

    _run(spec, net, args, kwargs, see)


def _believed(
    spec: PermutationSpec,
    first: nn.Module,
    second: nn.Module,
    reference: Mapping[str, Tensor],
    args: Any,
    kwargs: Any,
) -> _Parts:
    """The places at which permuting the network permutes what is seen, and nothing else.

    An axis beside the units' may hold units, too (an MLP-Mixer's tokens and channels): observations would then be
    paired wrongly, and the place says nothing.
    """
    parts: _Parts = {}
    seen = iter(_record(spec, first, parts, args, kwargs))
    shift = {perm: order.roll(1, -1) for perm, order in identity_perms(spec).items()}
    load(second, permute(spec, shift, reference))
    doubted: set[Part] = set()

    def see(name: str, layout: Layout, activations: Tensor) -> None:
        for part, before in zip(parts[name], next(seen)[1], strict=True):
            rows = part.rows(activations)
            expected = before[part.order(spec, shift).to(before.device)]
            spread = (expected - expected.mean(1, keepdim=True)).norm() + 1e-3 * expected.norm()
            if rows.shape != expected.shape or bool((rows - expected).norm() > _PROOF * spread):
                doubted.add(part)

    _run(spec, second, args, kwargs, see)
    for part in doubted:
        LOGGER.info("activation matching: a place of %r is left out: permuting the network mixes it", part.perm)
    return {name: [part for part in found if part not in doubted] for name, found in parts.items()}
