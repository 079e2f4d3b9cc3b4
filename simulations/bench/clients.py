"""Trained clients for benchmarks, on halves, Dirichlet or biased parts; ends are trained once and shared."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrebasin.errors import UsageError
from fedrebasin.simulations.augment import BatchMaker
from fedrebasin.simulations.commands import bench_command
from fedrebasin.simulations.data import Dataset, load_dataset
from fedrebasin.simulations.disjoint_bench import Bench, Effort
from fedrebasin.simulations.disjoint_options import DEFAULTS
from fedrebasin.simulations.ends import EndConfig, trained_end
from fedrebasin.simulations.measures import correct_prior, label_prior, mean_of_probabilities, measure
from fedrebasin.simulations.models import DEFAULT_WIDTHS
from fedrebasin.simulations.partition import parse_partition, partition_rows
from fedrebasin.simulations.results import provenance, save_results

State = dict[str, Tensor]
Row = dict[str, Any]
HALVES, PARTS = "biased:0.2", "dirichlet:0.5"


@dataclass(frozen=True)
class Options:
    """What the command was asked for."""

    dataset: str
    path: str | None
    model: str
    width: int
    epochs: int
    nodes: Sequence[int]
    seeds: Sequence[int]
    images: Sequence[int]
    ends: Path
    sources: Sequence[str] = ()
    other_path: str | None = None
    other_images: int = 0
    skip: Sequence[str] = ()
    priors: bool = False
    copies: int = 0
    split: str | None = None

    def split_of(self, nodes: int) -> str:
        """How so many clients hold the data: halves for two and Dirichlet parts for more, unless it was given."""
        return self.split or default_split(nodes)


@dataclass(frozen=True)
class Clients:
    """Trained clients: their state dicts, their labels, and the network that they share."""

    bench: Bench
    states: list[State]
    labels: list[Tensor]

    @property
    def coefficients(self) -> list[float]:
        """Weights in proportion to the clients' examples."""
        return [len(labels) / sum(map(len, self.labels)) for labels in self.labels]


def default_split(nodes: int) -> str:
    """What is measured where no split is given."""
    return HALVES if nodes == 2 else PARTS


def train_clients(data: Dataset, options: Options, nodes: int, seed: int) -> Clients:
    """Train what is not trained yet."""
    kind = options.split_of(nodes)
    parts = partition_rows(data.train_labels, data.classes, nodes, parse_partition(kind), seed=seed)
    fixed: Row = {"held": 0.2, "width": options.width, "norm": "batch", "epochs": options.epochs}
    config = EndConfig(dataset=options.dataset, source=data.source, model=options.model, seed=seed, end="a", **fixed)
    halves = (nodes, kind) == (2, HALVES)  # the ends of the disjoint experiment
    names = "ab" if halves else [f"{kind.replace(':', '')}-{nodes}-{node}" for node in range(nodes)]
    cpu = torch.device("cpu")
    states = [
        trained_end(replace(config, end=name), data, rows, options.ends, device=cpu, progress=lambda line: None)[0]
        for name, rows in zip(names, parts, strict=True)
    ]
    effort = Effort(2, 2, calibration_images=max(options.images), curve_calibration_images=1)
    bench = Bench(data, config, effort, cpu)
    return Clients(bench, states, [data.train_labels[rows] for rows in parts])


def references(clients: Clients) -> dict[str, dict[str, float]]:
    """The clients alone, the best of them by loss, with its label prior corrected, and both ensembles."""
    bench, test = clients.bench, clients.bench.labels["test"]
    logits = [bench.logits(state, ["test"])["test"] for state in clients.states]
    found = {f"client {place}": measure(one, test) for place, one in enumerate(logits)}
    corrected = [
        correct_prior(one, label_prior(labels, bench.data.classes))
        for one, labels in zip(logits, clients.labels, strict=True)
    ]
    for name, several in (("best client", logits), ("best client, prior corrected", corrected)):
        found[name] = min((measure(one, test) for one in several), key=lambda one: one["loss"])
    found["ensemble of logits"] = measure(torch.stack(logits).mean(0), test)
    found["ensemble of logits, priors corrected"] = measure(torch.stack(corrected).mean(0), test)
    found["ensemble of probabilities"] = measure(mean_of_probabilities(logits), test)
    return found


def calibrations(clients: Clients, options: Options) -> Iterator[tuple[str, list[Tensor]]]:
    """Source and batches of each calibration set."""
    data, own = clients.bench.data, clients.bench.images["calibration"]
    size = clients.bench.batch
    for count in dict.fromkeys(min(count, len(own)) for count in options.images):
        yield "own", [data.normalise(chunk) for chunk in torch.split(own[:count], size)]
    if options.copies:
        maker = BatchMaker(data, own[: max(options.images)], seed=0)
        yield "augmented", [maker.batch(rows) for _ in range(options.copies) for rows in maker.rows(size)]
    for source in options.sources:
        count = min(options.other_images, len(own))
        if source == "noise":
            noise = torch.randn(count, *data.shape, generator=torch.Generator().manual_seed(0))
            yield source, list(torch.split(noise, size))
            continue
        other = load_dataset(source, options.other_path)
        if other.shape != data.shape:
            raise UsageError(f"--other: expected images of shape {data.shape}; those of {source} have {other.shape}")
        yield source, [data.normalise(chunk) for chunk in torch.split(other.train_images[:count], size)]


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """The arguments that say which clients are trained, and where files lie."""
    parser = argparse.ArgumentParser(description=text.splitlines()[0] if text else "")
    parser.add_argument("dataset", choices=sorted(DEFAULTS))
    parser.add_argument("--data", help="folder of Parquet files")
    parser.add_argument("--model", choices=sorted(DEFAULT_WIDTHS), help="by default the data set's usual one")
    parser.add_argument("--width", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--nodes", default="2,5,10")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--split", type=_split, help="dirichlet:ALPHA or biased:SHARE; by default halves (biased:0.2) or dirichlet:0.5"
    )
    parser.add_argument("--ends", type=Path, default=Path("ends"), help="folder of trained clients")
    parser.add_argument("--output", type=Path, required=True)
    return parser


def _split(text: str) -> str:
    try:
        return str(parse_partition(text))
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--partition: ")) from error


def options_of(given: argparse.Namespace, images: Sequence[int], **more: Any) -> Options:
    """What was given, with the data set's defaults; ``more`` are further fields of the options."""
    usual, epochs = DEFAULTS[given.dataset]
    model = given.model or usual
    return Options(
        dataset=given.dataset,
        path=given.data,
        model=model,
        width=given.width or DEFAULT_WIDTHS[model],
        epochs=given.epochs or epochs,
        nodes=[int(word) for word in given.nodes.split(",")],
        seeds=[int(word) for word in given.seeds.split(",")],
        images=images,
        ends=given.ends,
        split=given.split,
        **more,
    )


def measure_all(
    experiment: str,
    options: Options,
    rows_of: Callable[[Clients, int], Iterable[Row]],
    folder: Path,
    *,
    config: Mapping[str, Any],
    module: str,
) -> None:
    """Train and measure every number of clients and seed; ``results.json`` is written anew after each.

    Parameters
    ----------
    rows_of : callable
        The rows of clients and a seed.
    module : str
        Its name, for the command line in the results.
    """
    started = time.time()
    command = bench_command(module, dict.fromkeys(("--data", "--other-data", "--ends", "--output"), "FOLDER"))
    data = load_dataset(options.dataset, options.path)
    result: dict[str, Any] = {"experiment": experiment, "rows": [], "references": [], "config": config}
    for nodes in options.nodes:
        for seed in options.seeds:
            case = {"clients": nodes, "split": options.split_of(nodes), "seed": seed}
            clients = train_clients(data, options, nodes, seed)
            sizes = [len(labels) for labels in clients.labels]
            result["references"].append({**case, "examples": sizes, "rows": references(clients)})
            for row in rows_of(clients, seed):
                result["rows"].append({**case, **row})
                print(json.dumps(result["rows"][-1]), flush=True)
            result["provenance"] = provenance(command, options.seeds, started)
            save_results(folder / "results.json", result)
