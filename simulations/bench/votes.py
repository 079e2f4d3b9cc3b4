"""How often clients' votes keep the best model: ``python -m fedrebasin.simulations.bench.votes --output FILE``.

Clients train apart, each without a fifth of its rows; their models are merged as they are and aligned, and
corrected by what they send of the rows that they trained on. Every client measures all on its fifth, as for
``select="clients"``, in one process. A row holds each model's test loss, test accuracy and loss by the votes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedrebasin import match_many, merge, permute, trace
from fedrebasin.corrections.federated import Case, Node, answer, correct_federated
from fedrebasin.corrections.queries import drive
from fedrebasin.corrections.votes import Votes, vote
from fedrebasin.simulations.baselines import score
from fedrebasin.simulations.bench.federated import clients
from fedrebasin.simulations.commands import bench_command
from fedrebasin.simulations.data import Dataset, load_dataset
from fedrebasin.simulations.results import provenance, save_results
from fedrebasin.simulations.settings import Settings, resolve
from fedrebasin.simulations.silo import batches_of, initial_model, rows_of_nodes
from fedrebasin.simulations.training import predict

State = dict[str, Tensor]
SPLITS = ("2,biased:0.05", "5,dirichlet:0.5")
#: images at once; a client of digits has fewer
BATCH = 2000
SETS = {
    "repair": ("federated-repair",),
    "all": ("federated-repair", "federated-regmean", "federated-least-squares"),
}


def candidates(case: Case, ends: dict[str, Sequence[State]], data: Sequence[Any]) -> dict[str, State]:
    """Plain and aligned average, each as it is and with every correction."""
    made: dict[str, State] = {}
    for path, models in ends.items():
        made[path] = merge(models, coefficients=case.coefficients)
        one = Case(case.net, made[path], models, case.coefficients, case.example_inputs)
        made |= {f"{path}+{name}": correct_federated(name, one, data) for name in SETS["all"]}
    return made


def measure(settings: Settings, data: Dataset, nodes: int, split: str, seed: int) -> dict[str, Any]:
    """One row."""
    own, held = rows_of_nodes(replace(settings, partition=split, select="clients"), data, nodes, seed=seed)
    ends = clients(settings, data, own, seed)
    net, example = initial_model(settings, data, seed=seed), (data.normalise(data.train_images[:2]),)
    shares = [len(rows) / sum(map(len, own)) for rows in own]

    spec = trace(net, example)
    perms = match_many(spec, ends, coefficients=shares, method="merge-many", seed=seed).perms
    aligned = [permute(spec, one, end) for one, end in zip(perms, ends, strict=True)]
    case = Case(net, ends[0], ends, shares, example)
    made = candidates(case, {"plain": ends, "aligned": aligned}, [batches_of(data, rows, BATCH) for rows in own])

    def votes(names: Sequence[str]) -> Votes:
        def ask(query: Any) -> dict[int, Any]:
            voters = [Node(net, query.merged, {}, batches_of(data, rows, BATCH), loss=F.cross_entropy) for rows in held]
            return {place: query.read(answer(query.kind, query.about, one)) for place, one in enumerate(voters)}

        return drive(vote({name: made[name] for name in names}), ask)

    figures, losses = {}, votes(list(made)).figures
    for name, state in made.items():
        net.load_state_dict(state)
        found = score(predict(net, data, data.test_images, device=torch.device("cpu")), data.test_labels)
        figures[name] = [float(f"{value:.5g}") for value in (found["loss"], found["accuracy"], losses[name])]
    kept = {
        label: votes(
            [f"{path}{end}" for path in ("plain", "aligned") for end in ("", *(f"+{one}" for one in names))]
        ).name
        for label, names in SETS.items()
    }
    where = {"nodes": nodes, "partition": split, "seed": seed, "measured-on": sum(map(len, held))}
    return {**where, "figures": figures, "kept": kept}


def main() -> None:
    """Measure every split and seed; the file is written anew after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--dataset", default="digits")
    parser.add_argument("--data", help="folder of Parquet files")
    parser.add_argument("--splits", nargs="+", default=SPLITS, help="CLIENTS,PARTITION")
    options = parser.parse_args()
    started, settings = time.time(), resolve(Settings(data=options.dataset))
    data = load_dataset(options.dataset, options.data)
    rows = []
    for seed in options.seeds:
        for nodes, split in (one.split(",") for one in options.splits):
            rows.append(measure(settings, data, int(nodes), split, seed))
            print(json.dumps({key: value for key, value in rows[-1].items() if key != "figures"}), flush=True)
        result: dict[str, Any] = {"experiment": "bench-votes", "data": settings.data, "sets": SETS}
        result |= {"model": settings.model, "width": settings.width}
        about = provenance(bench_command("votes", {"--data": "FOLDER"}), options.seeds, started)
        save_results(options.output, {**result, "rows": rows, "provenance": about})


if __name__ == "__main__":
    main()
