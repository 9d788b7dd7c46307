"""Steps: folders that are made once. A marker, written last, says that a step is whole."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from medtpp.errors import ConfigError, OutputError
from medtpp.files import MARKER, digest, prepare_folder, read_json, write_json

INPUTS = "inputs.json"


def refuse_folder(folder: Path, reads: Iterable[Path], *, resume: bool, overwrite: bool) -> None:
    """Make an output folder, or say why it cannot be used, before the work of reading; nothing is deleted yet.

    Args:
        folder: To be written.
        reads: What the work reads, so that `overwrite` does not delete it.
        resume: A folder that holds something is gone on with.
        overwrite: A folder that holds something will be replaced.

    Raises:
        OutputError: The folder holds something and neither was asked for, or holds what is to be read.
    """
    if overwrite:
        for path in reads:
            if path.resolve().is_relative_to(folder.resolve()):
                raise OutputError(f"--overwrite would delete {path}, which is to be read. Name another output folder.")
    prepare_folder(folder, resume=resume or overwrite)


def step(folder: Path, inputs: Mapping[str, Any], work: Callable[[], object]) -> bool:
    """Do `work`, which fills `folder` and writes its marker last, unless it was done before from the same inputs.

    A folder that was begun from the same inputs is gone on with: the work finds its resume file there.

    Args:
        folder: Of the step alone.
        inputs: What its result depends on, as plain values.
        work: Fills the folder.

    Returns:
        Whether anything had to be done.

    Raises:
        ConfigError: The folder was made from other inputs.
        OutputError: The folder holds something that no step made.
    """
    key = {"sha256": digest(json.dumps(inputs, sort_keys=True, default=str)), "inputs": inputs}
    path = folder / INPUTS
    if path.is_file():
        before = read_json(path)
        if before["sha256"] != key["sha256"]:
            changed = [
                name
                for name in inputs
                if before["inputs"].get(name) != json.loads(json.dumps(inputs[name], default=str))
            ]
            raise ConfigError(
                f"{folder} was made with another experiment (differing: {', '.join(changed) or 'unknown'}), so it "
                "cannot be gone on with. Use --overwrite, or another --out."
            )
        if (folder / MARKER).is_file():
            return False
    elif folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
        raise OutputError(f"{folder} holds other things than a begun run, so it cannot be gone on with. Name another.")
    write_json(path, json.loads(json.dumps(key, default=str)))
    work()
    return True
