"""Phantoms: reproducible, varied, neither trivial nor hopeless."""

from dataclasses import astuple

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medtpp.config import DataOptions
from medtpp.data.phantom import generate, write_folder
from medtpp.data.read import read_dataset
from medtpp.errors import DataError


@pytest.mark.parametrize(("dims", "size"), [(2, 48), (3, 20)])
def test_shapes_masks_and_labels(dims, size):
    phantoms = generate(20, size, dims=dims)
    assert phantoms.images.shape == phantoms.masks.shape == (20, *[size] * dims)
    assert phantoms.images.dtype == phantoms.masks.dtype == np.uint8
    axes = tuple(range(1, dims + 1))
    assert np.array_equal(phantoms.masks.any(axis=axes), phantoms.labels == 1)
    assert set(np.unique(phantoms.masks)) == {0, 1}
    assert 5 <= phantoms.labels.sum() <= 15
    assert phantoms.images.std(axis=axes).min() > 15


@pytest.mark.parametrize(("dims", "size"), [(2, 32), (3, 16)])
def test_the_seed_decides(dims, size):
    few, more, other = generate(6, size, 3, dims=dims), generate(9, size, 3, dims=dims), generate(6, size, 4, dims=dims)
    for a, b in zip(astuple(few), astuple(more), strict=True):
        assert np.array_equal(a, b[:6])
    assert not np.array_equal(few.images, other.images)
    assert len({image.tobytes() for image in more.images}) == 9


def test_two_images_of_a_patient_show_the_same_lesion():
    phantoms = generate(60, 32)
    labels = {}
    for patient, label in zip(phantoms.patients, phantoms.labels, strict=True):
        assert labels.setdefault(patient, label) == label
    assert 30 < len(labels) < 60


def test_lesions_are_visible():
    phantoms = generate(60, 96)
    contrasts = []
    for image, mask in zip(phantoms.images, phantoms.masks, strict=True):
        if mask.any():
            rows, columns = np.nonzero(mask)
            radius = 2 * max(np.ptp(rows), np.ptp(columns), 2) // 2
            around = np.zeros_like(mask)
            around[
                max(rows.min() - radius, 0) : rows.max() + radius,
                max(columns.min() - radius, 0) : columns.max() + radius,
            ] = 1
            contrasts.append(image[mask == 1].mean() - np.quantile(image[(around == 1) & (mask == 0)], 0.3))
    assert np.mean(np.array(contrasts) > 15) > 0.8


def test_a_linear_probe_on_pixels_finds_it_hard_but_not_hopeless():
    aucs = []
    for seed in (0, 1):
        phantoms = generate(600, 64, seed)
        small = np.stack(
            [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BOX)) for image in phantoms.images]
        )
        pixels = small.reshape(len(small), -1) / 255
        training = np.array([patient < phantoms.patients[400] for patient in phantoms.patients])
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=1e-3)).fit(
            pixels[training], phantoms.labels[training]
        )
        aucs.append(roc_auc_score(phantoms.labels[~training], probe.decision_function(pixels[~training])))
    assert 0.52 < np.mean(aucs) < 0.8


def test_folders_that_the_layouts_read(tmp_path):
    write_folder(tmp_path / "m", 12, 32, seed=5)
    write_folder(tmp_path / "f", 12, 32, seed=5, layout="folders")
    table, folders = (read_dataset(DataOptions(path=tmp_path / name)) for name in "mf")
    phantoms = generate(12, 32, 5)
    assert (table.layout, folders.layout) == ("manifest", "folders")
    assert table.classes == folders.classes == ("lesion", "normal")
    assert table.problems == folders.problems == ()
    assert [case.patient for case in table.cases] == phantoms.patients
    assert [case.labels[0] for case in table.cases] == ["lesion" if label else "normal" for label in phantoms.labels]
    with Image.open(table.cases[3].image) as image:
        assert np.array_equal(np.asarray(image), phantoms.images[3])
    with pytest.raises(DataError, match="manifest or folders"):
        write_folder(tmp_path / "x", 1, 32, layout="csv")
