"""Augmentation: each case by its own draws, in two and three dimensions, and only what the modality allows."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d

from medtpp.config import AugmentOptions
from medtpp.data.augment import Augmenter, resolve
from medtpp.data.augment.intensities import _coarsening, _gaussian
from medtpp.data.augment.shapes import ShapeChanges, crop_sides
from medtpp.seeds import Seeds

NOTHING = AugmentOptions(crop_min=1, flip_horizontal=False, flip_vertical=False, intensity=0)
FULL = AugmentOptions(crop_min=0.4, flip_horizontal=True, flip_vertical=True, intensity=0.3)
CERTAIN = {
    f"{effect}_probability": 1.0 for effect in ("affine", "elastic", "blur", "low_resolution", "noise", "intensity")
}
EVERYTHING = resolve(AugmentOptions(**CERTAIN), "pathology", "segmentation")
SHAPES = ("rotation", "scaling", "shear", "elastic")


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
    sides = crop_sides(draws(5000), 0.3, dims)
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
    sides = crop_sides(draws(64), 0.3, len(shape))[:, -1]
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
    told = resolve(AugmentOptions(flip_horizontal=not horizontal, flip_vertical=not vertical), modality)
    assert (told.flip_horizontal, told.flip_vertical) == (not horizontal, not vertical)


def smooth(count, *spatial, fold=3):
    """Random smooth images (count, 1, *spatial) that fill [0, 1]."""
    coarse = images(count, 1, *[fold] * len(spatial))
    fine = F.interpolate(coarse, spatial, mode="bicubic" if len(spatial) == 2 else "trilinear")
    low, high = (extreme(fine, dim=tuple(range(1, fine.ndim)), keepdim=True) for extreme in (torch.amin, torch.amax))
    return (fine - low) / (high - low)


@pytest.mark.parametrize("options", [EVERYTHING, AugmentOptions(), AugmentOptions(crop_min=0.5, rotation=180)])
@pytest.mark.parametrize("shape", [(12, 1, 24, 24), (12, 2, 16, 20), (12, 1, 6, 12, 12), (12, 2, 5, 8, 10)])
def test_of_many_effects_too_a_case_does_not_depend_on_its_batch(shape, options):
    batch = images(*shape)
    masks = (batch[:, 0] * 4).byte()
    augment = Augmenter(options, "photo", "segmentation")
    before = batch.clone(), masks.clone()
    found, found_masks = augment(batch, draws(12), masks)
    assert torch.equal(batch, before[0])
    assert torch.equal(masks, before[1])
    for row in range(12):
        alone, alone_mask = augment(batch[row : row + 1], draws(12)[row : row + 1], masks[row : row + 1])
        assert torch.equal(alone_mask[0], found_masks[row])
        assert torch.equal(alone[0], found[row])
    assert torch.equal(augment(batch, draws(12)), found)  # masks change nothing in the images
    assert found.shape == batch.shape
    assert 0 <= found.min() <= found.max() <= 1


@pytest.mark.parametrize("shape", [(40, 2, 12, 12), (40, 1, 6, 8, 8)])
def test_a_case_that_no_effect_meets_keeps_its_bits(shape):
    batch = images(*shape)
    masks = (batch[:, 0] * 4).byte()
    impossible = AugmentOptions(**dict.fromkeys(CERTAIN, 0.0))
    for options in (resolve(NOTHING, "ct"), impossible):
        found, found_masks = Augmenter(options, "ct", "segmentation")(batch, draws(40), masks)
        assert torch.equal(found, batch)
        assert torch.equal(found_masks, masks)
    rare = AugmentOptions(**dict.fromkeys(CERTAIN, 0.05))
    found = Augmenter(rare, "ct", "segmentation")(batch, draws(40))
    same = (found == batch).flatten(1).all(dim=1)
    assert 0 < same.sum() < 40


@pytest.mark.parametrize(
    ("effect", "strength", "probability"),
    [
        ("rotation", 30.0, "affine"),
        ("scaling", 0.4, "affine"),
        ("shear", 0.3, "affine"),
        ("elastic", 0.4, "elastic"),
        ("blur", 1.0, "blur"),
        ("low_resolution", 0.5, "low_resolution"),
        ("noise", 0.1, "noise"),
    ],
)
@pytest.mark.parametrize("spatial", [(16, 16), (8, 12, 12)])
def test_each_effect_meets_its_share_of_the_cases_and_masks_follow_shapes_alone(effect, strength, probability, spatial):
    augment = Augmenter(changed(**{effect: strength, f"{probability}_probability": 0.3}), "ct")
    batch = images(1, 1, *spatial).expand(300, 1, *spatial)
    masks = (batch[:, 0] * 200).byte()
    found, found_masks = augment(batch, draws(300), masks)
    differs = (found != batch).flatten(1).any(dim=1)
    assert 60 < differs.sum() < 120
    moved = (found_masks != masks).flatten(1).any(dim=1)
    assert not (moved & ~differs).any()
    assert bool(moved.any()) == (effect in SHAPES)
    assert torch.equal(augment(batch, draws(300), geometric_only=True), found if effect in SHAPES else batch)


@pytest.mark.parametrize("spatial", [(40, 40), (30, 44), (24, 24, 24), (20, 28, 32)])
def test_masks_move_with_their_images(spatial):
    """A thresholded image as mask agrees with the thresholded result, but where interpolation may decide."""
    batch = smooth(16, *spatial)
    masks = (batch[:, 0] > 0.5).byte() * 255
    options = EVERYTHING.model_copy(update={"rotation": 180.0, "crop_min": 0.5, "elastic": 0.4})
    found, found_masks = Augmenter(options, "pathology")(batch, draws(16), masks, geometric_only=True)
    assert found_masks.dtype == torch.uint8
    assert set(found_masks.unique().tolist()) == {0, 255}
    step = sum(batch.diff(dim=axis).abs().max().item() for axis in range(2, batch.ndim))
    sure = (found[:, 0] - 0.5).abs() > step / 2  # the nearest pixel is at most half a pixel away along each axis
    assert sure.float().mean() > 0.3
    assert torch.equal((found[:, 0] > 0.5)[sure], (found_masks == 255)[sure])
    assert not torch.equal(found_masks, masks)


def test_masks_keep_their_type_and_must_fit():
    batch = images(2, 1, 8, 8)
    masks = torch.randint(0, 70000, (2, 8, 8))
    found = Augmenter(EVERYTHING, "ct")(batch, draws(2), masks)[1]
    assert found.dtype == masks.dtype
    assert set(found.unique().tolist()) <= set(masks.unique().tolist())
    with pytest.raises(ValueError, match="do not fit"):
        Augmenter(EVERYTHING, "ct")(batch, draws(2), masks[:, :4])


@pytest.mark.parametrize("spatial", [(20, 20), (10, 14, 14)])
def test_outside_the_field_the_border_goes_on_in_images_and_masks(spatial):
    batch, masks = torch.full((8, 1, *spatial), 0.7), torch.full((8, *spatial), 3, dtype=torch.uint8)
    options = EVERYTHING.model_copy(update={"rotation": 180.0, "scaling": 1.0})
    found, found_masks = Augmenter(options, "pathology")(batch, draws(8), masks, geometric_only=True)
    torch.testing.assert_close(found, batch)
    assert torch.equal(found_masks, masks)


@pytest.mark.parametrize("spatial", [(48, 40), (24, 20, 28)])
def test_the_strongest_elastic_map_folds_nothing_and_has_no_seams(spatial):
    options = changed(elastic=0.4, elastic_probability=1.0)
    dims = len(spatial)
    grid = ShapeChanges(resolve(options, "ct"), None).grid(spatial, draws(24))
    size = torch.tensor(spatial[::-1]) / 2
    inner = (slice(None), *[slice(8, -8) if n > 16 else slice(None) for n in spatial])  # away from the clamped border
    places = (grid * size)[inner]  # in pixels
    slopes = [places.diff(dim=axis + 1) for axis in range(dims)]
    crop = (slice(None), *[slice(0, min(s.shape[axis + 1] for s in slopes)) for axis in range(dims)])
    jacobian = torch.stack([slope[crop] for slope in reversed(slopes)], dim=-1)
    assert torch.linalg.det(jacobian).min() > 0
    assert (places - (ShapeChanges(resolve(NOTHING, "ct")).grid(spatial, draws(24)) * size)[inner]).abs().max() > 1
    bends = torch.cat([places.diff(n=2, dim=axis + 1).abs().flatten() for axis in range(dims)])
    assert bends.max() < 0.5  # a seam between the control cells would be a jump in slope


@pytest.mark.parametrize(("spatial", "spacing"), [((20, 30), (2.0, 1.0)), ((12, 20, 30), (2.5, 1.0, 0.9))])
def test_rotations_keep_lengths_in_the_patient(spatial, spacing):
    options = resolve(changed(rotation=60.0, affine_probability=1.0), "ct")
    found = ShapeChanges(options, spacing)._affine(spatial, draws(20))
    extent = torch.tensor(spatial) * torch.tensor(spacing)
    turn = extent[:, None] * found / extent
    torch.testing.assert_close(
        turn @ turn.transpose(1, 2), torch.eye(len(spatial)).expand_as(turn), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(torch.linalg.det(turn), torch.ones(20))
    assert turn[:, -1, -1].min() < 0.7


def test_thick_slices_are_not_mixed():
    levels = torch.rand(1, 1, 6, 1, 1).expand(20, 1, 6, 16, 16)
    options = changed(rotation=30.0, shear=0.2, elastic=0.3, affine_probability=1.0, elastic_probability=1.0)
    found = Augmenter(options, "ct", spacing=(3.2, 1.0, 1.0))(levels, draws(20))
    torch.testing.assert_close(found, levels)
    assert not torch.allclose(Augmenter(options, "ct", spacing=(2.9, 1.0, 1.0))(levels, draws(20)), levels, atol=0.01)


def test_scaling_keeps_to_its_range_and_its_axes_differ_a_little():
    options = resolve(changed(scaling=0.4, affine_probability=1.0), "ct")
    factors = ShapeChanges(options)._affine((9, 9, 9), draws(3000)).diagonal(dim1=1, dim2=2)
    assert 1 / 1.4 <= factors.min() < 0.75
    assert 1.35 < factors.max() <= 1.4
    assert 1.1 < (factors[:, 0] / factors[:, 1]).max() < 1.4**0.5


def test_blur_is_gaussian_and_keeps_constants():
    line = images(1, 1, 1, 40)[0, 0, 0]
    matrix = _gaussian(torch.tensor([1.3, 1e-3]), 40)
    expected = gaussian_filter1d(line.double().numpy(), 1.3, truncate=8)
    np.testing.assert_allclose((matrix[0] @ line)[10:-10], expected[10:-10], atol=1e-5)
    torch.testing.assert_close(matrix[0].sum(dim=1), torch.ones(40))
    assert torch.equal(matrix[1], torch.eye(40))


@pytest.mark.parametrize("zoom", [0.5, 0.25, 0.1, 1.0])
def test_low_resolution_is_nearest_down_and_linear_up(zoom):
    line = images(1, 1, 40)
    coarse = F.interpolate(line, int(40 * zoom), mode="nearest-exact")
    expected = F.interpolate(coarse, 40, mode="linear")
    found = line @ _coarsening(torch.tensor([zoom]), 40).transpose(1, 2)
    torch.testing.assert_close(found, expected)
    if zoom == 1:
        assert torch.equal(found, line)


@pytest.mark.parametrize("shape", [(30, 3, 24, 20), (30, 2, 10, 12, 14)])
def test_unsharp_images_vary_less_and_channels_stay_apart(shape):
    batch = images(*shape)
    batch[:, 0] = 0.25
    options = changed(blur=2.0, low_resolution=0.7, blur_probability=1.0, low_resolution_probability=1.0)
    found = Augmenter(options, "ct")(batch, draws(30))
    torch.testing.assert_close(found[:, 0], batch[:, 0])
    assert (found[:, 1].flatten(1).std(dim=1) < 0.7 * batch[:, 1].flatten(1).std(dim=1)).all()
    torch.testing.assert_close(
        found[:, 1:].flatten(2).mean(dim=2), batch[:, 1:].flatten(2).mean(dim=2), atol=0.1, rtol=0
    )


def test_noise_is_white_and_as_strong_as_drawn():
    grey = torch.full((200, 1, 32, 32), 0.5)
    added = Augmenter(changed(noise=0.1, noise_probability=1.0), "ct")(grey, draws(200)) - grey
    deviations = added.flatten(1).std(dim=1)
    assert deviations.max() < 0.11
    assert 0.04 < deviations.mean() < 0.06
    assert added.flatten(1).mean(dim=1).abs().max() < 0.02
    neighbours = (added[..., 1:] * added[..., :-1]).mean() / added.square().mean()
    assert abs(neighbours) < 0.02
    assert not torch.equal(added[0] / deviations[0], added[1] / deviations[1])


@pytest.mark.parametrize("use", ["classification", "segmentation"])
def test_resolved_options_have_no_auto_left_and_keep_what_was_told(use):
    found = resolve(AugmentOptions(noise=0.03, crop_min=0.7), "ct", use)
    assert "auto" not in found.model_dump().values()
    assert (found.noise, found.crop_min) == (0.03, 0.7)
    assert AugmentOptions.model_validate(found.model_dump(mode="json")) == found
    with pytest.raises(ValueError, match="resolved"):
        ShapeChanges(AugmentOptions())


def test_classification_has_the_crops_and_intensities_it_had():
    found = resolve(AugmentOptions(), "xray")
    assert (found.crop_min, found.intensity, found.intensity_probability) == (0.5, 0.15, 1)
    assert not any(getattr(found, effect) for effect in (*SHAPES, "blur", "low_resolution", "noise"))


def test_autocast_coarsens_none_of_the_effects():
    batch = images(4, 1, 16, 16, 16)
    augment = Augmenter(EVERYTHING, "pathology")
    with torch.autocast("cpu", torch.bfloat16):
        found = augment(batch, draws(4))
    assert torch.equal(found, augment(batch, draws(4)))
