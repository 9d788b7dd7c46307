"""Preprocessing chosen from a fingerprint of the training cases."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtpp.config import VolumeOptions, Window
from medtpp.data.case import Structure
from medtpp.data.volume_plan import DatasetFingerprint, as_options, fingerprint_of, fit_preprocessing, patch_shape
from medtpp.data.volume_scan import scan_volumes, structures_in
from medtpp.errors import ConfigError, DataError
from volumes import READER, STRUCTURES, geometry, read_volume, write_case

PERCENTILES = Window(kind="percentiles", low=0.5, high=99.5)


def fingerprint(shapes=((40, 50, 60),) * 3, spacings=((1.0, 1.0, 1.0),) * 3, **changes):
    channels = changes.get("channels", 1)
    known = {"known": True, "units": "none", "channels": 1, "lows": (0.0,) * channels, "highs": (9.0,) * channels}
    return DatasetFingerprint(shapes=shapes, spacings=spacings, **known | {"contents": shapes, "outside": 0} | changes)


def scanned(cases, structures, modality, **options):
    """The fingerprint of some cases."""
    return fingerprint_of([*scan_volumes(cases, structures, modality, READER, **options).values()])


def ct(shape=(20, 24, 28), seed=0):
    """Air around a body with an organ of 40 to 60 HU."""
    rng = np.random.default_rng(seed)
    scan, labels = np.full(shape, -1000, np.int16), np.zeros(shape, np.uint8)
    scan[4:-4, 5:-5, 6:-6] = 0
    labels[6:10, 6:12, 8:16] = 1
    scan[labels == 1] = rng.integers(40, 61, np.count_nonzero(labels))
    return scan[None], labels


@settings(max_examples=100, deadline=None)
@given(
    shape=st.lists(st.integers(1, 600), min_size=2, max_size=3),
    multiple=st.integers(1, 20),
    voxels=st.integers(1, 1 << 20),
    data=st.data(),
)
def test_a_patch_fits_the_backbone_the_budget_and_the_scan(shape, multiple, voxels, data):
    spacing = data.draw(st.lists(st.floats(0.1, 10), min_size=len(shape), max_size=len(shape)))
    patch = patch_shape(shape, spacing, (multiple,) * len(shape), voxels)
    assert all(side % multiple == 0 and side > 0 for side in patch)
    assert math.prod(patch) <= max(voxels, multiple ** len(shape))
    assert all(side < size + multiple for side, size in zip(patch, shape, strict=True))
    if any(side < size for side, size in zip(patch, shape, strict=True)):  # one step more would break the budget
        axis = max(range(len(patch)), key=lambda a: shape[a] - patch[a])
        grown = [side + multiple * (a == axis) for a, side in enumerate(patch)]
        assert math.prod(grown) > voxels / 2 ** len(shape)


def test_a_small_scan_is_seen_whole_and_a_large_one_as_a_cube_in_mm():
    assert patch_shape((36, 50, 35), (1, 1, 1), (4, 8, 8), 1 << 18) == (36, 56, 40)
    assert patch_shape((300, 512, 512), (2.0, 1.0, 1.0), (8, 8, 8), 1 << 18) == (40, 80, 80)


def test_the_spacing_is_the_median_and_across_thick_slices_the_finest_tenth():
    spacings = ((0.8, 0.7, 0.7), (1.0, 0.8, 0.8), (2.0, 0.9, 0.9))
    assert fit_preprocessing(fingerprint(spacings=spacings), (8, 8, 8)).spacing == (1.0, 0.8, 0.8)
    spacings = ((3.0, 0.7, 0.7), (5.0, 0.8, 0.8), (6.0, 0.9, 0.9))
    spacing = fit_preprocessing(fingerprint(spacings=spacings), (8, 8, 8)).spacing
    assert spacing == pytest.approx((3.4, 0.8, 0.8))
    assert fit_preprocessing(fingerprint(known=False), (8, 8, 8)).spacing is None


def test_the_patch_is_measured_on_the_new_grid():
    plan = fit_preprocessing(
        fingerprint(((10, 40, 40),) * 3, ((1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (2.0, 1.0, 1.0))), (2, 2, 2)
    )
    assert plan.spacing == (2.0, 1.0, 1.0)
    assert plan.patch == (10, 40, 40)


def test_windows_follow_the_units():
    hu = fit_preprocessing(fingerprint(units="HU", lows=(-50.0,), highs=(200.0,)), (8, 8, 8))
    assert hu.windows == (Window(kind="fixed", low=-50, high=200),)
    assert (hu.air, hu.dtype) == (-500, "float16")
    mri = fit_preprocessing(fingerprint(channels=2), (8, 8, 8))
    assert mri.windows == (PERCENTILES, PERCENTILES)
    assert mri.air is None
    slide = fingerprint(((1000, 1000),), ((1.0, 1.0),), units="levels", channels=3, known=False)
    tiles = fit_preprocessing(slide, (16, 16))
    assert tiles.windows == (Window(kind="fixed", low=0, high=255),) * 3
    assert (tiles.dtype, tiles.patch) == ("uint8", (512, 512))
    assert fit_preprocessing(fingerprint(units="HU", lows=(5.0,), highs=(5.0,)), (8, 8, 8)).windows[0].high == 6


def test_the_crop_must_pay_and_lose_nothing():
    contents = ((30, 40, 50),) * 3
    plan = fit_preprocessing(fingerprint(contents=contents), (10, 10, 10))
    assert plan.crop
    assert plan.patch == (30, 40, 50)
    assert not fit_preprocessing(fingerprint(contents=contents, outside=1), (10, 10, 10)).crop
    assert not fit_preprocessing(fingerprint(contents=((39, 49, 58),) * 3), (10, 10, 10)).crop


def test_a_patch_for_classification_holds_nearly_all_scans_and_one_for_segmentation_the_median():
    shapes = ((8, 40, 40),) * 15 + ((30, 60, 40),) * 4 + ((90, 200, 200),)
    found = fingerprint(shapes, ((1.0, 1.0, 1.0),) * 20)
    assert fit_preprocessing(found, (4, 8, 8)).patch == (8, 40, 40)
    whole = fit_preprocessing(found, (4, 8, 8), whole=True)
    assert whole.patch == (32, 64, 40)  # 19 of 20 fit
    assert math.prod(fit_preprocessing(found, (4, 8, 8), whole=True, voxels=1 << 14).patch) <= 1 << 14
    said = VolumeOptions(size=(16, 32, 32))
    assert fit_preprocessing(found, (4, 8, 8), said, whole=True).patch == (16, 32, 32)


def test_a_scan_of_ct_tells_shape_units_structures_and_content(tmp_path):
    scan, _ = ct()
    where = geometry(scan.shape[1:], (2.0, 1.5, 1.0), seed=2)
    cases = [write_case(tmp_path, f"case{number}", *ct(seed=number), geometry=where) for number in range(3)]
    calls = []
    found = scanned(cases, STRUCTURES, "ct", progress=lambda *call: calls.append(call))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert found.units == "HU"
    order = np.argmax(np.abs(where.directions), axis=1)  # which coordinate each axis runs along
    assert found.shapes[0] == tuple(np.array(scan.shape[1:])[[order.tolist().index(axis) for axis in (2, 1, 0)]])
    assert sorted(found.spacings[0]) == [1.0, 1.5, 2.0]
    assert sorted(found.contents[0]) == sorted((12, 14, 16))
    assert (found.outside, found.known, found.channels) == (0, True, 1)
    assert 40 <= found.lows[0] <= 41
    assert 59 <= found.highs[0] <= 60
    plan = fit_preprocessing(found, (4, 4, 4))
    assert plan.crop
    assert found == scanned(cases, STRUCTURES, "ct", workers=1)
    bone = write_case(tmp_path, "unlabelled", np.full((1, 12, 12, 12), 900), geometry=geometry((12, 12, 12)))
    assert scanned([*cases, bone], STRUCTURES, "ct").highs == found.highs
    assert scanned(cases, None, "ct").lows[0] == -1000  # masks left alone
    assert scanned(cases, (), "ct") == found  # all values but 0 are structures


def test_a_scan_tells_values_and_copies_of_masks(tmp_path):
    image, labels = ct()
    other = np.where(labels == 1, 7, 0).astype(np.uint8)
    cases = [write_case(tmp_path, "a", image, labels), write_case(tmp_path, "b", image, other)]
    cases += [write_case(tmp_path, "c", image, labels), write_case(tmp_path, "d", image)]
    scans = scan_volumes(cases, STRUCTURES, "ct", READER)
    assert list(scans) == ["a", "b", "c", "d"]
    assert [scan.values for scan in scans.values()] == [(0, 1), (0, 7), (0, 1), None]
    assert [scan.labelled for scan in scans.values()] == [True, False, True, False]
    assert len({scan.fingerprint for scan in scans.values()}) == 1
    masks = [scan.mask_fingerprint for scan in scans.values()]
    assert masks[0] == masks[2] != masks[1]
    assert masks[3] == ""


def test_what_a_scan_told_is_kept_until_a_file_changes(tmp_path):
    image, labels = ct()
    cases = [write_case(tmp_path, "a", image, labels), write_case(tmp_path, "b", image)]
    read = []

    def counted(case):
        read.append(case.id)
        return READER.volume(case)

    def scans(structures=STRUCTURES):
        read.clear()
        return scan_volumes(cases, structures, "ct", replace(READER, volume=counted), tmp_path / "kept", workers=1)

    first = scans()
    assert read == ["a", "b"]
    second = scans()
    assert read == []
    for case, scan in first.items():
        np.testing.assert_array_equal(second[case].samples, scan.samples)
        assert replace(second[case], samples=scan.samples) == scan
    scans(())
    assert read == ["a"]  # whose mask is looked at otherwise
    write_case(tmp_path, "a", image + 1, labels)
    scans()
    assert read == ["a"]
    for kept in (tmp_path / "kept").iterdir():
        kept.write_bytes(kept.read_bytes()[:100])
    scans()
    assert read == ["a", "b"]


def test_a_case_that_cannot_be_used_is_read_again(tmp_path):
    def unreadable(case):
        raise DataError("The disk is away.")

    case = write_case(tmp_path, "a", *ct())
    scans = scan_volumes([case], STRUCTURES, "ct", replace(READER, volume=unreadable), tmp_path / "kept")
    assert scans["a"].error == "The disk is away."
    assert not (tmp_path / "kept").exists()
    assert scan_volumes([case], STRUCTURES, "ct", READER, tmp_path / "kept")["a"].error is None


def test_structures_that_nobody_named(tmp_path):
    def values(*numbers):
        return [write_case(tmp_path, "mask", np.zeros((1, 1, 1, 99)), np.resize(numbers, (1, 1, 99)))]

    def found(*numbers):
        return structures_in(scan_volumes(values(*numbers), (), "unknown", READER).values())

    assert found(0, 255) == (Structure("foreground", (255,)),)
    assert found(0, 2, 1) == (Structure("1", (1,)), Structure("2", (2,)))
    assert found(0) == ()
    assert found(-1, 0, 3, -7, 1) == (Structure("1", (1,)), Structure("3", (3,)))
    assert found(-1, 0) == found(*range(-90, 2)) == ()
    (scan,) = scan_volumes(values(-1, 0), (), "unknown", READER).values()
    assert (scan.values, scan.labelled) == ((-1, 0), False)
    assert found(*range(90)) == ()  # grey levels, which check tells


def test_structures_outside_the_content_are_counted(tmp_path):
    scan, labels = ct()
    labels[0, 0, 0] = 2
    cases = [write_case(tmp_path, "a", scan, labels), write_case(tmp_path, "b", *ct())]
    assert scanned(cases, STRUCTURES, "ct").outside == 1


def test_scans_that_fit_into_8_bits_are_no_photographs(tmp_path):
    small = np.random.default_rng(0).integers(0, 200, (1, 5, 6, 7), dtype=np.uint8)
    cases = [
        write_case(tmp_path, "a", small, geometry=geometry((5, 6, 7)), units="levels"),
        write_case(tmp_path, "b", small.astype(np.float32), geometry=geometry((5, 6, 7))),
    ]
    assert scanned(cases, None, "mri").units == "none"


def test_grey_and_coloured_images_are_planned_as_coloured(tmp_path):
    tile = np.random.default_rng(0).integers(0, 200, (3, 20, 30), dtype=np.uint8)
    cases = [write_case(tmp_path, str(count), tile[:count], units="levels") for count in (1, 3)]
    found = scanned(cases, None, "pathology")
    assert (found.channels, len(found.lows), found.units, found.known) == (3, 3, "levels", False)
    assert len(fit_preprocessing(found, (16, 16)).windows) == 3
    assert len(fit_preprocessing(found, (16, 16), channels=1).windows) == 1


def test_cases_that_cannot_be_used_are_listed_together(tmp_path):
    cases = [write_case(tmp_path, name, *ct()) for name in "abc"]
    cases[0].image.write_bytes(b"")
    np.save(cases[2].mask, np.zeros((2, 2, 2), int))
    with pytest.raises(DataError) as caught:
        scanned(cases, STRUCTURES, "ct")
    assert caught.value.problems == ["a: is no scan.", "c: has another shape than its scan."]


def test_data_that_do_not_go_together_are_told(tmp_path):
    volume = write_case(tmp_path, "volume", np.zeros((1, 4, 5, 6)))
    image = write_case(tmp_path, "image", np.zeros((1, 5, 6)))
    double = write_case(tmp_path, "double", np.zeros((2, 4, 5, 6)))
    hounsfield = write_case(tmp_path, "hounsfield", np.zeros((1, 4, 5, 6)), units="HU")
    for others, message in (([image], "together"), ([double], r"channels: \[1, 2\]"), ([hounsfield], "HU")):
        with pytest.raises(DataError, match=message):
            scanned([volume, *others], None, "unknown")
    assert read_volume(hounsfield).units == "HU"
    assert scanned([volume, hounsfield], None, "ct").units == "HU"
    with pytest.raises(DataError, match="no training cases"):
        fingerprint_of([])
    with pytest.raises(DataError, match="3 dimensions, but the backbone has 2"):
        fit_preprocessing(fingerprint(), (16, 16))


def test_what_the_user_says_is_taken():
    said = VolumeOptions(spacing=(2.0, 1.0, 1.0), patch=(8, 16, 16), windows=(PERCENTILES,), air=3.0, crop=True)
    plan = fit_preprocessing(fingerprint(), (8, 8, 8), said)
    assert (plan.spacing, plan.patch, plan.windows, plan.air, plan.crop) == (
        (2.0, 1.0, 1.0), (8, 16, 16), (PERCENTILES,), 3.0, True,
    )  # fmt: skip
    assert fit_preprocessing(fingerprint(), (8, 8, 8), VolumeOptions(spacing="none")).spacing is None
    middle = VolumeOptions(center_crop=(20.0, 25.0, 500.0), spacing=(2.0, 1.0, 1.0))
    plan = fit_preprocessing(fingerprint(((90, 90, 90),) * 3), (1, 1, 1), middle)
    assert (plan.patch, plan.center_crop) == ((10, 24, 90), (20.0, 25.0, 500.0))
    with pytest.raises(ConfigError, match=r"center_crop is \[5.0, 5.0\]: give 3 numbers"):
        fit_preprocessing(fingerprint(), (8, 8, 8), VolumeOptions(center_crop=(5.0, 5.0)))
    with pytest.raises(ConfigError, match=r"patch is \[9, 9, 9\].*\[8, 8, 8\]"):
        fit_preprocessing(fingerprint(), (8, 8, 8), VolumeOptions(patch=(9, 9, 9)))


def test_each_channel_of_scans_needs_its_window():
    zscore = Window(kind="zscore", low=-3, high=3)
    plan = fit_preprocessing(fingerprint(channels=2), (8, 8, 8), VolumeOptions(windows=(zscore, PERCENTILES)))
    assert (plan.windows, plan.dtype) == ((zscore, PERCENTILES), "float16")
    with pytest.raises(ConfigError, match=r"data.volume.windows: 1 for 2 channels"):
        fit_preprocessing(fingerprint(channels=2), (8, 8, 8), VolumeOptions(windows=(zscore,)))
    tiles = fingerprint(((64, 64),), ((1.0, 1.0),), units="levels", channels=3)
    levels = VolumeOptions(windows=(Window(kind="fixed", low=0, high=255),))
    assert len(fit_preprocessing(tiles, (16, 16), levels).windows) == 1  # colour becomes grey


def test_a_size_for_all_takes_the_place_of_a_spacing_unless_the_user_says_otherwise():
    images = fingerprint(((300, 200),) * 2, ((1.0, 1.0),) * 2, units="levels", known=False)
    plan = fit_preprocessing(images, (16, 16), size=(64, 64))
    assert (plan.size, plan.spacing, plan.patch) == ((64, 64), None, (64, 64))
    own = fit_preprocessing(images, (16, 16), VolumeOptions(size=(32, 48)), size=(64, 64))
    assert (own.size, own.patch) == ((32, 48), (32, 48))
    for options in (VolumeOptions(size="none"), VolumeOptions(spacing="none")):
        assert fit_preprocessing(images, (16, 16), options, size=(64, 64)).size is None
    spaced = fit_preprocessing(images, (16, 16), VolumeOptions(spacing=(2.0, 2.0)), size=(64, 64))
    assert (spaced.size, spaced.spacing) == (None, (2.0, 2.0))


def test_what_is_planned_has_the_digits_of_a_header():
    spacings = ((1.2000000000000002, 0.6738280057907104, 1 / 3),) * 3
    found = fingerprint(spacings=spacings, units="HU", lows=(-930.469970703125,), highs=(40.40999984741211,))
    plan = fit_preprocessing(found, (8, 8, 8))
    assert plan.spacing == (1.2, 0.673828, 0.333333)
    assert plan.windows == (Window(kind="fixed", low=-930.47, high=40.41),)
    narrow = fingerprint(units="HU", lows=(12.3456789,), highs=(12.3456789,))
    assert fit_preprocessing(narrow, (8, 8, 8)).windows == (Window(kind="fixed", low=12.3457, high=13.3457),)


@pytest.mark.parametrize("size", [None, (16, 24, 24)])
@pytest.mark.parametrize("units", ["HU", "none"])
def test_a_plan_planned_again_from_its_own_options_is_the_same(size, units):
    changes = {"units": units, "lows": (-7 / 3,), "highs": (240 / 7,), "contents": ((20, 20, 20),) * 3}
    first = fingerprint(spacings=((2 / 3, 0.7, 1 / 7),) * 3, **changes)
    plan = fit_preprocessing(first, (8, 8, 8), size=size)
    other = fingerprint(((9, 9, 9),), ((3.0, 3.0, 3.0),), units=units)
    assert fit_preprocessing(other, (8, 8, 8), as_options(plan)) == plan
