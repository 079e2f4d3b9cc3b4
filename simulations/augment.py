"""Batches from uint8 images that lie on the training's device: normalised and augmented where they lie."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fedrebasin.errors import UsageError
from fedrebasin.simulations.data import Dataset


class BatchMaker:
    """Turns rows of the images into batches of a network, and draws what augmentation needs.

    On a GPU each random number is drawn there, so that a step waits for nothing; on the CPU one generator serves the
    order of the rows and the augmentation, as it always has, so that results keep their bits.

    Parameters
    ----------
    images : Tensor, uint8, shape (n, channels, height, width)
        On the device of the training.
    augment : str
        One of ``AUGMENTATIONS``; without a meaning where the data set is not augmented.
    """

    def __init__(self, data: Dataset, images: Tensor, *, seed: int, augment: str = "shift") -> None:
        if augment not in AUGMENTATIONS:
            raise UsageError(f"--augment: expected one of {', '.join(AUGMENTATIONS)}; got {augment!r}")
        self.images = images
        self.order = torch.Generator().manual_seed(seed)
        self.draws = self.order if images.device.type == "cpu" else torch.Generator(images.device).manual_seed(seed)
        self.augment = AUGMENTATIONS[augment] if data.augment else None
        shape = (1, -1, 1, 1)
        self.mean = torch.tensor(data.mean, device=images.device).view(shape)
        self.std = torch.tensor(data.std, device=images.device).view(shape)

    @property
    def generators(self) -> list[torch.Generator]:
        """Those whose states decide the batches to come."""
        return [self.order] if self.draws is self.order else [self.order, self.draws]

    def rows(self, batch: int) -> Iterator[Tensor]:
        """Row numbers of the batches of one epoch; the rest is dropped: another one each time."""
        order = torch.randperm(len(self.images), generator=self.order).to(self.images.device)
        yield from torch.split(order[: len(order) // batch * batch], batch)

    def batch(self, rows: Tensor) -> Tensor:
        """The images of these rows as float32, channels last."""
        x = (self.images[rows].float() - self.mean) / self.std
        if self.augment is not None:
            x = self.augment(x, self.draws)
        return x.contiguous(memory_format=torch.channels_last)


def flip_and_shift(x: Tensor, generator: torch.Generator, reach: int = 4) -> Tensor:
    """Mirror half of the images and move each by up to ``reach`` pixels, zeros coming in at the border."""
    n, channels, height, width = x.shape
    flip = _flips(n, generator).to(x.device)
    x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
    down, across = torch.randint(0, 2 * reach + 1, (2, n, 1), generator=generator, device=generator.device).to(x.device)
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, *(reach,) * 4))
    # with the channels last a row of an image is one run of numbers, which its first pixel tells: copied whole
    image = (height + 2 * reach) * torch.arange(n, device=x.device).view(-1, 1)
    first = (image + down + torch.arange(height, device=x.device)) * (width + 2 * reach) + across
    runs = padded.reshape(-1).unfold(0, width * channels, channels)
    return runs[first].view(n, height, width, channels).permute(0, 3, 1, 2)


def flip_and_zoom(x: Tensor, generator: torch.Generator, low: float = 0.8, high: float = 1.2) -> Tensor:
    """Mirror half of the images and magnify each by a factor between ``low`` and ``high``, its logarithm uniform.

    The window that is shown lies anywhere inside the image, or, where it is the larger, around it: zeros come in.
    Git Re-Basin's code crops at random with this range of zooms (and turns images as well, which is not done here).
    """
    n = len(x)
    flip = _flips(n, generator)
    draws = torch.rand(3, n, generator=generator, device=generator.device)
    side = torch.exp(-(math.log(low) + (math.log(high) - math.log(low)) * draws[0]))  # of the window, in images
    centre = (2 * draws[1:] - 1) * (1 - side).abs()
    zero = torch.zeros_like(side)
    across = torch.stack([torch.where(flip, -side, side), zero, centre[0]], 1)
    down = torch.stack([zero, side, centre[1]], 1)
    window = torch.stack([across, down], 1).to(x.device)
    grid = F.affine_grid(window, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def flip_only(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images."""
    return torch.where(_flips(len(x), generator).to(x.device).view(-1, 1, 1, 1), x.flip(3), x)


def _flips(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, device=generator.device).lt(0.5)


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "shift": flip_and_shift,
    "zoom": flip_and_zoom,
    "flip": flip_only,
}
