"""`medtpp compare` of a study: what it shows of many comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from medtpp.cli._common import console, decoding, errors, show_paths

if TYPE_CHECKING:
    from collections.abc import Iterable

    from medtpp.report.schema import StudyFile
    from medtpp.report.schema_study import AcrossFile
    from medtpp.workflow.cluster import ClusterOptions
    from medtpp.workflow.pool import Outcome
    from medtpp.workflow.study import OpenStudy, Study


def compare_all(
    study: Study,
    out: Path | None,
    *,
    jobs: int | None,
    cluster: ClusterOptions | None,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
) -> None:
    """Plan and do a study."""
    from medtpp.workflow import study as studies
    from medtpp.workflow.compare import hold

    def opened() -> OpenStudy:
        with decoding() as progress:
            return studies.open_study(
                study,
                out,
                jobs=jobs,
                cluster=cluster,
                dry_run=dry_run,
                resume=resume,
                overwrite=overwrite,
                progress=progress,
            )

    if dry_run or out is None:
        with console.status("measuring steps"):
            planned = studies.measure_study(opened(), dry_run=True)
        _show_plan(planned)
        if any(one.failed for one in planned.parts):
            raise typer.Exit(1)
        return
    with hold(out):
        begun = opened()
        with studies.hold_parts(begun):
            studies.keep_study(begun, out, overwrite=overwrite)
            with console.status("measuring steps"):
                begun = studies.measure_study(begun)
            _show_plan(begun)
            left = [(found.missing_cells(at), found.missing_starts(at)) for found, at in begun.comparisons.values()]
            follow(studies.run_study(begun, out), sum(len(cells) + len(starts) for cells, starts in left))
            file, across = studies.finish_study(begun, out)
    if across is not None:
        _show_summary(across)
        show_paths(report=out / "report.html")
    show_paths(cells=out / "cells.csv", study=out / "study.json")
    if file.failed:
        _show_failures(file)
        raise typer.Exit(1)


def _show_plan(study: OpenStudy) -> None:
    """A row for each comparison, what is to be done in all, and what cannot be."""
    table = Table(box=None, pad_edge=False, title_justify="left", title="Plan")
    grid = study.study
    names = {"dataset": "data set", "backbone": "backbone", "fold": "fold", "site": "site"}
    shown = [name for name in names if name == "dataset" or any(getattr(one.part, name) for one in study.parts)]
    for name in shown:
        table.add_column(names[name], overflow="fold", no_wrap=name == "dataset" and len(grid.members) > 1)
    for title in ("cases", "cells", "TPP runs", "estimate"):
        table.add_column(title, justify="right", no_wrap=True)
    left, without = [0, 0], [0, 0]  # cells and runs of TPP, with and without their data
    seconds_left, unknown = 0.0, False
    for one in study.parts:
        counts, seconds = one.counts(study.folder(one)), study.seconds_left(one)
        total = without if one.comparison is None else left
        total[:] = total[0] + counts[0], total[1] + counts[1]
        cases = "?" if one.comparison is None else f"{len(one.comparison.prepared.whole_split):,}"
        if one.comparison is None:
            time = "missing" if one.missing else "failed"
        elif not counts[0]:
            time = "done"
        else:
            time = "?" if seconds is None else duration(seconds)
            seconds_left, unknown = seconds_left + (seconds or 0.0), unknown or seconds is None
        table.add_row(*(str(getattr(one.part, name)) for name in shown), cases, *map(str, counts), time)
    console.print(table, markup=False)
    machine = study.machine
    if study.comparisons:
        console.print(
            f"[bold]to do[/bold]     {left[0]} cells and {left[1]} runs of TPP, "
            f"processes {machine.processes}, threads {machine.threads} each\n"
            f"[bold]estimate[/bold]  {duration(seconds_left)}{' and what is not known' if unknown else ''}"
        )
    if any(without):
        console.print(f"[bold]not now[/bold]   {without[0]} cells and {without[1]} runs without their data")
    for reason in dict.fromkeys(one.missing for one in study.parts if one.missing):
        console.print(reason, markup=False, soft_wrap=True)
    for one in study.parts:
        if one.failed:
            errors.print(f"{one.title}: {one.failed}", markup=False, soft_wrap=True)


def _show_summary(across: AcrossFile) -> None:
    """What the comparisons say together."""
    console.print(f"\n{across.answer}\n", markup=False)
    for pooled in across.pooled:
        console.print(pooled.sentence, markup=False)
    for note in across.notes:
        console.print(f"note: {note}", markup=False)


def _show_failures(file: StudyFile) -> None:
    """What failed, by comparison."""
    for part in dict.fromkeys(one.part for one in file.failed):
        found = [one for one in file.failed if one.part == part]
        cells = sum(bool(one.cell) for one in found)
        reasons = [one.reason for one in found if not one.cell]
        text = "; ".join([*reasons, *([f"{cells} failed: see its report, or its logs"] if cells else [])])
        errors.print(f"{part}: {text}", markup=False, soft_wrap=True)
    errors.print("--resume tries them again.")


def duration(seconds: float) -> str:
    """Seconds for a reader."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{max(1, round(seconds)):d} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def follow(outcomes: Iterable[Outcome], total: int) -> None:
    """A bar on a terminal, lines elsewhere."""
    from rich.progress import Progress

    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("comparing", total=total)
        for done, outcome in enumerate(outcomes, start=1):
            bar.advance(task)
            if outcome.error is not None:
                errors.print(f"{done}/{total} failed: {outcome.job.name}: {outcome.error}", markup=False)
            elif not errors.is_terminal:
                errors.print(f"{done}/{total} {outcome.job.name}, {outcome.seconds:.0f} s", markup=False)
