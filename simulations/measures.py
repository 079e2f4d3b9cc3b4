"""What is measured on logits: loss, top-k, calibration; and what logits are combined or corrected by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fedrebasin.corrections.label_prior import label_shares
from fedrebasin.errors import UsageError


def measure(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Cross-entropy, top-1, top-5 and expected calibration error, as fractions.

    Parameters
    ----------
    logits : Tensor, shape (n, classes), floating
    labels : Tensor, shape (n,), int64

    Examples
    --------
    >>> measure(torch.tensor([[9.0, 0.0], [0.0, 9.0]]), torch.tensor([0, 0]))["top1"]
    0.5
    """
    log_probabilities = logits.double().log_softmax(1)
    return {
        "loss": float(F.nll_loss(log_probabilities, labels)),
        "top1": top_k(logits, labels, 1),
        "top5": top_k(logits, labels, 5),
        "ece": expected_calibration_error(logits, labels),
    }


def top_k(logits: Tensor, labels: Tensor, k: int) -> float:
    """Share of the images whose label is among their own ``k`` largest logits.

    The Git Re-Basin code tests membership in the top five of the whole batch, which is nearly always true.

    Examples
    --------
    >>> top_k(torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0]]), torch.tensor([1, 2]), 2)
    0.5
    """
    nearest = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return float((nearest == labels.unsqueeze(1)).any(1).double().mean())


def reliability(logits: Tensor, labels: Tensor, bins: int = 15) -> dict[str, list[float]]:
    """Confidence against accuracy in ``bins`` intervals of equal width of the largest probability.

    Returns
    -------
    dict
        ``count``: images in each bin; ``confidence`` and ``accuracy``: sums over them (not means, so that bins of
        several seeds can be added).

    References
    ----------
    Guo, Pleiss, Sun, Weinberger (2017), "On calibration of modern neural networks", Section 2.

    Examples
    --------
    >>> reliability(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]), bins=2)
    {'count': [2.0, 0.0], 'confidence': [1.0, 0.0], 'accuracy': [1.0, 0.0]}
    """
    confidence, guess = logits.double().softmax(1).max(1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
    place = torch.bucketize(confidence, edges)  # a confidence on an edge belongs to the bin below it
    zeros = torch.zeros(bins, dtype=torch.float64)
    return {
        "count": zeros.index_add(0, place, torch.ones_like(confidence)).tolist(),
        "confidence": zeros.index_add(0, place, confidence).tolist(),
        "accuracy": zeros.index_add(0, place, (guess == labels).double()).tolist(),
    }


def expected_calibration_error(logits: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean over images of the distance between confidence and accuracy in their bin (Guo et al., equation 5).

    Examples
    --------
    >>> expected_calibration_error(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1]))
    0.0
    """
    found = reliability(logits, labels, bins)
    gaps = [abs(accuracy - sure) for accuracy, sure in zip(found["accuracy"], found["confidence"], strict=True)]
    return sum(gaps) / len(labels)


def label_prior(labels: Tensor, classes: int) -> Tensor:
    """Share of each class among ``labels``, where one without an example counts as one: float64 ``(classes,)``.

    >>> label_prior(torch.tensor([0, 0, 0, 1]), 2)
    tensor([0.7500, 0.2500], dtype=torch.float64)
    """
    return label_shares(torch.bincount(labels, minlength=classes).double())


def correct_prior(logits: Tensor, prior: Tensor) -> Tensor:
    """Take the label prior of the training data off: ``logits - log prior``, right where test classes are balanced.

    Raises
    ------
    UsageError
        If a class has prior 0, which no correction brings back.

    Examples
    --------
    >>> correct_prior(torch.tensor([[0.75, 0.25]]).log(), torch.tensor([0.75, 0.25])).softmax(1)
    tensor([[0.5000, 0.5000]])
    """
    if bool((prior <= 0).any()):
        missing = (prior <= 0).nonzero().flatten().tolist()
        raise UsageError(f"prior: expected a positive share of every class; classes {missing} have none")
    return logits - prior.log().to(logits.dtype)


def mean_of_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """Ensemble of probabilities, as its logarithm (float64), so that it can be measured like logits.

    >>> mean_of_probabilities([torch.tensor([[0.9, 0.1]]).log(), torch.tensor([[0.1, 0.9]]).log()]).exp()
    tensor([[0.5000, 0.5000]], dtype=torch.float64)
    """
    return torch.stack([part.double().log_softmax(1) for part in logits]).logsumexp(0) - torch.tensor(len(logits)).log()


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Temperature ``T`` that makes the cross-entropy of ``logits / T`` smallest, between 0.01 and 100.

    The loss is convex in ``1 / T``, so that its slope has one zero, which bisection on ``log T`` finds.

    Examples
    --------
    >>> logits = torch.tensor([[2.0, 0.0]] * 4) * 10
    >>> fitted = fit_temperature(logits, torch.tensor([0, 0, 0, 1]))  # 3 of 4: sigmoid(20 / T) = 3 / 4
    >>> round(20 / fitted, 4), round(float(torch.tensor(3.0).log()), 4)
    (1.0986, 1.0986)
    """
    logits = logits.double()
    target = logits.gather(1, labels.unsqueeze(1)).mean()
    low, high = -4.605170185988091, 4.605170185988091
    for _ in range(60):
        middle = (low + high) / 2
        inverse = torch.tensor(-middle, dtype=torch.float64).exp()
        expected = ((logits * inverse).softmax(1) * logits).sum(1).mean()
        if expected > target:  # too sure of itself: the slope in 1 / T is positive
            low = middle
        else:
            high = middle
    return float(torch.tensor((low + high) / 2, dtype=torch.float64).exp())
