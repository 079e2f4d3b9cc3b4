"""Is every single swap of two units seen? ``python -m fedrebasin.simulations.bench.swaps --output FILE``.

``check_spec`` compares outputs on random weights. A comparison that does not see a change proves nothing, so here
two units of every axis of every tensor that the graph uses are swapped, one axis at a time, in every torchvision
classifier up to 60 million parameters, and an output must change on the weights and inputs that ``check_spec`` draws.
Most changes are so large that float32, which is faster, shows them; what it does not show is decided in float64.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedrebasin.errors import RebasinError
from fedrebasin.export import export_model
from fedrebasin.proof import Proof
from fedrebasin.simulations.commands import bench_command
from fedrebasin.simulations.inspection_zoo_row import BEYOND, ON_META, zoo_model, zoo_models
from fedrebasin.simulations.results import load_results, provenance, save_results
from fedrebasin.trace import spec_of

#: the smallest inputs, tried in this order; the last stage sees one pixel of two images, or 49 of one
_INPUTS = ((2, 3, 32, 32), (2, 3, 64, 64), (2, 3, 96, 96), (1, 3, 224, 224), (2, 3, 299, 299))
_BLIND = "none: the check is blind here"


def unseen_swaps(name: str, seed: int = 0) -> dict[str, Any]:
    """Swap two units of each axis of a model's tensors, and list the axes that change no output, with reasons."""
    torch.manual_seed(seed)
    model = zoo_model(name)
    proofs = _proofs(model, seed)
    proof = next(proofs)
    quick = _in_float32(proof)
    visible = 10 * quick.rounding()
    tested = [
        (key, dim)
        for key, tensor in proof.state.items()
        if key in proof.spec.uses and tensor.is_floating_point()
        for dim, size in enumerate(tensor.shape)
        if size > 1
    ]
    small = [axis for axis in tested if _change(quick, *axis) <= visible]
    changes = {axis: _change(proof, *axis) for axis in small}
    unseen = {axis: _never_read(proof, axis[0]) for axis in small if changes[axis] <= proof.tolerance}
    for larger in proofs if not all(unseen.values()) else ():
        for axis in (axis for axis, reason in unseen.items() if not reason):
            if _change(larger, *axis) > larger.tolerance:
                unseen[axis] = f"too few pixels: seen with an input of {_text(larger)}"
    return {
        "model": name,
        "input": _text(proof),
        "axes": len(tested),
        "seen-in-float32": len(tested) - len(small),
        "float32-tolerance": visible,
        "tolerance": proof.tolerance,
        "smallest-change": min(changes.values(), default=None),
        "unseen": {f"{key} dim {dim}": reason or _BLIND for (key, dim), reason in unseen.items()},
    }


def _proofs(model: nn.Module, seed: int) -> Iterator[Proof]:
    """One for each of the inputs that the model takes, the smallest first."""
    found = False
    for shape in _INPUTS:
        inputs = (torch.zeros(shape),)
        try:
            exported = export_model(model, inputs)
        except RebasinError:
            continue
        if exported.failure:  # of the training mode: an auxiliary head, at too small a size
            continue
        proof = Proof(model, spec_of(exported), inputs, seed)
        proof.widen_tolerance()
        found = True
        yield proof
    if not found:
        raise RebasinError(f"{type(model).__name__}: runs with none of the inputs {_INPUTS}")


def _text(proof: Proof) -> str:
    return "x".join(map(str, proof.inputs[0][0][0].shape))


def _in_float32(proof: Proof) -> Proof:
    """The same network, weights and inputs, in single precision."""
    quick = copy.deepcopy(proof)
    quick.model.float()
    quick.state = {key: value.float() if value.is_floating_point() else value for key, value in proof.state.items()}
    quick.inputs = [(tuple(value.float() for value in args), kwargs) for args, kwargs in proof.inputs]
    quick.outputs = quick.run(quick.state)
    return quick


def _change(proof: Proof, name: str, dim: int) -> float:
    """What an output changes by if the first unit of an axis and the middle one (a kernel's centre) change places."""
    tensor = proof.state[name]
    order = torch.arange(tensor.shape[dim])
    order[[0, len(order) // 2]] = order[[len(order) // 2, 0]]
    return proof.change_to({**proof.state, name: tensor.index_select(dim, order)})


def _never_read(proof: Proof, name: str) -> str:
    """Why a swap can't be seen if nothing reads the tensor, so that a NaN in its place reaches no output."""
    poisoned = {**proof.state, name: torch.full_like(proof.state[name], torch.nan)}
    if any(bool(output.isnan().any()) for output in proof.run(poisoned)):
        return ""
    if name in proof.spec.buffers:
        return "statistics of a head that only training mode runs, where those of the batch are used: never read"
    return "never read"


def main() -> None:
    """Run all models that the file does not hold yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    started = time.time()
    rows = load_results(options.output)["rows"] if options.output.exists() else []
    names = options.only.split(",") if options.only else [n for n in zoo_models() if n not in (*BEYOND, *ON_META)]
    for name in names:
        if name not in {row["model"] for row in rows}:
            before = time.perf_counter()
            row = unseen_swaps(name)
            facts = provenance(bench_command("swaps"), [0], started)
            seconds = round(time.perf_counter() - before, 1)
            rows.append({**row, "seconds": seconds, "commit": facts["commit"]})  # another run may go on with the file
            print(json.dumps(rows[-1]), flush=True)
            facts["versions"]["torchvision"] = metadata.version("torchvision")
            facts["seconds"] = round(sum(row["seconds"] for row in rows), 1)  # of all rows, whichever run had them
            save_results(options.output, {"experiment": "bench-swaps", "provenance": facts, "rows": rows})


if __name__ == "__main__":
    main()
