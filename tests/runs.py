"""Tiny runs through the command line, made once and shared by the tests of the outer layers."""

import io
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from safetensors.torch import load_file, save_file

from medtpp.backbones import hash_state
from medtpp.cli import main
from medtpp.data.phantom import write_folder
from medtpp.files import read_json, write_json
from medtpp.workflow.experiment import load_experiment

SIZE, CASES = 32, 48
_HOLD = TemporaryDirectory(prefix="medtpp-runs-")  # goes away with the process
_ROOT = Path(_HOLD.name)
SETTINGS = (
    "tuner.roles=[attention.qkv]",
    "tpp.steps=4",
    "tpp.batch_size=16",
    "finetune.steps=4",
    "finetune.batch_size=16",
    "hardware.precision=32",
    "logging.tensorboard=false",
)


@dataclass(frozen=True)
class Result:
    """How a command ended and what it said; what it said on one line, for looking up words that may be wrapped."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return " ".join((self.out + " " + self.err).split())


def cli(*arguments: object) -> Result:
    """`medtpp ARGUMENTS` in this process. What is no mistake of the user is raised."""
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with patch.object(sys, "argv", ["medtpp", *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            status = end.code or 0
    return Result(status, out.getvalue(), err.getvalue())


def done(*arguments: object) -> Result:
    """The same, for a command that should end well."""
    result = cli(*arguments)
    assert result.status == 0, result.text
    return result


def refused(*arguments: object) -> str:
    """What a command says that should end with a user's mistake."""
    result = cli(*arguments)
    assert result.status == 2, result.text
    assert "Traceback" not in result.text
    return result.text


def settings(*more: str, backbone: Path | None = None) -> list[str]:
    """--set for each of the tiny settings and some more, with the tiny backbone."""
    name = f"backbone.name={backbone or backbone_folder()}"
    return [part for setting in (name, *SETTINGS, *more) for part in ("--set", setting)]


@cache
def data_folder() -> Path:
    """Radiographs with a manifest that names patients."""
    folder = _ROOT / "data"
    write_folder(folder, CASES, SIZE, 0)
    return folder


@cache
def pool_folder() -> Path:
    """Radiographs of other patients."""
    folder = _ROOT / "pool"
    write_folder(folder, 24, SIZE, 1)
    return folder


@cache
def other_folder() -> Path:
    """Class folders with radiographs of nobody known."""
    folder = _ROOT / "other"
    write_folder(folder, 40, SIZE, 2, layout="folders")
    return folder


@cache
def backbone_folder() -> Path:
    """A backbone by `medtpp pretrain`, which never saw the data."""
    folder = _ROOT / "backbone"
    options = ("architecture=test_vit", "steps=4", "batch_size=8", "hardware.precision=32", "logging.tensorboard=false")
    sets = [part for option in options for part in ("--set", option)]
    done("pretrain", pool_folder() / "images", "--out", folder, "--image-size", SIZE, *sets)
    return folder


@cache
def finished() -> tuple[Path, Result]:
    """A whole run's folder, and what it said."""
    folder = _ROOT / "run"
    return folder, done("run", data_folder(), "--out", folder, "--modality", "xray", *settings())


def compare_command() -> list[str]:
    """A comparison of two arms, two label counts and two seeds, each process with one thread."""
    axes = ["--labels", "12,all", "--seeds", "2"]
    return ["compare", str(data_folder()), "--modality", "xray", *axes, *settings("hardware.threads=2")]


@cache
def compared() -> tuple[Path, Result]:
    """A whole comparison's folder, not to be changed, and what it said."""
    folder = _ROOT / "comparison"
    return folder, done(*compare_command(), "--out", folder)


def run_folder() -> Path:
    """The folder of a whole run, not to be changed."""
    return finished()[0]


def adapter_folder() -> Path:
    """The fine-tuned adapter of that run."""
    return run_folder() / "finetune" / "adapter"


def other_weights(folder: Path) -> Path:
    """A copy of the backbone, whole and with other weights."""
    shutil.copytree(backbone_folder(), folder, dirs_exist_ok=True)
    state = load_file(folder / "model.safetensors")
    state["norm.bias"] += 1
    save_file(state, folder / "model.safetensors")
    sha256 = hash_state({name: value.float() for name, value in state.items()})
    write_json(folder / "backbone.json", {**read_json(folder / "backbone.json"), "sha256": sha256})
    return folder


def same_files(first: Path, second: Path, names: tuple[str, ...]) -> None:
    """Files of two run folders hold the same bytes."""
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


RESULTS = (
    "split.csv",
    "tpp/adapter/adapter_model.safetensors",
    "finetune/adapter/adapter_model.safetensors",
    "finetune/adapter/head.safetensors",
    "evaluation/predictions.csv",
    "evaluation/evaluation.json",
)


def experiment(*more, data=None, unlabelled=()):
    return load_experiment(data or data_folder(), settings(*more)[1::2], unlabelled)


def split_of(folder):
    """Case ids by split, as a run wrote them."""
    parts = {"train": set(), "val": set(), "test": set()}
    for line in (folder / "split.csv").read_text().splitlines()[1:]:
        case, split, *_ = line.split(",")
        parts[split].add(case)
    return parts


def with_rows(folder, rows):
    """The data set with other rows in its manifest."""
    shutil.copytree(data_folder() / "images", folder / "images")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder


def manifest():
    return (data_folder() / "manifest.csv").read_text().splitlines()
