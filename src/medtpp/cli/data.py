"""`medtpp data`: data sets of the literature, from their official download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from medtpp.cli._common import Overwrite, console, decoding, show_paths

app = typer.Typer(no_args_is_help=True, help="Data sets of the literature: from the official download to a manifest.")


@app.command("list")
def list_() -> None:
    """List the data sets that there are recipes for, and where to ask for them."""
    from medtpp.config import RECIPES

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, recipe in RECIPES.items():
        cases = f"{sum(part.count for part in recipe.parts):,} {recipe.parts[0].what}"
        table.add_row(name, f"{recipe.task}; {cases}\nlicence: {recipe.licence}\n{recipe.access}")
    console.print(table)


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="Of the data set; see `medtpp data list`.")],
    source: Annotated[Path, typer.Option(help="The download, unpacked.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder for manifest, card and converted masks. [data/NAME]")
    ] = None,
    allow_incomplete: Annotated[
        bool, typer.Option("--allow-incomplete", help="Go on without what is missing or broken.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Check a download against what is known of it, and write a manifest with the split of the protocol.

    Images stay where they are; masks that cannot be read in place are converted.
    """
    from medtpp.config import RECIPES
    from medtpp.data.recipes.preparation import prepare as prepare_data

    recipe = RECIPES.get(name)
    folder = out or Path("data") / name
    with decoding() as progress:
        done = prepare_data(
            name, source, folder, allow_incomplete=allow_incomplete, overwrite=overwrite, progress=progress
        )
    for note in done.notes:
        console.print(f"note: {note}", markup=False, soft_wrap=True)
    parts = ", ".join(f"{split} {count}" for split, count in done.counts.items() if count)
    check = f"medtpp check {done.manifest} --modality {recipe.modality} --set task={recipe.kind}"
    show_paths(split=parts, manifest=done.manifest, card=folder / "README.md", check=check)
