"""The data set that a command was given: what lies in a folder has to be the one that was named."""

from __future__ import annotations

from pathlib import Path

import torch

from fedrebasin.errors import UsageError
from fedrebasin.simulations.data import CATALOGUE, Dataset, load_dataset

#: channels, height and width of an image, where it may come from a folder
SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32)}


def load_named(name: str, path: Path | str | None) -> Dataset:
    """Load a data set as ``load_dataset`` does, and refuse a folder that holds another one.

    Raises
    ------
    UsageError
        For what ``load_dataset`` refuses; if images have another shape, training lacks a class, or a label is none.

    Examples
    --------
    >>> load_named("digits", None).shape
    (1, 8, 8)
    """
    check_path(name, path)
    if path is None or name not in SHAPES:
        return load_dataset(name)
    classes = CATALOGUE[name][3]
    shape = "x".join(map(str, SHAPES[name]))
    expected = f"--data: expected {name} in {path}, images of {shape} and all labels from 0 to {classes - 1}"
    remedy = "give a folder with this data set, or leave --data out to download it"
    try:
        data = load_dataset(name, str(path))
    except UsageError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, KeyError) as error:  # of cells that are no images or labels
        raise UsageError(f"{expected}; got others ({type(error).__name__}: {error}); {remedy}") from error
    for images in (data.train_images, data.test_images):
        if tuple(images.shape[1:]) != SHAPES[name]:
            raise UsageError(f"{expected}; got images of {'x'.join(map(str, images.shape[1:]))}; {remedy}")
    for labels in (data.train_labels, data.test_labels):
        if labels.dtype != torch.int64 or int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise UsageError(f"{expected}; got labels from {labels.min():g} to {labels.max():g}; {remedy}")
    count = len(set(data.train_labels.tolist()))
    if count < classes:
        raise UsageError(f"{expected}; got training images of {count} classes; {remedy}")
    return data


def check_path(name: str, path: Path | str | None) -> None:
    """Refuse a folder that is not there, or has no meaning."""
    if path is None:
        return
    if name == "digits":
        raise UsageError("--data: digits come with scikit-learn and take no folder; leave --data out")
    if not Path(path).is_dir():
        raise UsageError(f"--data: expected a folder with Parquet files of {name}; there is no folder {path}")
