"""A node's label shares, which may come off the goals of its last layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedrebasin.corrections.privacy import source_of_noise
from fedrebasin.corrections.queries import Node
from fedrebasin.errors import CalibrationError, RebasinError


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
    counts = torch.zeros(classes, dtype=torch.float64)
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
    counts = counts.clamp_min(1)
    return (counts / counts.sum()).log()
