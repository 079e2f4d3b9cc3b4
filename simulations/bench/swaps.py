"""Is every single swap of two units seen? ``python -m fedrebasin.simulations.bench.swaps --output FILE``.

``check_spec`` compares outputs on random weights. A comparison that does not see a change proves nothing, so here
two units of every axis of every tensor that evaluation uses are swapped, one axis at a time, in every torchvision
classifier up to 60 million parameters, and the outputs must change. (One image of 32 pixels is too little: there
both units may be dead at the only position that is left.)
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from fedrebasin.check import _Proof
from fedrebasin.errors import RebasinError
from fedrebasin.simulations.inspection_zoo import BEYOND, ON_META, zoo_model, zoo_models
from fedrebasin.simulations.results import provenance
from fedrebasin.trace import trace

#: the smallest inputs, tried in this order
_SIDES = (64, 96, 224)


def unseen_swaps(name: str, seed: int = 0) -> dict[str, Any]:
    """Swap two units of each axis of a model's tensors; count those axes and list the ones that change no output."""
    torch.manual_seed(seed)
    model, proof = zoo_model(name), None
    for side in _SIDES:
        inputs = (torch.zeros(2, 3, side, side),)
        try:
            spec = trace(model, inputs)
            proof = _Proof(model, spec, inputs, seed)
            break
        except (RebasinError, RuntimeError):
            continue
    if proof is None:
        raise RebasinError(f"{name}: runs with none of the sizes {_SIDES}")
    tested, unseen = 0, []
    for tensor_name, tensor in proof.state.items():
        if tensor_name not in spec.uses or not tensor.is_floating_point():
            continue
        for dim, size in enumerate(tensor.shape):
            if size < 2:
                continue
            order = torch.arange(size)
            order[[0, size // 2]] = order[[size // 2, 0]]
            tested += 1
            if proof._change({**proof.state, tensor_name: tensor.index_select(dim, order)}) <= proof.tolerance:
                unseen.append(f"{tensor_name}:{dim}")
    return {"model": name, "input": f"2x3x{side}x{side}", "axes": tested, "unseen": unseen}


def main() -> None:
    """Run all models that the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    started = time.time()
    rows = json.loads(options.output.read_text())["rows"] if options.output.exists() else []
    names = options.only.split(",") if options.only else [n for n in zoo_models() if n not in (*BEYOND, *ON_META)]
    for name in names:
        if name not in {row["model"] for row in rows}:
            before = time.perf_counter()
            rows.append({**unseen_swaps(name), "seconds": round(time.perf_counter() - before, 1)})
            print(rows[-1], flush=True)
            command = "python -m fedrebasin.simulations.bench.swaps --output FILE"
            result = {"experiment": "swaps", "rows": rows, "provenance": provenance(command, [0], started)}
            options.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
