"""Files are written whole or not at all, and a full output folder is not touched unasked."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medtpp.errors import OutputError

MARKER = "complete.json"
# One of these is in every folder that medtpp made, and --overwrite deletes no other.
OWN = ("experiment.yaml", "inputs.json", "medtpp.json", "backbone.json")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and goes away when it does not.

    Raises:
        OutputError: The disk is full or the folder cannot be written.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        # mkstemp makes private files; results are meant to be shared like any other file of the user.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except Exception as error:
        # On a full disk torch and safetensors raise errors of their own.
        if not isinstance(error, OSError) and "os error" not in str(error) and "inline_container" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or "no space is left, or the disk fails"
        raise OutputError(f"Cannot write {path}: {reason}. Free some space or choose another folder.") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically. Not-a-number values are refused, since JSON has none."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def digest(*parts: str | bytes) -> str:
    """The sha256 of some parts, each marked off from the next by its length, as hexadecimal text."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "little"))
        total.update(data)
    return total.hexdigest()


def prepare_folder(folder: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Make an output folder ready.

    Raises:
        OutputError: The folder holds something and neither `resume` nor `overwrite` was asked for.
    """
    if folder.is_file():
        raise OutputError(f"{folder} is a file. Name a folder.")
    if folder.is_dir() and any(folder.iterdir()):
        if overwrite:
            if not any((folder / name).is_file() for name in OWN):
                raise OutputError(
                    f"{folder} was not made by medtpp, so --overwrite does not touch it. Name another folder."
                )
            shutil.rmtree(folder)
        elif not resume:
            raise OutputError(
                f"The output folder {folder} is not empty. Go on there with --resume, replace it with --overwrite, "
                "or name another one."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"Cannot make the folder {folder}: {error.strerror}.") from error
