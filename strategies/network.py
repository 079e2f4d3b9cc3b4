"""The network behind the strategy: its module, where one is given, and its checked spec."""

from __future__ import annotations

from collections.abc import Callable
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

import torch
from flwr.common.logger import log
from torch import nn

from fedrebasin import PermutationSpec, check_spec, trace
from fedrebasin.errors import UsageError

Model = nn.Module | Callable[[], nn.Module]


def build_network(
    model: Model | None, example_inputs: Any, spec: PermutationSpec | str | Path | None, seed: int
) -> tuple[nn.Module | None, PermutationSpec]:
    """Make the module, trace it where no spec is given, and prove the spec.

    Raises
    ------
    UsageError
        If what is needed is missing, or is of the wrong kind.
    InvalidSpecError
        If the spec changes the function of the model.

    Examples
    --------
    >>> make = lambda: nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> net, spec = build_network(make, (torch.randn(2, 4),), None, 0)
    >>> spec.checked, spec.perm_shapes
    (True, {'0': (3,)})
    """
    if isinstance(spec, str | Path):
        spec = PermutationSpec.load(spec)
    if spec is not None and not isinstance(spec, PermutationSpec):
        raise UsageError(f"spec: expected a PermutationSpec, or the path of a saved one; got {type(spec).__name__}")
    if model is None:
        if spec is None:
            raise UsageError(
                "model: give model= and example_inputs=, from which the spec is traced and checked, or a checked spec="
            )
        if not spec.checked:
            raise UsageError(
                "spec: it lacks the mark of a passed check (it is new, or was edited by hand); save what "
                "check_spec(net, spec, inputs) returns, or give model= and example_inputs= as well"
            )
        return None, spec
    net: object = model() if callable(model) and not isinstance(model, nn.Module) else model
    if not isinstance(net, nn.Module):
        raise UsageError(
            f"model: expected an nn.Module or a function of no arguments that makes one; got {type(net).__name__}"
        )
    if example_inputs is None:
        raise UsageError("example_inputs: needed with model=, as (images,), for its trace and the check of the spec")
    checked = check_spec(net, trace(net, example_inputs) if spec is None else spec, example_inputs, seed=seed)
    log(INFO, "rebasin: the spec has %d perms, and its check has passed", len(checked.perm_shapes))
    for note in checked.notes:
        log(WARNING, "rebasin: %s", note)
    return net, checked


def find_device(device: torch.device | str | None) -> torch.device | None:
    """Turn a name into a device, and see that it is there.

    Examples
    --------
    >>> find_device("cpu")
    device(type='cpu')
    """
    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UsageError(f"device={device!r} cannot be used here: {error}") from error
    return found
