"""`medtpp list`: what there is to choose from."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer
from rich.table import Table

from medtpp.cli._common import console


class Kind(StrEnum):
    """What can be listed."""

    backbones = "backbones"
    tuners = "tuners"
    pretexts = "pretexts"
    tasks = "tasks"


def list_(kind: Annotated[Kind, typer.Argument(help="What to list.")]) -> None:
    """List backbones, tuners, pretext tasks or tasks, with their options."""
    from medtpp.config import BACKBONES, PRETEXTS, TASKS, TUNERS

    table = Table(box=None, pad_edge=False, header_style="bold")
    if kind is Kind.backbones:
        table.add_column("family")
        table.add_column("what")
        table.add_column("for example", no_wrap=True)  # names are there to be copied
        for name, family in BACKBONES.items():
            table.add_row(name, family.summary, "\n".join(family.examples))
    else:
        registry = {Kind.tuners: TUNERS, Kind.pretexts: PRETEXTS, Kind.tasks: TASKS}[kind]
        for name in ("name", "what", "options (defaults)"):
            table.add_column(name)
        for name, entry in registry.items():
            options = {key: field for key, field in entry.Options.model_fields.items() if key != "name"}
            shown = [f"{key}={_brief(field.default)}" for key, field in options.items()]
            table.add_row(name, entry.summary, "\n".join(shown))
    console.print(table)


def _brief(value: object) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
