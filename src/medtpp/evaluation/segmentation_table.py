"""The table of segmentations: how each structure of each case came out. `segmentation.csv` holds it."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, cast

import numpy as np
from numpy.typing import NDArray

from medtpp.data.case import Case
from medtpp.errors import DataError
from medtpp.evaluation.surfaces import TOLERANCE, Agreement
from medtpp.evaluation.tables import UnixLines, invalid_table, read_table, shortened
from medtpp.files import atomic

Unit = Literal["mm", "px"]
Floats = NDArray[np.float64]
Row = Mapping[str, str]  # the cells of a line by column

METRICS = ("dice", "hd95", "nsd")
UNITS = ("mm", "px")
_NUMBERS = (*METRICS, "volume", "volume_true")
_OF_CASE = ("case", "split", "patient", "site")
_OF_FILE = ("unit", "tolerance")
_COLUMNS = (*_OF_CASE, "structure", *_NUMBERS, *_OF_FILE)
_KIND = "segmentations"


@dataclass(frozen=True, eq=False)
class Segmentations:
    """How well n cases were segmented, for k structures.

    `dice`, `hd95` and `nsd` are not-a-number where a structure is neither there nor predicted, and only there.

    Attributes:
        cases: (n,) unique ids.
        split: (n,) "train", "val", "test", or "" for new cases.
        patients: (n,) patients, None where unknown.
        sites: (n,) hospitals or scanners, None where unknown.
        structures: (k,) unique names.
        dice: (n, k) in [0, 1].
        hd95: (n, k) 95th percentile Hausdorff distance, in `unit`.
        nsd: (n, k) normalised surface Dice in [0, 1].
        volume: (n, k) of the predictions: ml (cm² for images of two dimensions), or pixels.
        volume_true: (n, k) of the true masks.
        unit: "mm", or "px" where distances and volumes count pixels: one for all cases, since they are averaged.
        tolerance: Of the surface Dice, in `unit`.

    Raises:
        DataError: The fields do not fit together; all problems are listed by case, structure and column.
    """

    cases: tuple[str, ...]
    split: tuple[str, ...]
    patients: tuple[str | None, ...]
    sites: tuple[str | None, ...]
    structures: tuple[str, ...]
    dice: Floats
    hd95: Floats
    nsd: Floats
    volume: Floats
    volume_true: Floats
    unit: Unit = "mm"
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        expected = (len(self.cases), len(self.structures))
        problems = [
            f"{f.name}: not one for each case" for f in fields(self)[1:4] if len(getattr(self, f.name)) != expected[0]
        ]
        problems += [
            f"{name}: the shape {self.numbers[name].shape} instead of {expected}"
            for name in _NUMBERS
            if self.numbers[name].shape != expected
        ]
        if self.unit not in UNITS or not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            problems.append(f"the unit is {self.unit!r}, the tolerance {self.tolerance}; need mm or px, and 0 or more")
        if len(set(self.cases)) < len(self.cases) or not all(self.cases):
            problems.append("case ids must be unique and not empty")
        if len(set(self.structures)) < len(self.structures) or not self.structures or not all(self.structures):
            problems.append("there must be structures, and their names must be unique and not empty")
        problems = problems or [
            f"case {self.cases[row]!r}, structure {self.structures[index]!r}, column {column}: {what}"
            for row, index, column, what in _find_problems(self.numbers)
        ]
        if problems:
            raise DataError("The table of segmentations is not valid.", shortened(problems))

    def __len__(self) -> int:
        return len(self.cases)

    @property
    def numbers(self) -> dict[str, Floats]:
        """The (n, k) columns by name: the metrics and the volumes."""
        return {name: getattr(self, name) for name in _NUMBERS}

    def select(self, split: str) -> Segmentations:
        """The cases of one split.

        Raises:
            DataError: There is none.
        """
        rows = [row for row, name in enumerate(self.split) if name == split]
        if not rows:
            there = ", ".join(sorted({repr(name) for name in self.split}))
            raise DataError(f"There are no segmentations for the split {split!r}. There are: {there or 'none at all'}.")
        return self.take(rows)

    def take(self, rows: Sequence[int]) -> Segmentations:
        """The cases at these positions."""
        return Segmentations(
            cases=tuple(self.cases[row] for row in rows),
            split=tuple(self.split[row] for row in rows),
            patients=tuple(self.patients[row] for row in rows),
            sites=tuple(self.sites[row] for row in rows),
            structures=self.structures,
            **{name: values[np.asarray(rows, dtype=int)] for name, values in self.numbers.items()},
            unit=self.unit,
            tolerance=self.tolerance,
        )


def as_segmentations(
    cases: Sequence[Case],
    split: Sequence[str],
    agreements: Sequence[Sequence[Agreement]],
    structures: Sequence[str],
    *,
    unit: Unit,
    tolerance: float = TOLERANCE,
) -> Segmentations:
    """A table of the agreements of (n,) cases in (k,) structures each.

    Args:
        cases: (n,) cases.
        split: (n,) "train", "val", "test" or "".
        agreements: (n,) of (k,) each, from `compare_masks`.
        structures: (k,) names.
        unit: "mm" if `compare_masks` was told every spacing, "px" if none.
        tolerance: What `compare_masks` was told.

    Raises:
        DataError: The arguments do not fit together.
    """
    numbers = {
        name: np.array([[getattr(one, name) for one in case] for case in agreements], dtype=np.float64)
        for name in _NUMBERS
    }
    return Segmentations(
        cases=tuple(case.id for case in cases),
        split=tuple(split),
        patients=tuple(case.patient for case in cases),
        sites=tuple(case.site for case in cases),
        structures=tuple(structures),
        **numbers,
        unit=unit,
        tolerance=tolerance,
    )


def write_segmentations(path: Path, table: Segmentations) -> None:
    """Write `segmentation.csv`, a row for each structure of each case, with every digit that a number has.

    Raises:
        OutputError: The file cannot be written.
    """
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(UnixLines(stream))
        writer.writerow(_COLUMNS)
        for row, case in enumerate(table.cases):
            of_case = (case, table.split[row], table.patients[row] or "", table.sites[row] or "")
            for index, structure in enumerate(table.structures):
                values = (float(table.numbers[name][row, index]) for name in _NUMBERS)
                texts = ("" if math.isnan(value) else repr(value) for value in values)
                writer.writerow([*of_case, structure, *texts, table.unit, repr(table.tolerance)])


def read_segmentations(path: Path) -> Segmentations:
    """Read `segmentation.csv`. Columns and rows may come in any order; every case has every structure once.

    Raises:
        DataError: The file is missing or malformed; all problems are listed by line and column.
    """
    raw = read_table(path, _KIND, _find_header_problems)
    rows = [dict(zip(raw.header, cells, strict=True)) for cells in raw.rows]
    cases = _first_rows(rows, "case")
    structures = list(_first_rows(rows, "structure"))
    numbers = {name: np.full((len(cases), len(structures)), np.nan) for name in _NUMBERS}
    lines: dict[tuple[int, int], int] = {}
    problems: list[str] = []
    case_places, structure_places = ({name: place for place, name in enumerate(names)} for names in (cases, structures))
    for line, row in zip(raw.lines, rows, strict=True):
        place = case_places[row["case"]], structure_places[row["structure"]]
        found = list(_find_row_problems(row, cases[row["case"]], rows[0]))
        if place in lines:
            found.append(f"structure: {row['structure']!r} of {row['case']!r} appears twice")
        problems += [f"line {line}, column {what}" for what in found]
        lines[place] = line
        if not found:
            for name in _NUMBERS:
                numbers[name][place] = float(row[name] or math.nan)
    for case, position in case_places.items():
        missing = [name for name, index in structure_places.items() if (position, index) not in lines]
        if missing:
            problems.append(f"case {case!r}: no row for {', '.join(missing)}")
    # A cell that is no number would only show up again as an empty one.
    problems = problems or [
        f"line {lines[row, index]}, column {column}: {what}" for row, index, column, what in _find_problems(numbers)
    ]
    if problems:
        raise invalid_table(path, _KIND, problems)
    return Segmentations(
        cases=tuple(cases),
        split=tuple(first["split"] for first in cases.values()),
        patients=tuple(first["patient"] or None for first in cases.values()),
        sites=tuple(first["site"] or None for first in cases.values()),
        structures=tuple(structures),
        **numbers,
        unit=cast(Unit, rows[0]["unit"]),
        tolerance=float(rows[0]["tolerance"]),
    )


def _find_header_problems(header: Sequence[str]) -> list[str]:
    counts = Counter(header)
    problems = [f"column {name}: it appears {count} times" for name, count in counts.items() if count > 1]
    problems += [f"column {name}: it is missing" for name in _COLUMNS if name not in counts]
    known = ", ".join(_COLUMNS)
    return problems + [f"column {name}: unknown; known are {known}" for name in counts if name not in _COLUMNS]


def _first_rows(rows: Sequence[Row], column: str) -> dict[str, Row]:
    """The first row with each value of a column."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row[column], row)
    return first


def _find_row_problems(row: Row, of_case: Row, of_file: Row) -> Iterator[str]:
    """What is wrong with a row alone, beside the first row of its case and beside the first row of the file."""
    for name in ("case", "structure", "tolerance"):
        if not row[name]:
            yield f"{name}: it is empty"
    for name in (*_NUMBERS, "tolerance"):
        if row[name] and not _is_finite(row[name]):
            yield f"{name}: {row[name]!r} is not a finite number"
    if row["unit"] not in UNITS:
        yield f"unit: {row['unit']!r} is neither mm nor px"
    for names, first, where in ((_OF_CASE, of_case, "case"), (_OF_FILE, of_file, "file")):
        for name in names:
            if row[name] != first[name]:
                yield f"{name}: {row[name]!r}, but {first[name]!r} elsewhere in the {where}"


def _is_finite(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _find_problems(numbers: Mapping[str, Floats]) -> Iterator[tuple[int, int, str, str]]:
    """Quadruples of row, structure, column and what is wrong there."""
    absent = (numbers["volume"] == 0) & (numbers["volume_true"] == 0)
    for name, values in numbers.items():
        top = 1.0 if name in ("dice", "nsd") else np.inf
        # Written so that not-a-number, which is in no range, is found.
        wrong = ~((values >= 0) & (values <= top) & np.isfinite(values))
        if name in METRICS:
            wrong = np.where(absent, ~np.isnan(values), wrong)
        for row, index in np.argwhere(wrong).tolist():
            if absent[row, index]:
                yield row, index, name, "must be empty: the structure is neither there nor predicted"
            elif np.isnan(values[row, index]):
                yield row, index, name, "it is empty"
            else:
                allowed = "from 0 to 1" if top == 1 else "a finite number of 0 or more"
                yield row, index, name, f"{values[row, index]:g} is not {allowed}"
