"""A CSV manifest: `image,label[,mask][,patient][,site][,split]`, a row per image, paths relative to the CSV file."""

from __future__ import annotations

import csv
import io
import os
import posixpath
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from medtpp.config import SOURCES, ColumnOptions, DataOptions
from medtpp.data.case import Case, Dataset, Problem
from medtpp.data.listing import find_spelled
from medtpp.data.problems import agree, first_few
from medtpp.data.sources import ImageFile, class_names, find_scans, is_excluded, scan_problems, split_of
from medtpp.data.sources._structures import named_structures
from medtpp.errors import DataError

NO_FINDING = "none"

_HAS, _NAMES = ("row has", "rows have"), ("row names", "rows name")

# What is said of one, of several, and of both.
_ADVICE = {
    "row-length": (*_HAS, "another number of cells than the header. Quote cells that hold the separator"),
    "no-image": (*_NAMES, "no image. Name one or delete the row"),
    "doubled-image": (
        *_NAMES,
        "an image that an earlier row names. Keep one row per image; several labels go in one cell (a;b) with --set "
        "data.multilabel=true",
    ),
    "missing-file": ("image does", "images do", "not exist. Paths are relative to the manifest"),
    "missing-mask": (
        "mask does",
        "masks do",
        "not exist. Paths are relative to the manifest; an empty cell is for no mask",
    ),
    "no-series": (*_NAMES, "a folder that holds no DICOM series"),
    "several-series": (*_NAMES, "a folder that holds several DICOM series. Name one of them, as they are called here"),
    "unknown-series": (*_NAMES, "a DICOM series that the folder does not hold. Name one that it does"),
    "unknown-split": (*_HAS, "an unknown split. Use train, val or test"),
    "empty-split": (
        "row with a label or mask has",
        "rows with a label or mask have",
        "no split although others have. Fill in all or none",
    ),
    "none-with-labels": (*_HAS, "the label none (no finding) beside others. Keep one or the other"),
}


@SOURCES.register("manifest")
class Manifest:
    """A table in UTF-8 with comma, semicolon or tab between its cells, all read as text ("01" stays "01").

    An image is a file of any format, or a folder that holds one DICOM series; of several, `folder#1` and so on.
    An empty label is an unlabelled case. With `data.multilabel` a cell holds several labels ("mass;nodule"), and the
    word `none`, or the separator alone, says that the case is labelled and has no finding.
    """

    summary: ClassVar[str] = "a CSV file (or a folder with manifest.csv): image,label[,mask][,patient][,site][,split]"

    @staticmethod
    def recognises(path: Path) -> bool:
        """A CSV or TSV file, or a folder with a manifest.csv."""
        return (path.is_file() and path.suffix.lower() in {".csv", ".tsv"}) or (path / "manifest.csv").is_file()

    @staticmethod
    def read(path: Path, options: DataOptions) -> Dataset:
        """Read all rows; what is wrong in single rows becomes the data set's problems.

        Raises:
            DataError: The file is not text in UTF-8, has no rows, or lacks the image column, or `data.structures` has
                mistakes.
        """
        file = path / "manifest.csv" if path.is_dir() else path
        header, rows = _table(file, options.columns.image)
        columns, problems = _columns(file, header, options.columns)
        faults: dict[str, list[tuple[int, str, str]]] = defaultdict(list)
        scans: list[ImageFile] = []
        cases: dict[str, tuple[int, Case]] = {}  # by the name of the file as the operating system compares names
        for line, cells in rows:
            if len(cells) != len(header):
                faults["row-length"].append((line, f"{len(cells)} cells, not {len(header)}", ""))
                continue
            values = {name: cells[at].strip() for name, at in columns.items()}
            case = _case(file.parent, line, values, options, faults, scans)
            key = os.path.normcase(case.id) if case else ""
            if case and key in cases:
                faults["doubled-image"].append((line, f"{case.id}, as in line {cases[key][0]}", case.id))
            elif case:
                cases[key] = line, case
        if any(case.split for _, case in cases.values()):
            named = {line for line, *_ in faults["unknown-split"]}
            faults["empty-split"] += [
                (line, case.id, case.id)
                for line, case in cases.values()
                if (case.labelled or case.mask) and case.split is None and line not in named
            ]
        missing = {case for _, _, case in faults["missing-file"]}
        kept = tuple(sorted((case for _, case in cases.values() if case.id not in missing), key=lambda case: case.id))
        problems += [_fault_problem(file, code, faults[code]) for code in _ADVICE if faults[code]]
        problems += [*scan_problems(scans, options.exclude), *_separator_problems(kept, options)]
        structures = named_structures(options.structures) if "mask" in columns else ()
        return Dataset(
            file.parent, "manifest", kept, class_names(kept), options.multilabel, structures, problems=tuple(problems)
        )


def _table(file: Path, image_column: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header, and rows with the 1-based line on which each begins; blank rows left out."""
    try:
        data = file.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"Cannot read {file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{file} is not UTF-8 (line {line}). Save it as UTF-8; Excel calls this 'CSV UTF-8 (Comma delimited)'."
        ) from error
    table = _rows(file, text, _separator(text, image_column))
    if len(table) < 2:
        raise DataError(f"{file} has no rows. Expected is a header such as image,label,patient and a row per image.")
    return [cell.strip() for cell in table[0][1]], table[1:]


def _separator(text: str, image_column: str) -> str:
    """The separator under which the first line has the image column, or else the most columns."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    headers = {separator: next(csv.reader([first], delimiter=separator), []) for separator in ",;\t"}
    return max(headers, key=lambda sep: (_position(headers[sep], image_column) is not None, len(headers[sep])))


def _rows(file: Path, text: str, separator: str) -> list[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows = []
    line = 1
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}: the row that begins in line {line} is not valid CSV: {error}.") from error
    return rows


def _position(header: list[str], column: str) -> int | None:
    names = [name.strip() for name in header]
    if column in names:
        return names.index(column)
    folded = [name.casefold() for name in names]
    return folded.index(column.casefold()) if column.casefold() in folded else None


def _columns(file: Path, header: list[str], options: ColumnOptions) -> tuple[dict[str, int], list[Problem]]:
    """Where each known column stands, and what is missing."""
    found = f"The columns found are {first_few(header, 20)}"
    if _position(header, options.image) is None:
        raise DataError(
            f"{file} has no column {options.image!r}. {found}. Name the one with the images' paths with "
            "--set data.columns.image=NAME."
        )
    columns: dict[str, int] = {}
    problems = []
    for role, name in options:
        position = _position(header, name)
        if position is not None:
            columns[role] = position
        elif name != role:  # a name that the user gave
            text = f"{file.name} has no column {name!r} (data.columns.{role}). {found}."
            problems.append(Problem("error", "missing-column", text))
        elif role == "label" and _position(header, options.mask) is None:
            text = (
                f"{file.name} has no column 'label': all cases are unlabelled. {found}; --set data.columns.label=NAME."
            )
            problems.append(Problem("warning", "no-label-column", text))
    return columns, problems


def _case(
    root: Path,
    line: int,
    cells: dict[str, str],
    options: DataOptions,
    faults: dict[str, list[tuple[int, str, str]]],
    scans: list[ImageFile],
) -> Case | None:
    """The case of one row, or None when it names no image; faults are noted with line, text and case id."""
    if not cells["image"]:
        faults["no-image"].append((line, "", ""))
        return None
    name = _case_id(root, cells["image"])
    image = ImageFile(name, find_spelled(root, name))
    mask = find_spelled(root, _case_id(root, cells["mask"])) if cells.get("mask") else None
    # An excluded case is dropped later, so that leaving a missing file out is a way to mend the data set. Path.is_file
    # would raise on a name that is too long.
    if not is_excluded(name, options.exclude):
        if folder := _folder_of_scans(root, name):
            image, told = _scan(image, *folder, line, faults)
            scans += told
        elif not os.path.isfile(image.image):  # noqa: PTH113
            faults["missing-file"].append((line, name, name))
        if mask and not os.path.isfile(mask):  # noqa: PTH113
            faults["missing-mask"].append((line, cells["mask"], name))
    split = split_of(cells.get("split", ""))
    if split is None and cells.get("split"):
        faults["unknown-split"].append((line, repr(cells["split"]), name))
    labels, labelled = _labels(cells.get("label", ""), options)
    if options.multilabel and len(labels) > 1 and NO_FINDING in (label.casefold() for label in labels):
        faults["none-with-labels"].append((line, repr(cells["label"]), name))
    patient, site = cells.get("patient") or image.patient, cells.get("site") or None
    return Case(name, image.image, labels, labelled, patient, site, split, image.files, mask=mask)


def _folder_of_scans(root: Path, name: str) -> tuple[Path, str] | None:
    """The folder that the name of an image means, and its name: itself, or that of a series ("scans/p1#2")."""
    numbered = re.fullmatch(r"(.+)#\d+", name)
    if numbered and not os.path.exists(find_spelled(root, name)):  # noqa: PTH110
        name = numbered[1]
    folder = find_spelled(root, name)
    return (folder, name) if os.path.isdir(folder) else None  # noqa: PTH112


def _scan(
    image: ImageFile, folder: Path, name: str, line: int, faults: dict[str, list[tuple[int, str, str]]]
) -> tuple[ImageFile, list[ImageFile]]:
    """The DICOM scan that a cell names (the cell itself where it is none, or any of several), and scans to tell of."""
    found = find_scans(folder, name)
    series = {called: scan.scan for called, scan in found.items() if scan.scan}
    broken = [replace(found[called], name=called) for called, one in series.items() if not one.size]
    whole = dict.fromkeys(found[called] for called, one in series.items() if one.size)
    alone = next(iter(whole), None) if image.name == name and len(whole) == 1 else None
    scan = found.get(image.name, alone)  # files that cannot be read beside a scan are told of, and no choice
    if scan:
        scan = replace(scan, name=image.name, place="")
        return scan, [scan, *(one for one in broken if one.image != scan.image)]
    listed = "; ".join(f"{called}: {one.summary()}" for called, one in [*series.items()][:8])
    code = "no-series" if not found else "several-series" if image.name == name else "unknown-series"
    faults[code].append((line, f"{image.name}{f' ({listed})' if listed else ''}", image.name))
    return image, []


def _case_id(root: Path, cell: str) -> str:
    name = posixpath.normpath(cell.replace("\\", "/"))
    absolute = root.resolve().as_posix() + "/" if Path(name).is_absolute() else ""
    return name.removeprefix(absolute)


def _labels(cell: str, options: DataOptions) -> tuple[tuple[str, ...], bool]:
    if not options.multilabel or not cell:
        return ((cell,), True) if cell else ((), False)
    labels = {label.strip() for label in cell.split(options.label_separator)} - {""}
    if {label.casefold() for label in labels} == {NO_FINDING}:
        return (), True
    return tuple(sorted(labels)), True


def _fault_problem(file: Path, code: str, faults: list[tuple[int, str, str]]) -> Problem:
    where = first_few((f"line {line}: {text}" if text else f"line {line}" for line, text, _ in sorted(faults)))
    one, several, rest = _ADVICE[code]
    message = f"{file.name}: {len(faults)} {agree(faults, one, several)} {rest} ({where})."
    return Problem("error", code, message, tuple(case for *_, case in faults if case))


def _separator_problems(cases: tuple[Case, ...], options: DataOptions) -> list[Problem]:
    joined = [name for name in class_names(cases) if options.label_separator in name]
    if options.multilabel or not joined:
        return []
    message = (
        f"Class names hold {options.label_separator!r}: {first_few(joined)}. If these are several labels of one image, "
        "use --set data.multilabel=true."
    )
    return [Problem("warning", "several-labels", message)]
