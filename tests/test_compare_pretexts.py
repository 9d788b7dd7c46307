"""Several pretext tasks in one comparison."""

import csv
import re
import shutil
from dataclasses import asdict
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from medtpp.errors import ConfigError
from medtpp.evaluation.bootstrap import Estimate
from medtpp.evaluation.paired import Difference
from medtpp.files import read_json, write_json
from medtpp.report import write_report
from medtpp.workflow.compare import Axes, Comparison, open_comparison
from medtpp.workflow.compare.comparison import Budget, Machine
from medtpp.workflow.compare.plan import Arm, Cell, base_experiment, cell_experiment
from medtpp.workflow.compare.words import Measure, sentence
from medtpp.workflow.compare.work import Timing
from runs import data_folder, done, experiment, refused, settings

_HOLD = TemporaryDirectory(prefix="medtpp-pretexts-")
_ROOT = Path(_HOLD.name)
STEPS = ("tpp.steps=2", "tpp.head_warmup=0", "finetune.steps=2", "data.modality=xray", "hardware.threads=1")


def command(*more):
    return ["compare", data_folder(), "--labels", "12", "--seeds", "1", *settings(*STEPS), *more]


@cache
def compared():
    """A comparison by the experiment's own pretext task, gone on with by another one."""
    folder = _ROOT / "compared"
    done(*command("--out", folder))
    axes = read_json(folder / "axes.json")
    del axes["pretexts"]  # as it was before there was this axis
    write_json(folder / "axes.json", axes)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/**/complete.json")}
    return folder, before, done(*command("--out", folder, "--resume", "--pretext", "simmim"))


def test_pretext_tasks_share_the_cells_without_tpp():
    folder, before, said = compared()
    assert len(before) == 5  # of a pretext stage, two cells and their fine-tuning
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert "1 cells and 1 runs of TPP" in said.text
    for stage in ("TPP of lora", "TPP of lora by simmim"):
        assert re.search(rf"^ *{stage} +1 +2 ", said.out, re.MULTILINE)  # one cell, two steps
    with (folder / "cells.csv").open() as stream:
        rows = [(row["arm"], row["pretext"], row["status"], row["folder"]) for row in csv.DictReader(stream)]
    assert rows == [
        ("lora standard", "", "done", "cells/lora-standard/12/seed0"),
        ("lora tpp", "mae", "done", "cells/lora-tpp/12/seed0"),
        ("lora tpp simmim", "simmim", "done", "cells/lora-tpp-simmim/12/seed0"),
    ]
    cards = [
        read_json(folder / "tpp" / name / "seed0/adapter/medtpp.json")["tpp"] for name in ("lora", "lora-tpp-simmim")
    ]
    assert [card["pretext"]["name"] for card in cards] == ["mae", "simmim"]
    assert cards[0]["fingerprints"] == cards[1]["fingerprints"]
    first, second = (read_json(folder / f"cells/{row[3][6:]}/finetune/inputs.json")["inputs"] for row in rows[1:])
    assert {name for name in first if first[name] != second[name]} == {"start", "start card"}


def test_each_is_told_against_the_same_standard():
    folder, _, said = compared()
    file = read_json(folder / "comparison.json")
    assert [(one["arm"], one["baseline"]) for one in file["differences"]] == [
        ("lora tpp", "lora standard"),
        ("lora tpp simmim", "lora standard"),
    ]
    assert [one["pretext"] for one in file["arms"]] == ["", "", "simmim"]
    assert "TPP by simmim" in said.text
    assert "TPP by mae" in file["arms"][1]["description"]
    assert {(one["tuner"], one["pretext"]) for one in file["tpp"]} == {("lora", ""), ("lora", "simmim")}
    assert {one["pretext"]: one["views"] for one in file["tpp"]} == {"": ["masked", "restored"], "simmim": []}
    page = (folder / "report.html").read_text()
    for part in ("lora tpp simmim", "lora simmim, 12 labels", "<strong>lora.</strong>"):
        assert part in page


def test_a_report_of_an_older_comparison_needs_no_pretext(tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(compared()[0], folder)
    file = read_json(folder / "comparison.json")
    for one in (*file["arms"], *file["tpp"]):
        del one["pretext"]
    write_json(folder / "comparison.json", file)
    write_report(folder)


def test_the_experiments_own_task_is_no_further_arm():
    written = experiment("pretext=mae", "pretext.mask_ratio=0.5")
    axes = Axes(inits=("standard", "tpp", "random_direction"), pretexts=("simmim", "mae"))
    assert [arm.name for arm in axes.arms(written)] == [
        "lora standard",
        "lora tpp simmim",
        "lora tpp",
        "lora random_direction simmim",
        "lora random_direction",
    ]
    base = base_experiment(written, axes)
    own, other = (cell_experiment(base, Cell(arm, 12, 0)) for arm in (Arm("lora", "tpp"), Arm("lora", "tpp", "simmim")))
    assert (own.pretext.name, own.pretext.mask_ratio) == ("mae", 0.5)
    assert other.pretext == type(other.pretext)()
    moved = Cell(Arm("lora", "random_direction", "simmim"), 12, 0).starts
    assert [start.folder(Path()).as_posix() for start in moved] == [
        "tpp/lora-tpp-simmim/seed0",
        "tpp/lora-random_direction-simmim/seed0",
    ]
    assert [start.title for start in moved] == ["TPP of lora by simmim", "random direction of lora by simmim"]


def test_axes_keep_the_tasks_they_had():
    written = experiment("pretext=mae")
    before = Axes().resolved(written)
    assert before.pretexts == ("mae",)
    assert Axes(pretexts=("simmim",)).resolved(written).joined(before).pretexts == ("mae", "simmim")
    assert Axes.load(asdict(before)) == before
    assert Axes(inits=("standard",)).resolved(written).pretexts == ()
    with pytest.raises(ConfigError, match="no pretext 'mea'; there are auto, byol"):
        Axes(pretexts=("mea",))
    with pytest.raises(ConfigError, match="--pretext is for the init tpp"):
        Axes(inits=("standard",), pretexts=("mae",))


@pytest.mark.parametrize("named", [("simmim",), ("mae", "simmim"), ("auto", "simmim"), ()])
def test_a_task_that_the_backbone_decides_keeps_its_options(named):
    written = experiment(*STEPS, "pretext.mask_ratio=0.5")
    opened = open_comparison(written, Axes(labels=(12,), seeds=1, pretexts=named), None, dry_run=True)
    own = {"", "simmim"} if len(named) == 2 else set(named) or {""}
    assert {arm.pretext for arm in opened.arms if arm.init == "tpp"} == own
    assert (opened.base.pretext.name, opened.base.pretext.mask_ratio) == ("mae", 0.5)


def test_a_head_that_is_new_is_warmed_up_whatever_the_others_need():
    """The backbone brings a head of MAE, and none of SimMIM."""
    written = experiment(*(one for one in STEPS if "warmup" not in one), "tpp.steps=30")
    opened = open_comparison(written, Axes(labels=(12,), seeds=1, pretexts=("mae", "simmim")), None, dry_run=True)
    assert opened.budget.tpp == {"": 30, "simmim": 230}


def test_costs_are_those_of_the_task():
    first = Timing(tpp_step=0.2, finetune_step=0.5, tpp_rest=2.0, cell_rest=1.0, memory_mib=100)
    second = Timing(tpp_step=0.4, finetune_step=9, tpp_rest=1.0, cell_rest=9, memory_mib=100)
    axes = Axes(extras=("longer",), labels=("all",), seeds=1, pretexts=("mae", "simmim"))
    budget = Budget(tpp={"": 40, "simmim": 50}, finetune={"all": 30}, batch={"all": 16})
    timings = {"lora 16": first, "lora simmim 16": second}
    one = Comparison(axes, base_experiment(experiment("pretext=mae"), axes), None, budget, Machine(1, 1), timings)
    assert (one.tpp_seconds("lora"), one.tpp_seconds("lora", "simmim")) == (pytest.approx(10), pytest.approx(21))
    cells = {cell.arm.name: cell for cell in one.axes.cells(one.base)}
    assert one.seconds(cells["lora tpp simmim"]) == one.seconds(cells["lora tpp"]) == 16
    assert one.steps(cells["lora longer"]) == 30 + 20


def test_tasks_that_do_not_fit_are_refused_together():
    resnet = ("backbone.name=resnet18", "backbone.weights=random", "pretext=simclr")
    said = refused(
        *command(*(part for one in resnet for part in ("--set", one))), "--dry-run", "--pretext", "mae,features"
    )
    assert "The pretext task mae does not fit" in said
    assert "The pretext task features does not fit" in said
    said = refused(*command("--tuner", "lora,ladder,linear"), "--dry-run", "--pretext", "simmim,features")
    assert "linear has no target parameters" in said


def test_sentences_name_the_task():
    estimate = Estimate(0.02, 0.01, 0.03, 0.0)
    gap = Difference(estimate, estimate, 0.01, dict.fromkeys(range(6), 0.02))
    measure = Measure("auc", "AUC", "", 0.005)
    arm = Arm("lora", "tpp", "simmim")
    for verdict, start in {
        "helps": "lora, 5 labels: TPP by simmim helps: AUC is 2.0 points higher than with no TPP",
        "equivalent": "lora, 5 labels: TPP by simmim and no TPP are equivalent",
        "too few seeds": "lora, 5 labels: 6 seeds are too few to tell TPP by simmim from no TPP",
        "no difference seen": "lora, 5 labels: no difference seen between TPP by simmim and no TPP",
        "undefined": "lora, 5 labels: the difference between TPP by simmim and no TPP is undefined",
    }.items():
        assert sentence(arm, Arm("lora", "standard"), "5", gap, verdict, measure).startswith(start)
