"""The models of the zoo, and what is measured of one of them, in a process of its own."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, cast

from torch import nn

from fedrebasin.errors import RebasinError
from fedrebasin.simulations.inspection import Inspection, inspect_model, proved, traced_model
from fedrebasin.simulations.inspection_inputs import Input, text_of
from fedrebasin.simulations.inspection_tables import fixed_places

#: largest number of parameters of the models that are taken by size
LARGEST = 60_000_000
BEYOND = ("vit_b_16", "vit_b_32", "vgg11")
#: models that are built and traced on the meta device: their weights are never held, so nothing can be proved
ON_META = ("vit_h_14",)
#: the smallest inputs that evaluation and training mode take; two images, because BatchNorm may see one pixel
_SIDE = {"inception_v3": 299, "maxvit_t": 224, "vit_": 224}
_DEFAULT_SIDE = 64
#: their own initialisation takes longer than everything else
_KWARGS = {"googlenet": {"init_weights": False}, "inception_v3": {"init_weights": False}}

Row = dict[str, Any]


def zoo_models() -> list[str]:
    """The models of a full run, the smallest first; needs torchvision."""
    import torchvision
    from torchvision.models import get_model_weights, list_models

    sizes = {
        name: next(iter(get_model_weights(name))).meta["num_params"] for name in list_models(module=torchvision.models)
    }
    small = sorted((name for name in sizes if sizes[name] <= LARGEST), key=lambda name: (sizes[name], name))
    return [*small, *BEYOND, *ON_META]


def zoo_model(name: str) -> nn.Module:
    """One of them, with random weights."""
    from torchvision.models import get_model

    return cast("nn.Module", get_model(name, weights=None, **_KWARGS.get(name, {})))


def measure(name: str, seed: int) -> Row:
    """One row, in this process; an error of the core is part of it.

    Times are those of a warm process: a small network is traced first.
    """
    inspect_model(_small_net, [Input((2, 3, 8, 8))], name="warm-up")
    side = next((side for start, side in _SIDE.items() if name.startswith(start)), _DEFAULT_SIDE)
    on_meta = name in ON_META
    inputs = [Input((1 if on_meta else 2, 3, side, side))]
    row: Row = {"input": text_of(inputs[0]), "start-mib": _peak_mib()}
    try:
        found, model, drawn = traced_model(
            lambda: zoo_model(name),
            inputs,
            name=name,
            seed=seed,
            device="meta" if on_meta else "cpu",
        )
        row |= _numbers(found)
        if on_meta:
            row["proof"] = "skipped: no weights are held"
        else:
            row["change"] = proved(found, model, drawn, seed=seed).change
            row["proof"] = "passed"
    except RebasinError as error:
        row["error"] = f"{type(error).__name__}: {error}"
    return {**row, "peak-mib": _peak_mib()}


def _numbers(found: Inspection) -> Row:
    return {
        "device": found.device,
        "parameters": found.parameters,
        "perms": len(found.spec.perm_shapes),
        "log10-order": round(found.spec.log10_order, 2),
        "free-share": found.free_share,
        "export-seconds": round(found.export_seconds, 3),
        "trace-seconds": round(found.trace_seconds, 4),
        "notes": list(found.spec.notes),
        "fixed": {reason: len(places) for reason, places in fixed_places(found.spec).items()},
    }


def _small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))


def _peak_mib() -> float | None:
    """Largest resident memory of this process so far; ``getrusage`` would count the parent's before ``exec`` too."""
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8")) if status.exists() else None
    return round(int(match[1]) / 1024, 1) if match else None


if __name__ == "__main__":
    _, _name, _seed, _target = sys.argv
    Path(_target).write_text(json.dumps(measure(_name, int(_seed))), encoding="utf-8")
