"""Files are whole or not there, and full folders are not touched unasked."""

import errno
import json
import os
import stat
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medtpp.errors import OutputError
from medtpp.files import atomic, digest, prepare_folder, read_json, write_json, write_text


def test_a_file_takes_its_place_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "result.txt"
    with atomic(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == path.parent  # the same file system: replacing is one step
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert [item.name for item in path.parent.iterdir()] == ["result.txt"]


def fail_halfway(path, error):
    with atomic(path) as temporary:
        temporary.write_text("half")
        raise error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_an_exception_leaves_what_was_there(tmp_path, error):
    old = tmp_path / "old.txt"
    old.write_text("before")
    for path in (old, tmp_path / "new.txt"):
        with pytest.raises(OutputError if error is OSError else error):
            fail_halfway(path, error)
    assert old.read_text() == "before"
    assert [item.name for item in tmp_path.iterdir()] == ["old.txt"]


def test_a_full_disk_is_told(tmp_path):
    path = tmp_path / "result.txt"
    with pytest.raises(OutputError, match=r"result\.txt: No space left.*Free some space") as raised, atomic(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert isinstance(raised.value.__cause__, OSError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_a_write_that_the_system_refuses_leaves_nothing(tmp_path):
    code = """
import resource, signal, sys
from pathlib import Path
from medtpp.errors import OutputError
from medtpp.files import write_text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_text(Path(sys.argv[1]), "x" * 5000)
except OutputError as error:
    print(error.message)
"""
    path = tmp_path / "result.txt"
    path.write_text("before")
    told = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout
    assert f"Cannot write {path}: File too large" in told
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"Cannot write"):
        write_text(tmp_path / "file" / "result.txt", "x")


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are other there")
def test_results_can_be_read_by_whom_the_user_lets(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "result.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "result.txt").stat().st_mode) == 0o640


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=10,
)


@given(value=JSON)
def test_json_comes_back_as_it_was(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    if "\ud800" <= max(json.dumps(value, ensure_ascii=False), default="") <= "\udfff":
        return
    write_json(path, value)
    assert read_json(path) == value


def test_json_holds_no_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_digests_keep_their_parts_apart():
    assert digest("ab", "c") != digest("a", "bc") != digest("abc")
    assert digest("a") == digest(b"a")
    assert digest("a", "") != digest("a")
    assert len(digest("a")) == 64


def test_a_new_or_empty_folder_is_made_ready(tmp_path):
    prepare_folder(tmp_path / "a" / "b")
    prepare_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()


def test_a_full_folder_is_refused_resumed_or_replaced(tmp_path):
    folder = tmp_path / "run"
    write_text(folder / "sub" / "log.csv", "1")
    with pytest.raises(OutputError, match=r"not empty.*--resume.*--overwrite"):
        prepare_folder(folder)
    prepare_folder(folder, resume=True)
    assert (folder / "sub" / "log.csv").read_text() == "1"
    with pytest.raises(OutputError, match=r"not made by medtpp"):
        prepare_folder(folder, overwrite=True)
    assert (folder / "sub" / "log.csv").is_file()
    write_text(folder / "experiment.yaml", "")
    prepare_folder(folder, overwrite=True)
    assert list(folder.iterdir()) == []


def test_a_file_in_the_folders_place_is_told(tmp_path):
    (tmp_path / "run").write_text("mine")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(OutputError, match="is a file"):
            prepare_folder(tmp_path / "run", **options)
    with pytest.raises(OutputError, match="Cannot make"):
        prepare_folder(tmp_path / "run" / "inside")
    assert (tmp_path / "run").read_text() == "mine"
