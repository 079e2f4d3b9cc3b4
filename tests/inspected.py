"""A user's module for `fedrebasin inspect`, and the call of the command."""

from __future__ import annotations

from fedrebasin.simulations import cli

USER_CODE = '''
import torch
from torch import nn


class Mlp(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, width), nn.LayerNorm(width), nn.Linear(width, 2)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))


class Tokens(nn.Module):
    """An embedding, a mask by keyword, a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.table, self.place = nn.Embedding(11, 8), nn.Parameter(torch.randn(5, 8))
        self.hidden, self.out = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, tokens, mask=None):
        found = self.table(tokens) + self.place
        found = found if mask is None else found * mask.unsqueeze(-1)
        return {"logits": self.out(torch.relu(self.hidden(found)))}


class Filled(Mlp):
    """An op that no rule covers."""

    def forward(self, x):
        found = self.first(x)
        return self.last(self.norm(found.masked_scatter(found > 0, found)))


class Branching(Mlp):
    def forward(self, x):
        return super().forward(x) if float(x.sum()) > 1e9 else x


class Plain(Mlp):
    """A tensor that is no buffer keeps the model off the meta device."""

    def __init__(self):
        super().__init__()
        self.scale = torch.ones(4, device="cpu")

    def forward(self, x):
        return super().forward(x * self.scale)


def pretrained(weights="DEFAULT", pretrained=True):
    assert weights is None and pretrained is False, "a download"
    return Mlp()


def broken():
    raise RuntimeError("no such width")


def text():
    return "a text"


built, number = Mlp(), 3
'''


def run(line: str) -> int:
    return cli.run(["inspect", *line.split()])
