"""What a round costs the server: FedAvg alone, FedAvg behind ``rebasin_mod``, and Rebasin on the server.

``python -m fedrebasin.simulations.bench.client_side --output FILE``

``aggregate_train`` of ten replies of ResNet18's size, of forty where they are near, and of ten whose first layer is
all but the whole model, in a fresh process for every number, on Linux. Memory is the peak
of the process above what it held before the call; CPU seconds are those of one thread, whatever else runs.
*Near* replies are the sent model with noise, as after a common start; *apart* ones are that with their units in an
order of their own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torchvision
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy
from torch import Tensor, nn

from fedrebasin import PermutationSpec, check_spec, match_each, permute, random_perms, trace
from fedrebasin.simulations.bench.peak import peak_above, start_peak
from fedrebasin.simulations.commands import bench_command
from fedrebasin.simulations.results import provenance, save_results
from fedrebasin.strategies import Rebasin
from fedrebasin.strategies.records import state_to_record

State = dict[str, Tensor]
METHODS = ("FedAvg", "FedAvg, replies aligned by the mod", "Rebasin on the server")
ONE_LAYER = "apart, one large layer"
CASES = (("near", 10), ("near", 40), ("apart", 10), (ONE_LAYER, 10))
NOISE = 0.05


class _Nodes(Grid):
    """Node ids, and nothing else: messages are made and answered here."""

    def __init__(self, nodes: int) -> None:
        self.nodes = nodes

    def get_node_ids(self) -> list[int]:
        return list(range(1, self.nodes + 1))

    def _absent(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError  # no round here sends anything

    # one function for what differs in signature
    set_run = run = create_message = push_messages = pull_messages = send_and_receive = _absent  # type: ignore[assignment]


def network_of(kind: str) -> nn.Module:
    """ResNet18, or a network of its size that is one layer and a small one; on images of 64 x 64."""
    if kind == ONE_LAYER:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 1024), nn.ReLU(), nn.Linear(1024, 10))
    net: nn.Module = torchvision.models.resnet18(weights=None)
    return net


def reply_of(sent: State, node: int) -> State:
    """What node ``node`` trained, in the sent model's order."""
    generator = torch.Generator().manual_seed(node)
    return {
        name: tensor + NOISE * tensor.std() * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point() and tensor.numel() > 1 and "running" not in name
        else tensor.clone()
        for name, tensor in sent.items()
    }


def time_of_the_mod(spec: PermutationSpec, sent: State, trained: State, kind: str) -> float:
    """CPU seconds in which one client aligns its model; that it finds the planted order is checked."""
    moved = permute(spec, random_perms(spec, 1), trained) if kind.startswith("apart") else trained
    started = time.process_time()
    aligned = permute(spec, match_each(spec, sent, [moved])[0].perms, moved)
    seconds = time.process_time() - started
    if not all(torch.equal(aligned[name], trained[name]) for name in trained):
        raise RuntimeError("the planted order was not found, so that the mod's replies are not the ones that are used")
    return seconds


def measure_once(method: str, kind: str, replies: int) -> dict[str, float]:
    """One round in this process; the peak means something only in a fresh one."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    torch.manual_seed(0)
    net, inputs = network_of(kind), (torch.zeros(2, 3, 64, 64),)
    spec = check_spec(net, trace(net, inputs), inputs)
    sent: State = dict(net.state_dict())
    strategy: Strategy = FedAvg(min_train_nodes=replies, min_available_nodes=replies)
    if method.startswith("Rebasin"):
        strategy = Rebasin(strategy, spec=spec, reference="global")
    messages = list(strategy.configure_train(1, state_to_record(sent), ConfigRecord(), _Nodes(replies)))
    answers = []
    for node, message in enumerate(messages):
        state = reply_of(sent, node)
        if kind.startswith("apart") and "mod" not in method:  # the mod puts them back: see time_of_the_mod
            state = permute(spec, random_perms(spec, node), state)
        record = state_to_record(state)
        metrics = MetricRecord({"num-examples": 10 + node})
        answers.append(Message(RecordDict({"arrays": record, "metrics": metrics}), reply_to=message))
    del message, state, record, metrics  # the last reply must be held by its message alone, as the others are
    client = time_of_the_mod(spec, sent, reply_of(sent, 1), kind) if "mod" in method else 0.0
    before, started, used = start_peak(), time.perf_counter(), time.process_time()
    arrays, _ = strategy.aggregate_train(1, answers)
    seconds, cpu = time.perf_counter() - started, time.process_time() - used
    if arrays is None:
        raise RuntimeError("no model came out of the round")
    model = sum(len(array.data) for array in arrays.values()) / 2**20
    return {
        "cpu-seconds": cpu,
        "seconds": seconds,
        "peak-mb": peak_above(before),
        "mod-cpu-seconds": client,
        "model-mb": model,
    }


def measure(method: str, kind: str, replies: int, runs: int) -> dict[str, Any]:
    """Medians over fresh processes."""
    call = [sys.executable, "-m", "fedrebasin.simulations.bench.client_side", "--once", method, kind, str(replies)]
    found: list[dict[str, float]] = []
    for _ in range(runs):
        done = subprocess.run(call, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    medians = {key: round(statistics.median(one[key] for one in found), 3) for key in found[0]}
    return {"method": method, "replies": replies, "kind": kind, **medians}


def main() -> None:
    """Measure all, or one round with ``--once METHOD KIND REPLIES``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--once", nargs=3)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(measure_once(options.once[0], options.once[1], int(options.once[2]))))
        return
    started, rows = time.time(), []
    for kind, replies in CASES:
        for method in METHODS:
            rows.append(measure(method, kind, replies, options.runs))
            print(json.dumps(rows[-1]), flush=True)
    if options.output:
        result = {"experiment": "client-side", "threads": torch.get_num_threads(), "rows": rows}
        save_results(options.output, {**result, "provenance": provenance(bench_command("client_side"), [0], started)})


if __name__ == "__main__":
    main()
