"""What a silo does: a network of two layers and its training, in NumPy, on the silo's share of the digits."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits

HIDDEN, EPOCHS, BATCH, RATE = 64, 30, 32, 0.1
Weights = dict[str, np.ndarray]


def initial(seed: int) -> Weights:
    """Fresh weights, as PyTorch's ``Linear`` draws them; keys and shapes of ``server_app.make_network``."""
    generator = np.random.default_rng(seed)
    weights = {}
    for name, (rows, columns) in {"0": (HIDDEN, 64), "2": (10, HIDDEN)}.items():
        bound = columns**-0.5
        weights[f"{name}.weight"] = generator.uniform(-bound, bound, (rows, columns)).astype(np.float32)
        weights[f"{name}.bias"] = generator.uniform(-bound, bound, rows).astype(np.float32)
    return weights


def rows_of(partition: int, partitions: int) -> tuple[np.ndarray, np.ndarray]:
    """The images (rows, 64) from 0 to 1 and labels of one silo: every so-many-th of all digits."""
    digits = load_digits()
    rows = slice(partition, None, partitions)
    return (digits.data[rows] / 16).astype(np.float32), digits.target[rows]


def train(sent: Weights, partition: int, partitions: int, server_round: int) -> tuple[Weights, int]:
    """Train; in round 1 from weights of the silo's own, as if it had trained before it met the others."""
    weights = initial(1 + partition) if server_round == 1 else {name: value.copy() for name, value in sent.items()}
    images, labels = rows_of(partition, partitions)
    generator = np.random.default_rng([partition, server_round])
    for _ in range(EPOCHS):
        order = generator.permutation(len(images))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            step(weights, images[rows], labels[rows])
    return weights, len(images)


def step(weights: Weights, images: np.ndarray, labels: np.ndarray) -> None:
    """One step of gradient descent on the cross-entropy, in place."""
    hidden = np.maximum(images @ weights["0.weight"].T + weights["0.bias"], 0)
    scores = hidden @ weights["2.weight"].T + weights["2.bias"]
    chances = np.exp(scores - scores.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    chances[np.arange(len(labels)), labels] -= 1
    back = chances / len(labels)
    below = (back @ weights["2.weight"]) * (hidden > 0)
    for name, error, inputs in (("2", back, hidden), ("0", below, images)):
        weights[f"{name}.weight"] -= RATE * (error.T @ inputs)
        weights[f"{name}.bias"] -= RATE * error.sum(0)
