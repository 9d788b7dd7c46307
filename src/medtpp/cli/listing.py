"""`medtpp list`: what there is to choose from."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.markup import escape
from rich.table import Table

from medtpp.cli._common import console

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo


class Kind(StrEnum):
    """What can be listed."""

    backbones = "backbones"
    tuners = "tuners"
    pretexts = "pretexts"
    tasks = "tasks"
    matrix = "matrix"


def list_(kind: Annotated[Kind, typer.Argument(help="What to list.")]) -> None:
    """List backbones, tuners, pretext tasks or tasks, with their options, or the matrix of what goes together."""
    from medtpp.config import BACKBONES, PRETEXTS, TASKS, TUNERS

    if kind is Kind.matrix:
        _list_matrix()
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    if kind is Kind.backbones:
        table.add_column("family")
        table.add_column("what")
        table.add_column("for example", no_wrap=True)  # names are there to be copied
        for name, family in BACKBONES.items():
            table.add_row(name, family.summary, "\n".join(family.examples))
    else:
        registry = {Kind.tuners: TUNERS, Kind.pretexts: PRETEXTS, Kind.tasks: TASKS}[kind]
        for name in ("name", "what", *(["rate"] if kind is Kind.tuners else []), "options (defaults)"):
            table.add_column(name)
        for name, entry in registry.items():
            options = {key: field for key, field in entry.Options.model_fields.items() if key != "name"}
            shown = [f"{key}={_brief(field)}" for key, field in options.items()]
            rate = [f"{entry.learning_rate:g}"] if kind is Kind.tuners else []
            table.add_row(name, entry.summary, *rate, escape("\n".join(shown)))
    console.print(table)


def _list_matrix() -> None:
    """Tuners by pretext tasks, with the reasons for what is refused."""
    from medtpp.config import PRETEXTS, TUNERS
    from medtpp.training.tpp import refusal

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("tuner")
    for name in PRETEXTS.names():
        table.add_column(name, justify="center")
    reasons: dict[str, None] = {}
    for tuner in TUNERS.names():
        found = [refusal(tuner, method.needs) for method in PRETEXTS.values()]
        reasons |= dict.fromkeys(reason for reason in found if reason)
        table.add_row(tuner, *("-" if reason else "yes" for reason in found))
    console.print(table)
    console.print("\n-: " + "; ".join(reasons) + ". A sum goes with what all of its parts go with.\n", highlight=False)
    _list_kinds()


def _list_kinds() -> None:
    """Tuners and pretext tasks by kinds of backbones, with what is lacking."""
    from medtpp import backbones
    from medtpp.config import PRETEXTS, TUNERS
    from medtpp.training.tpp import AUTO_PRETEXT

    kinds = backbones.kinds()
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for name in ("tuner or task", *kinds, "needs"):
        table.add_column(name, justify="center" if name in kinds else "left")
    for name, method in (*TUNERS.items(), *PRETEXTS.items()):
        fits = ["yes" if method.needs <= capabilities else "-" for capabilities in kinds.values()]
        table.add_row(name, *fits, backbones.describe_lacking(method.needs, frozenset({"dense", "masks"})))
    console.print(table)
    console.print(f"\npretext=auto, the default: {AUTO_PRETEXT}", highlight=False)


def _brief(field: FieldInfo) -> str:
    value = field.default
    if not isinstance(value, tuple):
        return str(value)
    known = get_args(get_args(field.annotation)[0])
    return "all" if value == known else f"[{', '.join(map(str, value))}]"
