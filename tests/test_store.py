"""The store of volumes: what is in it is what preprocessing gives, found again by content, whole or not there."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medtpp.config import Window
from medtpp.data.case import Case, Structure
from medtpp.data.fingerprints import Fingerprints
from medtpp.data.store import COORDINATES, build_store
from medtpp.data.volume_preprocess import VolumePreprocessing
from medtpp.errors import DataError, OutputError
from volumes import READER, STRUCTURES, blobs, geometry, read_mask, read_volume, write_case

PREPARE = VolumePreprocessing(patch=(8, 8, 8), windows=(Window(kind="fixed", low=0, high=1),), spacing=(1.0, 1.0, 1.0))


@pytest.fixture
def cases(tmp_path):
    folder = tmp_path / "private patient"
    folder.mkdir()
    rng = np.random.default_rng(0)
    made = []
    for number in range(4):
        shape = (18 + number, 20, 24)
        where = geometry(shape, (1.2, 1.0, 0.9), seed=number)
        labels = blobs(shape, number)
        made.append(write_case(folder, f"Smith_{number}", rng.random((1, *shape), np.float32), labels, geometry=where))
    return made


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "stores"


class Reads:
    """A reader that counts the images it reads."""

    def __init__(self, wait=0.0):
        self.count = 0
        self.reader = replace(READER, volume=self.read)
        self.wait = wait

    def read(self, case):
        self.count += 1
        time.sleep(self.wait)
        return read_volume(case)


def build(cases, folder, preprocessing=PREPARE, structures=STRUCTURES, reader=READER, **options):
    return build_store(cases, preprocessing, structures, reader, folder, **options)


def test_the_store_holds_what_preprocessing_gives(cases, folder):
    store = build(cases[::-1], folder)
    assert [record.case for record in store.records] == [case.id for case in cases[::-1]]
    for case in cases:
        row = store.row[case.id]
        volume = read_volume(case)
        array, restore = PREPARE.apply(volume)
        labels = read_mask(case.mask, volume.geometry)
        mask = PREPARE.apply_mask(labels, STRUCTURES, restore)
        record = store.records[row]
        np.testing.assert_array_equal(store.image(row), array)
        np.testing.assert_array_equal(store.mask(row), mask)
        assert store.image(row).dtype == np.float16
        assert store.mask(row).dtype == np.uint8
        assert (record.shape, record.restore, record.error) == (array.shape, restore, None)
        assert record.voxels == tuple(np.count_nonzero(mask == number) for number in (1, 2))
        assert record.restore.labels(store.mask(row)).shape == labels.shape
        region = (slice(3, 11), slice(0, 8), slice(10, 18))
        np.testing.assert_array_equal(store.image(row, region), array[:, *region])
        np.testing.assert_array_equal(store.mask(row, region), mask[region])
    assert len({record.fingerprint for record in store.records}) == 4
    assert len(Fingerprints.of(cases, dict(zip(store.row, store.records, strict=True))).images) == 4


def test_coordinates_lie_in_their_structures(cases, folder):
    structures = (*STRUCTURES, Structure("absent", (9,)))
    store = build(cases, folder, structures=structures)
    again = build(cases, folder.with_name("other"), structures=structures)
    for row, record in enumerate(store.records):
        mask = store.mask(row)
        for number, count in enumerate(record.voxels):
            voxels = store.foreground(row, number)
            assert voxels.shape == (min(count, COORDINATES), 3)
            assert (mask[tuple(voxels.T)] == number + 1).all()
            assert len(np.unique(voxels, axis=0)) == len(voxels)
            np.testing.assert_array_equal(voxels, again.foreground(row, number))
        assert record.voxels[2] == 0
        # Drawn from everywhere, not from the first slices.
        np.testing.assert_allclose(store.foreground(row, 0).mean(axis=0), np.argwhere(mask == 1).mean(axis=0), atol=1)
    assert max(record.voxels[0] for record in store.records) > COORDINATES


def test_structures_that_overlap_keep_their_coordinates(cases, folder):
    store = build(cases[:1], folder, structures=(Structure("all", (1, 2)), Structure("core", (2,))))
    mask = store.mask(0)
    assert set(np.unique(mask)) == {0, 0b01, 0b11}
    assert store.records[0].voxels == (np.count_nonzero(mask), np.count_nonzero(mask == 0b11))
    assert (mask[tuple(store.foreground(0, 1).T)] == 0b11).all()


def test_eight_bits_are_kept_exactly(tmp_path, folder):
    tile = np.random.default_rng(0).integers(0, 256, (3, 200, 300), dtype=np.uint8)
    prepare = VolumePreprocessing(patch=(64, 64), windows=(Window(kind="fixed", low=0, high=255),) * 3, dtype="uint8")
    store = build([write_case(tmp_path, "tile", tile, units="levels")], folder, prepare, ())
    assert store.image(0).dtype == np.uint8
    np.testing.assert_array_equal(store.image(0), tile)
    assert store.records[0].voxels is None


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts bytes by Linux's /proc")
def test_a_patch_is_read_without_its_volume(tmp_path, folder):
    noise = np.random.default_rng(0).random((1, 160, 160, 160), np.float32)
    store = build([write_case(tmp_path, "large", noise)], folder, PREPARE)

    def read_so_far():
        return int(Path("/proc/self/io").read_text().split()[1])

    store.image(0, (slice(0, 8),) * 3)
    before = read_so_far()
    store.image(0, (slice(32, 64),) * 3)
    read = read_so_far() - before
    size = (folder / f"{store.names[0]}.image").stat().st_size
    assert size > 5_000_000
    assert read < size / 20


def test_a_second_build_reads_no_image_and_tells_the_same(cases, folder):
    reads, calls = Reads(), []
    first = build(cases, folder, reader=reads.reader, progress=lambda *call: calls.append(call))
    assert reads.count == 4
    assert calls == [(done, 4) for done in range(1, 5)]
    assert build(cases, folder, reader=reads.reader) == first
    assert reads.count == 4


def test_renamed_reordered_and_fewer_cases_are_found_again(cases, folder, tmp_path):
    reads = Reads()
    store = build(cases, folder, reader=reads.reader)
    moved = []
    for number, case in enumerate(reversed(cases[1:])):
        image, mask = tmp_path / f"{number}.scan", tmp_path / f"{number}.npy"
        shutil.copy(case.image, image)
        shutil.copy(case.mask, mask)
        moved.append(Case(id=f"new{number}", image=image, mask=mask))
    other = build(moved, folder, reader=reads.reader)
    assert reads.count == 4
    assert other.names == store.names[:0:-1]
    assert [record.case for record in other.records] == ["new0", "new1", "new2"]


def test_another_option_structure_image_or_mask_is_prepared_anew(cases, folder):
    case = cases[:1]
    names = {build(case, folder).names[0]}
    names.add(build(case, folder, PREPARE.model_copy(update={"border": "edge"})).names[0])
    names.add(build(case, folder, structures=STRUCTURES[:1]).names[0])
    names.add(build(case, folder, structures=()).names[0])
    names.add(build([replace(case[0], mask=None, channels=(case[0].mask,))], folder, structures=()).names[0])
    np.save(case[0].mask, read_mask(case[0].mask, read_volume(case[0]).geometry) * 0)
    names.add(build(case, folder).names[0])
    array = read_volume(case[0]).array
    write_case(case[0].image.parent, case[0].id, array + 1)
    names.add(build(case, folder).names[0])
    assert len(names) == 7


def test_voxels_beside_a_header_count(cases, folder, tmp_path):
    header = tmp_path / "scan.mhd"
    header.write_text("ElementDataFile = scan.raw")
    shutil.copy(cases[0].image, tmp_path / "scan.raw")
    reader = replace(READER, volume=lambda case: read_volume(replace(case, image=case.image.with_suffix(".raw"))))
    case = Case(id="scan", image=header)
    first = build([case], folder, reader=reader)
    shutil.copy(cases[1].image, tmp_path / "scan.raw")
    second = build([case], folder, reader=reader)
    assert first.names != second.names
    assert first.records[0].fingerprint != second.records[0].fingerprint


def test_identical_cases_are_prepared_once(cases, folder):
    shutil.copy(cases[0].image, cases[1].image)
    shutil.copy(cases[0].mask, cases[1].mask)
    reads = Reads(wait=0.05)
    store = build(cases, folder, reader=reads.reader)
    assert reads.count == 3
    assert store.names[0] == store.names[1]


@pytest.mark.parametrize("damage", ["image", "mask", "foreground", "no mask", "no index", "half index", "empty index"])
def test_a_damaged_case_is_prepared_again(cases, folder, damage):
    store = build(cases, folder)
    expected = store.image(0)
    index = folder / f"{store.names[0]}.json"
    if damage.endswith("index"):
        index.unlink() if damage == "no index" else index.write_text(
            index.read_text()[:80] if damage == "half index" else "{}"
        )
    elif damage == "no mask":
        (folder / f"{store.names[0]}.mask").unlink()
    else:
        part = folder / f"{store.names[0]}.{damage}"
        part.write_bytes(part.read_bytes()[:-10])
    leftover = folder / f".{store.names[0]}.image.abc"
    leftover.touch()
    reads = Reads()
    again = build(cases, folder, reader=reads.reader)
    assert again == store
    assert reads.count == 1
    assert not leftover.exists()
    np.testing.assert_array_equal(again.image(0), expected)


def test_cases_that_cannot_be_used_have_an_error_and_are_tried_again(cases, folder):
    content = cases[1].image.read_bytes()
    cases[1].image.write_bytes(b"")
    np.save(cases[2].mask, np.zeros((3, 3, 3), int))
    cases[3].image.unlink()
    for _ in range(2):
        errors = [record.error for record in build(cases, folder).records]
        assert errors == [None, "is no scan.", "has another shape than its scan.", "is no scan."]
    cases[1].image.write_bytes(content)
    assert build(cases, folder).records[1].error is None


def test_a_file_that_changes_meanwhile_is_told(cases, folder):
    def read(case):
        volume = read_volume(case)
        write_case(case.image.parent, case.id, volume.array + 1)
        return volume

    with pytest.raises(DataError, match="Smith_0 changed while"):
        build(cases[:1], folder, reader=replace(READER, volume=read))
    assert {path.suffix for path in folder.iterdir()} == {".lock"}


def test_runs_that_want_the_same_cases_prepare_them_once(cases, folder):
    reads, stores = Reads(wait=0.1), []
    threads = [
        threading.Thread(target=lambda: stores.append(build(cases, folder, reader=reads.reader))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reads.count == 4
    assert stores[0] == stores[1] == stores[2]


@pytest.mark.skipif(os.name == "nt", reason="needs resource limits")
def test_a_full_disk_names_the_way_out(cases, folder):
    """A process that may write 5,000 bytes per file meets EFBIG where a full disk gives ENOSPC: both on `write`."""
    code = """
        import resource, signal, sys
        from pathlib import Path
        from medtpp.errors import OutputError
        sys.path.insert(0, sys.argv[3])
        import test_store
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        cases = [test_store.Case(id="a", image=Path(sys.argv[1]))]
        try:
            test_store.build(cases, Path(sys.argv[2]))
        except OutputError as error:
            print(error.message)
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(cases[0].image), str(folder), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "MEDTPP_CACHE" in result.stdout, result.stderr
    assert str(folder) in result.stdout
    assert {path.suffix for path in folder.iterdir()} == {".lock"}


def test_a_folder_that_cannot_be_made_names_the_way_out(cases, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="MEDTPP_CACHE"):
        build(cases, tmp_path / "file")
    with pytest.raises(DataError, match="no volumes"):
        build([], tmp_path)


def test_names_of_files_stay_out_of_the_store(cases, folder):
    build(cases, folder)
    for path in folder.iterdir():
        assert "Smith" not in path.name
        assert b"Smith" not in path.read_bytes()
        assert b"private" not in path.read_bytes()


def test_a_store_pickles_as_paths(cases, folder):
    store = build(cases, folder)
    expected = store.image(2)
    copy = pickle.dumps(store)
    assert len(copy) < 10_000
    np.testing.assert_array_equal(pickle.loads(copy).image(2), expected)
    assert json.loads((folder / f"{store.names[0]}.json").read_text())["record"]["case"] == ""
