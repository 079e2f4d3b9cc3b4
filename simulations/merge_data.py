"""Calibration data from a path: .npy or .npz, Parquet as on the Hugging Face hub, or a folder of images."""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedrebasin.errors import UsageError, first_line

_IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"}
_IMAGE_COLUMNS, _LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label")
_INPUT_KEYS, _LABEL_KEYS = ("x", "images", "inputs", "data"), ("y", "labels", "targets")
_BATCH = 100
#: what helps where labels are no classes
REMEDY = "number the classes as the model does, or leave the labels out"

#: an example's place -> what it holds; how many there are; their labels
_Read = tuple[Callable[[int], Any], int, Any]


def read_calibration(
    path: Path,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    count: int = 1000,
    seed: int = 0,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    keyword: str = "",
) -> tuple[list[Any], bool]:
    """Read batches of up to 100 examples, and whether they have labels.

    Parameters
    ----------
    path : Path
        ``.npy`` (with ``labels.npy`` beside it, if there is one), ``.npz`` (``x``, ``images`` or ``inputs``; ``y`` or
        ``labels``), a Parquet file or a folder of them (columns ``image`` or ``img``; ``label`` or ``fine_label``),
        or a folder of images; with a folder for each class the class is the folder's place in the alphabet.
    shape : tuple of int
        Of one example: channels, height and width for images, which are resized to it.
    dtype : torch.dtype
        What the model takes. 8-bit images become floats from 0 to 1, then ``(x - mean) / std``; other arrays stay.
    count : int
        At most so many examples, drawn at random.
    mean, std : sequence of float
        One for each channel.
    keyword : str
        The input's name, if the model takes it by its name: inputs are then dicts.

    Returns
    -------
    list of inputs, or of (inputs, Tensor)
    bool

    Raises
    ------
    UsageError
        If there is nothing, or something else, at the path.
    """
    read, total, labels = _open(path, shape)
    if total == 0:
        raise UsageError(f"--calibration: expected examples in {path}; there are none")
    if labels is not None and np.shape(labels)[:1] != (total,):
        got = next(iter(np.shape(labels)), "one number")
        raise UsageError(f"--calibration: expected a label for each of {total} examples in {path}; got {got}")
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].tolist()
    first, scale = _channels(mean, "--mean", shape, 0.0), _channels(std, "--std", shape, 1.0)
    examples = []
    for place in chosen:
        array = np.array(read(place))
        if array.dtype.kind not in ("biufc" if dtype.is_complex else "biuf"):
            raise UsageError(f"--calibration: expected numbers for a model of {dtype} in {path}; got {array.dtype}")
        example = torch.as_tensor(array.astype(array.dtype.newbyteorder("=")))
        if tuple(example.shape) != shape:
            raise UsageError(
                f"--calibration: expected examples of shape {shape}, as --input says; got {tuple(example.shape)}"
            )
        if example.dtype is torch.uint8 and dtype.is_floating_point:
            example = (example.float() / 255 - first) / scale
        elif mean or std:
            raise UsageError(
                f"{'--mean' if mean else '--std'}: expected 8-bit images in {path} and a model of floats; got "
                f"{example.dtype} for {dtype}; leave it out, and normalise the array itself"
            )
        if example.is_floating_point() and not bool(example.isfinite().all()):
            raise UsageError(f"--calibration: example {place} in {path} holds a NaN or an infinity")
        whole = example.to(dtype).to(example.dtype) if _counts(dtype) else example
        if not torch.equal(whole, example):
            raise UsageError(f"--calibration: expected {dtype}, as --input says; example {place} in {path} has others")
        examples.append(example.to(dtype))
    tensors = [torch.stack(examples[at : at + _BATCH]) for at in range(0, len(examples), _BATCH)]
    inputs = [{keyword: tensor} if keyword else tensor for tensor in tensors]
    if labels is None:
        return inputs, False
    targets = np.asarray(labels)[chosen]
    if targets.dtype.kind not in "biu":
        raise UsageError(f"--calibration: expected integer labels in {path}; got {targets.dtype}; {REMEDY}")
    return list(zip(inputs, torch.split(torch.as_tensor(targets.astype(np.int64)), _BATCH), strict=True)), True


def _counts(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex)


def _channels(values: Sequence[float], option: str, shape: tuple[int, ...], default: float) -> Tensor:
    if not values:
        return torch.tensor(default)
    if len(values) != shape[0] or (option == "--std" and min(values) <= 0):
        least = ", above 0" if option == "--std" else ""
        raise UsageError(f"{option}: expected a number for each of {shape[0]} channels{least}; got {list(values)}")
    return torch.tensor(list(values)).view(-1, *[1] * (len(shape) - 1))


def _open(path: Path, shape: tuple[int, ...]) -> _Read:
    try:
        if path.is_dir():
            files = sorted(path.glob("*.parquet"))
            return _parquet(files, shape) if files else _images(path, shape)
        if path.suffix == ".npy":
            beside = path.with_name("labels.npy")
            labels = np.load(beside, allow_pickle=False) if beside.exists() and beside != path else None
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if isinstance(array, np.ndarray):
                return _array(array, path, shape, labels)
            raise UsageError(f"--calibration: expected one array in {path}; got an .npz; give it that suffix")
        if path.suffix == ".npz":
            if not zipfile.is_zipfile(path) and path.is_file():
                raise UsageError(f"--calibration: expected a whole .npz in {path}; got something else")
            with np.load(path, allow_pickle=False) as archive:
                inputs = next((archive[key] for key in _INPUT_KEYS if key in archive), None)
                if inputs is None:
                    raise UsageError(f"--calibration: expected one of {', '.join(_INPUT_KEYS)} in {path}")
                return _array(inputs, path, shape, next((archive[key] for key in _LABEL_KEYS if key in archive), None))
        if path.suffix == ".parquet" and path.exists():
            return _parquet([path], shape)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"--calibration: cannot read {path} ({first_line(error)})") from error
    raise UsageError(
        f"--calibration: expected .npy, .npz, .parquet, or a folder of images or Parquet files; got {path}"
        + ("" if path.exists() else ", which is not there")
    )


def _array(array: Any, path: Path, shape: tuple[int, ...], labels: Any) -> _Read:
    """Rows of an array; images with the channels last are turned."""
    if array.ndim == 0:
        raise UsageError(f"--calibration: expected an array of examples in {path}; got one number")
    last = (
        array.dtype == np.uint8 and array.ndim == 4 and len(shape) == 3 and array.shape[3] == shape[0] != array.shape[1]
    )
    return (lambda place: np.moveaxis(array[place], -1, 0) if last else array[place]), len(array), labels


def _images(folder: Path, shape: tuple[int, ...]) -> _Read:
    classes = sorted(one for one in folder.iterdir() if one.is_dir())
    found = [
        (file, label)
        for label, one in enumerate(classes or [folder])
        for file in sorted(one.iterdir())
        if file.suffix.lower() in _IMAGE_SUFFIXES
    ]
    labels = np.array([label for _, label in found]) if classes else None
    return (lambda place: _image(found[place][0].read_bytes(), str(found[place][0]), shape)), len(found), labels


def _parquet(files: Sequence[Path], shape: tuple[int, ...]) -> _Read:
    import pyarrow.parquet as parquet

    cells: list[Any] = []
    labels: list[int] = []
    for file in files:
        names = parquet.read_schema(file).names
        image = next((name for name in _IMAGE_COLUMNS if name in names), None)
        label = next((name for name in _LABEL_COLUMNS if name in names), None)
        if image is None:
            raise UsageError(f"--calibration: expected a column image or img in {file}; it has {', '.join(names)}")
        table = parquet.read_table(file, columns=[name for name in (image, label) if name])
        cells += table.column(image).to_pylist()
        labels += table.column(label).to_pylist() if label else []
    return (lambda place: _image(_bytes(cells[place]), str(files[0]), shape)), len(cells), labels or None


def _bytes(cell: Any) -> bytes:
    data = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(data, bytes):
        raise UsageError("--calibration: expected an image column with the images' bytes")
    return data


def _image(data: bytes, name: str, shape: tuple[int, ...]) -> Any:
    """A decoded image, as uint8 (channels, height, width)."""
    from PIL import Image, UnidentifiedImageError

    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UsageError(f"--calibration: images need an --input such as 1x3x32x32; got one of shape {shape}")
    try:
        image = Image.open(io.BytesIO(data)).convert("L" if shape[0] == 1 else "RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise UsageError(f"--calibration: cannot read an image of {name} ({error})") from error
    if image.size != (shape[2], shape[1]):
        image = image.resize((shape[2], shape[1]), Image.Resampling.BILINEAR)
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
