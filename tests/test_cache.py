"""The image cache: found again by content, shared by parallel runs, never taken for whole when it is not."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from PIL import Image

from medtpp.data import cache
from medtpp.data.cache import build, cache_root, cache_size, clear_cache, scan
from medtpp.data.case import Case
from medtpp.data.preprocess import Preprocessing
from medtpp.errors import DataError, OutputError

GREY = Preprocessing(image_size=16, channels=1)


@pytest.fixture
def cases(tmp_path):
    folder = tmp_path / "private patient"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        Image.fromarray(rng.integers(0, 256, (20 + number, 30), dtype=np.uint8)).save(folder / f"Smith_{number}.png")
    return [Case(id=path.name, image=path) for path in sorted(folder.iterdir())]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache"


class Decoded:
    """Counts the images that a build decodes, through its progress."""

    def __init__(self):
        self.calls = []

    def __call__(self, done, total):
        self.calls.append((done, total))


def test_rows_hold_the_prepared_images_and_records_follow_the_cases(cases, folder):
    cache = build(cases[::-1], GREY, folder)
    assert cache.images.shape == (6, 1, 16, 16)
    assert [record.case for record in cache.records] == [case.id for case in cases[::-1]]
    for case, record in zip(cases[::-1], cache.records, strict=True):
        pixels = np.asarray(Image.open(case.image))
        np.testing.assert_array_equal(cache.images[cache.row[case.id]], GREY.apply(pixels))
        assert (record.height, record.width, record.bits, record.colour) == (*pixels.shape, 8, False)
        assert record.error is None
    assert len({record.fingerprint for record in cache.records}) == 6
    assert not cache.images.flags.writeable


def test_a_second_build_decodes_nothing_and_tells_the_same(cases, folder):
    first, again = Decoded(), Decoded()
    cache = build(cases, GREY, folder, progress=first)
    second = build(cases, GREY, folder, progress=again)
    assert first.calls == [(done, 6) for done in range(1, 7)]
    assert again.calls == []
    assert (second.path, second.records, second.row) == (cache.path, cache.records, cache.row)


def test_copied_renamed_and_reordered_data_hit_the_same_cache(cases, folder, tmp_path):
    cache = build(cases, GREY, folder)
    moved = []
    for number, case in enumerate(reversed(cases)):
        target = tmp_path / f"moved{number}.png"
        shutil.copy(case.image, target)
        moved.append(Case(id=f"new{number}", image=target))
    other = build(moved, GREY, folder)
    assert other.path == cache.path
    assert [other.row[case.id] for case in moved] == [cache.row[case.id] for case in reversed(cases)]


def test_another_option_or_image_makes_another_cache(cases, folder):
    paths = {build(cases, GREY, folder).path}
    paths.add(build(cases, GREY.model_copy(update={"fit": "pad"}), folder).path)
    paths.add(build(cases, Preprocessing(image_size=8, channels=1), folder).path)
    paths.add(build(cases[1:], GREY, folder).path)
    Image.fromarray(np.zeros((9, 9), np.uint8)).save(cases[0].image)
    paths.add(build(cases, GREY, folder).path)
    assert len(paths) == 5


def test_identical_files_share_a_row(cases, folder):
    shutil.copy(cases[0].image, cases[1].image)
    cache = build(cases, GREY, folder)
    assert len(cache.images) == 5
    assert cache.row[cases[0].id] == cache.row[cases[1].id]
    assert [record.case for record in cache.records] == [case.id for case in cases]


def test_unreadable_images_have_an_error_and_a_black_row(cases, folder):
    cases[1].image.write_bytes(b"")
    cases[2].image.write_bytes(cases[2].image.read_bytes()[:90])
    cases[3].image.unlink()
    for _ in range(2):  # built, then opened
        cache = build(cases, GREY, folder)
        errors = [record.error for record in cache.records]
        assert [error is None for error in errors] == [True, False, False, False, True, True]
        assert "0 bytes" in errors[1]
        assert "truncated" in errors[2]
        assert "No such file" in errors[3]
        assert not any(cache.images[cache.row[case.id]].any() for case in cases[1:4])
        assert cache.images[cache.row[cases[4].id]].any()


def test_an_unreadable_file_is_tried_again_once_it_is_there(cases, folder):
    content = cases[0].image.read_bytes()
    cases[0].image.unlink()
    assert build(cases, GREY, folder).records[0].error
    cases[0].image.write_bytes(content)
    assert build(cases, GREY, folder).records[0].error is None


def test_scan_tells_the_same_records_as_build(cases, folder):
    cases[1].image.write_bytes(b"nothing")
    progress = Decoded()
    records = scan(cases, workers=2, progress=progress)
    assert tuple(records.values()) == build(cases, GREY, folder).records
    assert list(records) == [case.id for case in cases]
    assert progress.calls[-1] == (6, 6)


@pytest.mark.parametrize("damage", ["truncate", "empty index", "half index", "no index", "no pixels"])
def test_a_damaged_cache_is_built_again(cases, folder, damage):
    cache = build(cases, GREY, folder)
    expected = np.array(cache.images)
    index = cache.path.with_suffix(".json")
    if damage == "truncate":
        with cache.path.open("rb+") as stream:
            stream.truncate(100)
    elif damage == "empty index":
        index.write_text("{}")
    elif damage == "half index":
        index.write_text(index.read_text()[:50])
    else:
        (index if damage == "no index" else cache.path).unlink()
    progress = Decoded()
    np.testing.assert_array_equal(build(cases, GREY, folder, progress=progress).images, expected)
    assert progress.calls


def test_a_cache_pickles_as_a_path(cases, folder):
    cache = build(cases, GREY, folder)
    expected = np.array(cache.images)
    data = pickle.dumps(cache)
    assert len(data) < 5000
    np.testing.assert_array_equal(pickle.loads(data).images, expected)


def test_no_file_name_is_kept(cases, folder):
    cases[0].image.write_bytes(b"nothing")
    cases[1].image.unlink()
    build(cases, GREY, folder)
    for path in folder.iterdir():
        content = path.name.encode() + path.read_bytes()
        assert b"Smith" not in content
        assert b"private" not in content


def test_a_file_that_changes_while_it_is_read_is_an_error_and_leaves_no_cache(cases, folder, monkeypatch):
    digested = cache.case_digest

    def change(case):
        name = digested(case)
        case.image.write_bytes(case.image.read_bytes() + b"more")
        return name

    monkeypatch.setattr(cache, "case_digest", change)
    with pytest.raises(DataError, match="changed while it was being read"):
        build(cases, GREY, folder)
    assert {path.suffix for path in folder.iterdir()} <= {".lock"}


def test_a_folder_that_cannot_be_written_names_the_way_out(cases, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OutputError, match="MEDTPP_CACHE") as error:
        build(cases, GREY, blocked / "cache")
    assert str(blocked) in error.value.message


@pytest.mark.skipif(os.name == "nt", reason="needs resource limits")
def test_a_full_disk_names_the_way_out(cases, folder):
    """A process that may write 1,000 bytes per file meets EFBIG where a full disk gives ENOSPC: both on `write`."""
    code = """
        import resource, signal, sys
        from pathlib import Path
        from medtpp.data.cache import build
        from medtpp.data.case import Case
        from medtpp.data.preprocess import Preprocessing
        from medtpp.errors import OutputError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        cases = [Case(id=path.name, image=path) for path in sorted(Path(sys.argv[1]).iterdir())]
        try:
            build(cases, Preprocessing(image_size=16, channels=1), Path(sys.argv[2]))
        except OutputError as error:
            print(error.message)
    """
    result = run(code, cases[0].image.parent, folder)
    assert "MEDTPP_CACHE" in result.stdout, result.stderr
    assert str(folder) in result.stdout
    assert {path.suffix for path in folder.iterdir()} == {".lock"}


def run(code, *arguments, wait=True):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    if not wait:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


SLOW_BUILD = """
    import sys, time
    from pathlib import Path
    from medtpp.data.cache import build
    from medtpp.data.case import Case
    from medtpp.data.preprocess import Preprocessing
    cases = [Case(id=path.name, image=path) for path in sorted(Path(sys.argv[1]).iterdir())]
    calls = []
    def progress(done, total):
        calls.append(done)
        print("decoded", done, flush=True)
        time.sleep(float(sys.argv[3]))
    cache = build(cases, Preprocessing(image_size=16, channels=1), Path(sys.argv[2]), progress=progress)
    print("sum", int(cache.images.sum()), "calls", len(calls))
"""


def test_two_processes_build_the_same_cache_once(cases, folder):
    processes = [run(SLOW_BUILD, cases[0].image.parent, folder, 0.1, wait=False) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    last = [stdout.splitlines()[-1].split() for stdout, _ in outputs]
    expected = int(build(cases, GREY, folder).images.sum())
    assert [int(words[1]) for words in last] == [expected, expected], outputs
    assert sorted(int(words[3]) for words in last) == [0, 6]


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_killed_build_leaves_nothing_that_is_taken_for_whole(cases, folder):
    process = run(SLOW_BUILD, cases[0].image.parent, folder, 5, wait=False)
    assert process.stdout.readline().startswith("decoded 1")
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    assert len(list(folder.iterdir())) == 2  # the lock and half a file
    progress = Decoded()
    started = time.monotonic()
    cache = build(cases, GREY, folder, progress=progress)
    assert time.monotonic() - started < 4  # the dead process's lock is gone with it
    assert len(progress.calls) == 6
    assert all(cache.images[row].any() for row in cache.row.values())
    assert {path.suffix for path in folder.iterdir()} == {".pixels", ".json", ".lock"}
    assert len(list(folder.iterdir())) == 3


def test_the_environment_moves_the_cache_and_clearing_spares_other_files(cases, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDTPP_CACHE", str(tmp_path / "moved"))
    assert cache_size() == 0
    cache = build(cases, GREY)
    assert cache.path.parent == cache_root() == tmp_path / "moved"
    index = cache.path.with_suffix(".json")
    assert cache_size() == cache.path.stat().st_size + index.stat().st_size
    assert list(json.loads(index.read_text())) == ["preprocessing", "images"]
    mine = cache_root() / "thesis.json"
    mine.write_text("mine")
    clear_cache()
    assert list(cache_root().iterdir()) == [mine]
    assert cache_size() == 0


def test_no_images_is_a_clear_error(folder):
    with pytest.raises(DataError, match="no images"):
        build([], GREY, folder)
