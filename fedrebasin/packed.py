"""Packed sequences stand for padded ones while a model is exported: ``torch.export`` cannot follow their sizes.

A packed batch is the padded one without what is behind each sequence's end, and recurrent layers treat every step and
sequence alike; so the same permutations keep both. The proof runs the model as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


@contextmanager
def packed_as_padded() -> Iterator[None]:
    """In this thread, pack every sequence at its full length, and let recurrent layers read what was packed so.

    >>> from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
    >>> with packed_as_padded():
    ...     packed = pack_padded_sequence(torch.zeros(2, 3, 1), torch.tensor([3, 1]), batch_first=True)
    ...     found, _ = pad_packed_sequence(nn.GRU(1, 4)(packed)[0])
    >>> len(packed.data), found.shape
    (6, torch.Size([3, 2, 4]))
    """
    owner = threading.get_ident()

    def here(function: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return (function if threading.get_ident() == owner else other)(*args, **kwargs)

        return call

    functions = torch._C._VariableFunctions
    with ExitStack() as stack:
        for name, function in (("_pack_padded_sequence", _pack), ("_pad_packed_sequence", _pad)):
            patch = mock.patch.object(torch._VF, name, here(function, getattr(functions, name)), create=True)
            stack.enter_context(patch)
        for kind in (nn.RNN, nn.LSTM, nn.GRU):
            stack.enter_context(mock.patch.object(kind, "forward", here(_reading(kind.forward), kind.forward)))
        yield


def _pack(x: Tensor, lengths: Tensor, batch_first: bool) -> tuple[Tensor, Tensor]:
    del lengths
    x = x.transpose(0, 1) if batch_first else x
    return x.reshape(-1, *x.shape[2:]), torch.full((x.shape[0],), x.shape[1], device="cpu")


def _pad(data: Tensor, sizes: Tensor, batch_first: bool, value: float, total: int) -> tuple[Tensor, Tensor]:
    x = _steps(data, sizes)
    if total > len(sizes):
        x = torch.cat([x, x.new_full((total - len(sizes), *x.shape[1:]), value)])
    return x.transpose(0, 1) if batch_first else x, torch.full((x.shape[1],), len(sizes), device="cpu")


def _steps(data: Tensor, sizes: Tensor) -> Tensor:
    return data.reshape(len(sizes), -1, *data.shape[1:])


def _reading(forward: Callable[..., Any]) -> Callable[..., Any]:
    def read(self: nn.RNNBase, x: Any, hx: Any = None) -> Any:
        if not isinstance(x, PackedSequence):
            return forward(self, x, hx)
        steps = _steps(x.data, x.batch_sizes)
        hx = hx if hx is None else self.permute_hidden(hx, x.sorted_indices)
        found, hidden = forward(self, steps.transpose(0, 1) if self.batch_first else steps, hx)
        found = (found.transpose(0, 1) if self.batch_first else found).flatten(0, 1)
        return PackedSequence(found, *x[1:]), self.permute_hidden(hidden, x.unsorted_indices)

    return read
