"""A client's label shares, which may come off its model, or off the goals of its last layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedrebasin.corrections.privacy import source_of_noise
from fedrebasin.corrections.queries import Node
from fedrebasin.errors import CalibrationError, RebasinError, UsageError
from fedrebasin.permute import like_state


def remove_label_prior(
    state: Mapping[str, Tensor], label_counts: Sequence[float] | Tensor, *, bias: str
) -> dict[str, Tensor]:
    """Take the logarithm of a client's label shares off the bias of its last layer.

    A classifier learns how often it saw each class, and clients that saw different classes pull an average of their
    logits, and each other's hidden layers, towards their own. A client may do this before it sends its model; what is
    merged then is meant for classes that are equally frequent (logit adjustment, with the model's own prior).

    Parameters
    ----------
    state : dict of str to Tensor
        The client's state dict; it is not changed.
    label_counts : sequence of float or Tensor, shape (classes,)
        How many examples of each class the client trained on, at least 0. A class without any counts as one.
    bias : str
        Name of the bias that is added to the logits last.

    Returns
    -------
    dict of str to Tensor
        Keys, order, dtypes and devices of ``state``.

    Raises
    ------
    UsageError
        If ``bias`` is no floating tensor of ``state``, or the counts do not fit it.

    References
    ----------
    Menon, Jayasumana, Rawat, Jain, Veit, Kumar (2021), "Long-tail learning via logit adjustment", arXiv 2007.07314.

    Examples
    --------
    >>> net = torch.nn.Linear(3, 2)
    >>> state = remove_label_prior(net.state_dict(), [30, 10], bias="bias")
    >>> state["bias"] - net.bias.detach()
    tensor([0.2877, 1.3863])
    """
    tensor = state.get(bias)
    if tensor is None or not tensor.is_floating_point() or tensor.ndim != 1:
        fitting = [name for name, one in state.items() if one.is_floating_point() and one.ndim == 1][-3:]
        raise UsageError(f"bias: expected the name of the last layer's bias, such as {fitting}; got {bias!r}")
    counts = torch.as_tensor(label_counts, dtype=torch.float64, device=tensor.device)
    if counts.shape != tensor.shape:
        raise UsageError(
            f"label_counts: expected a number for each of the {len(tensor)} entries of {bias!r}; "
            f"got shape {tuple(counts.shape)}"
        )
    if not bool((counts.isfinite() & (counts >= 0)).all()) or not bool(counts.any()):
        raise UsageError("label_counts: expected numbers of examples, from 0 up and not all 0; got others")
    return like_state(state, {**state, bias: (tensor.double() - label_shares(counts).log()).to(tensor.dtype)})


def log_prior(node: Node, classes: int) -> Tensor:
    """Logarithm of the node's label shares; a class without an example counts as one; noised for privacy.

    Raises
    ------
    CalibrationError
        If the batches lack integer targets from 0 to ``classes - 1``.
    RebasinError
        If noise is asked for, and an example has several targets.

    Examples
    --------
    >>> batches = [(torch.zeros(4, 1), torch.tensor([0, 0, 0, 1]))]
    >>> log_prior(Node(torch.nn.Linear(1, 2), {}, {}, batches), 2)
    tensor([-0.2877, -1.3863], dtype=torch.float64)
    """
    counts = torch.zeros(classes, dtype=torch.float64, device="cpu")
    shapes = set[int]()
    for _, _, target in node.data():
        if not isinstance(target, Tensor) or target.is_floating_point() or not target.numel():
            raise CalibrationError("batches: label_prior needs integer targets; give (input, target) batches")
        shapes.add(target.ndim)
        labels = target.flatten().cpu()
        if int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise CalibrationError(f"batches: expected targets from 0 to {classes - 1}; got {int(labels.max())}")
        counts += labels.bincount(minlength=classes)
    if node.privacy is not None and shapes != {1}:
        raise RebasinError("privacy: label_prior takes one target an example; got targets with further axes")
    if node.privacy is not None:  # one example replaced takes from one count and adds to another
        counts = counts + node.privacy.noise * math.sqrt(2) * source_of_noise(None)(counts)
    return label_shares(counts).log()


def label_shares(counts: Tensor) -> Tensor:
    """The share of each class, where one without an example counts as one; its logarithm is the label prior's.

    >>> label_shares(torch.tensor([3.0, 0.0]))
    tensor([0.7500, 0.2500])
    """
    counts = counts.clamp_min(1)
    return counts / counts.sum()
