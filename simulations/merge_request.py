"""What ``fedrebasin merge`` is asked for, what of it goes together, and what the output says of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fedrebasin.corrections.methods import CORRECTIONS
from fedrebasin.errors import UsageError
from fedrebasin.simulations.inspection_command import check_apart, check_target, refuse
from fedrebasin.simulations.merge_matching import Found, Plan
from fedrebasin.simulations.results import provenance


@dataclass(frozen=True)
class Request:
    """What the command line asks for; numbers in lists are texts with commas between."""

    files: Sequence[Path]
    output: Path | None = None
    model: str = ""
    inputs: Sequence[str] = ()
    kwargs: str = ""
    vocab: int | None = None
    spec: Path | None = None
    check: bool = True
    coefficients: str = ""
    matching: str = "weight"
    method: str = ""
    reference: Path | None = None
    correction: str = "none"
    calibration: Path | None = None
    examples: int = 1000
    mean: str = ""
    std: str = ""
    memory: str = ""
    plot: Path | None = None
    dry_run: bool = False
    force: bool = False
    seed: int = 0
    command: str = "fedrebasin merge"
    on_phase: Callable[[str], None] = field(default=lambda text: None)


def correction_of(request: Request) -> str:
    """The correction, "" for none, if the options go together.

    Raises
    ------
    UsageError
        If they do not.
    """
    name = "" if request.correction == "none" else request.correction
    if name and name not in CORRECTIONS:
        raise UsageError(f"--correction: expected none, {', '.join(CORRECTIONS)}; got {name!r}")
    if name and CORRECTIONS[name].inputs and request.calibration is None:
        raise UsageError(f"--correction: {name} needs --calibration, a path with the network's inputs")
    if request.calibration is None:
        refuse({"--mean": request.mean, "--std": request.std}, "needs --calibration, whose 8-bit images it is for")
        refuse({"--examples": request.examples != Request.examples}, "needs --calibration, whose examples it counts")
    if bool(request.model) == bool(request.spec):
        raise UsageError("--model: expected module:Class, or --spec with a saved spec, and not both")
    if request.spec is not None and (name or request.calibration is not None):
        raise UsageError("--spec: a correction and --calibration run the network; give --model instead")
    if request.spec is not None:
        model = {"--input": request.inputs, "--kwargs": request.kwargs, "--vocab": request.vocab}
        refuse(model, "has no meaning with --spec, which makes no model")
    return name


def check_output(request: Request) -> None:
    """Refuse, before the work, an output that cannot be written or is there already."""
    check_target(request.plot, "--plot", force=request.force)
    check_apart({"--plot": request.plot, "--output": request.output})
    if request.plot is not None and request.calibration is None:
        raise UsageError("--plot: needs --calibration, a path with the network's inputs")
    if request.plot is not None and request.plot.suffix.lower() != ".png":
        raise UsageError(f"--plot: expected a path that ends in .png; got {request.plot}")
    if request.output is None:
        if not request.dry_run:
            raise UsageError("--output: expected the path of the merged file")
        return
    check_target(request.output, "--output", force=request.force or request.dry_run)


def numbers(text: str, option: str) -> list[float]:
    """Read numbers with commas between.

    >>> numbers("0.5,.5", "--coefficients"), numbers("", "--coefficients")
    ([0.5, 0.5], [])
    """
    try:
        return [float(number) for number in text.split(",")] if text.strip() else []
    except ValueError as error:
        raise UsageError(f"{option}: expected numbers with commas between; got {text!r}") from error


def metadata_of(
    request: Request, plan: Plan, found: Found, weights: Sequence[float], digests: Sequence[str], correction: str
) -> str:
    """Where the file comes from, as JSON; without dates, so that the same command writes the same bytes."""
    source = provenance(request.command, [request.seed], 0.0)
    inputs = [
        {"file": path.name, "sha256": digest, "coefficient": weight}
        for path, digest, weight in zip(request.files, digests, weights, strict=True)
    ]
    told = {
        **{key: source[key] for key in ("command", "commit", "versions")},
        "inputs": inputs,
        "model": request.model or f"spec {request.spec}",
        "matching": plan.matching,
        "method": plan.method,
        "reference": request.files[plan.reference].name,
        "correction": correction or None,
        "objective": found.objective,
        "objective-before": found.objective_before,
        "seed": request.seed,
    }
    return json.dumps(told)
