"""The application: all verbs, and what they share. Heavy imports wait until a verb runs."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from medtpp.cli import (
    bench,
    check,
    compare,
    data,
    doctor,
    evaluate,
    export,
    finetune,
    init,
    listing,
    phantom,
    predict,
    pretrain,
    report,
    run,
    tpp,
)


class Verbs(TyperGroup):
    """The verbs; Ctrl+C ends any of them with what to do next."""

    def invoke(self, ctx: Any) -> Any:
        """Run a verb."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo(
                "\nStopped. Training goes on from its last checkpoint with the same command and --resume.", err=True
            )
            raise typer.Exit(130) from None


app = typer.Typer(
    name="medtpp",
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Target Parameter Pre-training for parameter-efficient fine-tuning on medical images. "
    "--debug with any command shows the traceback of an error.",
)
app.command("check")(check.check)
app.command("init")(init.init)
app.command("run")(run.run)
app.command("compare")(compare.compare)
app.command("tpp")(tpp.tpp)
app.command("finetune")(finetune.finetune)
app.command("evaluate")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("export")(export.export)
app.command("report")(report.report)
app.command("pretrain")(pretrain.pretrain)
app.command("bench")(bench.bench)
app.command("list")(listing.list_)
app.command("phantom")(phantom.phantom)
app.add_typer(data.app, name="data")
app.command("doctor")(doctor.doctor)
