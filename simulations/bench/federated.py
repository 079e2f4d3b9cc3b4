"""Corrections on the clients' own data, aligned and not: ``python -m fedrebasin.simulations.bench.federated``.

Clients train apart, each from its own initialisation; their models are merged once, as they are or aligned, and
corrected by the functions that server and clients run, in one process. A row holds the test loss and accuracy of every
seed. Each client uses its own training images; ``private`` rows clip and noise what clients send.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrebasin import match_many, merge, permute, trace
from fedrebasin.corrections.federated import (
    FEDERATED,
    Case,
    FederatedOptions,
    Node,
    Query,
    answer,
    correct_federated,
    count_releases,
)
from fedrebasin.corrections.privacy import Privacy
from fedrebasin.corrections.queries import drive
from fedrebasin.simulations.baselines import score
from fedrebasin.simulations.commands import bench_command
from fedrebasin.simulations.data import Dataset, load_dataset
from fedrebasin.simulations.partition import parse_partition, partition_rows
from fedrebasin.simulations.results import provenance, save_results
from fedrebasin.simulations.settings import Settings, resolve
from fedrebasin.simulations.silo import batches_of, initial_model, train_round
from fedrebasin.simulations.training import predict

State = dict[str, Tensor]
SPLITS = ((2, "biased:0.2"), (5, "dirichlet:0.5"))
#: how tables call it: correction, its options
CORRECTIONS: dict[str, tuple[str, FederatedOptions]] = {
    "federated-repair": ("federated-repair", FederatedOptions()),
    "federated-repair, at once": ("federated-repair", FederatedOptions(sequential=False)),
    "federated-regmean": ("federated-regmean", FederatedOptions()),
    "federated-regmean, 16 kB a layer": ("federated-regmean", FederatedOptions(gram_limit=2**14)),
    "federated-regmean, diagonals": ("federated-regmean", FederatedOptions(gram_limit=0)),
    "federated-least-squares": ("federated-least-squares", FederatedOptions()),
    "federated-least-squares, label prior": ("federated-least-squares", FederatedOptions(label_prior=True)),
}
PRIVATE = [Privacy(clip=1.0, noise=noise) for noise in (1.0, 2.0, 5.0, 10.0)]


def clients(settings: Settings, data: Dataset, parts: Sequence[Tensor], seed: int) -> list[State]:
    """Each client's model after its training apart."""
    ends = []
    for owner, rows in enumerate(parts):
        model = initial_model(settings, data, seed=seed, owner=owner)
        train_round(model, settings, data, rows, seed=seed, owner=owner, server_round=1, epochs=settings.epochs)
        ends.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return ends


def merged_models(settings: Settings, data: Dataset, nodes: int, split: str, seed: int) -> Iterator[dict[str, Any]]:
    """One row for each way to merge and correct the same clients."""
    parts = partition_rows(data.train_labels, data.classes, nodes, parse_partition(split), seed=seed)
    ends = clients(settings, data, parts, seed)
    net, example = initial_model(settings, data, seed=seed), (data.normalise(data.train_images[:2]),)
    coefficients = [len(rows) / len(data.train_labels) for rows in parts]
    batches = [batches_of(data, rows, len(rows)) for rows in parts]
    spec = trace(net, example)
    perms = match_many(spec, ends, coefficients=coefficients, method="merge-many", seed=seed).perms
    aligned = [permute(spec, one, end) for one, end in zip(perms, ends, strict=True)]

    def row(how: str, correction: str, state: State, **more: Any) -> dict[str, Any]:
        net.load_state_dict(state)
        logits = predict(net, data, data.test_images, device=torch.device("cpu"))
        return {"merge": how, "correction": correction, **score(logits, data.test_labels), **more}

    for how, models in (("plain", ends), ("aligned", aligned)):
        merged = merge(models, coefficients=coefficients)
        yield row(how, "-", merged)
        for label, (name, options) in CORRECTIONS.items():
            case = Case(net, merged, models, coefficients, example, options)
            yield row(how, label, correct_federated(name, case, batches))
        case = Case(net, merged, models, coefficients, example)
        for name, privacy in product(FEDERATED, PRIVATE if how == "aligned" else []):
            found, releases = correct_privately(name, case, batches, privacy)
            epsilon = round(privacy.epsilon(releases), 2)
            yield row(how, f"{name}, private, epsilon {epsilon:.2f}", found, epsilon=epsilon)


def correct_privately(name: str, case: Case, data: Sequence[Any], privacy: Privacy) -> tuple[State, int]:
    """The corrected state dict, and how many noised vectors each node has sent for it."""
    releases = 0

    def ask(query: Query) -> dict[int, Any]:
        nonlocal releases
        releases += count_releases(query.kind, query.about)
        ends = ({key: end[key] for key in query.end_names} for end in case.ends)
        nodes = [Node(case.net, query.merged, end, own, None, privacy) for end, own in zip(ends, data, strict=True)]
        return {place: query.read(answer(query.kind, query.about, node)) for place, node in enumerate(nodes)}

    return drive(FEDERATED[name](case), ask), releases


def main() -> None:
    """Measure every split of a data set."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--path", default=None)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    started, settings = time.time(), resolve(Settings(data=options.data))
    data = load_dataset(options.data, options.path)
    rows: dict[tuple[int, str, str, str], dict[str, Any]] = {}
    for nodes, split in SPLITS:
        for seed in range(options.seeds):
            for one in merged_models(settings, data, nodes, split, seed):
                key = (nodes, split, one["merge"], one["correction"])
                names = dict(zip(("nodes", "partition", "merge", "correction"), key, strict=True))
                row = rows.setdefault(key, {**names, "loss": [], "accuracy": []})
                row["loss"].append(round(one["loss"], 4))
                row["accuracy"].append(round(one["accuracy"], 4))
                row |= {"epsilon": one["epsilon"]} if "epsilon" in one else {}
                print(json.dumps({"seed": seed, **row}), flush=True)
    if options.output:
        result = {"experiment": "federated", "data": options.data, "model": settings.model, "width": settings.width}
        about = provenance(bench_command("federated", {"--path": "FOLDER"}), list(range(options.seeds)), started)
        save_results(options.output, {**result, "rows": list(rows.values()), "provenance": about})


if __name__ == "__main__":
    main()
