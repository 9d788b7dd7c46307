"""`medtpp bench`: what each tuner costs on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from medtpp.cli._common import console, errors, names_in, show_paths

if TYPE_CHECKING:
    from medtpp.data.cache import Progress
    from medtpp.workflow.bench import Cost, Measurements


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


class Precision(StrEnum):
    """float32, or mixed with bfloat16 or float16."""

    auto = "auto"
    float32 = "32"
    bfloat16 = "bf16"
    float16 = "16"


def bench(
    backbone: Annotated[str, typer.Option(help="Backbone; its weights are left random.")] = "vit_small_patch16_224",
    tuner: Annotated[
        str | None, typer.Option(help="Tuners, such as lora,ssf; all that fit by default.", show_default=False)
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side in pixels; the backbone's own by default.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Images in a step.")] = 16,
    device: Annotated[Device, typer.Option(help="Where to compute.")] = Device.auto,
    precision: Annotated[Precision, typer.Option(help="Of training.")] = Precision.auto,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each speed; shown are medians.")] = 3,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file for all numbers.")] = None,
) -> None:
    """Measure parameters, speed and memory of tuners, in a step of TPP and of fine-tuning, on one backbone."""
    from medtpp.files import write_json
    from medtpp.workflow.bench import fitting, measure, set_up

    setup = set_up(backbone, image_size=image_size, batch_size=batch_size, device=device, precision=precision)
    names = list(dict.fromkeys(names_in(tuner))) or fitting(setup)
    with _progress() as progress:
        found = measure(setup, names, repeats, progress)
    _show(found)
    if out is not None:
        write_json(out, found.plain())
        show_paths(numbers=out)
    if found.errors:
        raise typer.Exit(1)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar on a terminal."""
    from rich.progress import Progress as Bar

    with Bar(console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task("measuring", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _show(found: Measurements) -> None:
    """One table, and below it what failed and why."""
    setup = found.setup
    size = f"{setup.image_size} pixels, batches of {setup.batch_size}, {setup.accelerator}, {setup.precision}"
    table = Table(box=None, pad_edge=False, title_justify="left", title=f"{setup.backbone}\n{size}\n")
    table.add_column("tuner")
    for name in ("parameters", "TPP\nimages/s", "TPP\nMiB", "fine-tuning\nimages/s", "fine-tuning\nMiB"):
        table.add_column(name, justify="right")
    for name, stages in found.costs.items():
        known = next((cost.parameters for cost in stages.values() if cost.parameters is not None), None)
        parts = [text for stage in ("tpp", "finetune") for text in _cells(stages.get(stage))]
        table.add_row(name, "?" if known is None else f"{known:,}", *parts)
    console.print(table)
    for name, stage, error in found.errors:
        errors.print(f"{name}, {'TPP' if stage == 'tpp' else 'fine-tuning'}: {error}", markup=False)


def _cells(cost: Cost | None) -> tuple[str, str]:
    """Speed and memory as text."""
    if cost is None:
        return "-", "-"
    if cost.error is not None:
        return "failed", "failed"
    return f"{cost.rate:.1f}", f"{cost.memory_mib:.0f}"
