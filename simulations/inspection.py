"""``fedrebasin inspect module:factory``: trace a model, prove its spec, and measure both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fedrebasin.check import check_spec, output_change
from fedrebasin.errors import RebasinError, UnsupportedOpError
from fedrebasin.export import export_model
from fedrebasin.simulations.inspection_inputs import Input, example_inputs, text_of
from fedrebasin.spec import PermutationSpec
from fedrebasin.trace import spec_of

#: a change of the outputs that float64 arithmetic in another order explains
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Inspection:
    """A traced model.

    Attributes
    ----------
    name, inputs : str
        What was inspected, for people.
    spec : PermutationSpec
    parameters : int
        Number of entries of all parameters, shared ones once.
    free_share : float
        Share of them that lie in a tensor that some permutation moves, in [0, 1].
    export_seconds, trace_seconds : float
        ``torch.export``, and the walk over its graph.
    device : str
        ``"meta"`` if the weights were never held.
    change : float or None
        The largest relative change of an output under random permutations of everything at once; None if unproved.
    """

    name: str
    inputs: str
    spec: PermutationSpec
    parameters: int
    free_share: float
    export_seconds: float
    trace_seconds: float
    device: str
    change: float | None = None


def inspect_model(
    make: Callable[[], nn.Module],
    inputs: Sequence[Input],
    *,
    name: str,
    vocab: int | None = None,
    strict: bool = False,
    check: bool = True,
    on_meta: bool = False,
    seed: int = 0,
    on_phase: Callable[[str], None] = lambda text: None,
) -> Inspection:
    """Build, export, trace and prove a model.

    Parameters
    ----------
    make : callable
        Returns the model.
    on_meta : bool
        Build on the meta device first, which holds no weights; where that fails, on the real one. Needs
        ``check=False``: a proof computes.

    Raises
    ------
    RebasinError
        If the model cannot be built or traced, or its spec fails the proof.

    Examples
    --------
    >>> found = inspect_model(lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)), [Input((2, 4))], name="two")
    >>> found.spec.perm_shapes, found.parameters, found.free_share, found.change < 1e-9
    ({'0': (3,)}, 23, 0.9130434782608695, True)
    """
    trace_on = partial(traced_model, make, inputs, name=name, vocab=vocab, strict=strict, seed=seed, on_phase=on_phase)
    if on_meta and not check:
        try:
            return trace_on(device="meta")[0]
        except UnsupportedOpError:
            raise
        except RebasinError as error:
            on_phase(f"not on the meta device ({str(error)[:60]}...); with real weights")
    found, model, drawn = trace_on(device="cpu")
    if not check:
        return found
    on_phase("proving the spec on random weights")
    return proved(found, model, drawn, seed=seed)


def traced_model(
    make: Callable[[], nn.Module],
    inputs: Sequence[Input],
    *,
    device: str,
    name: str,
    vocab: int | None = None,
    strict: bool = False,
    seed: int = 0,
    on_phase: Callable[[str], None] = lambda text: None,
) -> tuple[Inspection, nn.Module, Any]:
    """Build, export and trace a model on ``device``; the model and its inputs come along for a proof."""
    on_phase("building the model")
    with torch.device(device):
        model = make()
    drawn = example_inputs(model, inputs, vocab=vocab, seed=seed)
    if device == "meta":
        drawn = _to_meta(drawn)
    on_phase("exporting its graph")
    started = time.perf_counter()
    exported = export_model(model, drawn)
    exported_at = time.perf_counter()
    spec = spec_of(exported, strict=strict)
    traced_at = time.perf_counter()
    sizes = {key: parameter.numel() for key, parameter in model.named_parameters()}
    moved = {axis.name for axes in spec.tied.values() for axis in axes}
    total = sum(sizes.values())
    found = Inspection(
        name=name,
        inputs=", ".join(text_of(one) for one in inputs),
        spec=spec,
        parameters=total,
        free_share=sum(size for key, size in sizes.items() if key in moved) / max(1, total),
        export_seconds=exported_at - started,
        trace_seconds=traced_at - exported_at,
        device=device,
    )
    return found, model, drawn


def proved(found: Inspection, model: nn.Module, drawn: Any, *, seed: int = 0) -> Inspection:
    """``found`` with the mark of the passed check and the change that it saw.

    Raises
    ------
    InvalidSpecError
        If a permutation changes an output, or the model does not run on random weights.
    """
    change = output_change(model, found.spec, drawn, seed=seed)
    if change <= _ROUNDING:
        return replace(found, spec=replace(found.spec, checked=True), change=change)
    # a float32 forward may change more; and what changes too much is named
    return replace(found, spec=check_spec(model, found.spec, drawn, seed=seed), change=change)


def _to_meta(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: item.to("meta") for key, item in value.items()}
    return tuple(item.to("meta") for item in value)
