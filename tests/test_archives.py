"""MedMNIST archives on their way to the network: one cache of images, volumes row by row."""

import math
from dataclasses import replace

import numpy as np
import pytest

from medtpp.config import DataOptions
from medtpp.data import npz
from medtpp.data.cache import build, read_pixels, scan
from medtpp.data.case import Case
from medtpp.data.preprocess import Preprocessing
from medtpp.data.read import read_dataset
from medtpp.data.volumes import read_volume
from medtpp.errors import DataError
from medtpp.workflow.images import are_photographs, store_photographs
from stages import experiment

GREY = Preprocessing(image_size=16, channels=1)


def archive(path, shape=(12, 10), sizes=(40, 10, 12), save=np.savez_compressed, seed=0):
    rng = np.random.default_rng(seed)
    content = {}
    for split, size in zip(("train", "val", "test"), sizes, strict=True):
        content[f"{split}_images"] = rng.integers(0, 256, (size, *shape), dtype=np.uint8)
        content[f"{split}_labels"] = np.arange(size)[:, None] % 2
    save(path, **content)
    return read_dataset(DataOptions(path=path)), content


def row(content, case):
    split, _, number = case.id.partition("/")
    return content[f"{split}_images"][int(number)]


def test_a_cache_holds_every_row(tmp_path):
    dataset, content = archive(tmp_path / "a.npz")
    cache = build(dataset.cases, GREY, tmp_path / "cache")
    assert cache.shape == (62, 1, 16, 16)
    for case, record in zip(dataset.cases, cache.records, strict=True):
        np.testing.assert_array_equal(cache.images[cache.row[case.id]], GREY.apply(row(content, case)))
        assert (record.case, record.height, record.width, record.colour, record.error) == (case.id, 12, 10, False, None)
    assert tuple(scan(dataset.cases).values()) == cache.records


def test_the_same_rows_in_another_file_are_the_same_cache(tmp_path):
    first, _ = archive(tmp_path / "a.npz")
    second, _ = archive(tmp_path / "b.npz", save=np.savez)
    path = build(first.cases, GREY, tmp_path / "cache").path
    assert build(second.cases[::-1], GREY, tmp_path / "cache").path == path
    other, _ = archive(tmp_path / "c.npz", seed=1)
    assert build(other.cases, GREY, tmp_path / "cache").path != path


def test_rows_are_decompressed_once_on_several_threads(tmp_path):
    dataset, _ = archive(tmp_path / "a.npz", (300, 300), (70, 1, 1))
    npz._block.cache_clear()
    scan(dataset.cases, workers=8)
    assert npz._block.cache_info().misses == math.ceil(70 / npz.ROWS) + 2


def test_a_broken_archive_is_told_row_by_row_and_no_file_name_is_kept(tmp_path):
    path = tmp_path / "Mustermann.npz"
    dataset, _ = archive(path, (64, 64))
    data = bytearray(path.read_bytes())
    data[3000:3400] = bytes(400)  # inside the compressed images of train
    path.write_bytes(data)
    cache = build(dataset.cases, GREY, tmp_path / "cache")
    errors = {record.case: record.error for record in cache.records}
    assert errors["train/00039"].startswith("the image train/00039 cannot be read")
    assert errors["test/00000"] is None
    assert "Mustermann" not in cache.path.with_suffix(".json").read_text()
    with pytest.raises(DataError, match=r"Mustermann\.npz: the image train/00039 cannot be read"):
        read_volume(Case("train/00039", path))


@pytest.mark.parametrize(("shape", "array"), [((6, 7), (1, 6, 7)), ((6, 7, 3), (3, 6, 7)), ((5, 6, 7), (1, 5, 6, 7))])
def test_rows_as_volumes(tmp_path, shape, array):
    dataset, content = archive(tmp_path / "a.npz", shape)
    volume = read_volume(dataset.cases[7])
    expected = row(content, dataset.cases[7])
    expected = np.moveaxis(expected, -1, 0) if shape == (6, 7, 3) else expected[None]
    np.testing.assert_array_equal(volume.array, expected)
    assert volume.array.shape == array
    assert (volume.units, volume.geometry.known) == ("levels", False)


def test_colour_archives_of_equal_channels_are_grey(tmp_path):
    grey = np.repeat(np.arange(42, dtype=np.uint8).reshape(1, 6, 7, 1), 3, axis=3)
    np.savez(tmp_path / "a.npz", train_images=grey)
    case = Case("train/00000", tmp_path / "a.npz")
    np.testing.assert_array_equal(read_pixels(case), grey[0, ..., 0])
    np.testing.assert_array_equal(read_volume(case).array, grey[0, ..., :1].transpose(2, 0, 1))


def test_archives_of_images_are_photographs_and_their_colour_is_seen(tmp_path):
    for shape, channels in (((12, 10), 1), ((12, 10, 3), 3)):
        dataset, _ = archive(tmp_path / f"{len(shape)}.npz", shape)
        chosen = experiment(dataset.cases[0].image)
        assert are_photographs(chosen, dataset.cases)
        stored = store_photographs(chosen, dataset, ())
        assert stored.preprocessing.channels == channels
        assert len(stored.store.row) == 62
        dicom = replace(dataset.cases[0], files=(tmp_path / "slice.dcm",))
        assert not are_photographs(chosen, [*dataset.cases, dicom])
    volumes, _ = archive(tmp_path / "volumes.npz", (5, 6, 7))
    assert not are_photographs(experiment(tmp_path / "volumes.npz"), volumes.cases)
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    with pytest.raises(DataError, match=r"other\.npz holds no images as MedMNIST has them"):
        are_photographs(experiment(tmp_path), [Case("a", tmp_path / "other.npz")])
