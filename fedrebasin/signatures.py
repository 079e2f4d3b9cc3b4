"""The parameters of the user's functions, whatever their annotations name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """What ``function`` takes, by name; raises as ``inspect.signature`` does where that has nothing to read.

    >>> list(parameters_of(lambda x, y=1: x))
    ['x', 'y']
    """
    try:
        return inspect.signature(function).parameters
    except NameError:  # Python 3.14 looks annotations up now, and what stands under TYPE_CHECKING is not there
        unknown = {"annotation_format": importlib.import_module("annotationlib").Format.FORWARDREF}
        return inspect.signature(function, **unknown).parameters


def positional_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters that can be given by place, in their order, without ``*args``.

    >>> [one.name for one in positional_of(lambda x, y=1, *more, z=2: x)]
    ['x', 'y']
    """
    kinds = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return [one for one in parameters_of(function).values() if one.kind in kinds]
