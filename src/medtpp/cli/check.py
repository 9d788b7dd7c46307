"""`medtpp check`: what a data set holds, and all that is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import typer
from rich.table import Table
from rich.text import Text

from medtpp.cli._common import Modality, Settings, Source, console, decoding, experiment_from, show_problems
from medtpp.data.problems import count

if TYPE_CHECKING:
    from medtpp.data.check import DatasetSummary
    from medtpp.data.check_volumes import Spread, VolumeSummary

_UNITS = {"HU": "HU", "levels": "8 bit", "none": "without a unit"}


def check(data: Source, modality: Modality = None, settings: Settings = None) -> None:
    """Report cases, classes, masks, sizes, patients, and every problem. Exit status 2 if there are errors."""
    experiment = experiment_from(data, settings, modality=modality)
    from medtpp.workflow.check import check_data

    with decoding() as progress:
        found = check_data(experiment, progress)
    show_summary(found.summary, str(found.dataset.root))
    show_problems(found.problems)
    if found.unlabelled:
        console.print(f"[bold]unlabelled[/bold] {found.unlabelled} more images for TPP")
    errors = sum(problem.severity == "error" for problem in found.problems)
    warnings = len(found.problems) - errors
    counts = f"{count(errors, 'error')}, {count(warnings, 'warning')}."
    console.print(counts if found.problems else "No problems found.", style="bold")
    if errors:
        raise typer.Exit(2)


def show_summary(summary: DatasetSummary, title: str) -> None:
    """A data set in numbers."""
    console.print(Text(title, style="italic"), soft_wrap=True)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    volumes = summary.volumes
    segmented = volumes is not None and volumes.masks > 0
    lacking = "mask" if segmented and not summary.classes else "label"
    unlabelled = summary.cases - summary.labelled
    table.add_row("cases", f"{summary.cases}" + (f" ({unlabelled} without {lacking})" if unlabelled else ""))
    if summary.classes or not segmented:
        table.add_row("classes", _counts(summary.classes))
    for name, spread in (("width", summary.width), ("height", summary.height)):
        if spread:
            table.add_row(name, f"{_range(spread)} px")
    if summary.bits:
        depth = ", ".join(f"{bits} bit: {images}" for bits, images in summary.bits.items())
        table.add_row("depth", f"{depth}; {summary.colour or 'none'} in colour")
    if volumes:
        _add_volumes(table, volumes)
    table.add_row("patients", str(summary.patients) if summary.patients else "unknown: every image counts as a patient")
    if summary.sites:
        table.add_row("sites", _counts(summary.sites))
    for split in dict.fromkeys([*summary.splits, *(volumes.splits if volumes else {})]):
        parts = [_counts(summary.splits[split])] if summary.splits.get(split) else []
        parts += [count(volumes.splits[split], "mask")] if volumes and split in volumes.splits else []
        table.add_row(split, "; ".join(parts))
    console.print(table)


def _add_volumes(table: Table, volumes: VolumeSummary) -> None:
    if len(volumes.size) == 3:
        _add_axes(table, "voxels", volumes.size, "")
    if volumes.spacing:
        _add_axes(table, "spacing", volumes.spacing, " mm")
        if volumes.unknown:
            table.add_row("", f"unknown in {count(volumes.unknown, 'case')}")
    elif len(volumes.size) == 3:
        table.add_row("spacing", "unknown")
    table.add_row("values", _alternatives({_UNITS[unit]: scans for unit, scans in volumes.units.items()}))
    table.add_row("channels", _alternatives({str(number): scans for number, scans in volumes.channels.items()}))
    if volumes.masks:
        table.add_row("masks", str(volumes.masks))
        shown = ", ".join(f"{name} in {masks}" for name, masks in volumes.structures.items())
        table.add_row("structures", f"{shown} of {count(volumes.masks, 'mask')}" if shown else "none")


def _add_axes(table: Table, name: str, axes: tuple[Spread, ...], unit: str) -> None:
    """One row where nothing changes, otherwise one for each axis; the last three of D, H and W."""
    letters = "DHW"[-len(axes) :]
    if all(low == high for low, _, high in axes):
        table.add_row(name, f"{' x '.join(_number(middle) for _, middle, _ in axes)}{unit} ({', '.join(letters)})")
        return
    for letter, axis in zip(letters, axes, strict=True):
        table.add_row(name if letter == letters[0] else "", f"{letter} {_range(axis)}{unit}")


def _range(spread: Spread) -> str:
    low, middle, high = spread
    return _number(low) if low == high else f"{_number(low)} to {_number(high)}, median {_number(middle)}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value == round(value) else f"{value:.4g}"


def _alternatives(counts: Mapping[str, int]) -> str:
    """The only one, or each with its number of cases."""
    return next(iter(counts)) if len(counts) == 1 else ", ".join(f"{name} ({count})" for name, count in counts.items())


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"
