"""Every correction by clients, calibration images and their source, aligned and not.

``python -m fedrebasin.simulations.bench.calibration digits --output FOLDER``, for example. Two clients hold the 20/80
halves of ``fedrebasin reproduce disjoint`` and share its trained ends; more hold Dirichlet parts (alpha 0.5), which a
seed draws anew. Calibration images are training images without their labels (``own``), another data set's
(``--other cifar100``), and noise with the training images' mean and standard deviation.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedrebasin import match_many, merge, permute
from fedrebasin.corrections import methods
from fedrebasin.errors import UsageError
from fedrebasin.simulations.data import Dataset, load_dataset
from fedrebasin.simulations.disjoint_bench import CORRECTIONS, Bench, Effort
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
    width: int
    epochs: int
    nodes: Sequence[int]
    seeds: Sequence[int]
    images: Sequence[int]
    sources: Sequence[str]
    other_path: str | None
    other_images: int
    skip: Sequence[str]
    ends: Path


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


def train_clients(data: Dataset, options: Options, nodes: int, seed: int) -> Clients:
    """Train what is not trained yet."""
    kind = HALVES if nodes == 2 else PARTS
    parts = partition_rows(data.train_labels, data.classes, nodes, parse_partition(kind), seed=seed)
    model = DEFAULTS[options.dataset][0]
    fixed: Row = {"held": 0.2, "model": model, "width": options.width, "norm": "batch", "epochs": options.epochs}
    config = EndConfig(dataset=options.dataset, source=data.source, seed=seed, end="a", **fixed)
    names = "ab" if nodes == 2 else [f"{kind.replace(':', '')}-{nodes}-{node}" for node in range(nodes)]
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
        correct_prior(one, label_prior(torch.cat([labels, torch.arange(bench.data.classes)]), bench.data.classes))
        for one, labels in zip(logits, clients.labels, strict=True)
    ]
    for name, several in (("best client", logits), ("best client, prior corrected", corrected)):
        found[name] = min((measure(one, test) for one in several), key=lambda one: one["loss"])
    found["ensemble of logits"] = measure(torch.stack(logits).mean(0), test)
    found["ensemble of probabilities"] = measure(mean_of_probabilities(logits), test)
    return found


def calibrations(clients: Clients, options: Options) -> Iterator[tuple[str, list[Tensor]]]:
    """Source and batches of each calibration set."""
    data, own = clients.bench.data, clients.bench.images["calibration"]
    size = clients.bench.batch
    for count in dict.fromkeys(min(count, len(own)) for count in options.images):
        yield "own", [data.normalise(chunk) for chunk in torch.split(own[:count], size)]
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


def corrected(clients: Clients, options: Options) -> Iterator[Row]:
    """A row for every merge, correction and calibration set."""
    bench, shares = clients.bench, clients.coefficients
    if len(clients.states) == 2:
        a, b = clients.states
        aligned = [a, permute(bench.spec, bench.match(a, b, 0).perms, b)]
    else:
        perms = match_many(bench.spec, clients.states, coefficients=shares).perms
        aligned = [permute(bench.spec, one, state) for one, state in zip(perms, clients.states, strict=True)]
    sets = list(calibrations(clients, options))
    for alignment, ends in (("plain", clients.states), ("aligned", aligned)):
        merged = merge(ends, coefficients=shares)
        yield {"alignment": alignment, "correction": "", "source": "", "images": 0, **_score(bench, merged)}
        for source, batches in sets:
            setting = methods.Setting(bench.net, batches, shares)
            for name in bench.corrections:
                if not name or name in options.skip:
                    continue
                started = time.perf_counter()
                state = methods.correct(CORRECTIONS[name], setting, merged, ends)
                seconds = round(time.perf_counter() - started, 2)
                row = {"alignment": alignment, "correction": name, "source": source, "images": sum(map(len, batches))}
                yield row | _score(bench, state) | {"seconds": seconds}


def _score(bench: Bench, state: Mapping[str, Tensor]) -> dict[str, float]:
    return measure(bench.logits(dict(state), ["test"])["test"], bench.labels["test"])


def main() -> None:
    """Measure every number of clients and seed, and write ``results.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("dataset", choices=sorted(DEFAULTS))
    parser.add_argument("--data", help="folder of Parquet files")
    parser.add_argument("--width", type=int)
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--nodes", default="2,5,10")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--images", default="100,1000,5000", help="numbers of own calibration images")
    parser.add_argument("--other", default="", help="data set of the same shape")
    parser.add_argument("--other-data", help="its folder")
    parser.add_argument("--other-images", type=int, default=1000, help="images of each other source")
    parser.add_argument("--skip", default="", help="corrections with commas between")
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
        images=[int(word) for word in given.images.split(",")],
        sources=[*([given.other] if given.other else []), "noise"],
        other_path=given.other_data,
        other_images=given.other_images,
        skip=given.skip.split(","),
        ends=given.ends,
    )
    data = load_dataset(options.dataset, options.path)
    result: dict[str, Any] = {"experiment": "calibration", "rows": [], "references": []}
    left_out = ("path", "other_path", "ends")  # where files lay decides no number
    result["config"] = {key: value for key, value in asdict(options).items() if key not in left_out}
    for nodes in options.nodes:
        for seed in options.seeds:
            case = {"clients": nodes, "seed": seed}
            clients = train_clients(data, options, nodes, seed)
            sizes = [len(labels) for labels in clients.labels]
            result["references"].append({**case, "examples": sizes, "rows": references(clients)})
            for row in corrected(clients, options):
                result["rows"].append({**case, **row})
                print(json.dumps(result["rows"][-1]), flush=True)
            result["provenance"] = provenance(_command(sys.argv[1:]), options.seeds, started)
            save_results(given.output / "results.json", result)


def _command(words: Sequence[str]) -> str:
    """The command line, without the names of local folders."""
    folders = ("--data", "--other-data", "--ends", "--output")
    shown = ["FOLDER" if before in folders else word for before, word in zip(["", *words], words, strict=False)]
    return shlex.join(["python", "-m", "fedrebasin.simulations.bench.calibration", *shown])


if __name__ == "__main__":
    main()
