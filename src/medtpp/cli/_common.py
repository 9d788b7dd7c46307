"""Options and displays that several verbs share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from medtpp.config import Experiment
    from medtpp.data.cache import Progress
    from medtpp.data.case import Problem
    from medtpp.evaluation import Evaluation, SegmentationEvaluation
    from medtpp.workflow.prepare import Prepared

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

Source = Annotated[Path, typer.Argument(help="An experiment.yaml, a folder, a manifest, or medmnist:NAME@SIZE.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Output folder.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Override a field: --set tuner.rank=16. May be repeated.")
]
Unlabelled = Annotated[
    list[Path] | None, typer.Option("--unlabelled", help="Folder of more images without labels, for TPP. Repeatable.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on in a folder that holds a killed run.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the output folder.")]
Backbone = Annotated[str | None, typer.Option(help="Where the backbone lies now, if it moved.")]
Modality = Annotated[
    str | None,
    typer.Option(
        help="xray, ct, mri, ultrasound, pathology, microscopy, retina or photo: decides which flips are allowed."
    ),
]


def experiment_from(
    source: Path,
    settings: Sequence[str] | None,
    unlabelled: Sequence[Path] | None = None,
    modality: str | None = None,
) -> Experiment:
    """The experiment that a verb's arguments describe."""
    from medtpp.workflow.experiment import load_experiment

    chosen = [*(settings or []), *([f"data.modality={modality}"] if modality else [])]
    return load_experiment(source, chosen, unlabelled or [])


def names_in(text: str | None) -> tuple[str, ...]:
    """The names in a list such as lora,ssf."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


@contextmanager
def decoding() -> Iterator[Progress]:
    """A progress bar for reading images, on a terminal; it appears with the first image."""
    from rich.progress import Progress as Bar

    with Bar(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("reading images", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)


def show_problems(problems: Sequence[Problem]) -> None:
    """Errors and warnings, a paragraph each."""
    for problem in problems:
        style = "bold red" if problem.severity == "error" else "yellow"
        for line in Text.assemble((f"{problem.severity}:", style), " ", problem.message).split("\n"):
            # A command in the message stays on one line, to be copied.
            console.print(line, soft_wrap="--set" in line.plain)


def show_split(prepared: Prepared, *, tpp: bool) -> None:
    """How the cases were divided, with TPP also what it sees and learns from it, and warnings."""
    sizes = {name: len(prepared.cases(name)) for name in ("train", "val", "test")}
    parts = ", ".join(f"{name} {size}" for name, size in sizes.items())
    console.print(f"[bold]split[/bold]     {parts}" + (f"; TPP sees {len(prepared.tpp)} images" if tpp else ""))
    if tpp:
        tasks = prepared.experiment.tpp.choose
        console.print(f"[bold]pretext[/bold]   {', '.join(tasks) or prepared.experiment.pretext.name}")
    if tpp and prepared.excluded:
        console.print(
            f"[yellow]note:[/yellow] {len(prepared.excluded)} unlabelled images are left out of TPP: they are "
            "unreadable, set apart for validation or test, or share pixels or a patient with cases that are."
        )
    show_problems(prepared.problems)


def show_evaluation(evaluation: Evaluation | SegmentationEvaluation) -> None:
    """Metrics with intervals at 80 columns, and notes."""
    table = Table(title="Test", title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    for title, value in evaluation.table():
        table.add_row(title, value)
    console.print(table)
    for note in evaluation.notes:
        console.print(f"note: {note}", markup=False)


def show_stage(name: str, stage: dict[str, Any]) -> None:
    """One line about a finished stage."""
    seconds = stage["seconds"]
    text = f"{stage['steps']} steps of {stage['batch_size']}, "
    text += f"{seconds:.0f} s, " if seconds < 100 else f"{seconds / 60:.1f} min, "
    text += f"{stage['images_per_second']:.0f} images/s, loss {stage['last_loss']:.4f}"
    if stage.get("best"):
        text += f", best at step {stage['best']['step']}"
    if "feature_drift" in stage:
        on, off = stage["pretext_loss_on"], stage["pretext_loss_off"]
        text += f"\n          pretext loss {on:.4f} with tuner, {off:.4f} without; drift {stage['feature_drift']:.3f}"
    if "monitor_without" in stage:
        best, without = stage["best"]["score"], stage["monitor_without"]
        text += f"\n          probe on training labels: AUC {best:.3f} at the step kept, {without:.3f} without tuner"
    if "candidates" in stage:
        text += (
            f"\n          best AUC with {', '.join(f'{name} {auc:.3f}' for name, auc in stage['candidates'].items())}"
        )
    console.print(f"[bold]{name:9}[/bold] {text}")


def show_paths(**lines: object) -> None:
    """What was made and what to do with it; not wrapped, so that it can be copied."""
    width = max(9, *map(len, lines))
    for name, line in lines.items():
        console.print(f"[bold]{name:{width}}[/bold] {escape(str(line))}", soft_wrap=True)
