"""The application: all verbs, and what they share. Heavy imports wait until a verb runs."""

from __future__ import annotations

import typer

from medtpp.cli import check, doctor, evaluate, finetune, init, listing, phantom, predict, pretrain, run, tpp

app = typer.Typer(
    name="medtpp",
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
app.command("tpp")(tpp.tpp)
app.command("finetune")(finetune.finetune)
app.command("evaluate")(evaluate.evaluate)
app.command("predict")(predict.predict)
app.command("pretrain")(pretrain.pretrain)
app.command("list")(listing.list_)
app.command("phantom")(phantom.phantom)
app.command("doctor")(doctor.doctor)
