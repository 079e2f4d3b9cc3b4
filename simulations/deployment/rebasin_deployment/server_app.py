"""The server's side: FedRebasin where FedAvg would stand."""

from __future__ import annotations

from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from safetensors.torch import save_file
from torch import nn

from fedrebasin.strategies import FedRebasin

from .training import HIDDEN, initial

app = ServerApp()


def make_network() -> nn.Module:
    """The silos' network as a module, for the trace; its weights are not used."""
    return nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))


def make_strategy(silos: int, checkpoints: str = "") -> FedRebasin:
    """All silos in every round, no evaluation on them."""
    return FedRebasin(
        model=make_network,
        example_inputs=(torch.zeros(2, 64),),
        checkpoint_dir=checkpoints or None,
        fraction_evaluate=0.0,
        min_train_nodes=silos,
        min_available_nodes=silos,
    )


def first_model() -> ArrayRecord:
    """What the first round sends."""
    return ArrayRecord({name: torch.from_numpy(value) for name, value in initial(0).items()})


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds and write the model."""
    config = context.run_config
    strategy = make_strategy(int(config["silos"]), str(config["checkpoints"]))
    result = strategy.start(grid=grid, initial_arrays=first_model(), num_rounds=int(config["rounds"]), timeout=600)
    if config["output"]:
        save_file(result.arrays.to_torch_state_dict(), Path(str(config["output"])))
