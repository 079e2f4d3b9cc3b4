"""Augmentation moves pixels and nothing else; batches are what the data set's own normalisation gives."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fedrebasin.errors import UsageError
from fedrebasin.simulations.augment import BatchMaker, flip_and_shift, flip_and_zoom, flip_only
from fedrebasin.simulations.data import load_dataset


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_each_augmented_image_is_one_of_the_allowed_crops():
    image = torch.arange(1.0, 3 * 6 * 5 + 1).reshape(1, 3, 6, 5)
    reach = 2
    allowed = [
        F.pad(side, (reach,) * 4)[0, :, top : top + 6, left : left + 5]
        for side in (image, image.flip(3))
        for top in range(2 * reach + 1)
        for left in range(2 * reach + 1)
    ]
    out = flip_and_shift(image.repeat(400, 1, 1, 1), torch.Generator().manual_seed(0), reach)
    seen = {next(i for i, crop in enumerate(allowed) if torch.equal(crop, one)) for one in out}
    assert out.shape == (400, 3, 6, 5)
    assert len(seen) == len(allowed), "every crop comes up among 400 draws"


def test_images_of_one_batch_are_moved_independently():
    images = torch.arange(1.0, 65).reshape(1, 1, 8, 8).repeat(50, 1, 1, 1)
    out = flip_and_shift(images, torch.Generator().manual_seed(0))
    assert len({tuple(one.flatten().tolist()) for one in out}) > 10


def test_a_flip_alone_gives_the_image_or_its_mirror():
    image = torch.arange(1.0, 3 * 6 * 5 + 1).reshape(1, 3, 6, 5)
    out = flip_only(image.repeat(50, 1, 1, 1), seeded())
    mirrored = [torch.equal(one, image[0].flip(2)) for one in out]
    assert all(turned or torch.equal(one, image[0]) for turned, one in zip(mirrored, out, strict=True))
    assert 10 < sum(mirrored) < 40


def test_a_zoom_by_one_gives_the_image_or_its_mirror():
    image = torch.randn(1, 3, 8, 6, generator=seeded())
    for one in flip_and_zoom(image.repeat(20, 1, 1, 1), seeded(), 1.0, 1.0):
        nearest = min((one - side).abs().max() for side in (image[0], image[0].flip(2)))
        assert nearest < 1e-5


def test_a_zoomed_ramp_is_a_ramp_whose_slope_says_the_zoom():
    ramp = torch.arange(32.0).expand(1, 1, 32, 32) + 100  # bilinear interpolation keeps straight lines straight
    out = flip_and_zoom(ramp.repeat(200, 1, 1, 1), seeded())
    slopes = out[:, 0, 16, 17:].sub(out[:, 0, 16, 16:-1])[:, :8].mean(1)
    assert slopes.abs().min() >= 1 / 1.2 - 1e-4 and slopes.abs().max() <= 1 / 0.8 + 1e-4
    assert slopes.abs().min() < 0.87 and slopes.abs().max() > 1.2 and 60 < int((slopes > 0).sum()) < 140


def test_a_magnified_image_has_no_zeros_at_its_border_and_a_smaller_one_keeps_all_of_the_image():
    ones = torch.ones(100, 1, 16, 16)
    inside = flip_and_zoom(ones, seeded(), 1.1, 1.2)[:, :, 1:-1, 1:-1]
    assert torch.allclose(inside, torch.ones_like(inside))
    mass = flip_and_zoom(ones, seeded(), 0.8, 0.8).sum((1, 2, 3)) / 256
    torch.testing.assert_close(mass, torch.full((100,), 0.64), rtol=0.03, atol=0)


def test_batches_are_the_normalised_images_of_their_rows_channels_last():
    data = load_dataset("digits")
    maker = BatchMaker(data, data.train_images, seed=0)
    rows = list(maker.rows(100))
    assert [len(one) for one in rows] == [100] * 13 and len(set(torch.cat(rows).tolist())) == 1300
    batch = maker.batch(rows[0])
    assert torch.equal(batch, data.normalise(data.train_images[rows[0]]))
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_only_data_sets_that_are_augmented_are():
    data = dataclasses.replace(load_dataset("digits"), augment=True)
    maker = BatchMaker(data, data.train_images, seed=0, augment="flip")
    rows = torch.arange(50)
    assert not torch.equal(maker.batch(rows), data.normalise(data.train_images[rows]))


def test_an_unknown_augmentation_is_refused():
    data = load_dataset("digits")
    with pytest.raises(UsageError, match="--augment: expected one of shift, zoom, flip; got 'cut'"):
        BatchMaker(data, data.train_images, seed=0, augment="cut")
