"""Is every single swap of two units seen? ``python -m fedrebasin.simulations.bench.swaps --output FILE``.

``check_spec`` compares outputs on random weights. A comparison that does not see a change proves nothing, so here
two units of every axis of every tensor that evaluation uses are swapped, one axis at a time, in every torchvision
classifier up to 60 million parameters, and the outputs must change in one of the draws that ``check_spec`` makes.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from fedrebasin.check import DRAWS, _Proof
from fedrebasin.errors import RebasinError
from fedrebasin.simulations.inspection_zoo import BEYOND, ON_META, zoo_model, zoo_models
from fedrebasin.simulations.results import provenance
from fedrebasin.trace import trace

#: the smallest inputs, tried in this order
_SIDES = (64, 96, 224)


def unseen_swaps(name: str, seed: int = 0) -> dict[str, Any]:
    """Swap two units of each axis of a model's tensors; count those axes and list the ones that change no output."""
    torch.manual_seed(seed)
    model, spec = zoo_model(name), None
    for side in _SIDES:
        inputs = (torch.zeros(2, 3, side, side),)
        try:
            spec = trace(model, inputs)
            break
        except RebasinError:
            continue
    if spec is None:
        raise RebasinError(f"{name}: runs with none of the sizes {_SIDES}")
    unseen: list[tuple[str, int]] | None = None
    tested = 0
    for draw in range(DRAWS):
        proof = _Proof(model, spec, inputs, seed + draw)
        proof.widen_tolerance()
        if unseen is None:
            used = {
                key: tensor for key, tensor in proof.state.items() if key in spec.uses and tensor.is_floating_point()
            }
            unseen = [(key, dim) for key, tensor in used.items() for dim, size in enumerate(tensor.shape) if size > 1]
            tested = len(unseen)
        unseen = [axis for axis in unseen if not _sees(proof, *axis)]
    return {"model": name, "input": f"2x3x{side}x{side}", "axes": tested, "unseen": unseen or []}


def _sees(proof: _Proof, name: str, dim: int) -> bool:
    tensor = proof.state[name]
    order = torch.arange(tensor.shape[dim])
    order[[0, len(order) // 2]] = order[[len(order) // 2, 0]]
    return proof._change({**proof.state, name: tensor.index_select(dim, order)}) > proof.tolerance


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
