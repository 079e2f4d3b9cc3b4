"""Training and evaluation of the simulations' networks, on CPU and GPU alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedrebasin.errors import UsageError
from fedrebasin.simulations.acceleration import choose_kernels, compiled, fused, mixed_precision
from fedrebasin.simulations.augment import BatchMaker
from fedrebasin.simulations.data import Dataset
from fedrebasin.simulations.train_checkpoint import TrainCheckpoint

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
    augment: str = "shift",
    compile_model: bool = False,
    precision: str = "auto",
    checkpoint: TrainCheckpoint | None = None,
) -> float:
    """Train ``model`` in place on uint8 ``images`` and return the mean loss of the last epoch.

    Parameters
    ----------
    images, labels : Tensor
        uint8 ``(n, channels, height, width)`` and int64 ``(n,)``; moved to ``device`` once.
    progress : callable, optional
        Called with the epoch (from 1) and its mean training loss.
    augment : str
        One of ``augment.AUGMENTATIONS``, where the data set is augmented at all.
    compile_model : bool
        Compile the network first: a minute that pays on a GPU in long trainings.
    precision : str
        One of ``acceleration.PRECISIONS``: bfloat16 is faster on processors that multiply in it.
    checkpoint : TrainCheckpoint, optional
        Where the training is kept between epochs, and from where it goes on; not with a proximal term, whose
        start is not kept.
    """
    if checkpoint is not None and recipe.prox:
        raise UsageError("checkpoint: expected a recipe without prox, whose start is not kept; leave one of them out")
    trainer = Trainer(
        *(model, data, images, labels),
        recipe=recipe,
        epochs=epochs,
        seed=seed,
        device=device,
        augment=augment,
        compile_model=compile_model,
        precision=precision,
    )
    first = trainer.resume(checkpoint) if checkpoint is not None else 0
    mean_loss = math.nan
    for epoch in range(first + 1, epochs + 1):
        mean_loss = trainer.epoch()
        if progress is not None:
            progress(epoch, mean_loss)
        if checkpoint is not None and epoch < epochs:
            checkpoint.keep(model, trainer.optimizer, trainer.maker.generators, epoch=epoch, steps=trainer.steps)
    model.to(memory_format=torch.contiguous_format)
    return mean_loss


class Trainer:
    """A network in training, its data on the device, and one gradient step after the other; see :func:`train`."""

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        images: Tensor,
        labels: Tensor,
        *,
        recipe: Recipe,
        epochs: int,
        seed: int,
        device: torch.device,
        augment: str = "shift",
        compile_model: bool = False,
        precision: str = "auto",
    ) -> None:
        choose_kernels(device)
        # a third faster on the CPU, more on a GPU
        self.model = model.to(device).to(memory_format=torch.channels_last).train()
        self.forward = compiled(self.model, wanted=compile_model)
        self.maker = BatchMaker(data, images.to(device), seed=seed, augment=augment)
        self.labels, self.device, self.recipe = labels.to(device), device, recipe
        self.precision = precision
        self.batch = min(recipe.batch, len(images))
        self.optimizer = _optimizer(self.model, recipe, fused(device, precision))
        self.factor = _schedule(recipe, epochs * max(1, len(images) // self.batch))
        self.steps = 0
        self.start = [parameter.detach().clone() for parameter in model.parameters()] if recipe.prox else []

    def resume(self, checkpoint: TrainCheckpoint) -> int:
        """Go on from what ``checkpoint`` has kept; returns the epochs that are done."""
        done, self.steps = checkpoint.restore(self.model, self.optimizer, self.maker.generators)
        return done

    def epoch(self) -> float:
        """Take one step for each batch of an epoch; returns their mean loss."""
        losses = [self.step(rows) for rows in self.maker.rows(self.batch)]
        total = torch.zeros((), device=self.device)
        for loss in losses:
            total += loss
        return float(total) / len(losses)

    def step(self, rows: Tensor) -> Tensor:
        """Take one gradient step on the images of ``rows``; returns the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr * self.factor(self.steps)
        x = self.maker.batch(rows)
        self.optimizer.zero_grad(set_to_none=True)
        with mixed_precision(self.device, self.precision):
            loss = F.cross_entropy(self.forward(x).float(), self.labels[rows])
        if self.start:
            loss = loss + _proximal_term(self.model, self.start, self.recipe.prox)
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.steps += 1
        return loss.detach()


def _optimizer(model: nn.Module, recipe: Recipe, one_kernel: bool | None) -> torch.optim.Optimizer:
    parameters, decay = model.parameters(), recipe.weight_decay
    if recipe.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=recipe.lr, weight_decay=decay, fused=one_kernel)
    return torch.optim.SGD(parameters, lr=recipe.lr, momentum=0.9, nesterov=True, weight_decay=decay, fused=one_kernel)


def _schedule(recipe: Recipe, steps: int) -> Callable[[int], float]:
    """What the learning rate is multiplied by at each step, from 0."""

    def factor(step: int) -> float:
        if recipe.schedule == "constant":
            return 1.0
        warm_up = max(1, round(0.3 * steps))
        if step < warm_up:
            return (step + 1) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))

    return factor


def _proximal_term(model: nn.Module, start: list[Tensor], prox: float) -> Tensor:
    distances = [(now - then).square().sum() for now, then in zip(model.parameters(), start, strict=True)]
    return 0.5 * prox * torch.stack(distances).sum()


@torch.no_grad()
def predict(model: nn.Module, data: Dataset, images: Tensor, *, device: torch.device, batch: int = 1000) -> Tensor:
    """Logits of ``model`` in evaluation mode on uint8 ``images``: float32 ``(n, classes)`` on the CPU."""
    model.to(device).eval()
    parts = []
    for chunk in torch.split(images, batch):
        with mixed_precision(device):
            parts.append(model(data.normalise(chunk.to(device))).float().cpu())
    return torch.cat(parts)
