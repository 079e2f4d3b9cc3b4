"""The model that ``fedrebasin inspect`` and ``merge`` are given as ``module:factory``: imported and built."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import reduce
from pathlib import Path
from typing import Any

from torch import nn

from fedrebasin.errors import UsageError, first_line
from fedrebasin.signatures import parameters_of

#: arguments of common factories that would start a download, and what leaves it out
_PRETRAINED = {"weights": None, "weights_backbone": None, "pretrained": False}


def parse_kwargs(text: str) -> dict[str, Any]:
    """Read ``--kwargs``: a JSON object with the factory's arguments.

    >>> parse_kwargs('{"width": 16}')
    {'width': 16}
    """
    try:
        kwargs = json.loads(text or "{}")
    except ValueError as error:
        raise UsageError(f'--kwargs: expected a JSON object such as {{"width": 16}}; {error}') from error
    if not isinstance(kwargs, dict):
        raise UsageError(f'--kwargs: expected a JSON object such as {{"width": 16}}; got {text}')
    return kwargs


def load_factory(target: str) -> Any:
    """Import what ``module:factory`` names: a function, a class, or a module that is built already.

    Raises
    ------
    UsageError
        If there is no such module or attribute, its import fails, or it cannot be called.

    Examples
    --------
    >>> load_factory("torch.nn:Linear")
    <class 'torch.nn.modules.linear.Linear'>
    """
    module, colon, path = target.partition(":")
    if not (module and colon and path):
        raise UsageError(f"model: expected module:factory, for example torchvision.models:resnet18; got {target!r}")
    try:
        holder = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"model: cannot import {module!r} ({error}); run the command in the folder that holds it, or install it"
        ) from error
    except Exception as error:  # the user's module may raise anything
        raise UsageError(f"model: importing {module!r} raised {first_line(error)}") from error
    try:
        factory = reduce(getattr, path.split("."), holder)
    except AttributeError as error:
        raise UsageError(f"model: {module!r} has no {path!r}; {error}") from error
    if not callable(factory):
        raise UsageError(
            f"model: expected {target} to be a function or class; got one of type {type(factory).__name__}"
        )
    return factory


def build(factory: Any, kwargs: dict[str, Any]) -> nn.Module:
    """Call the factory without pretrained weights.

    Raises
    ------
    UsageError
        If it raises, or returns no ``nn.Module``.

    Examples
    --------
    >>> build(nn.Linear, {"in_features": 4, "out_features": 2})
    Linear(in_features=4, out_features=2, bias=True)
    """
    if isinstance(factory, nn.Module):
        return factory
    name = getattr(factory, "__name__", "the factory")
    try:
        model = factory(**{**_no_download(factory), **kwargs})
    except Exception as error:  # the user's factory may raise anything
        raise UsageError(f"model: {name}() raised {first_line(error)}; give its arguments with --kwargs") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"model: expected {name}() to return a torch.nn.Module; got a {type(model).__name__}")
    return model


def _no_download(factory: Callable[..., Any]) -> dict[str, Any]:
    try:
        parameters = parameters_of(factory)
    except (TypeError, ValueError):  # some built-in callables have none
        return {}
    return {
        name: value for name, value in _PRETRAINED.items() if name in parameters and parameters[name].default != value
    }


@contextmanager
def importable_here() -> Iterator[None]:
    """Let modules of the current directory be imported, as ``python -m`` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with suppress(ValueError):  # the user's module may have taken it out
            sys.path.remove(here)
