"""What the merge of clients that trained apart has to be compared with (the ordinary baselines)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedrebasin.simulations.measures import correct_prior, label_prior

Score = dict[str, float]


def score(logits: Tensor, labels: Tensor) -> Score:
    """Mean cross-entropy and the share of right answers.

    >>> score(torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1]))["accuracy"]
    0.5
    """
    return {
        "loss": float(F.cross_entropy(logits, labels)),
        "accuracy": float((logits.argmax(1) == labels).double().mean()),
    }


def client_baselines(
    client_logits: Sequence[Tensor],
    client_labels: Sequence[Tensor],
    test_labels: Tensor,
    classes: int,
    *,
    nodes: Sequence[int] | None = None,
) -> dict[str, object]:
    """Score each client alone, alone with its label prior corrected, and the ensemble of their logits.

    Parameters
    ----------
    client_logits : sequence of Tensor, shape (n, classes)
        Each client's logits on the test images.
    client_labels : sequence of Tensor
        The labels that each client trained on.
    nodes : sequence of int, optional
        Their numbers; from 0 by default.

    Returns
    -------
    dict
        ``clients`` (a list with ``loss``, ``accuracy``, ``corrected_loss``, ``corrected_accuracy``, ``examples``) and
        ``ensemble``.
    """
    clients = []
    numbers = range(len(client_logits)) if nodes is None else nodes
    for node, logits, labels in zip(numbers, client_logits, client_labels, strict=True):
        alone = score(logits, test_labels)
        corrected = score(correct_prior(logits, label_prior(labels, classes)), test_labels)
        row = {"node": node, "examples": len(labels), **alone}
        clients.append(row | {f"corrected_{key}": value for key, value in corrected.items()})
    ensemble = score(torch.stack(list(client_logits)).mean(0), test_labels)
    return {"clients": clients, "ensemble": ensemble}
