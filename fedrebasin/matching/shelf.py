"""Matrices by block that lie in files: what a matching keeps where memory is short."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import torch
from torch import Tensor

from fedrebasin.matching.plan import Block
from fedrebasin.stored import fill


class Shelf(MutableMapping[Block, Tensor]):
    """A dict of tensors in a temporary folder, which goes with the shelf; each look-up reads a copy, to its device.

    >>> shelf = Shelf(None)
    >>> shelf[Block("a", 2)] = torch.eye(2)
    >>> shelf[Block("a", 2)]
    tensor([[1., 0.],
            [0., 1.]])
    """

    def __init__(self, folder: str | Path | None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fedrebasin-", dir=folder)
        self._numbers = itertools.count()
        self._like: dict[Block, tuple[Path, Tensor, torch.device]] = {}

    def __getitem__(self, block: Block) -> Tensor:
        path, like, device = self._like[block]
        tensor = torch.empty(like.shape, dtype=like.dtype, device="cpu")
        if tensor.numel():
            with path.open("rb", buffering=0) as file:
                fill(file, tensor.numpy(), path)
        return tensor.to(device)

    def __setitem__(self, block: Block, tensor: Tensor) -> None:
        path = self._like[block][0] if block in self._like else Path(self._folder.name) / str(next(self._numbers))
        if tensor.numel():
            path.write_bytes(tensor.cpu().contiguous().numpy().data.cast("B"))
        self._like[block] = path, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), tensor.device

    def __delitem__(self, block: Block) -> None:
        self._like.pop(block)[0].unlink(missing_ok=True)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._like)

    def __len__(self) -> int:
        return len(self._like)
