"""Every joint method on trained clients: ``python -m fedrebasin.simulations.bench.joint digits --output FOLDER``.

The clients are those of ``calibration.py``, and their ends are shared with it: two hold the 20/80 halves, more hold
Dirichlet parts (alpha 0.5), which a seed draws anew. Each method of ``match_many`` aligns them; the average is measured
as it is and after a correction on training images without labels. *Gain* is that of the weighted objective, as a share
of what merge-many gains.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedrebasin import match_many, merge, permute
from fedrebasin.corrections import methods
from fedrebasin.matching.many import MANY_METHODS
from fedrebasin.simulations.bench.calibration import Clients, Options, Row, calibrations, references, train_clients
from fedrebasin.simulations.data import load_dataset
from fedrebasin.simulations.disjoint_options import DEFAULTS
from fedrebasin.simulations.measures import measure
from fedrebasin.simulations.models import DEFAULT_WIDTHS
from fedrebasin.simulations.results import provenance, save_results

CORRECTION = "least-squares-probabilities"


def merged(clients: Clients, options: Options, seed: int) -> Iterator[Row]:
    """A row for the plain average and for every method, without and with the correction."""
    bench, shares = clients.bench, clients.coefficients
    _, batches = next(calibrations(clients, options))
    setting = methods.Setting(bench.net, batches, shares)
    for method in ("", *MANY_METHODS):
        ends, seconds, gain = clients.states, 0.0, 0.0
        if method:
            started = time.process_time()
            found = match_many(bench.spec, clients.states, coefficients=shares, method=method, seed=seed)
            seconds, gain = time.process_time() - started, found.objective - found.objective_before
            ends = [permute(bench.spec, perms, state) for perms, state in zip(found.perms, clients.states, strict=True)]
        average = merge(ends, coefficients=shares)
        for correction in ("", CORRECTION):
            state = methods.correct(correction, setting, average, ends) if correction else average
            scores = measure(bench.logits(dict(state), ["test"])["test"], bench.labels["test"])
            yield {"method": method, "correction": correction, "gain": gain, "cpu-seconds": round(seconds, 2), **scores}


def main() -> None:
    """Measure every number of clients and seed, and write ``results.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("dataset", choices=sorted(DEFAULTS))
    parser.add_argument("--data", help="folder of Parquet files")
    parser.add_argument("--width", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--nodes", default="2,5,10")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--images", type=int, default=1000, help="calibration images")
    parser.add_argument("--ends", type=Path, default=Path("ends"), help="folder of trained clients")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    started = time.time()
    options = Options(
        dataset=given.dataset,
        path=given.data,
        width=given.width or DEFAULT_WIDTHS[DEFAULTS[given.dataset][0]],
        epochs=given.epochs or DEFAULTS[given.dataset][1],
        nodes=[int(word) for word in given.nodes.split(",")],
        seeds=[int(word) for word in given.seeds.split(",")],
        images=[given.images],
        sources=[],
        other_path=None,
        other_images=0,
        skip=[],
        ends=given.ends,
    )
    data = load_dataset(options.dataset, options.path)
    result: dict[str, Any] = {"experiment": "joint", "rows": [], "references": []}
    chosen = ("dataset", "width", "epochs", "nodes", "seeds", "images")
    result["config"] = {key: getattr(options, key) for key in chosen}
    for nodes in options.nodes:
        for seed in options.seeds:
            case = {"clients": nodes, "seed": seed}
            clients = train_clients(data, options, nodes, seed)
            result["references"].append({**case, "rows": references(clients)})
            for row in merged(clients, options, seed):
                result["rows"].append({**case, **row})
                print(json.dumps(result["rows"][-1]), flush=True)
            result["provenance"] = provenance(_command(sys.argv[1:]), options.seeds, started)
            save_results(given.output / "results.json", result)


def _command(words: list[str]) -> str:
    folders = ("--data", "--ends", "--output")
    shown = ["FOLDER" if before in folders else word for before, word in zip(["", *words], words, strict=False)]
    return shlex.join(["python", "-m", "fedrebasin.simulations.bench.joint", *shown])


if __name__ == "__main__":
    main()
