"""Steps: folders that are made once. A marker, written last, says that a step is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medtpp.errors import ConfigError
from medtpp.files import MARKER, digest, read_json, write_json

INPUTS = "inputs.json"


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
    elif folder.is_dir():
        shutil.rmtree(folder)
    write_json(path, json.loads(json.dumps(key, default=str)))
    work()
    return True
