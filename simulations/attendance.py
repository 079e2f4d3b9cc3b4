"""Who takes part in which round: nodes that drop in and out, and a silo that joins a running federation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedrebasin.errors import UsageError
from fedrebasin.simulations.settings import Settings, join_round

#: nobody averages alone: as many nodes stay in every round, whatever is drawn
FEWEST = 2
#: keeps these draws apart from those for rows and weights
_PURPOSE = 7


def attendance(settings: Settings, nodes: int, *, seed: int, server_round: int) -> list[int]:
    """The partition ids that take part in a round, in ascending order; no strategy enters the draw.

    Every node is absent with probability ``settings.absent``, independently in each round; where fewer than two would
    stay, the two that were nearest to staying do. With ``start="joins:ROUND"`` the last node is absent before that
    round, and present in it.

    Parameters
    ----------
    settings : Settings
    nodes : int
    seed : int
        The run's seed; another one draws other rounds.
    server_round : int
        From 1.

    Returns
    -------
    list of int
        At least two of ``range(nodes)``.

    Examples
    --------
    >>> [attendance(Settings(start="joins:2"), 3, seed=0, server_round=number) for number in (1, 2, 3)]
    [[0, 1], [0, 1, 2], [0, 1, 2]]
    >>> [attendance(Settings(absent=0.5), 4, seed=0, server_round=number) for number in (1, 2, 3)]
    [[0, 2], [0, 1, 3], [0, 1]]
    """
    joins = join_round(settings.start)
    candidates = nodes - 1 if server_round < joins else nodes
    # drawn for all nodes, so that who drops out among the others does not depend on the one that joins
    draws = np.random.default_rng([seed, _PURPOSE, server_round]).random(nodes)
    if server_round == joins:
        draws[nodes - 1] = 1.0
    stays = sorted(range(candidates), key=lambda node: -draws[node])
    count = sum(draws[node] >= settings.absent for node in range(candidates))
    return sorted(stays[: max(count, FEWEST)])


def first_round(settings: Settings, nodes: int, node: int, *, seed: int) -> int:
    """The first round that a node takes part in; one more than there are rounds if it never does.

    >>> first_round(Settings(start="joins:2"), 3, 2, seed=0)
    2
    """
    for server_round in range(1, settings.rounds + 1):
        if node in attendance(settings, nodes, seed=seed, server_round=server_round):
            return server_round
    return settings.rounds + 1


def trains_apart(settings: Settings, nodes: int, node: int, *, seed: int, server_round: int) -> bool:
    """Whether a node's reply of a round comes from its own initialisation: once, when it first takes part.

    With ``start="apart"`` that holds for every node, with ``"joins:ROUND"`` for the last one, else for none.

    >>> [trains_apart(Settings(start="joins:2"), 3, node, seed=0, server_round=2) for node in range(3)]
    [False, False, True]
    """
    alone = settings.start == "apart" or (join_round(settings.start) > 0 and node == nodes - 1)
    return alone and first_round(settings, nodes, node, seed=seed) == server_round


def local_epochs(settings: Settings, nodes: int, node: int, *, seed: int, server_round: int) -> int:
    """For how many epochs a node trains in a round that it takes part in.

    Who trains apart in a round trains as long where a baseline lets it start from the model that the server sent.

    >>> settings = Settings(start="joins:2", epochs=40, later_epochs=5)
    >>> [local_epochs(settings, 3, node, seed=0, server_round=2) for node in range(3)]
    [5, 5, 40]
    """
    first = trains_apart(settings, nodes, node, seed=seed, server_round=server_round)
    opening = settings.start == "common" and server_round == 1
    return settings.epochs if first or opening else settings.later_epochs


def fewest(settings: Settings, nodes: int, seeds: Sequence[int]) -> int:
    """The smallest number of nodes in any round of any of the seeds.

    >>> fewest(Settings(start="joins:2"), 4, [0])
    3
    """
    return min(
        len(attendance(settings, nodes, seed=seed, server_round=server_round))
        for seed in seeds
        for server_round in range(1, settings.rounds + 1)
    )


def check_nodes(settings: Settings, nodes: int) -> None:
    """Refuse a silo that joins a federation of one.

    >>> check_nodes(Settings(start="joins:2"), 3)
    """
    if join_round(settings.start) and nodes <= FEWEST:
        raise UsageError(f"--nodes: expected at least {FEWEST + 1} where one of them joins later; got {nodes}")
