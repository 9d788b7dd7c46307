"""Overlays: which cases are shown, that left is left, that proportions are true, and empty masks."""

import json
from functools import partial

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from medtpp.data.geometry import plain_geometry
from medtpp.data.restore import axes_to_ras, reorder
from medtpp.evaluation import Segmentations
from medtpp.evaluation.overlays import PREDICTED, TRUE, choose_cases, draw_overlay, write_overlays
from medtpp.inference.stored import planes
from volumes import geometry

TWO = partial(planes, structures=2, overlapping=False)


def table(dice):
    """A table with these Dice values (n, k); not-a-number where nothing is there."""
    dice = np.array(dice, dtype=float)
    nobody, volume = (None,) * len(dice), np.where(np.isnan(dice), 0.0, 1.0)
    cases = tuple(f"{row}.nii.gz" for row in range(len(dice)))
    names = ("organ", "lesion")[: dice.shape[1]]
    return Segmentations(
        cases, ("test",) * len(dice), nobody, nobody, names, dice, 10 * (1 - dice), dice, volume, volume
    )


def coloured(pixels, colour):
    """(h, w) where a picture is about this colour."""
    return (np.abs(pixels / 255 - to_rgb(colour)) < 0.2).all(axis=2)


def middle(mask):
    """Row and column of the middle of a mask, as shares of the picture."""
    return [float(places.mean()) / size for places, size in zip(np.nonzero(mask), mask.shape, strict=True)]


@pytest.mark.parametrize(
    ("dice", "chosen"),
    [
        ([[0.2, 0.4], [0.9, 0.9], [0.5, np.nan]], {"best": 1, "median": 2, "worst": 0}),
        ([[0.5], [0.1]], {"best": 0, "worst": 1}),
        ([[0.5], [np.nan]], {"best": 0}),
        ([[np.nan]], {}),
    ],
)
def test_the_best_the_median_and_the_worst(dice, chosen):
    assert choose_cases(table(dice)) == chosen


@pytest.mark.parametrize("seed", range(12))
def test_left_is_left_in_every_orientation(seed):
    """A body with a lesion at the patient's right, front, head; however the file's axes run."""
    where = geometry((40, 36, 32), seed=2 * seed)
    order, flipped = axes_to_ras(where)
    image, lesion = np.zeros(where.shape, np.float32), np.zeros(where.shape, np.uint8)
    reorder(image, order, flipped)[2:-2, 2:-2, 2:-2] = 0.5
    inside = reorder(lesion, order, flipped)
    corner = tuple(slice(2 * size // 3, size - 4) for size in inside.shape)  # to the head, front and right
    inside[corner] = 1
    inside[tuple(slice(3, 5) for _ in range(3))] = 2  # so that all is shown
    pictures = {one.plane: one.pixels for one in draw_overlay(image, lesion, 0 * lesion, where, TWO)}
    assert list(pictures) == ["axial", "coronal", "sagittal"]
    for name, pixels in pictures.items():
        row, column = middle(coloured(pixels, TRUE))
        assert row < 0.45, name  # front or head on top
        assert column < 0.45, name  # right, or front, on the left


def test_proportions_are_those_of_the_patient():
    where = geometry((10, 50, 50), spacing=(5.0, 1.0, 1.0))
    mask = np.ones(where.shape, np.uint8)
    pictures = {one.plane: one.pixels.shape[:2] for one in draw_overlay(0.0 * mask, mask, mask, where, TWO)}
    assert pictures == {"axial": (300, 300), "coronal": (300, 300), "sagittal": (300, 300)}
    whole = np.ones((50, 100), np.uint8)
    flat = draw_overlay(0.0 * whole, whole, whole, plain_geometry(whole.shape), TWO)
    assert [one.pixels.shape for one in flat] == [(150, 300, 3)]


def test_both_outlines_are_seen_where_they_agree():
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 1
    (picture,) = draw_overlay(np.full(mask.shape, 0.5), mask, mask, plain_geometry(mask.shape), TWO)
    true, predicted = coloured(picture.pixels, TRUE).sum(), coloured(picture.pixels, PREDICTED).sum()
    assert true > 50
    assert predicted > 50
    grey = picture.pixels[2, 2]
    assert len(set(grey.tolist())) == 1


def test_a_stain_keeps_its_colour_and_its_place():
    where = plain_geometry((40, 60))
    stained = np.ones((40, 60, 3), np.float32)
    stained[:, :20] = 0.9, 0.2, 0.6
    nothing = np.zeros((40, 60), np.uint8)
    (picture,) = draw_overlay(stained, nothing, nothing, where, TWO)
    (grey,) = draw_overlay(stained[..., 1], nothing, nothing, where, TWO)
    assert picture.pixels.shape == grey.pixels.shape == (200, 300, 3)
    pink = (picture.pixels[..., 0].astype(int) - picture.pixels[..., 1]) > 100
    assert pink[:, :90].all()
    assert not pink[:, 110:].any()
    assert (grey.pixels[:, :90] < 60).all()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("there", "predicted"), [(False, True), (True, False), (False, False)])
def test_empty_masks(dims, there, predicted):
    shape = (20, 24, 28)[-dims:]
    block = np.zeros(shape, np.uint8)
    block[(slice(8, 12),) * dims] = 2
    true, found = block * there, block * predicted
    pictures = draw_overlay(np.zeros(shape), true, found, plain_geometry(shape), TWO)
    names = [one.plane for one in pictures]
    assert names == ([""] if dims == 2 else ["axis 1", "axis 2", "axis 3"])
    for one in pictures:
        assert coloured(one.pixels, TRUE).any() == there
        assert coloured(one.pixels, PREDICTED).any() == predicted


def test_structures_that_overlap():
    bits = np.zeros((40, 40), np.uint8)
    bits[10:30, 10:30] |= 1
    bits[15:25, 15:25] |= 2
    split = partial(planes, structures=2, overlapping=True)
    (both,) = draw_overlay(np.zeros(bits.shape), bits, bits * 0, plain_geometry(bits.shape), split)
    (outer,) = draw_overlay(np.zeros(bits.shape), bits & 1, bits * 0, plain_geometry(bits.shape), split)
    assert coloured(both.pixels, TRUE).sum() > 1.2 * coloured(outer.pixels, TRUE).sum()


def test_what_is_written(tmp_path):
    found, mask = table([[0.5, np.nan], [0.75, 0.25]]), np.ones((8, 8), np.uint8)
    pictures = draw_overlay(np.zeros((8, 8)), mask, mask, plain_geometry((8, 8)), TWO)
    write_overlays(tmp_path, found, [("best", 1, pictures), ("worst", 0, pictures)])
    best, worst = json.loads((tmp_path / "overlays.json").read_text())
    assert (best["kind"], best["case"], best["dice"], best["hd95"]) == ("best", "1.nii.gz", 0.5, 5.0)
    assert worst["structures"][1] == {"name": "lesion", "dice": None, "hd95": None}
    assert worst["pictures"] == [{"plane": "", "image": "worst-image.png"}]
    with Image.open(tmp_path / "worst-image.png") as picture:
        assert max(picture.size) == 300
