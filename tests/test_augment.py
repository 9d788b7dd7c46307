"""Augmentation: each case by its own draws, in two and three dimensions, and only what the modality allows."""

import numpy as np
import pytest
import torch

from medtpp.config import AugmentOptions
from medtpp.data.augment import Augmenter, _crop_sides, resolve
from medtpp.seeds import Seeds

NOTHING = AugmentOptions(crop_min=1, flip_horizontal=False, flip_vertical=False, intensity=0)
FULL = AugmentOptions(crop_min=0.4, flip_horizontal=True, flip_vertical=True, intensity=0.3)


def draws(count, epoch=0):
    return Seeds(3).draws(torch.full((count,), epoch), torch.arange(count) + 100)


def images(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def changed(**options):
    return NOTHING.model_copy(update=options)


@pytest.mark.parametrize("shape", [(8, 1, 24, 24), (8, 3, 16, 20), (8, 1, 6, 12, 12), (8, 2, 5, 8, 10)])
def test_a_case_does_not_depend_on_its_batch(shape):
    batch = images(*shape)
    augment = Augmenter(FULL, "pathology")
    together = augment(batch, draws(8))
    alone = torch.cat([augment(batch[i : i + 1], draws(8)[i : i + 1]) for i in range(8)])
    assert torch.equal(together, alone)
    assert together.shape == batch.shape
    assert 0 <= together.min() <= together.max() <= 1
    assert not torch.equal(together, augment(batch, draws(8, epoch=1)))


def test_nothing_to_do_changes_nothing():
    batch = images(4, 1, 9, 9)
    assert torch.equal(Augmenter(NOTHING, "photo")(batch, draws(4)), batch)
    intensity_alone = Augmenter(changed(intensity=0.5), "photo")
    assert torch.equal(intensity_alone(batch, draws(4), geometric_only=True), batch)
    assert not torch.equal(intensity_alone(batch, draws(4)), batch)


def test_horizontal_flips_mirror_about_half_of_the_cases():
    batch = images(200, 1, 6, 7)
    found = Augmenter(changed(flip_horizontal=True), "xray")(batch, draws(200))
    flipped = [torch.allclose(one, other.flip(-1), atol=1e-6) for one, other in zip(found, batch, strict=True)]
    kept = [torch.allclose(one, other, atol=1e-6) for one, other in zip(found, batch, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True))
    assert 70 < sum(flipped) < 130


@pytest.mark.parametrize("shape", [(6, 6), (4, 6, 6)])
def test_without_an_up_all_eight_positions_of_a_square_come_and_nothing_else(shape):
    picture = images(1, 1, *shape)
    found = Augmenter(changed(flip_horizontal=True, flip_vertical=True), "pathology")(
        picture.expand(200, 1, *shape), draws(200)
    )
    positions = []
    for turned in (picture[0], picture[0].transpose(-1, -2)):
        positions += [turned, turned.flip(-1), turned.flip(-2), turned.flip(-1, -2)]
    matches = [[torch.allclose(one, position, atol=1e-5) for position in positions] for one in found]
    assert all(sum(row) == 1 for row in matches)
    assert (np.sum(matches, axis=0) > 8).all()


def test_an_oblong_image_is_not_turned():
    batch = images(50, 1, 4, 8)
    found = Augmenter(changed(flip_horizontal=True, flip_vertical=True), "pathology")(batch, draws(50))
    torch.testing.assert_close(found.flatten(1).sort().values, batch.flatten(1).sort().values)


@pytest.mark.parametrize("dims", [2, 3])
def test_crops_keep_the_promised_share_and_stay_inside(dims):
    sides = _crop_sides(draws(5000), 0.3, dims)
    share = sides.prod(dim=1)
    assert sides.max() <= 1 + 1e-6
    assert 0.3 - 1e-5 <= share.min() < 0.31
    assert share.max() > 0.99
    assert abs(share.mean() - 0.65) < 0.01
    aspect = sides[:, 0] / sides[:, 1]
    assert aspect.min() >= 3 / 4 - 1e-5
    assert aspect.max() <= 4 / 3 + 1e-5
    assert aspect.std() > 0.03


@pytest.mark.parametrize("shape", [(16, 16), (8, 16, 16)])
def test_crops_of_a_ramp_are_ramps_within_it(shape):
    """A crop of a linear ramp is a flatter one: its slope is the crop's side, its values lie within the image's."""
    ramp = torch.linspace(0, 1, shape[-1]).expand(64, 1, *shape)
    found = Augmenter(changed(crop_min=0.3), "xray")(ramp, draws(64))
    rows = found.reshape(64, -1, shape[-1])
    torch.testing.assert_close(rows, rows[:, :1].expand_as(rows))
    steps = rows[:, 0].diff(dim=1)[:, 1:-1]  # half a pixel at either border is repeated
    assert (steps > 0).all()
    torch.testing.assert_close(steps, steps[:, :1].expand_as(steps), atol=1e-5, rtol=0)
    sides = _crop_sides(draws(64), 0.3, len(shape))[:, -1]
    torch.testing.assert_close(steps[:, 0] * (shape[-1] - 1), sides, atol=1e-4, rtol=0)


def test_a_constant_image_stays_constant_under_geometry():
    batch = torch.full((8, 1, 20, 20), 0.7)
    found = Augmenter(FULL, "pathology")(batch, draws(8), geometric_only=True)
    torch.testing.assert_close(found, batch)


def test_an_empty_image_stays_empty_and_the_strength_bounds_the_change():
    black = torch.zeros(16, 1, 8, 8)
    assert not Augmenter(changed(intensity=0.15), "xray")(black, draws(16)).any()
    grey = torch.full((500, 1, 8, 8), 0.5)
    small, large = (Augmenter(changed(intensity=s), "xray")(grey, draws(500)).flatten() for s in (0.05, 0.3))
    assert small.std() * 3 < large.std()
    assert abs(large.mean() - 0.5) < 0.03


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_come_back_as_they_went_in(dtype):
    batch = images(4, 1, 32, 32)
    augment = Augmenter(FULL, "pathology")
    found = augment(batch.to(dtype), draws(4))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), augment(batch, draws(4)), atol=0.02, rtol=0)


def test_autocast_does_not_coarsen_the_grid():
    batch = images(4, 1, 64, 64)
    augment = Augmenter(FULL, "pathology")
    with torch.autocast("cpu", torch.bfloat16):
        found = augment(batch, draws(4))
    assert torch.equal(found, augment(batch, draws(4)))


@pytest.mark.parametrize(
    ("modality", "horizontal", "vertical"),
    [
        ("xray", False, False),
        ("ct", False, False),
        ("mri", False, False),
        ("unknown", False, False),
        ("ultrasound", True, False),
        ("retina", True, False),
        ("photo", True, False),
        ("pathology", True, True),
        ("microscopy", True, True),
    ],
)
def test_flips_follow_the_modality_unless_told(modality, horizontal, vertical):
    found = resolve(AugmentOptions(), modality)
    assert (found.flip_horizontal, found.flip_vertical) == (horizontal, vertical)
    told = AugmentOptions(flip_horizontal=not horizontal, flip_vertical=not vertical)
    assert resolve(told, modality) == told
