"""Calibration data in two parts: one for corrections, and one on which what they made is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.batches import batches_of, split_inputs, tensors
from fedrebasin.errors import CalibrationError, RebasinError, first_line
from fedrebasin.modules import deep_copy
from fedrebasin.seeds import generator_of

#: The measured part is cut into about this many pieces, so that differences have standard errors.
_PIECES = 32


def split_calibration(
    net: nn.Module,
    calibration: Iterable[Any],
    *,
    share: float = 0.25,
    seed: int = 0,
) -> tuple[list[Any], list[Any]]:
    """Part calibration data in two, no example in both.

    The data is read once and held in memory, so that the parts stay apart even if a DataLoader shuffles anew each
    time. Each batch gives its share of examples, drawn at random: data in the order of its classes is parted well.

    Parameters
    ----------
    net : nn.Module
        The network that the batches are for.
    calibration : iterable of batches
        With or without targets. Where the rows of a batch (axis 0 of all its tensors) are not examples to ``net``, as
        in an LSTM with time first, whole batches are parted.
    share : float
        Of the examples (or whole batches) in the second part, between 0 and 1; at least one is in each part.
    seed : int
        Of the draw.

    Returns
    -------
    list of batches, list of batches
        For corrections, and for measuring; the second has about 32 small batches where there are rows enough.

    Raises
    ------
    CalibrationError
        If the data holds fewer than two examples, can be read only once, or the network cannot run on it.
    RebasinError
        If ``share`` is not between 0 and 1.

    Examples
    --------
    >>> fit, held_out = split_calibration(nn.Linear(2, 1), [torch.zeros(12, 2), torch.ones(8, 2)])
    >>> [len(batch) for batch in fit], sum(len(batch) for batch in held_out)
    ([9, 6], 5)
    """
    if not 0 < share < 1:
        raise RebasinError(f"share: expected a number between 0 and 1; got {share}")
    first = next(iter(batches_of(net, calibration)))  # refuses what is no collection of batches
    batches = list(calibration)
    by_rows = _rows_are_examples(net, first, batches[0])
    sizes = [(_rows(batch) or 1) if by_rows else 1 for batch in batches]
    total = sum(sizes)
    if total < 2:
        kind = "example" if by_rows else "batch (its rows are not examples to this network)"
        raise CalibrationError(
            f"calibration: expected two examples or more, to keep one apart; got one {kind}; give more data"
        )
    held_total = min(total - 1, max(1, round(share * total)))
    generator = generator_of(seed)
    # whole batches in a drawn order, so that of many batches with a row each not every fourth is held out
    order = torch.randperm(len(batches), generator=generator, device="cpu").tolist()
    taken = _spread(held_total, [sizes[place] for place in order])
    counts = dict(zip(order, taken, strict=True))
    piece = max(1, held_total // _PIECES)
    fit: list[Any] = []
    held_out: list[Any] = []
    for place, (batch, size) in enumerate(zip(batches, sizes, strict=True)):
        count = counts[place]
        if count in (0, size) and not (by_rows and count):
            (held_out if count else fit).append(batch)
            continue
        drawn = torch.randperm(size, generator=generator, device="cpu")
        if count < size:
            fit.append(_take(batch, drawn[count:].sort().values))
        held_out += [_take(batch, rows) for rows in torch.split(drawn[:count].sort().values, piece)]
    return fit, held_out


def _spread(total: int, sizes: list[int]) -> list[int]:
    """``total`` over places in proportion to their sizes, in whole numbers that sum to it.

    >>> _spread(3, [4, 4, 4])
    [1, 1, 1]
    """
    whole, before, found = sum(sizes), 0, []
    for end in _sums(sizes):
        after = round(total * end / whole)
        found.append(after - before)
        before = after
    return found


def _sums(sizes: list[int]) -> Iterator[int]:
    total = 0
    for size in sizes:
        total += size
        yield total


def _leaves(batch: Any) -> list[Any]:
    if isinstance(batch, Mapping):
        return [leaf for value in batch.values() for leaf in _leaves(value)]
    if isinstance(batch, tuple | list):
        return [leaf for value in batch for leaf in _leaves(value)]
    return [batch]


def _rows(batch: Any) -> int | None:
    """The length of axis 0 if all of a batch are tensors that agree on it."""
    found = _leaves(batch)
    if not found or not all(isinstance(leaf, Tensor) and leaf.ndim for leaf in found):
        return None
    lengths = {len(leaf) for leaf in found}
    return lengths.pop() if len(lengths) == 1 else None


def _take(batch: Any, rows: Tensor) -> Any:
    return _map(batch, lambda tensor: tensor[rows.to(tensor.device)])


def _map(batch: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(batch, Mapping):
        return {key: _map(value, change) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return tuple(_map(value, change) for value in batch)
    return change(batch) if isinstance(batch, Tensor) else batch


@torch.no_grad()
def _rows_are_examples(net: nn.Module, parsed: tuple[Any, Any, Any], batch: Any) -> bool:
    """Whether the outputs of some rows are some rows of the outputs."""
    rows = _rows(batch)
    if rows is None:
        return False
    args, kwargs, _ = parsed
    model = deep_copy(net).eval()
    where = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))

    def run(chosen: Tensor) -> Tensor | None:
        here = _map(_take((args, kwargs), chosen), lambda tensor: tensor.to(where))
        found = tensors(model(*split_inputs(here[0])[0], **here[1]))
        return found[0] if found else None

    whole, some = torch.arange(min(rows, 8), device="cpu"), torch.arange(0, min(rows, 8), 2, device="cpu")
    try:
        outputs, part = run(whole), run(some)
    except Exception as error:  # the user's model may raise anything
        raise CalibrationError(f"calibration: the model cannot run on its first batch: {first_line(error)}") from error
    if outputs is None or part is None or outputs.ndim == 0 or len(outputs) != len(whole) or len(part) != len(some):
        return False
    return bool(torch.allclose(outputs[some.to(where)].double(), part.double(), rtol=1e-3, atol=1e-5))
