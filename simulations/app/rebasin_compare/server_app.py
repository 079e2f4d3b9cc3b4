"""The server: one ``start()`` for each seed and strategy, all in one run, scored on the test images."""

from __future__ import annotations

import logging
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.common.logger import log
from flwr.serverapp import Grid, ServerApp

from fedrebasin.matching.methods import METHODS
from fedrebasin.simulations.alone import Alone
from fedrebasin.simulations.attendance import attendance, check_nodes, fewest
from fedrebasin.simulations.baselines import Score, score
from fedrebasin.simulations.competitors import COMMON_START, make_strategy
from fedrebasin.simulations.data import Dataset
from fedrebasin.simulations.events import emit
from fedrebasin.simulations.handover import take_over
from fedrebasin.simulations.results import save_results
from fedrebasin.simulations.settings import Settings, from_run_config
from fedrebasin.simulations.silo import batches_of, initial_model, rows_of_nodes
from fedrebasin.simulations.training import predict, select_device
from fedrebasin.simulations.trainings import kept_in
from fedrebasin.simulations.watch import WatchedGrid, partitions_of

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    torch.set_num_threads(1)
    settings = from_run_config(context.run_config)
    progress_file, results_file = (str(context.run_config[key]) for key in ("progress-file", "results-file"))
    data = take_over(settings.data, str(context.run_config["data-file"]))
    partitions = partitions_of(grid)
    nodes = len(partitions)
    check_nodes(settings, nodes)
    emit(progress_file, "phase", text=f"the server is ready; {nodes} nodes are starting")
    runs, baselines = [], []
    for seed in settings.seed_list:
        arena = Arena(settings, data, partitions, seed, progress_file)
        # the server waits while clients train, so the model of all data trains beside them
        with ThreadPoolExecutor(1) as background:
            everything = background.submit(arena.alone.train)
            runs += [arena.play(grid, name) for name in settings.line_up]
            baselines.append(arena.baselines(everything))
        if trainings := kept_in(str(context.run_config["trainings-folder"]), seed):
            shutil.rmtree(trainings, ignore_errors=True)  # the next seed trains anew
        if results_file:  # after each seed: a run that is ended early keeps what it has
            results = {"settings": asdict(settings), "nodes": nodes, "runs": runs, "baselines": baselines}
            save_results(Path(results_file), results)
    emit(progress_file, "done")
    for run in runs:
        accuracies = " ".join(f"{100 * row['accuracy']:.1f}" for row in run["rounds"])
        log(logging.INFO, "seed %s, %s: test accuracy by round %s", run["seed"], run["strategy"], accuracies)


class Arena:
    """One seed: the same nodes, rows and starts for every strategy."""

    def __init__(
        self, settings: Settings, data: Dataset, partitions: dict[int, int], seed: int, progress_file: str
    ) -> None:
        self.settings = settings
        self.data = data
        self.partitions = partitions
        self.nodes = len(partitions)
        self.seed = seed
        self.progress_file = progress_file
        rows, _ = rows_of_nodes(settings, data, self.nodes, seed=seed)
        self.device = select_device(settings.device)
        self.model = initial_model(settings, data, seed=seed)
        self.initial = ArrayRecord(self.model.state_dict())
        self.alone = Alone(settings, data, rows, seed)

    def play(self, grid: Grid, name: str) -> dict[str, Any]:
        """Let one strategy run all its rounds."""
        start = "common" if name == COMMON_START else self.settings.start
        watched = WatchedGrid(grid, self.score_ends, self.partitions)
        rounds: list[dict[str, Any]] = []
        clock = time.perf_counter()

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
            nonlocal clock
            result = self.score_model(arrays)
            row: dict[str, Any] = {"round": server_round, **result}
            if server_round:
                row |= {"expected": watched.expected, "failures": watched.failures, "nodes": watched.nodes}
                row |= {"replies": len(watched.nodes), "seconds": time.perf_counter() - clock}
                row |= {"sent_bytes": watched.sent_bytes, "received_bytes": watched.received_bytes}
            watched.open_round(attendance(self.settings, self.nodes, seed=self.seed, server_round=server_round + 1))
            clock = time.perf_counter()
            rounds.append(row)
            emit(self.progress_file, "round", seed=self.seed, strategy=name, rounds=self.settings.rounds, **row)
            return MetricRecord({**result})

        strategy = make_strategy(
            name,
            nodes=fewest(self.settings, self.nodes, [self.seed]),
            model=lambda: initial_model(self.settings, self.data, seed=self.seed),
            example_inputs=(self.data.normalise(self.data.train_images[:2]),),
            calibration=self.calibration(),
            reference=self.settings.reference,
            matching=self.settings.matching,
            correction=self.settings.correction,
            select=self.settings.select,
            server_lr=self.settings.server_lr,
            proximal_mu=self.settings.proximal_mu,
            seed=self.seed,
            device=str(self.device),
        )
        result = strategy.start(
            grid=watched,
            initial_arrays=self.initial,
            num_rounds=self.settings.rounds,
            timeout=1e6,
            train_config=ConfigRecord({"strategy": name, "seed": self.seed, "start": start}),
            evaluate_fn=evaluate,
        )
        for row in rounds[1:]:
            metrics = result.train_metrics_clientapp.get(row["round"], MetricRecord())
            row |= {key: value for key, value in metrics.items() if key != "num-examples"}
        return {"seed": self.seed, "strategy": name, "rounds": rounds}

    def calibration(self) -> list[Any]:
        """Training images, the same for every strategy of a seed; with labels only for a matching that needs them."""
        rows = self.alone.all_rows  # not those that nodes measure on
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
        batches = batches_of(self.data, rows[order[: self.settings.calibration]])
        return batches if METHODS[self.settings.matching].targets else [images for images, _ in batches]

    def score_model(self, arrays: ArrayRecord) -> dict[str, float]:
        return score(self.logits(arrays), self.data.test_labels)

    def logits(self, arrays: ArrayRecord) -> torch.Tensor:
        self.model.load_state_dict(arrays.to_torch_state_dict())
        return predict(self.model, self.data, self.data.test_images, device=self.device)

    def score_ends(self, replies: list[Message], nodes: list[dict[str, Any]]) -> None:
        """Keep what a client that trained apart knows: every strategy gets the same ends."""
        for reply, about in zip(replies, nodes, strict=True):
            if about["apart"] and about["node"] not in self.alone.ends:
                self.alone.ends[about["node"]] = self.logits(reply.content.array_records["arrays"])

    def baselines(self, everything: Future[Score]) -> dict[str, Any]:
        emit(self.progress_file, "waiting", seed=self.seed)
        return self.alone.entry(everything.result())
