"""A user's networks and files for `fedrebasin merge`, and the call of the command."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedrebasin import permute, random_perms, trace
from fedrebasin.simulations import cli

USER_CODE = '''
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten())
        self.hidden, self.head = nn.Linear(width * 36, 7), nn.Linear(7, 4)

    def forward(self, x):
        return self.head(torch.relu(self.hidden(self.body(x))))


class Shared(nn.Module):
    """One tensor under two names, of which a file holds one."""

    def __init__(self):
        super().__init__()
        self.table, self.hidden, self.out = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 9, bias=False)
        self.out.weight = self.table.weight

    def forward(self, tokens):
        return self.out(torch.relu(self.hidden(self.table(tokens))))


class Pair(Net):
    """The output beside the input."""

    def forward(self, x):
        return super().forward(x), x


class Summed(Net):
    def forward(self, x):
        return super().forward(x).sum(1)


class Named(Net):
    """Its input goes by its name."""

    def forward(self, *, x):
        return super().forward(x)


class Turned(Net):
    """With a complex parameter that no permutation moves."""

    def __init__(self):
        super().__init__()
        self.turn = nn.Parameter(torch.ones(4, dtype=torch.complex64))

    def forward(self, x):
        return (super().forward(x) * self.turn).real


class Flat(nn.Module):
    """Without a permutation."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(192, 4)

    def forward(self, x):
        return self.head(x.flatten(1))
'''

NET = "--model merged_nets:Net --input 2x3x8x8"


class Net(nn.Module):
    """The same as in the user's code."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten())
        self.hidden, self.head = nn.Linear(width * 36, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Images of shape ``(n, 3, 8, 8)`` to 4 outputs."""
        result: Tensor = self.head(torch.relu(self.hidden(self.body(x))))
        return result


def run(line: str) -> int:
    return cli.run(["merge", *shlex.split(line)])


def output_of(state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    net = Net().eval()
    net.load_state_dict({name: tensor.to(net.state_dict()[name].dtype) for name, tensor in state.items()})
    with torch.no_grad():
        return net(images)


def random_state(seed: int) -> dict[str, Tensor]:
    """Of a network whose BatchNorm statistics are no units either."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    state = {name: tensor.clone() for name, tensor in Net().state_dict().items()}
    state["body.1.running_mean"] = torch.randn(6, generator=generator)
    state["body.1.running_var"] = torch.rand(6, generator=generator) + 0.5
    state["body.1.num_batches_tracked"] += seed
    return state


def plant(folder: Path, count: int = 2) -> dict[str, Tensor]:
    """Write a.safetensors and copies of it in other orders, b, c and so on; returns a's tensors."""
    state = random_state(1)
    spec = trace(Net(), (torch.randn(2, 3, 8, 8),))
    for place, name in enumerate("abcde"[:count]):
        save(folder / f"{name}.safetensors", permute(spec, random_perms(spec, place), state) if place else state)
    return state


def save(path: Path, state: Mapping[str, Tensor], **metadata: str) -> None:
    save_file(dict(state), path, metadata={"format": "pt", **metadata})


def load(path: str | Path) -> dict[str, Tensor]:
    """Copies: safetensors maps the file, and a file may be written over here."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def hidden_files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.name.startswith(".") or "out" in file.name)
