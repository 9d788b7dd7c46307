"""From a download to a data set: check it, draw the split, write what cannot be read in place, manifest and card."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from medtpp.config import RECIPES
from medtpp.data.cache import Progress, parallel
from medtpp.data.case import SPLITS, Case
from medtpp.data.problems import first_few
from medtpp.data.recipes.base import Part, Recipe, Row, Survey, compared_sizes
from medtpp.data.split import assign, groups
from medtpp.errors import DataError, OutputError
from medtpp.files import write_text
from medtpp.seeds import Seeds

SEED = 0  # of every recipe's split, so that everybody has the same
MOST_LISTED = 10
_COLUMNS = ("image", "mask", "label", "patient", "site", "split")


@dataclass(frozen=True)
class Prepared:
    """What was written.

    Attributes:
        manifest: The file.
        counts: Cases in each split.
        notes: What is missing or was left out.
    """

    manifest: Path
    counts: dict[str, int]
    notes: tuple[str, ...]


def prepare(
    name: str,
    source: Path,
    out: Path,
    *,
    allow_incomplete: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Prepared:
    """Write `manifest.csv` and a card, `README.md`, for a data set that was downloaded.

    Nothing is written before the whole download was looked through. Images are read where they are; masks that cannot
    be are converted to files under `out`.

    Args:
        name: Of the recipe.
        source: The download, unpacked.
        out: Another folder than the source.
        allow_incomplete: Go on without what is missing or broken.
        overwrite: Replace what an earlier call wrote.
        progress: Called with the numbers of files checked and in all.

    Raises:
        ConfigError: There is no such recipe.
        DataError: The layout is another one, or something is missing or broken; all of it is listed.
        OutputError: There is a manifest or card already, or nothing can be written.
    """
    recipe: Recipe = RECIPES.get(name)()
    source, out = source.expanduser(), out.expanduser()
    if not source.is_dir():
        raise DataError(f"There is no folder {source}. Name the folder of the download with --source.")
    if out.resolve() == source.resolve():
        raise OutputError(f"{out} is the download itself. Name another folder with --out.")
    there = [file for file in ("manifest.csv", "README.md") if (out / file).exists()]
    if there and not overwrite:
        raise OutputError(f"{out} has a {' and a '.join(there)} already. Use --overwrite, or another --out.")
    survey = recipe.survey(source, out)
    lacking = [text for part in recipe.parts if (text := _lacking(part, survey.found[part.name]))]
    rows = _readable(survey, progress)
    _refuse(recipe, source, lacking, survey.faults, allow_incomplete)
    rows = _converted(rows, survey, progress)
    _refuse(recipe, source, lacking, survey.faults, allow_incomplete)
    if not rows:
        raise DataError(f"{source} holds no case of {recipe.title} that can be used.")
    rows = draw(name, recipe, rows, source, survey)
    faults = [fault.replace(f"{source}{os.sep}", "") for fault in survey.faults]  # the card is there to be passed on
    notes = [*lacking, *(f"left out: {fault}" for fault in faults), *survey.notes]
    counts = {split: sum(row.split == split for row in rows) for split in SPLITS}
    write_text(out / "manifest.csv", _manifest(rows, out))
    write_text(out / "README.md", _card(name, recipe, counts, notes))
    return Prepared(out / "manifest.csv", counts, tuple(notes))


def draw(name: str, recipe: Recipe, rows: Sequence[Row], source: Path, survey: Survey) -> list[Row]:
    """Fill in the splits that the data set does not prescribe, patients apart, strata in proportion.

    Depends on the seed and the names in the download, not on where it lies. Rows of patients who are in a prescribed
    test set as well are left out, and noted.
    """
    held = {row.patient for row in rows if row.split and row.patient}
    kept = [row for row in rows if row.split or row.patient not in held]
    if len(kept) < len(rows):
        survey.notes.append(
            f"{len(rows) - len(kept)} cases are left out of train and val: their patients are in the official test set."
        )
    open_ = {_key(row, source): row for row in kept if not row.split}
    cases = [
        Case(key, row.image, (row.stratum or row.label,), labelled=True, patient=row.patient or None)
        for key, row in sorted(open_.items())
    ]
    total = sum(recipe.shares.values())
    shares = {split: share / total for split, share in recipe.shares.items()}
    split = assign(groups(cases, {}), shares, Seeds(SEED).numpy("recipe", name)) if cases else {}
    return [row if row.split else replace(row, split=split[_key(row, source)]) for row in kept]


def _key(row: Row, source: Path) -> str:
    # What is converted lies in `out` under a name of its own.
    return row.image.relative_to(source).as_posix() if row.image.is_relative_to(source) else row.image.name


def _lacking(part: Part, found: Sequence[str]) -> str | None:
    """How a part differs from what is known of it; None if it does not."""
    missing = sorted(set(part.names) - set(found), key=lambda name: (len(name), name))
    surplus = sorted(set(found) - set(part.names)) if part.names else []
    if len(set(found)) == part.count and not missing:
        return None
    text = f"{part.name}: found {len(set(found)):,} of {part.count:,} {part.what}"
    text += f"; missing: {first_few(missing, MOST_LISTED)}" if missing else ""
    return text + (f"; not known: {first_few(surplus, MOST_LISTED)}" if surplus else "")


def _readable(survey: Survey, progress: Progress | None) -> list[Row]:
    """The rows whose files have readable headers; the others become faults."""
    rows = []
    with closing(parallel(compared_sizes, survey.rows, None)) as found:
        for done, (row, fault) in enumerate(zip(survey.rows, found, strict=True), start=1):
            if fault:
                survey.faults.append(fault)
            else:
                rows.append(row)
            if progress:
                progress(done, len(survey.rows))
    return rows


def _converted(rows: Sequence[Row], survey: Survey, progress: Progress | None) -> list[Row]:
    """Write what cannot be read in place; rows of which that fails become faults."""
    kept = []
    for done, row in enumerate(rows, start=1):
        try:
            if row.make:
                row.make()
            kept.append(row)
        except DataError as error:
            survey.faults.append(str(error))
        if progress:
            progress(done, len(rows))
    return kept


def _refuse(recipe: Recipe, source: Path, lacking: Sequence[str], faults: Sequence[str], allowed: bool) -> None:
    if allowed or not (lacking or faults):
        return
    shown = list(faults[:MOST_LISTED])
    if len(faults) > len(shown):
        shown.append(f"and {len(faults) - len(shown)} more")
    raise DataError(
        f"{source} is not the whole of {recipe.title}. Download again what is missing or broken, or go on without it "
        "by --allow-incomplete:",
        [*lacking, *shown],
    )


def _manifest(rows: Iterable[Row], out: Path) -> str:
    """Sorted by image; columns that no row fills are left out."""
    table = []
    for row in rows:
        mask = _relative(row.mask, out) if row.mask else ""
        cells = (_relative(row.image, out), mask, row.label, row.patient, row.site, row.split)
        table.append(dict(zip(_COLUMNS, cells, strict=True)) | dict(row.extra))
    columns = [
        column for column in dict.fromkeys(key for line in table for key in line) if any(r[column] for r in table)
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(sorted(table, key=lambda line: line["image"]))
    return text.getvalue()


def _relative(path: Path, out: Path) -> str:
    try:
        return Path(os.path.relpath(path, out)).as_posix()
    except ValueError:  # on another drive of Windows
        return path.resolve().as_posix()


def _card(name: str, recipe: Recipe, counts: dict[str, int], notes: Sequence[str]) -> str:
    structures = f"--set 'data.structures={_flow(recipe.structures)}'" if recipe.structures else ""
    lines = [
        f"# {recipe.title}",
        "",
        f"Prepared by `medtpp data prepare {name}`. The images are not copied; `manifest.csv` says where they are.",
        "",
        f"- Task: {recipe.task}",
        f"- Licence: {recipe.licence}",
        f"- Where to ask: {recipe.access}",
        f"- Cite: {recipe.citation}",
        f"- Split: {recipe.protocol}",
        f"- Cases: {', '.join(f'{split} {count}' for split, count in counts.items() if count)}",
        "",
        "```bash",
        f"medtpp check manifest.csv --modality {recipe.modality} --set task={recipe.kind} {structures}".rstrip(),
        "```",
    ]
    if notes:
        lines += ["", "## Notes", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def _flow(structures: Mapping[str, int | list[int]]) -> str:
    """For the command line."""
    return str(dict(structures)).replace("'", "")
