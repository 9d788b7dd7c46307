"""`medtpp compare`: does TPP help on these data?"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from medtpp.cli._common import (
    Modality,
    Overwrite,
    Resume,
    Settings,
    Source,
    Unlabelled,
    console,
    decoding,
    errors,
    experiment_from,
    names_in,
    show_paths,
    show_problems,
    show_split,
)
from medtpp.cli.study import compare_all, duration, follow
from medtpp.errors import ConfigError, OutputError

if TYPE_CHECKING:
    from medtpp.report.schema import ComparisonFile
    from medtpp.workflow.cluster import ClusterOptions
    from medtpp.workflow.compare import Comparison
    from medtpp.workflow.compare.plan import Labels
    from medtpp.workflow.study import Member


def compare(
    source: Source,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Output folder.")] = None,
    init: Annotated[
        str | None,
        typer.Option(
            help="Starts to compare: standard, tpp; its controls tpp_labelled, tpp_foreign, random_direction; LoRA's "
            "pissa, olora, eva, lora_ga.",
            show_default="standard,tpp",
        ),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Numbers of labelled cases in all, such as 30,150,all.", show_default=False)
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Label draws, initial weights and batch orders.", show_default="10")
    ] = None,
    tuner: Annotated[
        str | None, typer.Option(help="Tuners, such as lora,ssf; the experiment's by default.", show_default=False)
    ] = None,
    pretext: Annotated[
        str | None,
        typer.Option(help="Pretext tasks, such as mae,simmim; the experiment's by default.", show_default=False),
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(help="A comparison on each of these backbones.", show_default=False)
    ] = None,
    folds: Annotated[
        int | None, typer.Option(min=2, help="A comparison for each of so many folds of the cases.", show_default=False)
    ] = None,
    sites: Annotated[bool, typer.Option("--sites", help="A comparison with each site left out for testing.")] = False,
    arm: Annotated[
        str | None,
        typer.Option(help="More arms: longer (equal time), linear, full, scratch (untrained).", show_default=False),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="What is compared, on the test cases; auto: auc, and dice of masks (hd95, nsd).", show_default="auto"
        ),
    ] = None,
    margin: Annotated[
        float | None,
        typer.Option(
            help="Differences below this do not matter, in the metric's unit; by default half a point, of dice and nsd "
            "one point, of hd95 0.5 mm.",
            show_default=False,
        ),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes at once; as many as fit by default.")] = None,
    cluster: Annotated[
        Path | None,
        typer.Option("--cluster", help="YAML file that says what to ask of SLURM; the cells are done there."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the cells and the time they take.")] = False,
    modality: Modality = None,
    settings: Settings = None,
    unlabelled: Unlabelled = None,
    foreign: Annotated[
        list[Path] | None,
        typer.Option("--foreign", help="Folder of other images, for the start tpp_foreign. Repeatable."),
    ] = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Compare starts of fine-tuning fairly: same split, label draws, heads, batches and steps, over several seeds.

    SOURCE may also be a YAML file with the field experiments: a study over several data sets.
    """
    from medtpp.workflow.cluster import load_cluster
    from medtpp.workflow.study import is_study, make_axes, read_study, study_of

    nodes = load_cluster(cluster) if cluster else None
    if out is None and not dry_run:
        raise OutputError("Name an output folder with --out, or look at the plan with --dry-run.")
    given: dict[str, object] = {
        "tuner": names_in(tuner) or None,
        "pretext": names_in(pretext) or None,
        "init": None if init is None else names_in(init),
        "arm": names_in(arm) or None,
        "labels": _counts(labels) or None,
        "seeds": seeds,
        "metric": metric,
        "margin": margin,
        "foreign": tuple(map(str, foreign or ())) or None,
    }
    backbones = names_in(backbone)
    if is_study(source):
        if unlabelled or modality:
            raise ConfigError("--unlabelled and --modality are of one data set: say them in its experiment file.")
        grid = {"backbones": backbones or None, "folds": folds, "sites": sites or None}
        study = read_study(source, settings or [], given | grid)
    else:
        experiment, axes = experiment_from(source, settings, unlabelled, modality), make_axes(given)
        study = study_of(experiment, axes, backbones=backbones, folds=folds or 0, sites=sites)
    if (single := study.single) is None:
        compare_all(study, out, jobs=jobs, cluster=nodes, dry_run=dry_run, resume=resume, overwrite=overwrite)
    else:
        _compare_one(single, out, jobs=jobs, cluster=nodes, dry_run=dry_run, resume=resume, overwrite=overwrite)


def _compare_one(
    member: Member,
    out: Path | None,
    *,
    jobs: int | None,
    cluster: ClusterOptions | None,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
) -> None:
    from medtpp.report import write_report
    from medtpp.workflow.compare import hold, measure, open_comparison, run_cells, summarise

    with nullcontext() if dry_run or out is None else hold(out):
        with decoding() as progress:
            comparison = open_comparison(
                member.experiment,
                member.axes,
                out,
                jobs=jobs,
                cluster=cluster,
                dry_run=dry_run,
                resume=resume,
                overwrite=overwrite,
                progress=progress,
            )
        show_split(comparison.prepared, tpp=bool(comparison.starts))
        _show_foreign(comparison)
        with console.status("measuring steps"):
            comparison = measure(comparison, out, dry_run=dry_run)
        _show_plan(comparison, out)
        if dry_run or out is None:
            return
        follow(run_cells(comparison, out), len(comparison.missing_cells(out)) + len(comparison.missing_starts(out)))
        summary = summarise(comparison, out)
        _show_means(summary)
        _show_differences(summary)
        show_paths(report=write_report(out), cells=out / "cells.csv")
    if summary.failed:
        errors.print(f"{len(summary.failed)} failed: see the report, or {out}/logs. --resume tries them again.")
        raise typer.Exit(1)


def _counts(text: str | None) -> tuple[Labels, ...]:
    names = names_in(text)
    wrong = [name for name in names if name != "all" and not (name.isdecimal() and int(name))]
    if wrong:
        raise ConfigError(f"--labels takes whole numbers and all, as in 30,150,all, and not {', '.join(wrong)}.")
    return tuple("all" if name == "all" else int(name) for name in names)


def _show_foreign(comparison: Comparison) -> None:
    """How many images `tpp_foreign` sees."""
    if (foreign := comparison.foreign) is None:
        return
    console.print(f"[bold]foreign[/bold]   {len(foreign.tpp)} images")
    if foreign.excluded:
        console.print(
            f"[yellow]note:[/yellow] {len(foreign.excluded)} foreign images are left out: they are unreadable, or "
            "share pixels or a patient with images of the data set."
        )
    show_problems(foreign.problems)


def _show_plan(comparison: Comparison, out: Path | None) -> None:
    """Arms, cells and the time they will take."""
    table = Table(box=None, pad_edge=False, title_justify="left", title="Plan")
    for name in ("labels", "arm", "cells", "steps", "minutes each"):
        table.add_column(name, justify="left" if name in ("labels", "arm") else "right")
    seeds = comparison.axes.seeds
    for start in (start for start in comparison.starts if start.seed == comparison.base.seed):
        steps = str(comparison.budget.tpp[start.arm.pretext]) if start.origin is None else ""
        minutes = _minutes(comparison.start_seconds(start))
        table.add_row("" if start.labels is None else str(start.labels), start.title, str(seeds), steps, minutes)
    for index, cell in enumerate(cells := [cell for cell in comparison.cells if cell.seed == comparison.base.seed]):
        first = index == 0 or cells[index - 1].labels != cell.labels
        seconds = comparison.seconds(cell)
        steps = str(comparison.steps(cell) or "?")
        table.add_row(str(cell.labels) if first else "", cell.arm.name, str(seeds), steps, _minutes(seconds))
    console.print(table)
    machine, missing = comparison.machine, comparison.missing_cells(out)
    runs = [start for start in comparison.missing_starts(out) if start.origin is None]
    console.print(
        f"[bold]to do[/bold]     {len(missing)} cells and {len(runs)} runs of TPP, "
        f"processes {machine.processes}, threads {machine.threads} each\n"
        f"[bold]estimate[/bold]  {duration(comparison.seconds_left(out))}"
    )


def _minutes(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds / 60:.1f}"


def _show_means(summary: ComparisonFile) -> None:
    table = Table(
        box=None, pad_edge=False, title_justify="left", title=f"\n{summary.title_with_unit}, mean over the seeds"
    )
    for name in ("labels", "arm", "mean", "95% interval", "seeds", "seconds"):
        table.add_column(name, justify="right" if name in ("seeds", "seconds") else "left")
    before, digits = "", summary.digits
    for mean in summary.means:
        spent = None if mean.seconds is None else mean.seconds + (mean.tpp_seconds or 0.0)
        table.add_row(
            mean.labels if mean.labels != before else "",
            mean.arm,
            f"{mean.value:.{digits}f}" if mean.value is not None else "undefined" if mean.seeds else "failed",
            "" if mean.low is None else f"[{mean.low:.{digits}f}, {mean.high:.{digits}f}]",
            str(mean.seeds),
            "" if spent is None else f"{spent:.0f}",
        )
        before = mean.labels
    console.print(table, markup=False)


def _show_differences(summary: ComparisonFile) -> None:
    if not summary.differences:
        return
    better = "" if summary.higher_is_better else ", lower is better"
    title = f"\nTPP minus another arm, paired{better}"
    table = Table(box=None, pad_edge=False, title_justify="left", title=title)
    for name in ("labels", "comparison", "gap", "95% interval", "verdict"):
        table.add_column(name)
    digits = summary.digits
    for row in summary.differences:
        table.add_row(
            row.labels,
            f"{row.arm} - {row.baseline.removeprefix(row.arm.split()[0]).strip() or row.baseline}",
            "" if row.value is None else f"{row.value:+.{digits}f}",
            "" if row.low is None else f"[{row.low:+.{digits}f}, {row.high:+.{digits}f}]",
            row.verdict,
        )
    console.print(table)
    console.print()
    question = ""
    for row in summary.differences:
        if row.question != question:
            question = row.question
            console.print(f"\n{question}", style="bold", markup=False)
        console.print(row.sentence, markup=False)
    for note in summary.notes:
        console.print(f"note: {note}", markup=False)
