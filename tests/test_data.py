"""Data sets: what comes with scikit-learn, what lies in a folder, and what is wrong with a folder."""

from __future__ import annotations

import io
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from fedrebasin.errors import UsageError
from fedrebasin.simulations.data import load_dataset


@pytest.fixture(autouse=True)
def fresh_cache():
    load_dataset.cache_clear()
    yield
    load_dataset.cache_clear()


def write_parquet(path, images, labels, image_column="img", label_column="fine_label"):
    cells = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="PNG")
        cells.append({"bytes": file.getvalue(), "path": None})
    parquet.write_table(pa.table({image_column: cells, label_column: labels}), path)


def test_digits_need_no_download_and_have_uint8_pixels_up_to_255():
    digits = load_dataset("digits")
    assert digits.train_images.dtype == torch.uint8 and int(digits.train_images.max()) == 255
    assert len(digits.train_labels) + len(digits.test_labels) == 1797
    assert digits.test_labels.unique().tolist() == list(range(10))


def test_training_images_are_normalised_to_mean_0_and_standard_deviation_1():
    digits = load_dataset("digits")
    normalised = digits.normalise(digits.train_images)
    assert float(normalised.mean()) == pytest.approx(0, abs=1e-4)
    assert float(normalised.std()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "label_column", "image_column", "shape"),
    [("mnist", "label", "image", (28, 28)), ("cifar100", "fine_label", "img", (32, 32, 3))],
)
def test_a_folder_of_parquet_files_is_read_in_order_pixel_by_pixel(tmp_path, name, label_column, image_column, shape):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (5, *shape), dtype=np.uint8)
    for file, part in (("train-00000-of-00002", slice(0, 2)), ("train-00001-of-00002", slice(2, 4))):
        labels = list(range(10))[part]
        write_parquet(tmp_path / f"{file}.parquet", images[part], labels, image_column, label_column)
    write_parquet(tmp_path / "test-00000-of-00001.parquet", images[4:], [9], image_column, label_column)
    data = load_dataset(name, str(tmp_path))
    expected = torch.from_numpy(images).reshape(5, *shape[:2], -1).permute(0, 3, 1, 2)
    assert torch.equal(data.train_images, expected[:4]) and torch.equal(data.test_images, expected[4:])
    assert data.train_labels.tolist() == [0, 1, 2, 3] and data.test_labels.tolist() == [9]
    assert data.shape == expected.shape[1:]


def test_an_unknown_data_set_is_refused_with_those_there_are():
    with pytest.raises(UsageError, match="expected one of digits, mnist, cifar10, cifar100; got 'imagenet'"):
        load_dataset("imagenet")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UsageError, match=rf"there is no folder {tmp_path}/none"):
        load_dataset("mnist", str(tmp_path / "none"))


def test_a_folder_without_the_files_says_which_are_missing(tmp_path):
    with pytest.raises(UsageError, match=r"expected train-\*\.parquet"):
        load_dataset("mnist", str(tmp_path))
    write_parquet(tmp_path / "train-0.parquet", np.zeros((1, 28, 28), np.uint8), [0], "image", "label")
    with pytest.raises(UsageError, match=r"expected test-\*\.parquet"):
        load_dataset("mnist", str(tmp_path))


def test_a_file_of_another_data_set_is_named(tmp_path):
    write_parquet(tmp_path / "train-0.parquet", np.zeros((1, 28, 28), np.uint8), [0], "picture", "label")
    write_parquet(tmp_path / "test-0.parquet", np.zeros((1, 28, 28), np.uint8), [0], "picture", "label")
    with pytest.raises(UsageError, match=r"train-0\.parquet is not a Parquet file of mnist"):
        load_dataset("mnist", str(tmp_path))


def test_a_file_that_is_no_parquet_file_is_named(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}-0.parquet").write_text("not parquet")
    with pytest.raises(UsageError, match=r"train-0\.parquet is not a Parquet file of cifar10"):
        load_dataset("cifar10", str(tmp_path))


def test_a_download_that_fails_says_what_to_do_instead(monkeypatch):
    class Hub:
        Image = object

        @staticmethod
        def load_dataset(*arguments, **keywords):
            raise ConnectionError("no route to host\nand a long trace")

    monkeypatch.setitem(sys.modules, "datasets", Hub)
    with pytest.raises(UsageError, match=r"cannot download ylecun/mnist \(no route to host\); .*--data PATH"):
        load_dataset("mnist")


def test_a_missing_library_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r'needs datasets .*"fedrebasin\[simulation\]"'):
        load_dataset("mnist")
