"""What the last layer of a classifier is solved for, so that it says what the ends' probabilities say together.

Index letters: k ends, c classes. The average of logits ``sum_k c_k z_k`` is the goal that least squares has in every
layer; where ends know different classes, the average of their probabilities is the better ensemble, and

    goal = log sum_k c_k softmax(z_k)  -  its mean over c  +  the mean over c of sum_k c_k z_k

are logits that have it as their softmax. A shift of all classes changes no probability: the last two terms choose the
one that the averaged logits have, so that equal ends get their own logits back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import BaseTorchFunctionMode

from fedrebasin.batches import Batches, copied, tensors
from fedrebasin.corrections.layers import Layer, Step
from fedrebasin.corrections.passes import Memory, Runner
from fedrebasin.errors import RebasinError

GOALS = ("pre-activations", "probabilities")


def logits_of_mean_probabilities(logits: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """Logits whose softmax over the last axis is the shares' average of the ends' softmaxes.

    Parameters
    ----------
    logits : sequence of Tensor, shape (examples, classes)
    shares : sequence of float
        Positive, of sum 1.

    Examples
    --------
    >>> one, other = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    >>> logits_of_mean_probabilities([one, other], [0.5, 0.5]).softmax(1)
    tensor([[0.5000, 0.5000]])
    >>> torch.allclose(logits_of_mean_probabilities([one, one], [0.5, 0.5]), one)
    True
    """
    said = torch.stack([math.log(share) + one.log_softmax(-1) for share, one in zip(shares, logits, strict=True)])
    goal = said.logsumexp(0)
    level = sum(share * one.mean(-1, keepdim=True) for share, one in zip(shares, logits, strict=True))
    return goal - goal.mean(-1, keepdim=True) + level


def goals_of(goals: str, logits: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """What the ends' outputs say together, by the name of the goals.

    >>> goals_of("pre-activations", [torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 0.0]])], [0.5, 0.5])
    tensor([[1.5000, 1.5000]])
    """
    if goals == "probabilities":
        return logits_of_mean_probabilities(logits, shares)
    return torch.stack([share * one for share, one in zip(shares, logits, strict=True)]).sum(0)


def check_goals(goals: str) -> None:
    """Raise :class:`RebasinError` unless the goals are known."""
    if goals not in GOALS:
        raise RebasinError(f"goals: expected one of {', '.join(GOALS)}; got {goals!r}")


@torch.no_grad()
def output_of(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """What a model returns, to the last bit as in the passes that see its layers.

    Transformers' encoders of torch compute by one fused function, and round otherwise, unless a mode sees their calls.

    >>> output_of(nn.Identity(), (torch.ones(2),), {})
    tensor([1., 1.])
    """
    args, kwargs = copied((args, kwargs))
    with BaseTorchFunctionMode():
        return model(*args, **kwargs)


@torch.no_grad()
def check_last_layer(
    asked: str, model: nn.Module, steps: Sequence[Step], batches: Batches, *, instead: str = "another correction"
) -> Layer:
    """The last layer, if the network's output is what it gives, ``(examples, outputs)``; else :class:`RebasinError`.

    Parameters
    ----------
    asked, instead : str
        What needs it, and what to use where it is not so.
    """
    last, (args, kwargs, _) = steps[-1], next(iter(batches))
    outputs = tensors(output_of(model, args, kwargs))
    if not outputs:
        raise RebasinError(
            f"{asked} needs a network that ends in a linear layer; this one returns no floating tensor; use {instead}"
        )
    output = outputs[0]
    if isinstance(last, Layer) and last.norm is None and not last.stride and output.ndim == 2:
        seen = Runner(model, steps, Memory(0), keep=False).output(len(steps) - 1, 0, (args, kwargs))
        if torch.equal(seen.nan_to_num(), output.nan_to_num()):
            return last
    raise RebasinError(
        f"{asked} needs a network that ends in a linear layer, of shape (examples, outputs); this network's output "
        f"of shape {tuple(output.shape)} is not what its last layer, {last.key!r}, gives; use {instead}"
    )
