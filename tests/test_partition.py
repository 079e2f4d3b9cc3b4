"""Partitions: every row once, the right shares, the same rows for the same seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedrebasin.errors import UsageError
from fedrebasin.simulations.ends import disjoint_halves
from fedrebasin.simulations.partition import Partition, parse_partition, partition_rows

LABELS = torch.randint(10, (1203,), generator=torch.Generator().manual_seed(0))


def parts_of(text: str, nodes: int, seed: int = 0, labels: Tensor = LABELS) -> list[Tensor]:
    return partition_rows(labels, 10, nodes, parse_partition(text), seed=seed)


@pytest.mark.parametrize("text", ["biased:0.2", "biased:0", "dirichlet:0.3", "dirichlet:100", "iid"])
@pytest.mark.parametrize("nodes", [2, 3, 7])
def test_every_row_belongs_to_exactly_one_node(text: str, nodes: int) -> None:
    parts = parts_of(text, nodes)
    assert len(parts) == nodes
    assert torch.cat(parts).sort().values.tolist() == list(range(len(LABELS)))


@pytest.mark.parametrize("nodes", [3, 4, 12])
def test_a_biased_class_leaves_its_held_share_to_the_other_nodes_evenly(nodes: int) -> None:
    parts = parts_of("biased:0.2", nodes)
    for label in range(10):
        counts = [int((LABELS[rows] == label).sum()) for rows in parts]
        total = int(LABELS.eq(label).sum())
        held = round(0.2 * total)
        others = counts[: label % nodes] + counts[label % nodes + 1 :]
        assert counts[label % nodes] == total - held
        assert max(others) - min(others) <= 1
    sizes = [len(rows) for rows in parts]
    assert min(sizes) > 0


def test_two_biased_nodes_are_the_halves_of_the_paper() -> None:
    for seed in (0, 5):
        for rows, expected in zip(parts_of("biased:0.3", 2, seed), disjoint_halves(LABELS, 10, 0.3), strict=True):
            assert torch.equal(rows, expected)


@pytest.mark.parametrize("text", ["biased:0.2", "dirichlet:0.5", "iid"])
def test_a_seed_gives_the_same_rows_again_and_another_seed_gives_others(text: str) -> None:
    first, again, other = (parts_of(text, 3, seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert sorted(first[0].tolist()) != sorted(other[0].tolist())


def test_iid_nodes_have_the_classes_in_the_data_sets_proportions() -> None:
    labels = torch.arange(10).repeat_interleave(300)  # sorted: a cut without a shuffle would give whole classes
    for rows in parts_of("iid", 3, labels=labels):
        assert len(rows) == 1000
        assert (labels[rows].bincount(minlength=10) - 100).abs().max() < 40


def test_a_small_alpha_makes_nodes_more_unlike_than_a_large_one() -> None:
    def largest_share(alpha: str) -> float:
        counts = [LABELS[rows].bincount(minlength=10).float() for rows in parts_of(f"dirichlet:{alpha}", 4)]
        return float(torch.stack([count.max() / count.sum() for count in counts]).mean())

    assert largest_share("0.2") > largest_share("1000") + 0.1


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("halves", "expected one of biased:HELD, dirichlet:ALPHA, iid; got 'halves'"),
        ("iid:3", "got 'iid:3'"),
        ("biased", "expected a number after biased"),
        ("biased:1", "0 <= share < 1; got 1"),
        ("biased:nan", "0 <= share < 1; got nan"),
        ("dirichlet:0", "positive alpha; got 0"),
        ("dirichlet:inf", "positive alpha; got inf"),
    ],
)
def test_a_partition_that_does_not_exist_is_refused(text: str, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        parse_partition(text)


def test_a_partition_that_leaves_a_node_without_rows_is_refused() -> None:
    with pytest.raises(UsageError, match="node 10 of 12 gets no row"):
        parts_of("biased:0", 12)
    with pytest.raises(UsageError, match="--nodes: expected at least 2; got 1"):
        partition_rows(LABELS, 10, 1, Partition("iid", 0.0))
