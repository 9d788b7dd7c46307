"""Reading a folder's files, with a message for each way in which one can be broken."""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

import pandas as pd
from PIL import Image
from pydantic import BaseModel, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from medtpp.errors import DataError

M = TypeVar("M", bound=BaseModel)

_FOLDERS = re.compile(r"(?<![\w./\\…:])(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\"]+[/\\])+")
_REMEDY = "Make the run again, or copy its folder again, whole."


def read_model(path: Path, model: type[M]) -> M:
    """A JSON file as a model.

    Raises:
        DataError: The file is missing, is no JSON, or lacks fields; all are listed.
    """
    value: M = _validated(path, TypeAdapter(model))
    return value


def read_models(path: Path, model: type[M]) -> list[M]:
    """A JSON file that holds a list of models. Raises DataError like `read_model`."""
    values: list[M] = _validated(path, TypeAdapter(list[model]))  # type: ignore[valid-type]
    return values


def _validated(path: Path, adapter: TypeAdapter[Any]) -> Any:
    try:
        return adapter.validate_python(json.loads(path.read_bytes()))
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}. {_REMEDY}") from error
    except ValidationError as error:
        found = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()]
        raise DataError(f"{path} is not as medtpp writes it. {_REMEDY}", found) from error
    except ValueError as error:
        raise DataError(f"{path} is no valid JSON: {error}. {_REMEDY}") from error


def read_table(path: Path, columns: Sequence[str], numbers: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV file as text, empty cells as "", with some columns as numbers.

    Args:
        path: The file.
        columns: Columns it must have.
        numbers: Those of its columns that become float64, empty cells not-a-number; of them, absent ones are left out.

    Raises:
        DataError: The file is missing, is no table, has no rows, or lacks a column.
    """
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
        missing = [name for name in columns if name not in table.columns]
        if missing or table.empty:
            raise DataError(f"{path} {f'has no column {missing[0]}' if missing else 'has no rows'}. {_REMEDY}")
        there = [name for name in numbers if name in table.columns]
        table[there] = table[there].replace("", "nan").astype(float)
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}. {_REMEDY}") from error
    except ValueError as error:  # what pandas raises for broken text, tables and numbers alike
        raise DataError(f"{path} is no valid table: {error}. {_REMEDY}") from error
    return table


@dataclass(frozen=True)
class Experiment:
    """An experiment file.

    Attributes:
        values: Sections by name.
        text: The file, with absolute paths reduced to their last part.
    """

    values: dict[str, Any]
    text: str


def read_experiment(path: Path, sections: Sequence[str] = ()) -> Experiment:
    """Read experiment.yaml, comments kept. Raises DataError where it is missing, no YAML, or lacks a section."""
    yaml = YAML()
    yaml.width = 10_000
    try:
        values = yaml.load(path.read_text(encoding="utf-8"))
        lacking = [name for name in sections if name not in values] if isinstance(values, dict) else ["every section"]
        if lacking:
            raise DataError(f"{path} is no whole experiment: it lacks {', '.join(lacking)}. {_REMEDY}")
        _reduce(values)
        text = io.StringIO()
        yaml.dump(values, text)
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror}. {_REMEDY}") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no valid YAML: {error}. {_REMEDY}") from error
    return Experiment(values, text.getvalue())


def _reduce(values: Any) -> None:
    for key, value in list(values.items() if isinstance(values, dict) else enumerate(values)):
        if isinstance(value, dict | list):
            _reduce(value)
        elif isinstance(value, str):
            values[key] = last_part(value)


def last_part(text: str) -> str:
    """An absolute path without its folders, which may name a person or a server; other text as it is."""
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(text)
        if path.is_absolute() and path.name:
            return f"…/{path.name}"
    return text


def without_folders(text: str) -> str:
    """A message without the folders of absolute paths in it."""
    return _FOLDERS.sub("…/", text)


@dataclass(frozen=True)
class Picture:
    """An image to be shown inline.

    Attributes:
        uri: A data URI.
        width, height: In pixels.
    """

    uri: str
    width: int
    height: int


def read_picture(path: Path, longest: int = 1200, *, lossless: bool = False) -> Picture:
    """An image, made smaller where a side is longer than `longest` pixels, as WebP.

    Args:
        path: The image.
        longest: In pixels.
        lossless: For thin coloured lines, which lossy compression blurs.

    Raises:
        DataError: It is missing or broken.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises each of them for broken files
        raise DataError(f"The image {path} cannot be read ({type(error).__name__}). {_REMEDY}") from error
    image.thumbnail((longest, longest))
    data = io.BytesIO()
    image.save(data, format="WEBP", quality=85, lossless=lossless)
    text = base64.b64encode(data.getvalue()).decode("ascii")
    return Picture(f"data:image/webp;base64,{text}", image.width, image.height)
