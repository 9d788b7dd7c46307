"""Studies: comparisons over data sets, backbones, folds and sites."""

import csv
import re
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from medtpp.data.phantom import write_folder
from medtpp.errors import ConfigError
from medtpp.files import read_json
from medtpp.report.schema import StudyFile
from medtpp.workflow.compare import Axes
from medtpp.workflow.compare import run as compare_run
from medtpp.workflow.study import keep_study, open_study, study_of
from medtpp.workflow.study.file import folder_name, is_study, read_study
from runs import (
    SIZE,
    backbone_folder,
    cli,
    data_folder,
    experiment,
    other_weights,
    refused,
    same_files,
    settings,
    split_of,
)

_HOLD = TemporaryDirectory(prefix="medtpp-studies-")
_ROOT = Path(_HOLD.name)
STEPS = ("tpp.steps=2", "tpp.head_warmup=0", "finetune.steps=2", "data.modality=xray", "hardware.threads=1")
CELL_FILES = (
    "finetune/adapter/adapter_model.safetensors",
    "finetune/adapter/head.safetensors",
    "evaluation/predictions.csv",
)


def write_study(folder, text, **sets):
    """A study's file, and beside it those of experiments by name: where their data are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in sets.items():
        (folder / f"{name}.yaml").write_text(f"data:\n  path: {path}\n")
    (folder / "study.yaml").write_text(text)
    return folder / "study.yaml"


@cache
def sited_folder():
    """Radiographs of two hospitals, some of neither."""
    folder = _ROOT / "sited"
    write_folder(folder, 48, SIZE, 3)
    header, *rows = (folder / "manifest.csv").read_text().splitlines()
    sites = ("north", "south/east", "north", "")
    lines = [f"{row},{sites[number // 4 % 4]}" for number, row in enumerate(rows)]
    (folder / "manifest.csv").write_text("\n".join([f"{header},site", *lines]) + "\n")
    return folder


@cache
def study_file():
    text = """
        experiments:
          first: first.yaml
          second: {file: second.yaml, labels: [14]}
          third: third.yaml
        folds: 2
        labels: 12
        seeds: 1
    """
    text = "\n".join(line[8:] for line in text.splitlines())
    return write_study(_ROOT / "file", text, first=data_folder(), second=sited_folder(), third=_ROOT / "nowhere")


def command():
    return ["compare", study_file(), *settings(*STEPS)]


@cache
def studied():
    """A whole study of two data sets, two folds each; a third one is not there."""
    folder = _ROOT / "study"
    return folder, cli(*command(), "--out", folder)


def rows_of(folder):
    with (folder / "cells.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_every_comparison_of_a_study_is_done_and_told():
    folder, said = studied()
    assert said.status == 1
    assert f"{_ROOT / 'nowhere'} is missing" in said.text
    parts = {(name, fold): folder / name / f"fold{fold}" for name in ("first", "second") for fold in "12"}
    for part in parts.values():
        assert (part / "report.html").is_file()
        assert len(rows_of(part)) == 2
    rows = rows_of(folder)
    assert {row["status"] for row in rows} == {"done"}
    assert {(row["dataset"], row["fold"], row["init"], row["pretext"], row["labels"]) for row in rows} == {
        (name, fold, init, pretext, "12" if name == "first" else "14")
        for name, fold in parts
        for init, pretext in (("standard", ""), ("tpp", "mae"))
    }
    for row in rows:
        assert (folder / row["folder"] / "complete.json").is_file()
        assert (row["n_labels"], row["site"]) == (row["labels"], "")
        assert row["backbone"] == str(backbone_folder())
        assert float(row["auc"]) >= 0
        assert float(row["seconds"]) > 0
    file = StudyFile.model_validate(read_json(folder / "study.json"))
    assert file.levels == ["dataset", "fold"]
    assert [(one.dataset, one.fold, one.folder) for one in file.parts][:2] == [
        ("first", "1", "first/fold1"),
        ("first", "2", "first/fold2"),
    ]
    assert {one.part for one in file.failed} == {"third, fold 1", "third, fold 2"}
    assert max(map(len, said.out.splitlines()[:8])) <= 80


def test_folds_are_disjoint_and_tpp_is_run_in_each():
    folder, _ = studied()
    first, second = (folder / "first" / f"fold{fold}" for fold in "12")
    assert split_of(first)["test"].isdisjoint(split_of(second)["test"])
    assert split_of(first)["test"] | split_of(second)["test"] == set().union(*split_of(first).values())
    seen = [read_json(part / "tpp/lora/seed0/adapter/medtpp.json")["tpp"]["fingerprints"] for part in (first, second)]
    assert seen[0] != seen[1]
    assert [read_json(part / "inputs.json")["test cases are"] for part in (first, second)] == [
        "fold 1 of 2",
        "fold 2 of 2",
    ]


def test_a_study_is_gone_on_with(tmp_path):
    folder, _ = studied()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    gone, kept = "second/fold2/cells/lora-tpp/14/seed0", "first/fold1/cells/lora-tpp/12/seed0/complete.json"
    shutil.rmtree(copy / gone)
    before = (copy / kept).stat().st_mtime_ns
    assert "not empty" in refused(*command(), "--out", copy)
    result = cli(*command(), "--out", copy, "--resume")
    assert "1 cells and 0 runs of TPP" in result.text
    assert "4 cells and 2 runs without their data" in result.text
    assert (copy / kept).stat().st_mtime_ns == before
    same_files(folder / gone, copy / gone, CELL_FILES)
    assert len(rows_of(copy)) == 8


def test_what_would_not_be_the_same_study_is_refused():
    folder, _ = studied()
    again = (*command(), "--out", folder, "--resume")
    assert "fold 3" not in (text := refused(*again, "--folds", "3"))
    assert "first, fold 1" in text
    assert "test cases are" in text
    assert "would be by dataset: results there" in refused(*again[:1], write_study(
        _ROOT / "unfolded", study_file().read_text().replace("folds: 2", ""),
        first=data_folder(), second=sited_folder(), third=_ROOT / "nowhere",
    ), *again[2:])  # fmt: skip
    fewer = study_file().read_text().replace("  first: first.yaml\n", "")
    fewer = write_study(_ROOT / "fewer", fewer, second=sited_folder(), third=_ROOT / "nowhere")
    assert "has first, fold 1, which this study leaves out" in refused(again[0], fewer, *again[2:])


def test_results_are_replaced_when_all_is_known_to_be_well(tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(studied()[0], copy)
    again = (*command(), "--out", copy, "--overwrite")
    assert "no metric dice" in refused(*again, "--metric", "dice")
    assert len(list(copy.glob("*/fold*/cells/*/*/seed0/complete.json"))) == 8
    study = read_study(study_file(), settings(*STEPS)[1::2], {})
    opened = open_study(study, copy, overwrite=True)
    assert sum(one.counts(opened.folder(one))[0] for one in opened.parts if one.comparison) == 0
    keep_study(opened, copy, overwrite=True)
    assert not list(copy.glob("*/fold*/cells"))
    assert len(list(copy.glob("*/fold*/split.csv"))) == 4


def test_a_comparison_and_a_study_do_not_share_a_folder(tmp_path):
    folder, _ = studied()
    assert "holds a study" in refused("compare", data_folder(), *settings(*STEPS), "--out", folder, "--resume")
    again = ("compare", data_folder(), *settings(*STEPS), "--folds", "2", "--resume", "--out")
    assert "holds a single comparison" in refused(*again, folder / "first" / "fold1")


def test_a_mistake_leaves_nothing_behind(tmp_path):
    command = ["compare", data_folder(), *settings(*STEPS), "--folds", "2", "--metric", "dice", "--out", tmp_path / "x"]
    assert "no metric dice of a classification" in refused(*command)
    assert not list((tmp_path / "x").iterdir())


def test_all_mistakes_of_a_study_are_told_together(tmp_path):
    text = """
experiments:
  a: a.yaml
  b: {fil: b.yaml}
  c: c.yaml
  d: {file: a.yaml, set: [data.imagesize=3], labels: few}
backbone: x
folds: 1
init: standard, longer
tuner: lorra
margin: -1
"""
    said = refused("compare", write_study(tmp_path, text, a=data_folder()), "--dry-run")
    for part in (
        "study.yaml",
        "line 4, experiments.b.file: is missing",
        "line 4, experiments.b.fil: there is no such field; did you mean file?",
        "line 6, experiments.d.labels.0: should be a whole number or 'all', not 'few'",
        "line 7, backbone: there is no such field; did you mean backbones?",
        "line 8, folds: should be greater than or equal to 2",
        "line 9, init.1: there is no init 'longer'",
        "line 10, tuner.0: there is no tuner 'lorra'",
        "line 11, margin",
        "c.yaml: There is no experiment file",
        "a.yaml: data.imagesize: there is no such field",
    ):
        assert part in said
    text = "experiments: {a: a.yaml, A: a.yaml}\nfolds: 2\nsites: true\nbackbones: [nobody, nobody]\ntuner: [linear]\n"
    said = refused("compare", write_study(tmp_path, text), "--dry-run")
    for part in ("exclude each other", "the folder a", "no backbone is called 'nobody'", "named twice", "a: The tuner"):
        assert part in said
    assert "are of one data set" in refused("compare", tmp_path / "study.yaml", "--dry-run", "--modality", "xray")


def test_the_page_shows_a_study(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "compare.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    study = read_study(write_study(tmp_path, text, chest="a", glands="b"), (), {})
    assert [(member.name, member.axes.labels) for member in study.members] == [
        ("chest", (20, 100)),
        ("glands", (10, 40)),
    ]
    assert study.levels == ("dataset", "backbone", "fold")


def test_the_command_line_wins(tmp_path):
    text = "experiments: {a: a.yaml, b: {file: a.yaml, labels: [16, all]}}\nfolds: 3\nseeds: 2\npretext: simmim, mae\n"
    source = write_study(tmp_path, text, a=data_folder())
    assert is_study(source)
    assert not is_study(tmp_path / "a.yaml")
    written = read_study(source, (), {})
    assert [member.axes for member in written.members] == [
        Axes(seeds=2, pretexts=("simmim", "mae")),
        Axes(seeds=2, pretexts=("simmim", "mae"), labels=(16, "all")),
    ]
    said = read_study(source, ["data.image_size=32"], {"labels": (20,), "sites": True, "seeds": None})
    assert {member.axes.labels for member in said.members} == {(20,)}
    assert {member.axes.seeds for member in said.members} == {2}
    assert {member.experiment.data.image_size for member in said.members} == {32}
    assert (said.folds, said.sites, written.folds, written.sites) == (0, True, 3, False)


@pytest.mark.parametrize(
    ("axes", "folders"),
    [
        ({"folds": 2}, ["fold1", "fold2"]),
        ({"folds": 2, "backbones": 1}, ["fold1", "fold2"]),
        ({"backbones": 2}, ["backbone", "other"]),
        ({"sites": True}, ["north", "south-east"]),
    ],
)
def test_folders_have_as_many_levels_as_needed(tmp_path, axes, folders):
    chosen = {"backbones": 0, "folds": 0, "sites": False, **axes}
    chosen["backbones"] = [str(backbone_folder()), str(tmp_path / "other")][: chosen["backbones"]]
    other_weights(tmp_path / "other")
    study = study_of(experiment(*STEPS, data=sited_folder()), Axes(labels=(12,), seeds=1), **chosen)
    opened = open_study(study, tmp_path / "out", dry_run=True)
    assert [one.part.folder.relative_to(tmp_path / "out").as_posix() for one in opened.parts] == folders
    assert {one.part.dataset for one in opened.parts} == {"sited"}
    assert not (tmp_path / "out").exists()
    assert all(one.comparison is not None for one in opened.parts)
    assert {one.part.backbone for one in opened.parts} == set(("backbone", "other")[: axes.get("backbones", 0)] or [""])


def test_each_site_is_left_out_once(tmp_path):
    folder = tmp_path / "sited"
    shutil.copytree(sited_folder(), folder)
    header, *rows = (folder / "manifest.csv").read_text().splitlines()
    label = header.split(",").index("label")
    some = [row.split(",") for row in rows[::5]]  # without labels: of all sites, and of none
    unlabelled = [",".join([*row[:label], "", *row[label + 1 :]]) for row in some]
    kept = [row for number, row in enumerate(rows) if number % 5]
    (folder / "manifest.csv").write_text("\n".join([header, *kept, *unlabelled]) + "\n")
    study = study_of(
        experiment(*STEPS, data=folder), Axes(labels=(12,), seeds=1),
        backbones=(), folds=0, sites=True,
    )  # fmt: skip
    opened = open_study(study, None, dry_run=True)
    for one in opened.parts:
        prepared = one.comparison.prepared
        assert {case.site for case in prepared.cases("test")} == {one.part.site}
        test = {case.patient for case in prepared.cases("test")}
        assert test.isdisjoint({case.patient for case in prepared.tpp})
        assert one.part.site not in {case.site for case in prepared.tpp}
        assert None in {case.site for case in prepared.tpp}
        its = {case.id for case in prepared.dataset.cases if case.site == one.part.site and not case.labelled}
        assert its
        assert its <= set(prepared.excluded)
        assert len({case.site for case in prepared.tpp if not case.labelled}) == 2  # none, and the other
    without = study_of(experiment(*STEPS), Axes(), backbones=(), folds=0, sites=True)
    with pytest.raises(ConfigError, match="column 'site' of the manifest"):
        open_study(without, None, dry_run=True)


def test_a_cluster_has_one_folder_for_a_study(monkeypatch, tmp_path):
    study = read_study(study_file(), settings(*STEPS)[1::2], {})
    opened = open_study(study, tmp_path / "parts", dry_run=True)
    told = []
    monkeypatch.setattr(compare_run, "_run", lambda *given: told.append(given[-1]) or [])
    assert len(opened.comparisons) > 1
    assert list(compare_run.run_together(opened.comparisons, opened.machine, tmp_path)) == []
    assert told == [tmp_path / "cluster"]


def test_what_cannot_be_used_does_not_stop_the_rest(tmp_path):
    text = "experiments: {good: good.yaml, bad: bad.yaml}\nlabels: 12\nseeds: 1\n"
    (tmp_path / "empty").mkdir()
    source = write_study(tmp_path, text, good=data_folder(), bad=tmp_path / "empty")
    opened = open_study(read_study(source, settings(*STEPS)[1::2], {}), None, dry_run=True)
    good, bad = opened.parts
    assert good.comparison is not None
    assert bad.comparison is None
    assert "empty" in bad.failed
    assert good.counts(None) == bad.counts(None) == (2, 1)
    assert list(opened.comparisons) == ["good: "]


def test_another_backbone_has_its_own_options():
    written = experiment("backbone.weights=random", "backbone.patch_size=8")
    chosen = {"backbones": (written.backbone.name, "test_vit"), "folds": 0, "sites": False}
    study = study_of(written, Axes(), **chosen)
    own, other = (member.experiment.backbone for member, _ in study.variants)
    assert own == written.backbone
    assert (other.name, other.weights, other.patch_size) == ("test_vit", "pretrained", None)


def test_names_of_folders(tmp_path):
    for name in ("one", "two"):
        other_weights(tmp_path / name / "net")
    chosen = {"backbones": [str(tmp_path / name / "net") for name in ("one", "two")], "folds": 0, "sites": False}
    with pytest.raises(ConfigError, match="several backbones would have the folder net"):
        study_of(experiment(), Axes(), **chosen)
    assert folder_name("hf-hub:org/vit") == "hf-hub-org-vit"
    assert folder_name("../x") == "x"
    assert folder_name("..") == "unnamed"
