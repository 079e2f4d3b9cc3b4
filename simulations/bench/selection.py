"""How often selection keeps the best model: ``python -m fedrebasin.simulations.bench.selection --output FILE``.

Two ends of digits, trained on biased halves as in ``fedrebasin reproduce disjoint``, are merged in every way, and each
model is measured twice: on the part of the calibration images that no correction saw, and on the test images. The
calibration images are a server's own (347 training images that no client has), or those that the clients trained on.
The measure of agreement was chosen after a look at seeds 0 to 9; the default seeds are others. Tables are made by
``selection_tables.py``; runs over several rounds are in ``selection_rounds.py``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedrebasin import check_spec, match_many, merge, permute, select_candidate, split_calibration, trace
from fedrebasin.corrections.methods import CORRECTIONS, CorrectionSetting, correct
from fedrebasin.simulations.bench.selection_rounds import FEDERATIONS, VARIANTS, play
from fedrebasin.simulations.commands import bench_command
from fedrebasin.simulations.data import Dataset, load_dataset
from fedrebasin.simulations.ends import EndConfig, disjoint_halves, make_model, trained_end
from fedrebasin.simulations.results import provenance, save_results
from fedrebasin.simulations.silo import batches_of

State = dict[str, Tensor]
#: width, share of the classes that go to the other half, whose images calibrate, how many
CASES = (
    (512, 0.05, "server", 347),
    (512, 0.2, "server", 347),
    (16, 0.2, "server", 347),
    (512, 0.05, "clients", 1347),
)
SERVERS = 347
#: what is tried after the plain and the aligned average; reset-batchnorm has nothing to do in a network without norms
SETS = {
    "repair": ("repair",),
    "repair, least squares": ("repair", "least-squares"),
    "all": tuple(
        name
        for name, method in CORRECTIONS.items()
        if method.merge and not method.rereads and name != "reset-batchnorm"
    ),
}
EPOCHS = 30
#: of a row's figures, for each model
COLUMNS = (
    *("test loss", "test top-1", "loss", "divergence", "reverse divergence", "divergence, mean of probabilities"),
    *("squared distance of probabilities", "squared distance of logits"),
    *("top-1 disagreement", "top-1 disagreement, mean of probabilities"),
)


def measures(logits: Tensor, ends: Sequence[Tensor], labels: Tensor) -> list[float]:
    """What may tell how good logits are, as in ``COLUMNS``: all but the loss go without labels."""
    log_p, goal = logits.double().log_softmax(1), torch.stack([end.double() for end in ends]).mean(0)
    log_q, q = goal.log_softmax(1), torch.stack([end.double().softmax(1) for end in ends]).mean(0)
    return [
        float(F.nll_loss(log_p, labels)),
        float((log_q.exp() * (log_q - log_p)).sum(1).mean()),
        float((log_p.exp() * (log_p - log_q)).sum(1).mean()),
        float((q * (q.clamp_min(1e-300).log() - log_p)).sum(1).mean()),
        float((log_p.exp() - log_q.exp()).square().sum(1).mean()),
        float((logits.double() - goal).square().mean()),
        float((logits.argmax(1) != goal.argmax(1)).double().mean()),
        float((logits.argmax(1) != q.argmax(1)).double().mean()),
    ]


class Bench:
    """One seed of one case: the ends, the calibration images and the models between the ends."""

    def __init__(self, data: Dataset, case: tuple[int, float, str, int], seed: int, folder: Path) -> None:
        width, held, whose, images = case
        self.data, self.seed = data, seed
        order = torch.randperm(len(data.train_labels), generator=torch.Generator().manual_seed(11))
        own = whose == "server"
        clients = order[SERVERS:] if own else torch.arange(len(order))
        source = f"{data.source}, {SERVERS} images apart" if own else data.source
        self.states = []
        for end, rows in zip("ab", disjoint_halves(data.train_labels[clients], data.classes, held), strict=True):
            config = EndConfig(data.name, source, held, "mlp", width, "batch", EPOCHS, seed, end)
            where = folder / f"{whose}-{held}"
            device = torch.device("cpu")
            state, _ = trained_end(config, data, clients[rows], where, device=device, progress=lambda line: None)
            self.states.append(state)
        self.net = make_model(config, data)
        rows = order[:SERVERS] if own else clients
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))][:images]
        batches = batches_of(data, rows, 64)
        self.fit, self.held_out = split_calibration(self.net, batches, seed=seed)

    def merges(self) -> dict[str, State]:
        """The plain and the aligned average, each as it is and with every correction."""
        example = (self.data.normalise(self.data.test_images[:2]),)
        spec = check_spec(self.net, trace(self.net, example), example)
        found = match_many(spec, self.states, seed=self.seed)
        aligned = [permute(spec, perms, state) for perms, state in zip(found.perms, self.states, strict=True)]
        setting = CorrectionSetting(self.net, self.fit, None, example, self.seed)
        made = {}
        for path, ends in (("plain", self.states), ("aligned", aligned)):
            made[path] = merge(ends)
            made |= {f"{path}+{name}": correct(name, setting, made[path], ends) for name in SETS["all"]}
        return made

    def logits(self, state: State, images: Tensor) -> Tensor:
        """Outputs in evaluation mode."""
        self.net.load_state_dict(state)
        with torch.no_grad():
            found: Tensor = self.net.eval()(images)
        return found

    def kept(self, made: Mapping[str, State], corrections: Sequence[str], ends: str, *, labels: bool) -> str:
        """What ``select_candidate`` keeps; ``ends`` compete not at all, as any candidate, or by the rule for them."""
        names = [f"{path}{end}" for path in ("plain", "aligned") for end in ("", *(f"+{one}" for one in corrections))]
        candidates = {name: made[name] for name in names}
        alone = dict(zip("ab", self.states, strict=True))
        found = select_candidate(
            *(self.net, candidates | (alone if ends == "equal" else {}), self.held_out),
            ends=self.states,
            alone=alone if ends == "rule" else None,
            loss=F.cross_entropy if labels else None,
        )
        return found.name


def measure_case(data: Dataset, case: tuple[int, float, str, int], seed: int, folder: Path) -> dict[str, Any]:
    """One row: figures of every model on held-out and on test images, and what is kept."""
    bench = Bench(data, case, seed, folder)
    made = bench.merges()
    models = {**made, **dict(zip("ab", bench.states, strict=True))}
    x, y = (torch.cat(part) for part in zip(*bench.held_out, strict=True))
    test = data.normalise(data.test_images)
    logits = {name: bench.logits(state, x) for name, state in models.items()}
    tested = {name: bench.logits(state, test) for name, state in models.items()}
    kept = {
        corrections: {
            "labels" if labels else "no labels": {
                ends: bench.kept(made, names, ends, labels=labels)
                for ends in (("none", "equal", "rule") if corrections == "repair" else ("rule",))
            }
            for labels in (True, False)
        }
        for corrections, names in SETS.items()
    }
    ensemble = [logits["a"], logits["b"]]
    figures = {}
    for name, one in tested.items():
        top1 = float((one.argmax(1) == data.test_labels).double().mean())
        values = [float(F.cross_entropy(one, data.test_labels)), top1, *measures(logits[name], ensemble, y)]
        figures[name] = [float(f"{value:.5g}") for value in values]
    width, held, whose, images = case
    where = {"width": width, "held": held, "calibration": whose, "images": images, "measured-on": len(y), "seed": seed}
    return {**where, "figures": figures, "kept": kept}


def _task(kind: str, what: Any, seed: int, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    data = load_dataset("digits", None)
    if kind == "rows":
        return measure_case(data, what, seed, folder)
    federation, variant = what
    return play(data, federation, variant, seed)


def main() -> None:
    """Measure everything, and save after each piece; pieces are ordered as they were started."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10, 20)))
    parser.add_argument("--rounds-seeds", type=int, nargs="*", default=list(range(5)))
    parser.add_argument("--cases", type=int, default=len(CASES), help="how many of the cases, from the first")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    started = time.time()
    tasks: list[tuple[str, Any, int]] = [("rows", case, n) for case in CASES[: options.cases] for n in options.seeds]
    tasks += [("rounds", (one, v), n) for one in FEDERATIONS for v in VARIANTS for n in options.rounds_seeds]
    done: dict[int, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(options.jobs, get_context("spawn")) as pool:
        running = {pool.submit(_task, *task, Path(folder)): place for place, task in enumerate(tasks)}
        for future in as_completed(running):
            done[running[future]] = future.result()
            print(f"{len(done)} of {len(tasks)}", flush=True)
            found: dict[str, list[Any]] = {"rows": [], "rounds": []}
            for place in sorted(done):
                found[tasks[place][0]].append(done[place])
            about = {
                "experiment": "bench-selection",
                "provenance": provenance(bench_command("selection"), options.seeds, started),
            }
            save_results(options.output, {**about, "columns": COLUMNS, "sets": SETS, **found})


if __name__ == "__main__":
    main()
