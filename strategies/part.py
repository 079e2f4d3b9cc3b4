"""Where only a part of the model travels: adapters, norms that stay at home (FedBN), a frozen trunk."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from logging import INFO, WARNING

from flwr.app import ArrayRecord
from flwr.common.logger import log

from fedrebasin import PermutationSpec
from fedrebasin.errors import UsageError
from fedrebasin.strategies.matcher import Matcher
from fedrebasin.strategies.records import record_to_state


def part_of(spec: PermutationSpec, names: Iterable[str], last: PermutationSpec | None = None) -> PermutationSpec:
    """The spec of the tensors that travel; what is tied to one that stays at home is fixed, and the log says how much.

    Parameters
    ----------
    spec : PermutationSpec
        Of the whole model.
    names : iterable of str
        Tensors of the spec.
    last : PermutationSpec, optional
        The result of the last call, returned again if it has these tensors.

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
    if last is not None and kept == set(last.axes):
        return last
    part = spec.only(kept)
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
    spec: PermutationSpec, matcher: Matcher, arrays: ArrayRecord, correction: str | None
) -> tuple[PermutationSpec, Matcher]:
    """The spec and the matcher of what the server is to send: the whole model, or a part of it.

    Raises
    ------
    SpecMismatchError
        If ``arrays`` hold a tensor that the spec lacks, or one of another shape.
    UsageError
        If a part is to travel, and the correction or the matching runs the whole model.
    """
    if arrays and arrays.keys() < spec.axes.keys():
        runs = f"correction={correction!r}" if correction else f"matching={matcher.name!r}"
        if correction or matcher.runs_the_model:
            missing = next(name for name in spec.axes if name not in arrays)
            raise UsageError(
                f"{runs} runs the whole model, and initial_arrays hold {len(arrays)} of its {len(spec.axes)} tensors, "
                f"without {missing!r}; send the whole state dict, or use correction=None and matching='weight'"
            )
        spec = part_of(spec, arrays)
        matcher = replace(matcher, setting=replace(matcher.setting, spec=spec))
    spec.check_state(record_to_state(arrays), "initial_arrays")
    return spec, matcher
