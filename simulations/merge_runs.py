"""Whether calibration data fits the network: does it run on the examples, are the labels classes of its output?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedrebasin.batches import copied
from fedrebasin.errors import UsageError, first_line
from fedrebasin.simulations.merge_data import REMEDY

#: examples on which a network of floats is tried
_FEW = 2
#: cross entropy leaves entries with this label out
_IGNORED = -100


@torch.no_grad()
def check_runs(net: nn.Module, batches: Sequence[Any], *, labelled: bool, scored: bool) -> None:
    """Refuse examples that the network cannot be run on, and labels that cross entropy cannot take with its output.

    Integers may be out of a table's range in any batch, so that all are run; of floats the first two examples.

    Parameters
    ----------
    labelled : bool
        Whether batches are pairs with labels.
    scored : bool
        Whether the labels are used.

    Raises
    ------
    UsageError
        With the network's error, or the first label that is no class.
    """
    own: list[tuple[Any, Any]] = [batch if labelled else (batch, None) for batch in batches]
    first = next(iter(own[0][0].values())) if isinstance(own[0][0], dict) else own[0][0]
    few = first.is_floating_point() or first.is_complex()
    count = _FEW if few else len(first)
    output: Any = None
    for inputs, _ in own[:1] if few else own:
        args, kwargs = copied(((), inputs) if isinstance(inputs, dict) else ((inputs,), {}))
        args, kwargs = tuple(one[:count] for one in args), {name: one[:count] for name, one in kwargs.items()}
        try:
            found = net(*args, **kwargs)
        except Exception as error:  # the user's network may raise anything
            raise UsageError(
                f"--calibration: the network cannot be run on these examples ({first_line(error)}); give the inputs "
                "that it was trained on"
            ) from error
        output = found if output is None else output
    if not scored:
        return
    if isinstance(output, Tensor) and output.ndim > 1:
        classes, labels = output.shape[1], torch.cat([labels.flatten() for _, labels in own])
        wrong = labels[((labels < 0) & (labels != _IGNORED)) | (labels >= classes)]
        if len(wrong):
            raise UsageError(
                f"--calibration: expected labels from 0 to {classes - 1}, one for each output; got {wrong[0]}; {REMEDY}"
            )
    try:
        nn.functional.cross_entropy(output, own[0][1][:count])
    except Exception as error:  # whatever the output is
        raise UsageError(
            "--calibration: labels need a network whose output is one tensor (examples, classes, ...), for cross "
            f"entropy; got {_kind(output)} and labels {tuple(own[0][1][:count].shape)}; leave the labels out"
        ) from error


def _kind(output: Any) -> str:
    return f"a tensor {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
