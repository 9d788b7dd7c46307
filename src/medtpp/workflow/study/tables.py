"""The files of a study: study.json, and cells.csv with every cell of every comparison."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from medtpp.errors import DataError
from medtpp.files import atomic, read_json, write_json
from medtpp.report.schema import StudyFailedFile, StudyFile, StudyPartFile
from medtpp.workflow.compare.opening import STUDY
from medtpp.workflow.study.file import Study
from medtpp.workflow.study.parts import StudyPart

CELLS = "cells.csv"


def title_of(part: StudyPart | StudyPartFile) -> str:
    """A part in a reader's words: "glas, medtpp_vit_tiny, fold 1"."""
    named = [part.dataset, part.backbone, part.fold and f"fold {part.fold}", part.site and f"site {part.site}"]
    return ", ".join(name for name in named if name)


def write_study_file(
    out: Path, study: Study, parts: Sequence[StudyPart], failed: Sequence[StudyFailedFile]
) -> StudyFile:
    """Write study.json."""
    file = StudyFile(
        schema=1,
        levels=list(study.levels),
        axes={member.name: asdict(member.axes) for member in study.members},
        parts=[StudyPartFile(**asdict(part) | {"folder": part.folder.relative_to(out).as_posix()}) for part in parts],
        failed=list(failed),
    )
    write_json(out / STUDY, file.model_dump(mode="json", by_alias=True))
    return file


def read_study_file(out: Path) -> StudyFile | None:
    """What study.json says; None where there is none. Raises DataError where it is broken."""
    if not (out / STUDY).is_file():
        return None
    try:
        return StudyFile.model_validate(read_json(out / STUDY))
    except (ValueError, ValidationError) as error:
        raise DataError(f"{out / STUDY} is broken. Begin anew with --overwrite or another --out.") from error


def write_cells(out: Path, parts: Sequence[StudyPart], backbones: Mapping[Path, str]) -> None:
    """Write cells.csv: a row for each cell, the columns of all comparisons together.

    Args:
        out: Of the study.
        parts: Those that have results.
        backbones: What the cells were trained on, by the part's folder.
    """
    rows: list[dict[str, Any]] = []
    for part in parts:
        which = {"dataset": part.dataset, "backbone": backbones[part.folder], "fold": part.fold, "site": part.site}
        above = part.folder.relative_to(out)
        with (part.folder / CELLS).open(encoding="utf-8", newline="") as stream:
            for row in csv.DictReader(stream):
                row.pop("data")
                rows.append(which | row | {"folder": (above / row["folder"]).as_posix()})
    names = list(dict.fromkeys(name for row in rows for name in row))
    with atomic(out / CELLS) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
