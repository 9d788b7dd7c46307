"""MedMNIST: archives made here, their cases, single rows, and broken ones."""

import io
import pickle
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medtpp.config import DataOptions
from medtpp.data.npz import read_npz_row
from medtpp.data.read import read_dataset
from medtpp.data.sources._medmnist_classes import CLASSES
from medtpp.errors import DataError
from medtpp.evaluation import positive_class
from medtpp.evaluation.predictions import Predictions


def arrays(shape=(6, 6), sizes=(5, 2, 3), labels=2, width=1, seed=0):
    rng = np.random.default_rng(seed)
    content = {}
    for split, size in zip(("train", "val", "test"), sizes, strict=True):
        content[f"{split}_images"] = rng.integers(0, 256, (size, *shape), dtype=np.uint8)
        content[f"{split}_labels"] = rng.integers(0, labels, (size, width))
    return content


def write(path, content, save=np.savez_compressed):
    save(path, **content)
    return path


def read(path):
    return read_dataset(DataOptions(path=path))


def told(path):
    with pytest.raises(DataError) as error:
        read(path)
    assert str(path) in str(error.value)
    return str(error.value)


FINDINGS = {"breast": "malignant", "pneumonia": "pneumonia", "nodule": "malignant", "vessel": "aneurysm"}


@pytest.mark.parametrize(("name", "finding"), [*FINDINGS.items(), ("adrenal", "hyperplasia")])
def test_the_positive_class_is_the_finding(name, finding):
    classes = next(classes for flag, classes in CLASSES.items() if flag.startswith(name))
    table = Predictions(
        ("a",), ("test",), (None,), (None,), ((classes[0],),), classes, np.full((1, 2), 0.5, np.float32)
    )
    assert positive_class(table) == finding


@pytest.mark.parametrize("shape", [(6, 6), (6, 6, 3), (4, 5, 6)], ids=["grey", "colour", "volume"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_cases_and_their_rows(tmp_path, shape, save):
    content = arrays(shape)
    path = write(tmp_path / "some.npz", content, save)
    dataset = read(path)
    assert dataset.layout == "medmnist"
    assert not dataset.multilabel
    assert [case.id for case in dataset.cases[:6]] == [*(f"train/{row:05d}" for row in range(5)), "val/00000"]
    for case in dataset.cases:
        split, row = case.id.split("/")
        assert (case.split, case.image) == (split, path)
        assert case.labels == (str(content[f"{split}_labels"][int(row), 0]),)
        image = read_npz_row(case.image, case.id)
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, content[f"{split}_images"][int(row)])


def test_classes_have_their_names(tmp_path):
    content = arrays(sizes=(2, 1, 1))
    content |= {
        f"{split}_labels": np.array([[0], [1]])[: len(content[f"{split}_labels"])] for split in ("train", "test")
    }
    dataset = read(write(tmp_path / "BreastMNIST_224.npz", content))
    assert [case.labels for case in dataset.cases[:2]] == [("malignant",), ("benign or normal",)]
    content = arrays(labels=11, sizes=(40, 1, 1))
    content["train_labels"][:11, 0] = range(11)
    dataset = read(write(tmp_path / "own.npz", content))
    assert dataset.classes == tuple(f"{number:02d}" for number in range(11))  # in the order of the numbers
    assert len(read(write(tmp_path / "breastmnist.npz", content)).classes) == 11  # another file of that name


def test_several_labels(tmp_path):
    content = arrays(labels=2, width=14)
    content["train_labels"][:2] = 0
    content["train_labels"][1, [0, 13]] = 1
    dataset = read(write(tmp_path / "chestmnist.npz", content))
    assert dataset.multilabel
    assert (dataset.cases[0].labels, dataset.cases[0].labelled) == ((), True)
    assert dataset.cases[1].labels == ("atelectasis", "hernia")


@given(st.lists(st.tuples(st.sampled_from(["train", "val", "test"]), st.integers(0, 1)), max_size=12))
@settings(max_examples=20, deadline=None)
def test_rows_in_any_order(tmp_path_factory, order):
    content = arrays(sizes=(2, 2, 2), seed=len(order))
    path = write(tmp_path_factory.mktemp("npz") / "a.npz", content)
    for split, row in order:
        np.testing.assert_array_equal(read_npz_row(path, f"{split}/{row:05d}"), content[f"{split}_images"][row])


def test_rows_in_threads_and_of_a_changed_file(tmp_path):
    content = arrays(shape=(300, 300), sizes=(20, 1, 1))
    path = write(tmp_path / "a.npz", content)
    order = [*range(20)] * 5
    with ThreadPoolExecutor(8) as pool:
        rows = [*pool.map(lambda row: read_npz_row(path, f"train/{row:05d}"), order)]
    assert all((image == content["train_images"][row]).all() for row, image in zip(order, rows, strict=True))
    changed = arrays(sizes=(3, 1, 1), seed=1)
    write(path, changed)
    np.testing.assert_array_equal(read_npz_row(path, "train/00002"), changed["train_images"][2])


def test_memory_is_that_of_a_row(tmp_path):
    import tracemalloc

    path = write(tmp_path / "large.npz", {"train_images": np.zeros((200, 512, 512), np.uint8)})
    tracemalloc.start()
    read_npz_row(path, "train/00199")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # the array has 52e6 bytes


@pytest.mark.parametrize("name", ["train/00005", "train/-1", "train/x", "other/00000", ""])
def test_rows_that_are_not_there(tmp_path, name):
    path = write(tmp_path / "a.npz", arrays())
    with pytest.raises(DataError, match=r"a\.npz"):
        read_npz_row(path, name)


def test_broken_archives(tmp_path):
    path = write(tmp_path / "a.npz", arrays(shape=(64, 64)))
    data = path.read_bytes()
    for broken in (b"", b"PK", data[: len(data) // 2], data[:-40]):
        path.write_bytes(broken)
        assert "not an archive of NumPy arrays" in told(path)
    middle = bytearray(data)
    middle[2000:2400] = bytes(400)  # inside the compressed images
    path.write_bytes(middle)
    for _ in range(2):  # also when asked again
        with pytest.raises(DataError, match="cannot be read"):
            read_npz_row(path, "train/00004")


def test_python_objects_are_not_loaded(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, train_images=np.array([{"a": 1}], dtype=object), train_labels=np.array([[0]]))
    assert "Python objects" in told(path)
    stream = io.BytesIO(pickle.dumps([1]))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train_images.npy", stream.getvalue())
    assert "not an archive of NumPy arrays" in told(path)


def test_all_that_is_wrong_is_told_together(tmp_path):
    content = arrays()
    content["train_images"] = content["train_images"].astype(np.float32)
    del content["val_labels"]
    content["test_labels"] = np.zeros((2, 1), int)
    text = told(write(tmp_path / "a.npz", content))
    assert "train_images is float32 of shape (5, 6, 6)" in text
    assert "val_labels is missing" in text
    assert "test_labels has 2 rows" in text

    content = arrays()
    del content["train_images"]
    assert "train_images is missing, train_labels is there" in told(write(tmp_path / "a.npz", content))

    content = arrays(width=3) | {"val_images": np.zeros((0, 6, 6), np.uint8), "train_labels": np.zeros((5, 3))}
    text = told(write(tmp_path / "a.npz", content))
    assert "val_images is empty" in text
    assert "train_labels is float64" in text

    content = arrays(width=3) | {"test_images": np.zeros((3, 7, 7), np.uint8)}
    assert "different shapes in the splits" in told(write(tmp_path / "a.npz", content))

    content = arrays(width=3)
    content["train_labels"][3, 1] = 2
    assert "train_labels has 1 values that are not 0 or 1 for each of several labels, the first in row 3" in told(
        write(tmp_path / "a.npz", content)
    )
    content = arrays()
    content["val_labels"][1] = -1
    assert "val_labels has 1 values that are not 0 or more, the first in row 1" in told(
        write(tmp_path / "a.npz", content)
    )
    assert "it holds other" in told(write(tmp_path / "a.npz", {"other": np.zeros(3)}))
