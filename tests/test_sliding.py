"""Sliding windows: weights, borders, flips, ensembles, memory, and the way from a scan to a mask on its grid."""

import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from medtpp.backbones import load
from medtpp.config import Window
from medtpp.data.case import Case, Structure
from medtpp.data.geometry import Volume, same_grid
from medtpp.data.volume_preprocess import VolumePreprocessing, label_mask
from medtpp.data.volumes import read_mask, read_volume
from medtpp.inference.sliding import SlidingWindow, as_member, labels_on_scan
from medtpp.inference.write import write_mask
from medtpp.tasks.segmentation import Segmentation, SegmentationOptions
from volumes import STRUCTURES, blobs, geometry

CLASSES = 3


def one_hot(images):
    """The identity: (B, 1, *patch) of labels / 2 to certainty of them."""
    labels = (images[:, 0] * (CLASSES - 1)).round().long()
    return F.one_hot(labels, CLASSES).movedim(-1, 1).float()


def noise(shape, seed=0):
    return np.random.default_rng(seed).random(shape, np.float32)


def stacked(window, array):
    """(K, *spatial)"""
    return np.stack([*window.probabilities(array)])


def position_free(images):
    """A network that sees one voxel at a time, and so gives the same whatever the windows are."""
    return torch.cat([images, 1 - images], dim=1)


@settings(max_examples=25, deadline=None)
@given(
    sides=st.lists(st.tuples(st.integers(1, 7), st.integers(0, 12)), min_size=2, max_size=3),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.75]),
    batch=st.integers(1, 5),
)
def test_windows_cover_everything_and_weights_sum_to_one(sides, overlap, batch):
    patch = tuple(side for side, _ in sides)
    array = noise((1, *(side + more for side, more in sides)))
    window = SlidingWindow([torch.ones_like], patch, overlap=overlap, batch=batch)
    slabs = [slab.clone() for slab in window.slabs(array)]
    assert all(slab.shape[1] <= patch[0] for slab in slabs)
    whole = torch.cat(slabs, dim=1)
    assert whole.shape == array.shape
    torch.testing.assert_close(whole, torch.ones_like(whole), rtol=0, atol=1e-5)  # up to 64 windows are added
    exact = torch.cat([slab.clone() for slab in SlidingWindow([position_free], patch).slabs(array)], dim=1)
    np.testing.assert_allclose(exact, np.concatenate([array, 1 - array]), atol=1e-5)


def test_neighbours_overlap_as_asked_and_the_centre_of_a_window_counts_most():
    seen = []

    def order(images):  # the number of the window
        seen.extend(range(len(seen), len(seen) + len(images)))
        return torch.stack([torch.full_like(image, seen[-1]) for image in images])

    (row,) = SlidingWindow([order], (8, 8), batch=1).slabs(np.zeros((1, 8, 12), np.float32))
    assert seen == [0, 1]  # at 0 and 4
    profile = row[0, 0]
    assert (profile[:4] == 0).all()
    torch.testing.assert_close(profile[8:], torch.ones(4))
    torch.testing.assert_close(profile[4:8], 1 - profile[4:8].flip(0))  # handed over evenly ...
    assert (profile[4:8].diff() > 0).all()  # ... from one centre to the other
    gaussian = np.exp(-0.5 * (np.arange(8) - 3.5) ** 2)  # sigma is 8 / 8
    expected = gaussian[:4] / (gaussian[:4] + gaussian[4:])
    np.testing.assert_allclose(profile[4:8], expected, rtol=1e-5)
    seen.clear()
    list(SlidingWindow([order], (8, 8), overlap=0.75, batch=1).slabs(np.zeros((1, 16, 16), np.float32)))
    assert len(seen) == 25


def test_an_ensemble_is_the_mean_and_order_does_not_matter():
    array = noise((1, 9, 10, 11))
    members = [one_hot, lambda images: one_hot(1 - images)]
    singles = [stacked(SlidingWindow([member], (4, 4, 4)), array).astype(np.float32) for member in members]
    both = stacked(SlidingWindow(members, (4, 4, 4)), array)
    assert both.dtype == np.float16
    np.testing.assert_allclose(both, (singles[0] + singles[1]) / 2, atol=1e-3)
    assert np.array_equal(both, stacked(SlidingWindow(members[::-1], (4, 4, 4), batch=7), array))
    assert not np.allclose(singles[0], singles[1])
    with pytest.raises(ValueError, match="needs a member"):
        stacked(SlidingWindow([], (4, 4, 4)), array)


@pytest.mark.parametrize("axes", [(0,), (1, 2), (0, 1, 2)])
def test_flips_are_averaged_and_turned_back(axes):
    array = noise((1, 6, 6, 6))

    def ramp(images):  # knows where it is in the window, and so is not the same on a flipped image
        return images * torch.linspace(0, 1, 216).reshape(6, 6, 6)

    expected = []
    for some in itertools.chain.from_iterable(itertools.combinations(axes, n) for n in range(len(axes) + 1)):
        turned = torch.from_numpy(np.flip(array, [axis + 1 for axis in some]).copy())
        expected.append(np.flip(ramp(turned[None])[0].numpy(), [axis + 1 for axis in some]))
    assert len(expected) == 2 ** len(axes)
    found = stacked(SlidingWindow([ramp], (6, 6, 6), flips=axes), array)
    np.testing.assert_allclose(found, np.mean(expected, axis=0), atol=1e-3)
    whole = stacked(SlidingWindow([one_hot], (3, 4, 5), flips=axes), array)
    assert np.array_equal(whole, stacked(SlidingWindow([one_hot], (3, 4, 5)), array))


def test_labels_are_the_likeliest_structures_or_bits():
    array = noise((3, 7, 8))

    def channels(images):
        return images

    labels = SlidingWindow([channels], (4, 4)).labels(array)
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, array.argmax(axis=0))
    bits = SlidingWindow([channels], (4, 4), overlapping=True).labels(array)
    assert np.array_equal(bits, (array[0] > 0.5) + 2 * (array[1] > 0.5) + 4 * (array[2] > 0.5))
    stored = SlidingWindow([channels], (4, 4), overlapping=True).labels((array * 255).astype(np.uint8))
    assert (stored != bits).mean() < 0.02  # uint8 is divided by 255


def test_arrays_smaller_than_a_window_are_refused():
    for shape in ((1, 3, 8), (1, 8, 8, 8)):
        with pytest.raises(ValueError, match="cannot be covered"):
            SlidingWindow([one_hot], (4, 4)).labels(np.zeros(shape, np.float32))


CASES = 200
FACTORS = {
    "oblique": (False, True),
    "suffix": (".nii.gz", ".nrrd", ".mha", ".nii"),
    "refined": (False, True),
    "crop": (False, True),
    "margin": (0.0, 1.0, 2.0, 3.0, 4.0),
    "border": ("zero", "edge"),
    "flips": ((), (2,), (0, 1)),
    "thin": (False, True),
}


def drawn(seed):
    """Each factor by a draw of its own, so that no two go together in all cases; and the generator for the rest."""
    rng = np.random.default_rng(seed)
    return {name: values[rng.integers(len(values))] for name, values in FACTORS.items()}, rng


def test_the_cases_cross_every_factor_with_every_other():
    cases = [drawn(seed)[0] for seed in range(CASES)]
    for one, other in itertools.combinations(FACTORS, 2):
        wanted = set(itertools.product(FACTORS[one], FACTORS[other]))
        assert {(case[one], case[other]) for case in cases} == wanted, (one, other)


@pytest.mark.parametrize("seed", range(CASES))
def test_an_identity_models_mask_comes_back_voxel_exact(seed, tmp_path):
    """Any orientation, spacing and shape, thinner than the window or not: scan, windows, way back, file, mask."""
    case, rng = drawn(seed)
    shape = tuple(rng.integers(1, 20, 3).tolist())
    spacing = rng.uniform(0.5, 6, 3)
    where = geometry(shape, spacing.tolist(), 2 * int(rng.integers(1000)) + case["oblique"])  # odd seeds are oblique
    labels = rng.integers(0, CLASSES, shape).astype(np.uint8)
    patch = rng.integers(*((16, 24) if case["thin"] else (4, 16)), 3)
    prepare = VolumePreprocessing(
        patch=tuple(patch.tolist()),
        windows=(Window(kind="fixed", low=0, high=CLASSES - 1),),
        spacing=tuple((spacing.min() * rng.uniform(0.5, 1.0, 3)).tolist()) if case["refined"] else None,
        air=0.5,
        crop=case["crop"],
        margin=case["margin"],
        border=case["border"],
    )
    image, mask = (tmp_path / f"{name}{case['suffix']}" for name in ("image", "mask"))
    write_mask(image, labels, where)
    volume = read_volume(Case("case", image))
    array, restore = prepare.apply(volume)
    if case["refined"]:  # an image that is interpolated holds no labels any more
        array = prepare.apply_mask(labels, STRUCTURES, restore)[None] / np.float32(CLASSES - 1)
    window = SlidingWindow([one_hot], prepare.patch, flips=case["flips"])
    write_mask(mask, window.scan_labels(array, restore), volume.geometry)
    assert np.array_equal(read_mask(mask, volume.geometry), labels)
    assert same_grid(read_volume(Case("mask", mask)).geometry, where)


@pytest.mark.parametrize("overlapping", [False, True])
def test_on_a_coarser_grid_probabilities_are_interpolated(overlapping):
    labels = blobs((30, 32, 34), 3, scale=5)
    structures = (Structure("whole", (1, 2)), Structure("core", (2,))) if overlapping else STRUCTURES
    prepare = VolumePreprocessing(
        patch=(16, 16, 16), windows=(Window(kind="fixed", low=0, high=2),), spacing=(1.5, 1.5, 1.5)
    )
    _, restore = prepare.apply(Volume(labels[None], geometry(labels.shape, (1, 1, 1), 5)))
    array = prepare.apply_mask(labels, STRUCTURES, restore)[None] / np.float32(2)

    def regions(images):
        certain = one_hot(images)
        return torch.stack([certain[:, 1] + certain[:, 2], certain[:, 2]], dim=1)

    window = SlidingWindow([regions if overlapping else one_hot], (16, 16, 16), overlapping=overlapping)
    found = window.scan_labels(array, restore)
    truth = label_mask(labels, structures)
    nearest = restore.labels(window.labels(array))
    assert (found != truth).mean() < (nearest != truth).mean()  # smoother than blocks
    assert (found != truth).mean() < 0.08
    probabilities = stacked(window, array)
    assert np.array_equal(found, labels_on_scan(probabilities, restore, overlapping=overlapping))


def test_outside_of_the_crop_is_background():
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[6:14, 6:14, 6:14] = 1
    prepare = VolumePreprocessing(
        patch=(4, 4, 4), windows=(Window(kind="fixed", low=0, high=2),), air=0.5, crop=True, margin=2, spacing=(2, 2, 2)
    )
    _, restore = prepare.apply(Volume(labels[None], geometry(labels.shape)))
    assert (restore.cropped, restore.resized) == ((12,) * 3, (6,) * 3)
    array = prepare.apply_mask(labels, STRUCTURES, restore)[None] / np.float32(2)
    found = SlidingWindow([one_hot], (4, 4, 4)).scan_labels(array, restore)
    assert found[7:13, 7:13, 7:13].all()
    outside = np.ones_like(found)
    outside[5:15, 5:15, 5:15] = 0
    assert not (found * outside).any()


def test_a_task_on_a_backbone_is_a_member():
    """One window over all of an image gives what the network gives."""
    from medtpp.seeds import Seeds

    backbone = load("medtpp_vit_tiny").eval()
    task = Segmentation(SegmentationOptions(feature_size=4), backbone.spec, ("one", "two"), False, Seeds(0)).eval()
    images = noise((1, *backbone.spec.image_size))
    found = stacked(SlidingWindow([as_member(backbone, task)], images.shape[1:]), images)
    with torch.no_grad():
        logits = task(backbone.encode(torch.from_numpy(images)[None], taps=task.taps))
    np.testing.assert_allclose(found, logits.softmax(dim=1)[0], atol=1e-3)
    np.testing.assert_allclose(found.sum(axis=0), 1, atol=2e-3)


PEAK = """
import resource, sys
import numpy as np, torch
from medtpp.inference.sliding import SlidingWindow

def member(images):
    return torch.cat([images] * 4, dim=1)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)

predict = getattr(SlidingWindow([member], (16, 64, 64), batch=2), sys.argv[1])
predict(np.zeros((1, 32, 64, 64), np.float16))
array = np.full((1, 256, 256, 256), 0.5, np.float16)
before = peak()
predict(array)
print(peak() - before)
"""


@pytest.mark.parametrize(("method", "result"), [("probabilities", 4 * 2 * 16), ("labels", 16)])
def test_peak_memory_is_a_slab_and_the_result(method, result):
    """As documented, in MiB, for 4 outputs of 16 Mi voxels; in float32 the outputs alone would take 256."""
    pytest.importorskip("resource")
    found = float(subprocess.run([sys.executable, "-c", PEAK, method], check=True, capture_output=True).stdout)
    slab, handed_out, batch = 4 * 4, 12 * 8 / 16, 4 * 4 * 2 / 16  # 16 x 256 x 256 voxels are 1 Mi, windows 1 / 16
    assert found < result + slab + handed_out + 6 * batch + 32  # what libraries keep for themselves
