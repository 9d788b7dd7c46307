"""Agreement of two masks, against brute force, MONAI and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from medtpp.errors import ConfigError, DataError
from medtpp.evaluation.surfaces import compare_masks

SPACINGS = ((1.0, 1.0, 1.0), (5.0, 0.8, 0.5), (2.0, 3.0), (0.1, 0.1))


@st.composite
def mask_pairs(draw, dims=(2, 3)):
    """Two masks of which none is empty: blobs that overlap, or scattered elements."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=dims[0], max_size=dims[-1])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    noise, change = rng.random(shape), rng.random(shape)
    true = noise < draw(st.sampled_from([0.1, 0.5, 0.9]))
    predicted = true ^ (change < draw(st.sampled_from([0.0, 0.1, 0.5])))
    for mask in (predicted, true):
        mask[tuple(rng.integers(shape))] = True
    return predicted, true


def spacing_of(mask, seed=0):
    return tuple(np.random.default_rng(seed).uniform(0.3, 4.0, mask.ndim).tolist())


def at(mask, place):
    return all(0 <= i < n for i, n in zip(place, mask.shape, strict=True)) and bool(mask[place])


def boundary(mask):
    """Elements with a neighbour outside, one by one."""
    steps = [*np.eye(mask.ndim, dtype=int), *-np.eye(mask.ndim, dtype=int)]
    inside = map(tuple, np.argwhere(mask).tolist())
    return [p for p in inside if not all(at(mask, tuple(np.add(p, s).tolist())) for s in steps)]


def corners(mask):
    """Grid corners that have elements inside and outside around them."""
    around = [tuple(index) for index in np.ndindex((2,) * mask.ndim)]
    found = {}
    for corner in np.ndindex(tuple(n + 1 for n in mask.shape)):
        bits = tuple(at(mask, tuple(np.subtract(np.add(corner, a), 1).tolist())) for a in around)
        if len(set(bits)) == 2:
            found[corner] = bits
    return found


def nearest(points, others, spacing):
    return cdist(np.array(list(points)) * spacing, np.array(list(others)) * spacing).min(axis=1)


def brute_hd95(predicted, true, spacing):
    a, b = boundary(predicted), boundary(true)
    return max(np.percentile(nearest(a, b, spacing), 95), np.percentile(nearest(b, a, spacing), 95))


def contour_length(bits, spacing):
    """Of the piece of contour between the middles of the sides of a cell of four pixels (marching squares)."""
    first, second, third, fourth = bits
    diagonal = math.hypot(*spacing) / 2
    if sum(bits) in (1, 3):
        return diagonal
    if (first, second) == (fourth, third):  # two pixels that touch at the corner alone
        return 2 * diagonal
    return spacing[1] if first == second else spacing[0]


@given(mask_pairs(), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_hd95_is_that_of_brute_force(pair, seed):
    spacing = spacing_of(pair[0], seed)
    assert compare_masks(*pair, spacing=spacing).hd95 == pytest.approx(brute_hd95(*pair, spacing), rel=1e-6, abs=1e-6)


@given(mask_pairs(dims=(2, 2)), st.integers(0, 99), st.sampled_from([0.0, 0.5, 2.0]))
@settings(max_examples=60, deadline=None)
def test_surface_dice_is_that_of_brute_force(pair, seed, tolerance):
    spacing = spacing_of(pair[0], seed)
    sides = [corners(mask) for mask in pair]
    near, total = 0.0, 0.0
    for side, other in (sides, sides[::-1]):
        lengths = np.array([contour_length(bits, spacing) for bits in side.values()])
        near += lengths[nearest(side, other, spacing) <= tolerance].sum()
        total += lengths.sum()
    assert compare_masks(*pair, spacing=spacing, tolerance=tolerance).nsd == pytest.approx(near / total)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("change", [0.02, 0.3])
def test_distances_are_those_of_monai(spacing, change):
    import torch
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    rng = np.random.default_rng(3)
    true = np.zeros((9, 12, 11)[: len(spacing)], dtype=bool)
    true[tuple(slice(2, -1) for _ in spacing)] = True
    predicted = true ^ (rng.random(true.shape) < change)
    found = compare_masks(predicted, true, spacing=spacing, tolerance=0.9)
    batch = [torch.from_numpy(mask)[None, None].float() for mask in (predicted, true)]
    hd95 = compute_hausdorff_distance(*batch, include_background=True, percentile=95, spacing=spacing)
    nsd = compute_surface_dice(*batch, [0.9], include_background=True, spacing=spacing, use_subvoxels=True)
    assert found.hd95 == pytest.approx(hd95.item(), rel=1e-5)
    assert found.nsd == pytest.approx(nsd.item(), rel=1e-5)


@given(mask_pairs(), st.data())
@settings(max_examples=40, deadline=None)
def test_flips_padding_and_order_do_not_matter(pair, data):
    predicted, true = pair
    spacing = spacing_of(true)
    axis, width = data.draw(st.integers(0, true.ndim - 1)), data.draw(st.integers(0, 3))
    found = compare_masks(predicted, true, spacing=spacing, tolerance=1.0)
    moved = [np.pad(np.flip(mask, axis), width) for mask in pair]
    for one in (
        compare_masks(*moved, spacing=spacing, tolerance=1.0),
        compare_masks(true, predicted, spacing=spacing, tolerance=1.0),
    ):
        assert one.dice == found.dice
        assert one.hd95 == pytest.approx(found.hd95, abs=1e-6)
        assert one.nsd == pytest.approx(found.nsd, abs=1e-6)


@given(mask_pairs(), st.floats(0.1, 10))
@settings(max_examples=40, deadline=None)
def test_distances_scale_with_the_spacing(pair, scale):
    spacing = spacing_of(pair[0])
    scaled = tuple(step * scale for step in spacing)
    once, again = (
        compare_masks(*pair, spacing=steps, tolerance=reach) for steps, reach in ((spacing, 1.3), (scaled, 1.3 * scale))
    )
    assert again.hd95 == pytest.approx(once.hd95 * scale, rel=1e-5)
    assert again.dice == once.dice
    assert again.nsd == pytest.approx(once.nsd)
    assert again.volume == pytest.approx(once.volume * scale ** len(spacing))


@given(mask_pairs())
@settings(max_examples=40, deadline=None)
def test_surface_dice_rises_with_the_tolerance_to_one(pair):
    values = [compare_masks(*pair, tolerance=tolerance).nsd for tolerance in (0, 1, 1.5, 3, 20)]
    assert values == sorted(values)
    assert values[-1] == 1
    same = compare_masks(pair[0], pair[0], tolerance=0)
    assert (same.dice, same.hd95, same.nsd) == (1, 0, 1)


def test_a_tolerance_of_whole_steps_takes_them_in():
    """3 * 0.1 is more than 0.3 in floating point."""
    true, predicted = np.zeros((2, 12, 12), dtype=bool)
    true[2:5, 2:5], predicted[2:5, 5:8] = True, True
    assert compare_masks(predicted, true, spacing=(0.1, 0.1), tolerance=0.3).nsd == 1
    assert compare_masks(predicted, true, spacing=(0.1, 0.1), tolerance=0.29).nsd < 1


def test_surfaces_count_by_area():
    """A plate of one slice of 10 mm: its rim is much of its surface, but few of its boundary elements."""
    true = np.zeros((3, 24, 24), dtype=bool)
    true[1, 2:22, 2:22] = True  # 10 x 10 mm
    predicted = true.copy()
    predicted[1, 18:22] = False  # 2 mm less
    found = compare_masks(predicted, true, spacing=(10.0, 0.5, 0.5), tolerance=0.5)
    # In mm²: two faces and a rim each. Of the missing strip, 1.5 mm of both faces and of the rim are out of reach.
    whole = 2 * (100 + 80) + 10 * (40 + 36)
    far = 2 * 10 * 1.5 + 10 * (10 + 1.5 + 1.5)
    assert found.nsd == pytest.approx(1 - far / whole, abs=0.02)
    counted = 1 - 3 * 20 / (400 + 320)  # all elements are at the boundary, three rows are out of reach
    assert found.nsd < counted - 0.04


def test_volumes_by_hand():
    mask, other = np.zeros((2, 4, 5, 6), dtype=bool)
    mask[1:3, 1:3, 1:3], other[0, 0, 0] = True, True
    found = compare_masks(mask, other, spacing=(5.0, 10.0, 2.0))
    assert (found.volume, found.volume_true) == (pytest.approx(0.8), pytest.approx(0.1))  # ml
    assert compare_masks(mask, other).volume == 8  # voxels
    assert compare_masks(mask[1], other[1], spacing=(10.0, 2.0)).volume == pytest.approx(0.8)  # cm²


def test_empty_masks():
    empty, some = np.zeros((2, 30, 40), dtype=bool)
    some[3, 4] = True
    both = compare_masks(empty, empty, spacing=(2.0, 2.0))
    assert (both.dice, both.hd95, both.nsd, both.volume, both.volume_true) == (None, None, None, 0, 0)
    missed, invented = compare_masks(empty, some, spacing=(2.0, 2.0)), compare_masks(some, empty, spacing=(2.0, 2.0))
    for one in (missed, invented):
        assert (one.dice, one.hd95, one.nsd) == (0, 100, 0)  # the diagonal of 60 x 80 mm
    assert (missed.volume, invented.volume_true) == (0, 0)
    assert missed.volume_true == invented.volume > 0


def test_masks_that_do_not_fit_are_refused():
    mask = np.ones((4, 5), dtype=bool)
    with pytest.raises(DataError, match=r"\(4, 5\) and the true one \(5, 4\)"):
        compare_masks(mask, mask.T)
    with pytest.raises(DataError, match="boolean"):
        compare_masks(mask.astype(np.uint8), mask)
    for spacing in ((1.0, 1.0, 1.0), (1.0, 0.0), (1.0, math.nan)):
        with pytest.raises(DataError, match="spacing"):
            compare_masks(mask, mask, spacing=spacing)
    for tolerance in (-1.0, math.inf):
        with pytest.raises(ConfigError, match="tolerance"):
            compare_masks(mask, mask, tolerance=tolerance)
