"""What fedrebasin merge reads as calibration data."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedrebasin.errors import UsageError
from fedrebasin.simulations.merge_data import read_calibration

SHAPE = (3, 6, 5)
PIXELS = np.random.default_rng(0).integers(0, 256, (7, *SHAPE), dtype=np.uint8)
LABELS = np.arange(7) % 3


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.moveaxis(pixels, 0, -1)).save(out, "PNG")
    return out.getvalue()


def rows(batches: list[torch.Tensor]) -> set[tuple[float, ...]]:
    return {tuple(row.flatten().tolist()) for row in torch.cat(batches)}


EXPECTED = {tuple(row) for row in (torch.from_numpy(PIXELS).float() / 255).flatten(1).tolist()}


def test_arrays_of_pixels_become_floats_with_the_channels_first(tmp_path: Path) -> None:
    np.save(tmp_path / "first.npy", PIXELS)
    np.save(tmp_path / "last.npy", np.moveaxis(PIXELS, 1, -1))
    for name in ("first", "last"):
        batches, labelled = read_calibration(tmp_path / f"{name}.npy", SHAPE)
        assert not labelled and rows(batches) == EXPECTED
    batches, _ = read_calibration(tmp_path / "first.npy", SHAPE, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 4.0])
    back = [
        batch * torch.tensor([1.0, 2.0, 4.0]).view(3, 1, 1) + torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
        for batch in batches
    ]
    torch.testing.assert_close(torch.cat(back).sum(), torch.from_numpy(PIXELS).float().sum() / 255)


def test_labels_stay_with_their_examples_and_the_draw_is_seeded(tmp_path: Path) -> None:
    values = np.arange(250, dtype=np.float32).reshape(250, 1)
    np.savez(tmp_path / "both.npz", x=values, y=np.arange(250))
    np.save(tmp_path / "values.npy", values)
    np.save(tmp_path / "labels.npy", np.arange(250))
    for name in ("both.npz", "values.npy"):
        batches, labelled = read_calibration(tmp_path / name, (1,), count=230, seed=3)
        assert labelled and [len(x) for x, _ in batches] == [100, 100, 30]
        assert all(torch.equal(x.flatten().long(), y) for x, y in batches)
        again, _ = read_calibration(tmp_path / name, (1,), count=230, seed=3)
        assert all(torch.equal(x, z) for (x, _), (z, _) in zip(batches, again, strict=True))


def test_parquet_files_and_folders_of_images_are_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    images = [{"bytes": png(pixels), "path": None} for pixels in PIXELS]
    (tmp_path / "parquet").mkdir()
    parquet.write_table(pa.table({"img": images, "fine_label": LABELS}), tmp_path / "parquet" / "train-0.parquet")
    for place, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
        folder = tmp_path / "classes" / f"class-{label}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{place}.png").write_bytes(png(pixels))
    by_pixels = {tuple(pixels.flatten().tolist()): label for pixels, label in zip(PIXELS, LABELS, strict=True)}
    for path in ("parquet", "parquet/train-0.parquet", "classes"):
        batches, labelled = read_calibration(tmp_path / path, SHAPE)
        assert labelled and rows([x for x, _ in batches]) == EXPECTED
        for x, y in batches:
            for image, label in zip((x * 255).round().int(), y.tolist(), strict=True):
                assert by_pixels[tuple(image.flatten().tolist())] == label
    batches, labelled = read_calibration(tmp_path / "classes" / "class-0", (1, 3, 3))
    assert not labelled and batches[0].shape == (3, 1, 3, 3)


def test_what_is_no_calibration_data_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((4, 2), dtype=np.float32))
    np.save(tmp_path / "nan.npy", np.full((4, 2), np.nan, dtype=np.float32))
    np.save(tmp_path / "none.npy", np.zeros((0, 2)))
    np.save(tmp_path / "objects.npy", np.array([{}, {}]), allow_pickle=True)
    np.savez(tmp_path / "odd.npz", z=np.zeros(3))
    np.savez(tmp_path / "short.npz", x=np.zeros((4, 2)), y=np.zeros(3, dtype=int))
    np.savez(tmp_path / "float.npz", x=np.zeros((4, 2)), y=np.zeros(4))
    np.savez(tmp_path / "words.npz", x=np.zeros((4, 2)), y=list("abca"))
    np.savez(tmp_path / "label.npz", x=np.zeros((4, 2)), y=np.array(1))
    np.savez(tmp_path / "texts.npz", x=np.array([["a", "b"]] * 4))
    np.savez(tmp_path / "complex.npz", x=np.zeros((4, 2), dtype=np.complex64))
    np.savez(tmp_path / "number.npz", x=np.float32(3))
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "texts.npz").read_bytes()[:-30])
    (tmp_path / "zip.npy").write_bytes((tmp_path / "texts.npz").read_bytes())
    (tmp_path / "array.npz").write_bytes((tmp_path / "x.npy").read_bytes())
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    for name, shape, said in (
        ("x.npy", (3,), r"examples of shape \(3,\), as --input says; got \(2,\)"),
        ("nan.npy", (2,), "holds a NaN"),
        ("none.npy", (2,), "there are none"),
        ("objects.npy", (2,), "cannot read"),
        ("odd.npz", (2,), "expected one of x, images"),
        ("short.npz", (2,), "a label for each of 4 examples"),
        ("float.npz", (2,), "integer labels"),
        ("words.npz", (2,), "integer labels in .*; got <U1; number the classes as the model does"),
        ("label.npz", (2,), "a label for each of 4 examples in .*; got one number"),
        ("texts.npz", (2,), "expected numbers for a model of torch.float32 in .*; got <U1"),
        ("complex.npz", (2,), "expected numbers for a model of torch.float32 in .*; got complex64"),
        ("number.npz", (2,), "expected an array of examples in .*; got one number"),
        ("empty.npy", (2,), "cannot read .*EOFError"),
        ("cut.npz", (2,), "expected a whole .npz in"),
        ("zip.npy", (2,), "expected one array in .*; got an .npz"),
        ("array.npz", (2,), "expected a whole .npz in"),
        ("empty", SHAPE, "there are none"),
        ("broken", SHAPE, "cannot read an image"),
        ("broken", (2,), "images need an --input such as"),
        ("absent.txt", (2,), "which is not there"),
    ):
        with pytest.raises(UsageError, match=said):
            read_calibration(tmp_path / name, shape)
    with pytest.raises(UsageError, match="--std: expected a number for each of 2"):
        read_calibration(tmp_path / "x.npy", (2,), std=[1.0])
    for option in ("mean", "std"):
        with pytest.raises(UsageError, match=f"--{option}: expected 8-bit images in .*; got torch.float32"):
            read_calibration(tmp_path / "x.npy", (2,), **{option: [0.5, 0.5]})
    with pytest.raises(UsageError, match="for each of 2 channels, above 0; got"):
        read_calibration(tmp_path / "x.npy", (2,), std=[0.0, 0.0])


def test_numbers_are_read_whatever_their_kind_and_named_inputs_become_dicts(tmp_path: Path) -> None:
    values = np.arange(8).reshape(4, 2)
    expected = {tuple(row) for row in values.tolist()}
    for name, kind in (("big", ">f4"), ("unsigned", "u2"), ("whole", "f8")):
        np.save(tmp_path / f"{name}.npy", values.astype(kind))
        for dtype in (torch.float32, torch.int64):
            (batch,), _ = read_calibration(tmp_path / f"{name}.npy", (2,), dtype, keyword="x")
            assert rows([batch["x"]]) == expected and batch["x"].dtype == dtype
    np.save(tmp_path / "halves.npy", values + 0.5)
    with pytest.raises(UsageError, match=r"expected torch.int64, as --input says; example . in .* has others"):
        read_calibration(tmp_path / "halves.npy", (2,), torch.int64)
