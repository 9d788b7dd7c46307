"""Scans to network space and back: axes, positions, intensities, labels."""

import numpy as np
import pytest
import SimpleITK
from pydantic import ValidationError

from medtpp.config import Window
from medtpp.data.case import Structure
from medtpp.data.geometry import Geometry, Volume, plain_geometry
from medtpp.data.restore import Restore, resize, slice_axis
from medtpp.data.volume_preprocess import VolumePreprocessing, label_mask, overlapping
from medtpp.errors import DataError
from volumes import STRUCTURES, blobs, geometry

LEVELS = Window(kind="fixed", low=0, high=255)
UNIT = Window(kind="fixed", low=0, high=1)


def preprocessing(patch=(4, 4, 4), windows=(UNIT,), **options):
    return VolumePreprocessing(patch=patch, windows=windows, **options)


def dice(one, other):
    return 2 * np.count_nonzero(one & other) / (np.count_nonzero(one) + np.count_nonzero(other))


def saved(restore):
    return Restore.model_validate_json(restore.model_dump_json())


@pytest.mark.parametrize("seed", range(200))
def test_a_mask_comes_back_voxel_exact(seed):
    """Each factor has a draw of its own, so that no two go together in all cases."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 20, 3).tolist())
    spacing = rng.uniform(0.5, 6, 3)
    where = geometry(shape, spacing.tolist(), int(rng.integers(1000)))
    labels = rng.integers(0, 3, shape).astype(np.uint8)
    labels[rng.random(shape) < 0.3] = 0
    # The content is where the labels are, so that the crop may not lose any.
    image = np.where(labels > 0, 500, -1000).astype(np.int16)[None]
    prepare = preprocessing(
        patch=tuple(rng.integers(1, 30, 3).tolist()),
        windows=(Window(kind="fixed", low=-1000, high=1000),),
        # The finest spacing refines every axis, whatever way the scan lies.
        spacing=tuple((spacing.min() * rng.uniform(0.4, 1.0, 3)).tolist()) if rng.random() < 0.75 else None,
        air=-500,
        crop=bool(rng.random() < 0.67),
        margin=float(rng.integers(5)),
        border=rng.choice(["edge", "zero"]),
    )
    array, restore = prepare.apply(Volume(image, where, "HU"))
    mask = prepare.apply_mask(labels, STRUCTURES, restore)
    assert array.dtype == np.float16
    assert array.shape[1:] == mask.shape == restore.shape
    assert all(size >= side for size, side in zip(mask.shape, prepare.patch, strict=True))
    assert array.min() >= 0
    assert array.max() <= 1
    back = saved(restore)
    assert back == restore
    assert back.geometry == where
    np.testing.assert_array_equal(back.labels(mask), labels)


@pytest.mark.parametrize("seed", range(12))
def test_on_a_coarser_grid_a_mask_keeps_its_shape(seed):
    rng = np.random.default_rng(seed)
    labels = blobs((36, 40, 44), seed, scale=5)
    where = geometry(labels.shape, (1, 1, 1), seed)
    prepare = preprocessing(spacing=tuple(rng.uniform(1.2, 1.8, 3).tolist()))
    _, restore = prepare.apply(Volume(labels[None], where))
    mask = prepare.apply_mask(labels, STRUCTURES, restore)
    assert mask.size < labels.size / 1.5
    assert dice(restore.labels(mask) > 0, labels > 0) > 0.9


@pytest.mark.parametrize("seed", range(12))
def test_axes_run_as_in_itk_after_turning_to_ras(seed):
    array = np.random.default_rng(seed).random((5, 6, 7)).astype(np.float32)
    where = geometry(array.shape, (1, 2, 3), seed * 2)
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(where.spacing[::-1])
    image.SetDirection(np.array(where.directions)[::-1].T.ravel().tolist())
    expected = SimpleITK.GetArrayFromImage(SimpleITK.DICOMOrient(image, "RAS"))
    result, restore = preprocessing().apply(Volume(array[None], where))
    np.testing.assert_array_equal(result[0], expected.astype(np.float16))
    np.testing.assert_array_equal(restore.probability(expected), array)


def test_volumes_without_a_position_stay_as_they_are():
    array = np.random.default_rng(0).random((1, 5, 6, 7)).astype(np.float32)
    result, _ = preprocessing().apply(Volume(array, plain_geometry((5, 6, 7))))
    np.testing.assert_array_equal(result, array.astype(np.float16))


@pytest.mark.parametrize("interpolation", ["linear", "bspline"])
@pytest.mark.parametrize("seed", [0, 1])
def test_voxels_stay_where_they_are_in_the_patient(interpolation, seed):
    shape, spacing = (14, 16, 18), (1.5, 1.0, 1.25)
    where = geometry(shape, spacing, seed)
    places = np.indices(shape).reshape(3, -1) * np.array(spacing)[:, None]
    position = (np.array(where.directions).T @ places).reshape(3, *shape)  # along x, y, z
    scaled = (position - position.min()) / np.ptp(position)
    prepare = preprocessing(windows=(UNIT,) * 3, spacing=(0.9, 0.8, 0.7), interpolation=interpolation)
    result, restore = prepare.apply(Volume(scaled, where))
    # Away from the border, where the outermost half voxel is flat, the ramps go on with their slopes.
    inner = result[:, 5:-5, 5:-5, 5:-5].astype(np.float32) * np.ptp(position)
    directions = np.array(where.directions)[list(restore.order)] * np.where(restore.flipped, -1, 1)[:, None]
    for axis in range(3):
        step = np.diff(inner, axis=axis + 1).mean(axis=(1, 2, 3))
        np.testing.assert_allclose(step, directions[axis] * restore.spacing[axis], atol=0.02)
    # The middle of the volume stays in the middle.
    middle = np.mean(result.astype(np.float64), axis=(1, 2, 3))
    np.testing.assert_allclose(middle, scaled.mean(axis=(1, 2, 3)), atol=2e-3)


def test_what_a_coarser_grid_cannot_show_is_smoothed_away():
    stripes = (np.indices((24, 24, 24)).sum(axis=0) % 2).astype(np.float32)
    result, _ = preprocessing(spacing=(2.4, 2.4, 2.4)).apply(Volume(stripes[None], plain_geometry(stripes.shape)))
    assert np.abs(result[0, 2:-2, 2:-2, 2:-2].astype(np.float32) - 0.5).max() < 0.1


def test_thick_slices_are_repeated_and_never_mixed():
    array = np.random.default_rng(0).random((4, 12, 12)).astype(np.float32)
    where = Geometry(array.shape, (5.0, 1.0, 1.0), (0.0,) * 3, ((0, 0, 1.0), (0, -1.0, 0), (-1.0, 0, 0)))
    result, restore = preprocessing(spacing=(2.5, 0.8, 0.8)).apply(Volume(array[None], where))
    assert restore.slices == 0
    assert result.shape == (1, 8, 15, 15)
    np.testing.assert_array_equal(result[0, ::2], result[0, 1::2])
    for new, old in zip(result[0, ::2], array, strict=True):
        np.testing.assert_allclose(new, resize(old, (15, 15), "linear"), atol=1e-3)
    assert slice_axis((3.0, 1.0, 1.0)) is None
    assert slice_axis((9.0, 1.0)) is None


@pytest.mark.parametrize("interpolation", ["linear", "bspline", "label"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_thin_volumes_are_interpolated_without_numbers_from_nowhere(interpolation, size):
    array = np.random.default_rng(0).integers(0, 3, (size, 5, 6)).astype(np.uint8 if interpolation == "label" else "f4")
    result = resize(array, (7, 4, 9), interpolation)
    assert result.shape == (7, 4, 9)
    assert result.min() >= -0.5
    assert result.max() <= 2.5


def test_percentiles_look_at_the_content_alone():
    scan = np.zeros((20, 20, 20), np.float32)
    scan[5:10] = np.linspace(100, 200, 2000).reshape(5, 20, 20)
    result, _ = preprocessing(windows=(Window(kind="percentiles", low=10, high=90),)).apply(
        Volume(scan[None], plain_geometry(scan.shape))
    )
    assert (result[0] == 0).sum() == pytest.approx(6000 + 200, abs=3)
    assert (result[0] == 1).sum() == pytest.approx(200, abs=3)


@pytest.mark.parametrize("air", [None, 20.0])
def test_a_zscore_looks_at_the_content_alone(air):
    content = np.random.default_rng(0).normal(300, 40, 2000)
    content[:10] = 5000  # what a few bright vessels are
    scan = np.full((20, 20, 20), 10.0, np.float32)
    scan[5:10] = content.reshape(5, 20, 20)
    result, _ = preprocessing(windows=(Window(kind="zscore", low=-3, high=2),), air=air).apply(
        Volume(scan[None], plain_geometry(scan.shape))
    )
    expected = ((content - content.mean()) / content.std() + 3) / 5
    np.testing.assert_allclose(result[0, 5:10].ravel(), expected.clip(0, 1), atol=1e-3)  # float16
    assert (result[0] == 1).sum() == 10
    assert (result[0, :5] < result[0, 5:10].min()).all()


def test_a_zscore_does_not_depend_on_the_scanner_s_gain_and_offset():
    """What MRI needs it for: units differ from scan to scan."""
    scan = np.random.default_rng(0).gamma(3, 50, (1, 12, 12, 12))
    zscore = preprocessing(windows=(Window(kind="zscore", low=-3, high=3),))
    where = plain_geometry(scan.shape[1:])
    (first, _), (second, _) = zscore.apply(Volume(scan, where)), zscore.apply(Volume(7 * scan + 1000, where))
    np.testing.assert_allclose(first, second, atol=1e-3)  # float16


@pytest.mark.parametrize("kind", ["percentiles", "zscore"])
def test_content_of_one_value_is_white_on_black(kind):
    scan = np.zeros((1, 6, 6, 6), np.float32)
    scan[:, 2:4, 2:4, 2:4] = 0.1
    result, _ = preprocessing(windows=(Window(kind=kind, low=1, high=3),)).apply(Volume(scan, plain_geometry((6,) * 3)))
    np.testing.assert_array_equal(result, scan > 0)


@pytest.mark.parametrize("kind", ["fixed", "percentiles", "zscore"])
def test_a_scan_of_one_value_becomes_black_or_white(kind):
    volume = Volume(np.full((1, 4, 4, 4), 7, np.int16), plain_geometry((4, 4, 4)))
    result, _ = preprocessing(windows=(Window(kind=kind, low=1, high=5),)).apply(volume)
    assert (result == (1 if kind == "fixed" else 0)).all()


def test_each_channel_has_its_window():
    array = np.stack([np.full((4, 4, 4), 50), np.full((4, 4, 4), -200)])
    windows = (Window(kind="fixed", low=0, high=100), Window(kind="fixed", low=-1000, high=600))
    result, _ = preprocessing(windows=windows).apply(Volume(array, plain_geometry((4, 4, 4))))
    assert result[:, 0, 0, 0].tolist() == [0.5, 0.5]


def test_the_crop_keeps_the_content_and_a_margin_in_millimetres():
    scan = np.full((20, 30, 40), -1000, np.int16)
    scan[8:10, 10:15, 20:30] = 0
    where = geometry(scan.shape, (2.0, 1.0, 1.0))
    prepare = preprocessing((1, 1, 1), (Window(kind="fixed", low=-1000, high=0),), air=-500, crop=True, margin=3)
    result, restore = prepare.apply(Volume(scan[None], where))
    assert result.shape == (1, 2 + 4, 5 + 6, 10 + 6)
    assert (result == 1).sum() == 2 * 5 * 10
    ones = restore.probability(np.ones(restore.shape, np.float32))
    assert ones.sum() == 6 * 11 * 16
    assert ones[8:10, 10:15, 20:30].all()
    assert restore.probability(np.zeros(restore.shape), outside=1).sum() == scan.size - 6 * 11 * 16
    empty, _ = prepare.apply(Volume(np.full((1, 5, 6, 7), -1000), geometry((5, 6, 7))))
    assert empty.shape == (1, 5, 6, 7)


def test_the_middle_is_kept_in_millimetres_whichever_way_the_scan_lies():
    scan = np.random.default_rng(0).integers(0, 255, (9, 30, 41)).astype(np.float32)
    prepare = preprocessing((1, 1, 1), (Window(kind="fixed", low=0, high=255),), center_crop=(40, 10, 12))
    found = []
    for seed in range(6):
        where = geometry(scan.shape, (2.0, 1.0, 0.5), seed)
        result, restore = prepare.apply(Volume(scan[None], where))
        back = restore.probability(np.ones(restore.shape, np.float32))
        assert restore.spacing == tuple(where.spacing[axis] for axis in restore.order)
        sides = dict(zip(restore.order, prepare.center_crop, strict=True))  # of the scan's own axes
        kept = [int(min(n, sides[axis] / where.spacing[axis])) for axis, n in enumerate(scan.shape)]
        kept = [k - (n - k) % 2 for n, k in zip(scan.shape, kept, strict=True)]
        box = tuple(slice((n - k) // 2, n - (n - k) // 2) for n, k in zip(scan.shape, kept, strict=True))
        assert back.sum() == back[box].size
        assert back[box].all()
        assert np.sort(result, axis=None) == pytest.approx(np.sort(scan[box], axis=None) / 255, abs=1e-3)
        found.append(restore.order)
    assert len(set(found)) > 1


def test_the_middle_of_the_content():
    scan = np.zeros((12, 12, 12), np.float32)
    scan[2:8, 4:12, :] = 1
    where = geometry(scan.shape, (1, 1, 1))
    prepare = preprocessing((1, 1, 1), crop=True, margin=0, center_crop=(2, 4, 100))
    _, restore = prepare.apply(Volume(scan[None], where))
    kept = restore.probability(np.ones(restore.shape, np.float32)).nonzero()
    assert [(axis.min(), axis.max()) for axis in kept] == [(4, 5), (6, 9), (0, 11)]


@pytest.mark.parametrize("wrong", [(1, 1), (1, 0, 1)])
def test_an_impossible_middle_is_refused(wrong):
    with pytest.raises(ValidationError, match="center_crop needs 3 positive numbers"):
        preprocessing((1, 1, 1), center_crop=wrong)


@pytest.mark.parametrize("border", ["zero", "edge"])
def test_thin_volumes_are_padded_evenly_and_masks_alike(border):
    scan = np.arange(1, 3, dtype=np.float32)[:, None, None] * np.ones((2, 4, 4), np.float32) / 2
    prepare = preprocessing((5, 4, 4), border=border)
    result, restore = prepare.apply(Volume(scan[None], plain_geometry(scan.shape)))
    mask = prepare.apply_mask((scan * 2).astype(np.int32), STRUCTURES, restore)
    expected = [0, 1, 2, 0, 0] if border == "zero" else [1, 1, 2, 2, 2]
    assert mask[:, 0, 0].tolist() == expected
    assert (result[0, :, 0, 0] * 2).tolist() == expected


def test_images_are_scaled_in_pixels_and_grey_and_colour_go_together():
    tile = np.random.default_rng(0).integers(0, 256, (3, 40, 60), dtype=np.uint8)
    colour = VolumePreprocessing(patch=(16, 16), windows=(LEVELS,) * 3, spacing=(2, 2), dtype="uint8")
    result, restore = colour.apply(Volume(tile, plain_geometry((40, 60)), "levels"))
    assert result.shape == (3, 20, 30)
    assert restore.labels(np.ones((20, 30), np.uint8)).shape == (40, 60)
    grey, _ = colour.apply(Volume(tile[:1], plain_geometry((40, 60)), "levels"))
    np.testing.assert_array_equal(grey[0], grey[2])
    one = VolumePreprocessing(patch=(16, 16), windows=(LEVELS,))
    luminance, _ = one.apply(Volume(np.repeat(tile[:1], 3, axis=0), plain_geometry((40, 60)), "levels"))
    np.testing.assert_allclose(luminance, tile[:1] / 255, atol=1e-3)


@pytest.mark.parametrize("shape", [(10, 30, 20), (40, 7, 25)])
def test_a_size_holds_whatever_the_spacing(shape):
    """Scans that are seen whole: one size for all, and masks brought back to the scan's own grid."""
    preprocessing = VolumePreprocessing(
        patch=(16, 24, 24), size=(16, 24, 24), windows=(Window(kind="percentiles", low=0, high=100),)
    )
    labels = blobs(shape, scale=4.0)
    volume = Volume(labels[None].astype(np.float32), geometry(shape, (3.0, 0.7, 1.1), seed=5))
    array, restore = preprocessing.apply(volume)
    assert array.shape == (1, 16, 24, 24)
    mask = preprocessing.apply_mask(labels, STRUCTURES, restore)
    assert mask.shape == (16, 24, 24)
    back = restore.labels(mask)
    assert back.shape == labels.shape
    assert (back == labels).mean() > 0.9
    with pytest.raises(ValueError, match="exclude each other"):
        VolumePreprocessing.model_validate({**preprocessing.model_dump(), "spacing": (1.0, 1.0, 1.0)})


def test_other_channels_or_dimensions_are_told():
    volume = Volume(np.zeros((2, 4, 4, 4)), plain_geometry((4, 4, 4)))
    with pytest.raises(DataError, match=r"2 channels, but the training images have 1\. Give the channels"):
        preprocessing().apply(volume)
    with pytest.raises(DataError, match=r"3 dimensions, but the training images have 2\. Cut it into images, or leave"):
        preprocessing((4, 4)).apply(volume)


def test_labels_are_numbered_by_structure():
    values = np.array([[-1, 0, 3], [5, 700, 9]])
    structures = (Structure("a", (5, -1)), Structure("b", (700,)))
    assert label_mask(values, structures).tolist() == [[1, 0, 0], [1, 2, 0]]
    assert label_mask(values.astype(np.int16), structures).dtype == np.uint8
    assert not overlapping(structures)


def test_structures_that_overlap_are_bits():
    regions = (Structure("whole", (1, 2, 3)), Structure("core", (2, 3)), Structure("enhancing", (3,)))
    assert overlapping(regions)
    assert label_mask(np.array([[0, 1], [2, 3]]), regions).tolist() == [[0, 0b1], [0b11, 0b111]]


def test_masks_that_cannot_be_numbered_are_told():
    with pytest.raises(DataError, match="at most 255"):
        label_mask(np.zeros((2, 2), int), [Structure(str(value), (value,)) for value in range(1, 300)])
    with pytest.raises(DataError, match="at most 8 structures that overlap"):
        label_mask(np.zeros((2, 2), int), [Structure(str(value), (1, value)) for value in range(2, 12)])
    with pytest.raises(DataError, match="no labels"):
        label_mask(np.array([[0, 1 << 20]]), STRUCTURES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": (4,)}, "two or three sides"),
        ({"patch": (4, 0, 4)}, "at least one voxel"),
        ({"spacing": (1.0, 1.0)}, "needs 3 positive"),
        ({"spacing": (1.0, 0.0, 1.0)}, "needs 3 positive"),
        ({"windows": ()}, "windows"),
        ({"colour": 1}, "Extra inputs"),
    ],
)
def test_wrong_options_are_told(options, message):
    with pytest.raises(ValidationError, match=message):
        VolumePreprocessing(**{"patch": (4, 4, 4), "windows": (UNIT,)} | options)


@pytest.mark.parametrize(
    ("low", "high", "kind"), [(3, 3, "fixed"), (5, 2, "fixed"), (-1, 50, "percentiles"), (3, -3, "zscore")]
)
def test_wrong_windows_are_told(low, high, kind):
    with pytest.raises(ValidationError, match=r"low|between"):
        Window(kind=kind, low=low, high=high)


@pytest.mark.parametrize(
    "window", [Window(kind="percentiles", low=0.5, high=99.5), Window(kind="zscore", low=-3, high=3)]
)
def test_preprocessing_is_saved_and_gives_the_same_bits(window):
    rng = np.random.default_rng(0)
    volume = Volume(rng.random((1, 9, 10, 11)), geometry((9, 10, 11), (1, 2, 1.5), 3))
    first = preprocessing(windows=(window,), spacing=(1.3, 1.1, 0.9))
    again = VolumePreprocessing.model_validate_json(first.model_dump_json())
    np.testing.assert_array_equal(first.apply(volume)[0], again.apply(volume)[0])
    with pytest.raises(ValueError, match="not in the network's space"):
        first.apply(volume)[1].labels(np.zeros((2, 2, 2)))
