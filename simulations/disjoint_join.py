"""The model of all data may be a run of its own, on another machine: its row joins the results of both ends."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from fedrebasin.errors import UsageError

Results = Mapping[str, Any]

#: what has to be the same for a row to belong beside the others
SAME = ("dataset", "model", "width", "norm", "epochs", "augment", "precision", "recipe", "images")
#: what results that do not name it were made with
BEFORE = {"precision": "auto"}


def join_results(results: Sequence[Results]) -> dict[str, Any]:
    """Add rows and reliability of the further results to the seeds of the first, which keeps what it has.

    Raises
    ------
    UsageError
        If they are not of the same network, training and data, or a seed of the first is missing in another.

    Examples
    --------
    >>> config = {"config": {"dataset": "digits", "epochs": 3}, "provenance": {"command": "x"}}
    >>> ends, everything = ({"seed": 0, "rows": {name: {}}, "reliability": {}} for name in ("a", "all"))
    >>> list(join_results([config | {"seeds": [ends]}, config | {"seeds": [everything]}])["seeds"][0]["rows"])
    ['a', 'all']
    """
    joined = copy.deepcopy(dict(results[0]))
    for other in results[1:]:
        for key in SAME:
            ours, theirs = (one["config"].get(key, BEFORE.get(key)) for one in (joined, other))
            if ours != theirs:
                raise UsageError(f"--redraw: expected results with {key} {ours}, as in the first file; got {theirs}")
        seeds = {seed["seed"]: seed for seed in other["seeds"]}
        for seed in joined["seeds"]:
            if seed["seed"] not in seeds:
                raise UsageError(f"--redraw: expected seed {seed['seed']} in every file; got {sorted(seeds)}")
            for part in ("rows", "reliability"):
                for name, row in seeds[seed["seed"]][part].items():
                    seed[part].setdefault(name, row)
        joined.setdefault("joined", []).append(dict(other["provenance"]))
    return joined
