"""Training and evaluation of the simulations' networks, on CPU and GPU alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrebasin.errors import UsageError
from fedrebasin.simulations.data import Dataset

Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    ``schedule`` is ``"one-cycle"`` (linear warm-up over the first 30%, then cosine, in one ``train`` call)
    or ``"constant"``; ``prox`` is FedProx's mu, the weight of half the squared distance to the start.
    """

    optimizer: str
    lr: float
    batch: int
    schedule: str
    weight_decay: float = 0.0
    prox: float = 0.0


RECIPES = {
    "mlp": Recipe("adam", 1e-3, 64, "one-cycle"),
    "conv": Recipe("sgd", 0.1, 128, "one-cycle", weight_decay=5e-4),
    "vgg": Recipe("sgd", 0.05, 128, "one-cycle", weight_decay=5e-4),
    "resnet20": Recipe("sgd", 0.1, 100, "one-cycle", weight_decay=5e-4),
}


def select_device(name: str) -> torch.device:
    """``auto`` is the GPU where there is one, otherwise the CPU.

    >>> select_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device: expected auto, cpu or cuda; got {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device: {name} was asked for and torch sees no GPU; use --device cpu")
    return device


def train(
    model: nn.Module,
    data: Dataset,
    images: Tensor,
    labels: Tensor,
    *,
    recipe: Recipe,
    epochs: int,
    seed: int,
    device: torch.device,
    progress: Progress | None = None,
) -> float:
    """Train ``model`` in place on uint8 ``images`` and return the mean loss of the last epoch.

    Parameters
    ----------
    images, labels : Tensor
        uint8 ``(n, channels, height, width)`` and int64 ``(n,)``; moved to ``device`` once.
    progress : callable, optional
        Called with the epoch (from 1) and its mean training loss.
    """
    model.to(device).to(memory_format=torch.channels_last).train()  # a third faster on the CPU, more on a GPU
    images, labels = images.to(device), labels.to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(model, recipe)
    batch = min(recipe.batch, len(images))
    batches = max(1, len(images) // batch)  # the rest of an epoch is dropped: another one each time
    scheduler = _scheduler(optimizer, recipe, epochs * batches)
    start = [parameter.detach().clone() for parameter in model.parameters()] if recipe.prox else []
    mean_loss = math.nan
    for epoch in range(1, epochs + 1):
        order = torch.randperm(len(images), generator=generator).to(device)
        total = torch.zeros((), device=device)
        for index in torch.split(order[: batches * batch], batch):
            x = data.normalise(images[index])
            if data.augment:
                x = flip_and_shift(x, generator)
            x = x.contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                loss = F.cross_entropy(model(x).float(), labels[index])
            if start:
                loss = loss + _proximal_term(model, start, recipe.prox)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            scheduler.step()
            total += loss.detach()
        mean_loss = float(total) / batches
        if progress is not None:
            progress(epoch, mean_loss)
    model.to(memory_format=torch.contiguous_format)
    return mean_loss


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=0.9, nesterov=True, weight_decay=recipe.weight_decay
    )


def _scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    def factor(step: int) -> float:
        if recipe.schedule == "constant":
            return 1.0
        warm_up = max(1, round(0.3 * steps))
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _proximal_term(model: nn.Module, start: list[Tensor], prox: float) -> Tensor:
    distances = [(now - then).square().sum() for now, then in zip(model.parameters(), start, strict=True)]
    return 0.5 * prox * torch.stack(distances).sum()


def flip_and_shift(x: Tensor, generator: torch.Generator, reach: int = 4) -> Tensor:
    """Mirror half of the images and move each by up to ``reach`` pixels, zeros coming in at the border."""
    n, _, height, width = x.shape
    flip = torch.rand(n, generator=generator).lt(0.5).to(x.device)
    x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
    shift = torch.randint(0, 2 * reach + 1, (2, n, 1), generator=generator).to(x.device)
    rows = shift[0] + torch.arange(height, device=x.device)
    columns = shift[1] + torch.arange(width, device=x.device)
    which = torch.arange(n, device=x.device).view(-1, 1, 1)
    padded = F.pad(x, (reach,) * 4).permute(0, 2, 3, 1)
    return padded[which, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


@torch.no_grad()
def predict(model: nn.Module, data: Dataset, images: Tensor, *, device: torch.device, batch: int = 1000) -> Tensor:
    """Logits of ``model`` in evaluation mode on uint8 ``images``: float32 ``(n, classes)`` on the CPU."""
    model.to(device).eval()
    parts = []
    for chunk in torch.split(images, batch):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            parts.append(model(data.normalise(chunk.to(device))).float().cpu())
    return torch.cat(parts)
