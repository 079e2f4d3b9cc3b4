"""Where only a part of the model travels: adapters, norms that stay at home (FedBN), a frozen trunk."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from logging import INFO, WARNING

from flwr.app import ArrayRecord, Message
from flwr.common.logger import log

from fedrebasin import PermutationSpec, trunk_tensors
from fedrebasin.errors import UsageError
from fedrebasin.strategies.matcher import Matcher
from fedrebasin.strategies.records import record_to_state, select_arrays
from fedrebasin.strategies.wire import name_of_arrays

HOME = ("fixed", "relabelled")


def check_home(home: str, *, perms: bool, how: str) -> str:
    """Refuse to move units that are tied to tensors at home where nobody would learn of it.

    Parameters
    ----------
    home : str
    perms : bool
        Whether clients get to know the permutations.
    how : str
        The option that lets them know.

    Examples
    --------
    >>> check_home("fixed", perms=False, how="send_perms=True")
    'fixed'
    """
    if home not in HOME:
        raise UsageError(f"home: expected one of {', '.join(map(repr, HOME))}; got {home!r}")
    if home == "relabelled" and not perms:
        raise UsageError(f"home='relabelled': clients relabel what they keep by permutations that they get; add {how}")
    return home


def part_of(spec: PermutationSpec, names: Iterable[str], home: str = "fixed") -> PermutationSpec:
    """The spec of the tensors that travel; the log says how many units are left free.

    Parameters
    ----------
    spec : PermutationSpec
        Of the whole model.
    names : iterable of str
        Tensors of the spec.
    home : {"fixed", "relabelled"}
        Whether what is tied to a tensor at home is fixed, or moves since its client relabels that tensor too.

    Examples
    --------
    >>> from fedrebasin.layout import Free
    >>> spec = PermutationSpec({"w": (Free("a", 3),), "b": (Free("a", 3),), "c": (Free("d", 2),)})
    >>> part_of(spec, ["w", "c"]).perm_shapes
    {'d': (2,)}
    """
    kept = set(names)
    if kept == set(spec.axes):
        return spec
    part = spec.only(kept, fix=home == "fixed")
    free, all_free = (sum(math.prod(shape) for shape in one.perm_shapes.values()) for one in (part, spec))
    log(
        *(
            WARNING if free == 0 < all_free else INFO,
            "rebasin: %d of %d tensors travel; %d of %d hidden units are free",
        ),
        *(len(kept), len(spec.axes), free, all_free),
    )
    return part


def narrow(
    spec: PermutationSpec, matcher: Matcher, arrays: ArrayRecord, runs: str | None, home: str
) -> tuple[PermutationSpec, Matcher]:
    """The spec and the matcher of what the server is to send: the whole model, or a part of it.

    ``runs`` names an option that runs the whole model, if there is one.

    Raises
    ------
    SpecMismatchError
        If ``arrays`` hold a tensor that the spec lacks, or one of another shape.
    UsageError
        If a part is to travel, and an option or the matching runs the whole model.
    """
    if arrays and arrays.keys() < spec.axes.keys():
        check_part(spec, matcher, arrays, runs)
        spec = part_of(spec, arrays, home=home)
        matcher = replace(matcher, setting=replace(matcher.setting, spec=spec))
    spec.check_state(record_to_state(arrays), "initial_arrays")
    return spec, matcher


def check_part(spec: PermutationSpec, matcher: Matcher, names: Collection[str], runs: str | None) -> None:
    """Refuse that ``names`` alone travel, where an option (``runs``) or the matching runs the whole model."""
    missing = next((name for name in spec.axes if name not in names), None)
    runs = runs or (matcher.label if matcher.runs_the_model else None)
    if missing is not None and runs is not None:
        raise UsageError(
            f"{runs} runs the whole model, and {len(names)} of its {len(spec.axes)} tensors travel, without "
            f"{missing!r}; send the whole state dict without until=, or use correction=None and matching='weight'"
        )


class Trunk:
    """What nodes with heads of their own share: the tensors up to a layer, or all of them.

    Parameters
    ----------
    spec : PermutationSpec
        Of the server's model.
    until : str or None
        The last module of the trunk, as for :func:`fedrebasin.trunk_tensors`.
    """

    def __init__(self, spec: PermutationSpec, until: str | None) -> None:
        self.names = None if until is None else frozenset(trunk_tensors(spec, until))

    def cut(self, arrays: ArrayRecord) -> ArrayRecord:
        """The trunk's tensors, in their order; the very record where all are shared."""
        return arrays if self.names is None else select_arrays(arrays, [name for name in arrays if name in self.names])

    def strip(self, replies: Sequence[Message], key: str) -> None:
        """Leave the heads out of the replies that hold them, in place."""
        for message in replies if self.names is not None else ():
            name = name_of_arrays(message.content, key) if message.has_content() else None
            if name is not None:
                message.content[name] = self.cut(message.content.array_records[name])
