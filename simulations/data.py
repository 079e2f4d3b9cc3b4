"""Data sets as uint8 tensors: bundled, from a folder of Parquet files, or downloaded by name."""

from __future__ import annotations

import io
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedrebasin.errors import UsageError

#: name -> (hub name, image column, label column, number of classes, augment with flips and shifts)
CATALOGUE = {
    "digits": ("", "", "", 10, False),
    "mnist": ("ylecun/mnist", "image", "label", 10, False),
    "cifar10": ("uoft-cs/cifar10", "img", "label", 10, True),
    "cifar100": ("uoft-cs/cifar100", "img", "fine_label", 100, True),
}


@dataclass(frozen=True)
class Dataset:
    """Images as uint8 ``(n, channels, height, width)`` and labels as int64 ``(n,)``, train and test.

    ``mean`` and ``std`` are the channels' statistics over the training images, in raw pixel values;
    ``source`` says where the images came from, because the order of rows differs between sources.
    """

    name: str
    source: str
    classes: int
    augment: bool
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    def normalise(self, images: Tensor) -> Tensor:
        """Turn uint8 images into float32 with the training set's mean 0 and standard deviation 1."""
        shape = (1, -1, 1, 1)
        mean = torch.tensor(self.mean, device=images.device).view(shape)
        std = torch.tensor(self.std, device=images.device).view(shape)
        return (images.float() - mean) / std


@lru_cache(maxsize=2)
def load_dataset(name: str, path: str | None = None) -> Dataset:
    """Load ``digits``, ``mnist``, ``cifar10`` or ``cifar100``.

    Parameters
    ----------
    name : str
        One of the names above.
    path : str, optional
        A folder with ``train-*.parquet`` and ``test-*.parquet`` in the schema of the Hugging Face
        original. Without it the data set is downloaded by name; digits come with scikit-learn.

    Raises
    ------
    UsageError
        If the name is unknown, the folder is missing or incomplete, or the download fails.

    Examples
    --------
    >>> load_dataset("digits").train_images.shape
    torch.Size([1347, 1, 8, 8])
    """
    if name not in CATALOGUE:
        raise UsageError(f"data set: expected one of {', '.join(CATALOGUE)}; got {name!r}")
    if name == "digits":
        splits, source = _digits(), "scikit-learn"
    elif path is not None:
        splits, source = _parquet(name, Path(path)), "parquet folder"
    else:
        splits, source = _download(name), f"hub:{CATALOGUE[name][0]}"
    (train_images, train_labels), (test_images, test_labels) = splits
    pixels = train_images.float()
    return Dataset(
        name=name,
        source=source,
        classes=CATALOGUE[name][3],
        augment=CATALOGUE[name][4],
        train_images=train_images,
        train_labels=train_labels,
        test_images=test_images,
        test_labels=test_labels,
        mean=tuple(pixels.mean((0, 2, 3)).tolist()),
        std=tuple(pixels.std((0, 2, 3)).tolist()),
    )


Split = tuple[Tensor, Tensor]


def _digits() -> tuple[Split, Split]:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise UsageError(f'digits need scikit-learn ({error}); pip install "fedrebasin[simulation]"') from error
    bundle: Any = load_digits()
    # 0..16 becomes 0..255, so that every data set has the same pixel range
    images = torch.from_numpy(bundle.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bundle.target).long()
    train, test = train_test_split(np.arange(len(labels)), test_size=0.25, random_state=0, stratify=labels)
    return (images[train], labels[train]), (images[test], labels[test])


def _parquet(name: str, folder: Path) -> tuple[Split, Split]:
    if not folder.is_dir():
        raise UsageError(f"--data: expected a folder with Parquet files of {name}; there is no folder {folder}")
    splits = []
    for split in ("train", "test"):
        files = sorted(folder.glob(f"{split}-*.parquet"))
        if not files:
            raise UsageError(f"--data: expected {split}-*.parquet in {folder}; there is none")
        splits.append(_read(name, files))
    return splits[0], splits[1]


def _read(name: str, files: list[Path]) -> Split:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UsageError(f'Parquet files need pyarrow ({error}); pip install "fedrebasin[simulation]"') from error
    _, image_column, label_column, _, _ = CATALOGUE[name]
    images, labels = [], []
    for file in files:
        try:
            table = parquet.read_table(file, columns=[image_column, label_column])
        except Exception as error:  # pyarrow raises many kinds for a file that is not the expected one
            raise UsageError(f"--data: {file} is not a Parquet file of {name} ({error})") from error
        images += [cell["bytes"] for cell in table.column(image_column).to_pylist()]
        labels += table.column(label_column).to_pylist()
    return _decode(images), torch.tensor(labels)


def _decode(images: list[bytes]) -> Tensor:
    from PIL import Image

    arrays = [np.asarray(Image.open(io.BytesIO(image))) for image in images]
    stacked = torch.from_numpy(np.stack(arrays))
    return (stacked.unsqueeze(1) if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2)).contiguous()


def _download(name: str) -> tuple[Split, Split]:
    hub_name, image_column, label_column, _, _ = CATALOGUE[name]
    remedy = "check the network, or give --data PATH with Parquet files of the data set"
    try:
        from datasets import Image as ImageFeature
        from datasets import load_dataset as load_from_hub
    except ImportError as error:
        raise UsageError(f'a download needs datasets ({error}); pip install "fedrebasin[simulation]"') from error
    splits = []
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # each retry would be two lines; the error says it all
    for split in ("train", "test"):
        try:
            rows = load_from_hub(hub_name, split=split).cast_column(image_column, ImageFeature(decode=False))
        except Exception as error:  # the hub's client raises many kinds for one cause: no network
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UsageError(f"{name}: cannot download {hub_name} ({first_line}); {remedy}") from error
        splits.append((_decode([cell["bytes"] for cell in rows[image_column]]), torch.tensor(rows[label_column])))
    return splits[0], splits[1]
