"""A training that was killed at any time goes on and ends with the bits of one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from fedrebasin.errors import UsageError
from fedrebasin.simulations import ends
from fedrebasin.simulations.data import load_dataset
from fedrebasin.simulations.models import build_model
from fedrebasin.simulations.train_checkpoint import TrainCheckpoint
from fedrebasin.simulations.training import RECIPES, Recipe, train

CPU = torch.device("cpu")


class KilledError(Exception):
    """Stands for the end of the process."""


def run(folder, model, *, epochs=4, kill_after=None, described="this", recipe=None, precision="auto"):
    """Train on augmented digits; returns weights, epochs that were run, and the last loss."""
    data = replace(load_dataset("digits"), augment=True)
    torch.manual_seed(0)
    net = build_model(model, data.shape, data.classes, width=4)
    done = []

    def progress(epoch, loss):
        if kill_after is not None and epoch > kill_after:
            raise KilledError
        done.append(epoch)

    checkpoint = TrainCheckpoint(folder / "end.checkpoint", described, every=0.0)
    loss = train(
        *(net, data, data.train_images[:300], data.train_labels[:300]),
        recipe=recipe or RECIPES[model],
        epochs=epochs,
        seed=1,
        device=CPU,
        progress=progress,
        precision=precision,
        checkpoint=checkpoint,
    )
    return net.state_dict(), done, loss


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])  # the second with fused optimizers
@pytest.mark.parametrize("model", ["mlp", "conv"])  # Adam, and SGD with momentum and BatchNorm
def test_a_training_that_was_killed_ends_with_the_bits_of_one_that_was_not(tmp_path, model, precision):
    whole, epochs, loss = run(tmp_path / "whole", model, precision=precision)
    assert epochs == [1, 2, 3, 4]
    for kill_after in (2, 3):
        with pytest.raises(KilledError):
            run(tmp_path / "parts", model, kill_after=kill_after, precision=precision)
    state, epochs, loss_again = run(tmp_path / "parts", model, precision=precision)
    assert epochs == [4] and loss == loss_again
    assert all(torch.equal(whole[key], state[key]) for key in whole)


def test_a_checkpoint_of_another_training_is_not_used(tmp_path):
    with pytest.raises(KilledError):
        run(tmp_path, "mlp", kill_after=2)
    assert run(tmp_path, "mlp", described="another")[1] == [1, 2, 3, 4]


def test_checkpoints_are_not_written_more_often_than_asked(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    checkpoint = TrainCheckpoint(tmp_path / "one.checkpoint", "this", every=100.0)
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for seconds, expected in ((50.0, False), (150.0, True)):
        now[0] = seconds
        checkpoint.keep(net, optimizer, [], epoch=1, steps=1)
        assert checkpoint.path.exists() == expected


def test_seconds_go_on_from_those_before_the_kill(tmp_path):
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    first = TrainCheckpoint(tmp_path / "one.checkpoint", "this", every=0.0, _spent=1000.0)
    first.keep(net, optimizer, [], epoch=3, steps=30)
    second = TrainCheckpoint(tmp_path / "one.checkpoint", "this")
    assert second.restore(net, optimizer, []) == (3, 30)
    assert second.seconds >= 1000.0


def test_a_proximal_term_is_refused_because_its_start_is_not_kept(tmp_path):
    with pytest.raises(UsageError, match="checkpoint: expected a recipe without prox"):
        run(tmp_path, "mlp", recipe=Recipe("sgd", 0.1, 64, "constant", prox=0.1))


KILLED = """
import sys, torch
from pathlib import Path
from fedrebasin.simulations import ends
from fedrebasin.simulations.data import load_dataset
ends.CHECKPOINT_SECONDS = 0.0
data = load_dataset("digits")
config = ends.EndConfig("digits", "scikit-learn", 0.2, "mlp", 16, "batch", int(sys.argv[2]), 0, "a")
rows = torch.arange(800)
say = lambda line: print(line, flush=True)
ends.trained_end(config, data, rows, Path(sys.argv[1]), device=torch.device("cpu"), progress=say)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_an_end_whose_process_was_killed_goes_on_from_its_checkpoint(tmp_path):
    epochs, again = "120", []
    command = [sys.executable, "-c", KILLED, str(tmp_path / "parts"), epochs]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "epoch 5/" in line:
                os.kill(process.pid, signal.SIGKILL)
                break
    assert process.wait() == -signal.SIGKILL
    assert [path.suffix for path in (tmp_path / "parts").glob("*.safetensors")] == []
    config = ends.EndConfig("digits", "scikit-learn", 0.2, "mlp", 16, "batch", int(epochs), 0, "a")
    data, rows = load_dataset("digits"), torch.arange(800)
    state, _ = ends.trained_end(config, data, rows, tmp_path / "parts", device=CPU, progress=again.append)
    assert int(again[0].split("epoch ")[1].split("/")[0]) >= 5, "it did not begin anew"
    assert {path.suffix for path in (tmp_path / "parts").iterdir()} == {".safetensors"}
    whole, _ = ends.trained_end(config, data, rows, tmp_path / "whole", device=CPU, progress=lambda line: None)
    assert all(torch.equal(whole[key], state[key]) for key in whole)
