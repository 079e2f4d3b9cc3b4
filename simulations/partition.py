"""Which node holds which rows: biased by class, Dirichlet, or independent and identically distributed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedrebasin.errors import UsageError
from fedrebasin.simulations.ends import disjoint_halves

KINDS = ("biased:HELD", "dirichlet:ALPHA", "iid")
#: one row of so many is held apart
HELD_APART = 5


@dataclass(frozen=True)
class Partition:
    """How the rows are dealt out; ``value`` is the held-out share (biased) or alpha (dirichlet), else 0."""

    kind: str
    value: float

    def __str__(self) -> str:
        return self.kind if self.kind == "iid" else f"{self.kind}:{self.value:g}"


def parse_partition(text: str) -> Partition:
    """Read a partition as the command line writes it.

    Raises
    ------
    UsageError
        If ``text`` is none of ``biased:HELD`` with 0 <= HELD < 1, ``dirichlet:ALPHA`` with ALPHA > 0, ``iid``.

    Examples
    --------
    >>> parse_partition("biased:0.2")
    Partition(kind='biased', value=0.2)
    >>> str(parse_partition("iid"))
    'iid'
    """
    kind, colon, number = text.partition(":")
    if kind == "iid" and not colon:
        return Partition("iid", 0.0)
    if kind not in ("biased", "dirichlet"):
        raise UsageError(f"--partition: expected one of {', '.join(KINDS)}; got {text!r}")
    try:
        value = float(number)
    except ValueError:
        raise UsageError(f"--partition: expected a number after {kind}: as in {kind}:0.2; got {text!r}") from None
    if kind == "biased" and not 0 <= value < 1:
        raise UsageError(f"--partition: biased takes the share that leaves its node, 0 <= share < 1; got {number}")
    if kind == "dirichlet" and not 0 < value < float("inf"):
        raise UsageError(f"--partition: dirichlet takes a positive alpha; got {number}")
    return Partition(kind, value)


def partition_rows(labels: Tensor, classes: int, nodes: int, partition: Partition, *, seed: int = 0) -> list[Tensor]:
    """Deal the rows of a data set out to the nodes, every row exactly once.

    ``biased``: class c belongs to node ``c mod nodes``, which gets all of it but the held share; that is dealt evenly
    to the others. With two nodes it is the split of Git Re-Basin's Section 5.4 (the lower half of the classes
    against the upper), which knows no seed. ``dirichlet`` and ``iid`` are flwr-datasets' partitioners.

    Parameters
    ----------
    labels : Tensor, shape (n,), int64
    classes, nodes : int
    seed : int
        Another seed deals other rows; the sizes of biased and iid parts stay.

    Returns
    -------
    list of Tensor
        The row numbers (int64) of each node, at least one.

    Raises
    ------
    UsageError
        If a node is left without rows.

    Examples
    --------
    >>> labels = torch.arange(4).repeat(10)
    >>> parts = partition_rows(labels, 4, 4, parse_partition("biased:0.3"))
    >>> [int((labels[rows] == 0).sum()) for rows in parts]
    [7, 1, 1, 1]
    """
    if nodes < 2:
        raise UsageError(f"--nodes: expected at least 2; got {nodes}")
    if partition.kind == "biased":
        rows = _biased(labels, classes, nodes, partition.value, seed)
    else:
        # the caches' key is hashable; a list of 50,000 labels costs less than Hugging Face's import
        rows = _from_flower(tuple(labels.tolist()), nodes, partition, seed)
    empty = [node for node, part in enumerate(rows) if len(part) == 0]
    if empty:
        raise UsageError(f"--partition {partition}: node {empty[0]} of {nodes} gets no row; use fewer --nodes")
    return rows


def hold_apart(rows: Tensor, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split a node's rows into those that it trains on and a fifth, at least one, that it only measures on.

    Raises
    ------
    UsageError
        If there is one row alone.

    Examples
    --------
    >>> [len(part) for part in hold_apart(torch.arange(12))]
    [10, 2]
    """
    if len(rows) < 2:
        raise UsageError("a node with one row has none to measure on; use a larger alpha or fewer --nodes")
    drawn = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    count = max(1, len(rows) // HELD_APART)
    return drawn[count:], drawn[:count]


def _biased(labels: Tensor, classes: int, nodes: int, held: float, seed: int) -> list[Tensor]:
    if nodes == 2:
        return list(disjoint_halves(labels, classes, held))
    order = torch.from_numpy(np.random.default_rng([123, seed]).permutation(len(labels)))
    parts: list[list[Tensor]] = [[] for _ in range(nodes)]
    for label in range(classes):
        rows = order[labels[order] == label]
        cut = round(held * len(rows))
        owner = label % nodes
        parts[owner].append(rows[cut:])
        # dealt in turn, starting at another node for each class, so that none collects all the remainders
        others = [(owner + 1 + (label + i) % (nodes - 1)) % nodes for i in range(nodes - 1)]
        for i, node in enumerate(others):
            parts[node].append(rows[:cut][i :: nodes - 1])
    return [torch.cat(part) for part in parts]


@lru_cache(maxsize=4)
def _from_flower(labels: tuple[int, ...], nodes: int, partition: Partition, seed: int) -> list[Tensor]:
    try:
        from datasets import Dataset as Table
        from flwr_datasets.partitioner import (  # type: ignore[import-untyped]  # it ships no types
            DirichletPartitioner,
            IidPartitioner,
        )
    except ImportError as error:
        raise UsageError(
            f'--partition {partition}: needs flwr-datasets ({error}); pip install "fedrebasin[simulation]"'
        ) from error
    # Flower's iid partitioner cuts the table where it stands, so it is shuffled first
    order = np.random.default_rng([123, seed]).permutation(len(labels))
    table = Table.from_dict({"label": np.asarray(labels)[order], "row": order})
    partitioner: Any
    if partition.kind == "iid":
        partitioner = IidPartitioner(num_partitions=nodes)
    else:
        partitioner = DirichletPartitioner(
            num_partitions=nodes, partition_by="label", alpha=partition.value, min_partition_size=1, seed=seed
        )
    partitioner.dataset = table
    try:
        return [torch.tensor(partitioner.load_partition(node)["row"]) for node in range(nodes)]
    except ValueError as error:
        first_line = str(error).strip().splitlines()[0]
        raise UsageError(f"--partition {partition}: {first_line}; use a larger alpha or fewer --nodes") from error
