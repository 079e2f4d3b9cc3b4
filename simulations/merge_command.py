"""``fedrebasin merge``: safetensors files in, one safetensors file out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.allocator import keep_nothing_freed
from fedrebasin.batches import as_called
from fedrebasin.coefficients import check_coefficients
from fedrebasin.connectivity import loss_along_path, loss_barrier
from fedrebasin.corrections.methods import CORRECTIONS, CorrectionSetting, correct
from fedrebasin.errors import UsageError
from fedrebasin.perms import Perms
from fedrebasin.permute import permute
from fedrebasin.simulations.interrupts import signals_raise
from fedrebasin.simulations.merge_average import averaged
from fedrebasin.simulations.merge_data import read_calibration
from fedrebasin.simulations.merge_files import check_values, open_inputs
from fedrebasin.simulations.merge_matching import Found, Plan, match, needs_data, plan_matching
from fedrebasin.simulations.merge_memory import Needs, needs_of, parse_memory, streams
from fedrebasin.simulations.merge_network import Network, check_fit, from_model, from_spec, sizes
from fedrebasin.simulations.merge_request import Request, check_output, correction_of, metadata_of, numbers
from fedrebasin.simulations.merge_runs import check_runs
from fedrebasin.simulations.plots import save_lines
from fedrebasin.simulations.similarity_plot import similarities, similarity_panel
from fedrebasin.stored import StoredState
from fedrebasin.stored_write import write_state

#: float32 copies of a model besides the models: of a joint matching, or by more than weights; of a correction; of each
#: shadow that is trained on data, Adam's
_JOINT_COPIES, _CORRECTION_COPIES, _SHADOW_COPIES = 4, 3, 2
_LAMS = 11
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Merged:
    """What was done: ``barriers`` holds for each model but the reference the loss barrier, plain and aligned."""

    network: Network
    plan: Plan
    found: Found
    needs: Needs
    streamed: bool
    coefficients: list[float]
    barriers: Mapping[str, tuple[float, float]]
    output: Path | None


def merge_files(request: Request) -> Merged:
    """Do what ``fedrebasin merge`` is asked for; the output is written whole or not at all.

    Raises
    ------
    RebasinError
        For whatever the caller can mend.
    """
    limit, correction = parse_memory(request.memory), correction_of(request)
    check_output(request)
    weights = check_coefficients(numbers(request.coefficients, "--coefficients") or None, len(request.files))
    plan = plan_matching(
        request.files, weights, matching=request.matching, method=request.method, reference=request.reference
    )
    folder = None  # temporary files lie beside the output: elsewhere there may be little room, or it may be memory
    if request.output is not None and not request.dry_run:
        folder = next(parent for parent in request.output.absolute().parents if parent.exists())
    with signals_raise(), _disk_errors(), tempfile.TemporaryDirectory(prefix=".fedrebasin-", dir=folder) as scratch:
        states = open_inputs(request.files, scratch=Path(scratch))
        network = _network(request, plan, states, limit)
        check_fit(network.spec, states)
        batches, labelled = _calibration(request, plan, network)
        if batches is not None:
            scored = labelled and (request.dry_run or needs_data(plan, labelled=True))
            check_runs(_module(network), batches, labelled=labelled, scored=scored)
        whole = _whole(plan, correction, data=batches is not None)
        copies = _JOINT_COPIES + len(states) if plan.joint or plan.matching != "weight" else 0
        copies += _CORRECTION_COPIES + 2 * len(states) if correction or batches is not None else 0
        copies += _SHADOW_COPIES * len(states) if plan.joint and needs_data(plan, labelled=labelled) else 0
        relaxed = len(states) if plan.joint == "cycle-consistent" else 2 if plan.matching != "weight" else 0
        needs = needs_of(network.spec, states, whole=whole, copies=copies, relaxed=relaxed)
        streamed = streams(limit, needs)
        if limit is not None:
            keep_nothing_freed()
        request.on_phase("reading the files")
        digests = check_values(states, network.spec)
        held: list[State] = list(states) if streamed else [dict(state) for state in states]
        request.on_phase("matching")
        found = _match(plan, network, held, weights, batches, labelled=labelled, seed=request.seed)
        if request.plot is not None:
            request.on_phase("comparing the layers")
            _draw(request.plot, network, held, found.perms, plan.reference, batches)
        if request.dry_run:
            barriers = _barriers(plan, network, held, found.perms, batches, request.files) if labelled else {}
            return Merged(network, plan, found, needs, streamed, weights, barriers, None)
        tensors: Any = averaged(network.spec, held, found.perms, weights)
        if correction:
            request.on_phase(f"correcting: {correction}")
            setting = CorrectionSetting(_module(network), batches, weights, network.example, request.seed)
            tensors = _corrected(correction, setting, network, dict(tensors), held, found.perms).items()
        request.on_phase("writing")
        assert request.output is not None
        request.output.parent.mkdir(parents=True, exist_ok=True)
        metadata = {**states[0].metadata, "fedrebasin": metadata_of(request, plan, found, weights, digests, correction)}
        write_state(request.output, states[0].described, tensors, metadata=metadata)
    return Merged(network, plan, found, needs, streamed, weights, {}, request.output)


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"--output: {error.strerror or error}; nothing was written") from error


def _network(request: Request, plan: Plan, states: Sequence[StoredState], limit: int | None) -> Network:
    if request.spec is not None:
        if needs_data(plan, labelled=False):
            raise UsageError(f"--matching: {plan.matching} runs the network; give --model and --calibration")
        return from_spec(request.spec, check=request.check)
    request.on_phase("tracing the model")
    held = request.calibration is not None or request.correction != "none" or needs_data(plan, labelled=False)
    return from_model(
        *(request.model, request.inputs, states),
        kwargs=request.kwargs,
        vocab=request.vocab,
        check=request.check,
        held=held,
        limit=limit,
        seed=request.seed,
    )


def _calibration(request: Request, plan: Plan, network: Network) -> tuple[list[Any] | None, bool]:
    if request.calibration is None:
        return None, False
    if len(network.inputs) != 1:
        raise UsageError(f"--calibration: needs a model of one input; --input was given {len(network.inputs)} times")
    batches, labelled = read_calibration(
        *(request.calibration, sizes(network.example), network.inputs[0].dtype),
        count=request.examples,
        seed=request.seed,
        mean=numbers(request.mean, "--mean"),
        std=numbers(request.std, "--std"),
        keyword=network.inputs[0].keyword,
    )
    corrects = request.correction != "none" and CORRECTIONS[request.correction].inputs
    always = corrects or request.plot is not None or needs_data(plan, labelled=False)
    with_labels = request.dry_run or needs_data(plan, labelled=True)
    if not (always or (with_labels and labelled)):
        raise UsageError(
            f"--calibration: nothing that is asked for uses it{' without labels' if with_labels else ''}; leave it "
            "out, or give a --correction or --matching on data, or --plot"
        )
    return batches, labelled


def _whole(plan: Plan, correction: str, *, data: bool) -> str:
    """What needs the models as a whole, "" if nothing does."""
    if plan.joint:
        return f"--method {plan.joint}"
    if plan.matching != "weight":
        return f"--matching {plan.matching}"
    if correction:
        return f"--correction {correction}"
    return "a run of the network on --calibration" if data else ""


def _draw(
    path: Path, network: Network, states: Sequence[State], perms: Sequence[Perms], reference: int, batches: Any
) -> None:
    """Draw how alike the layers of each model and the reference are, before and after alignment."""
    whole = [network.whole(state) for state in states]
    aligned = [permute(network.full, own, state) for own, state in zip(perms, whole, strict=True)]
    found = [
        similarities(network.full, _module(network), (whole[reference], before), (aligned[reference], after), batches)
        for place, (before, after) in enumerate(zip(whole, aligned, strict=True))
        if place != reference
    ]
    save_lines(path, [similarity_panel(found)])


def _module(network: Network) -> nn.Module:
    if network.net is None:
        raise UsageError("--model: this run needs the network with its weights; leave --no-check out")
    return network.net


def _match(
    plan: Plan,
    network: Network,
    states: Sequence[State],
    weights: Sequence[float],
    batches: list[Any] | None,
    *,
    labelled: bool,
    seed: int,
) -> Found:
    runs = needs_data(plan, labelled=labelled)
    if runs and batches is None:
        raise UsageError(f"--matching: {plan.matching} needs --calibration, a path with the network's inputs")
    if runs and plan.matching == "straight-through" and not labelled:
        raise UsageError(f"--matching: {plan.matching} needs labels in --calibration")
    spec = network.full if runs else network.spec
    given = [network.whole(state) for state in states] if runs else states
    net = network.net if runs else None
    return match(plan, spec, given, weights, net=net, calibration=batches, labelled=labelled, seed=seed)


@torch.no_grad()
def _barriers(
    plan: Plan,
    network: Network,
    states: Sequence[State],
    perms: Sequence[Perms],
    batches: list[Any] | None,
    files: Sequence[Path],
) -> dict[str, tuple[float, float]]:
    net, aligned = _module(network), [permute(network.spec, own, s) for own, s in zip(perms, states, strict=True)]

    def barrier(ends: Sequence[State], place: int) -> float:
        pair = network.whole(ends[plan.reference]), network.whole(ends[place])
        data = as_called(batches or [], network.example)
        path = loss_along_path(net, *pair, data, loss=nn.functional.cross_entropy, lams=_LAMS)
        return loss_barrier(path)

    others = [place for place in range(len(states)) if place != plan.reference]
    return {str(files[place]): (barrier(states, place), barrier(aligned, place)) for place in others}


def _corrected(
    name: str,
    setting: CorrectionSetting,
    network: Network,
    merged: Mapping[str, Tensor],
    states: Sequence[State],
    perms: Sequence[Perms],
) -> dict[str, Tensor]:
    ends = [network.whole(permute(network.spec, own, state)) for own, state in zip(perms, states, strict=True)]
    found = correct(name, setting, network.whole(merged), ends)
    return {key: found[key].to(tensor.dtype) for key, tensor in merged.items()}
