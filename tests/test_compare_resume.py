"""A comparison that is gone on with is the one that was begun: no cell is mixed with others of other options."""

import tempfile

import pytest

from medtpp.data.phantom import write_folder
from medtpp.errors import ConfigError
from medtpp.files import read_json, write_json
from medtpp.workflow.compare import Axes, open_comparison
from medtpp.workflow.experiment import load_experiment, write_experiment
from runs import experiment

AUTO = ("finetune.steps=auto", "finetune.batch_size=auto", "data.modality=xray", "hardware.threads=1")
AXES = Axes(labels=(10, "all"), seeds=1)
SHARED = ("experiment.yaml", "inputs.json", "axes.json", "split.csv")


def files(out):
    return {name: (out / name).read_bytes() for name in SHARED}


def refused(out, *changes, axes=AXES, source=None):
    """What is said when the comparison is gone on with so; nothing is changed."""
    before = files(out)
    with pytest.raises(ConfigError) as caught:
        open_comparison(source or experiment(*AUTO, *changes), axes, out, resume=True)
    assert files(out) == before
    return str(caught.value)


def as_older_versions_left_it(out, comparison):
    """The first arm's resolved experiment, and no other, and a cell that is done."""
    write_experiment(out / "experiment.yaml", comparison.prepared.experiment)
    inputs = read_json(out / "inputs.json")
    del inputs["experiment"]
    write_json(out / "inputs.json", inputs)
    cell = next(cell for cell in comparison.cells if cell.labels == 10)
    told = {"steps": comparison.budget.finetune[10], "batch_size": comparison.budget.batch[10]}
    write_json(cell.folder(out) / "finetune" / "complete.json", told)


@pytest.mark.parametrize("changes", [(), ("data.labels=20",), ("tpp.steps=auto", "tpp.batch_size=auto")])
def test_the_experiment_file_of_a_comparison_begins_the_same_comparison(tmp_path, changes):
    """Budgets of each label count, too, which the values at all labels would replace."""
    out, again = tmp_path / "out", tmp_path / "again"
    begun = open_comparison(experiment(*AUTO, *changes), AXES, out)
    assert begun.budget.batch[10] != begun.budget.batch["all"]
    before = files(out)
    gone_on = open_comparison(load_experiment(out / "experiment.yaml"), AXES, out, resume=True)
    assert gone_on.budget == begun.budget
    assert files(out) == before
    open_comparison(load_experiment(out / "experiment.yaml"), AXES, again)
    assert files(again) == before
    text = before["experiment.yaml"].decode()
    assert "name: mae #" in text
    assert "image_size: 32 #" in text


def test_other_budgets_and_options_are_refused(tmp_path):
    open_comparison(experiment(*AUTO), AXES, tmp_path)
    assert "finetune.steps: auto there, 255 now" in refused(tmp_path, "finetune.steps=255")
    assert "finetune.learning_rate: auto there, 0.01 now" in refused(tmp_path, "finetune.learning_rate=0.01")
    said = refused(tmp_path, "pretext.mask_ratio=0.5", "tuner.rank=2")
    assert "pretext.mask_ratio: 0.75 there, 0.5 now" in said
    assert "tuner.rank: 8 there, 2 now" in said


def test_options_of_a_tuner_that_is_not_the_first_arm_count(tmp_path):
    axes = Axes(tuners=("bitfit", "lora"), labels=(10,), seeds=1)
    open_comparison(experiment(*AUTO), axes, tmp_path)
    assert "tuner.rank: 8 there, 2 now" in refused(tmp_path, "tuner.rank=2", axes=axes)
    assert "finetune.learning_rate" in refused(tmp_path, "finetune.learning_rate=0.01", axes=axes)
    assert "tpp.weight_decay" in refused(tmp_path, "tpp.weight_decay=0.1", axes=axes)


def test_what_may_change_may_change(tmp_path):
    """The machine, logs, and what the axes say."""
    open_comparison(experiment(*AUTO), AXES, tmp_path)
    axes = Axes(labels=(20,), seeds=2, tuners=("lora", "ssf"))
    more = ("hardware.threads=2", "logging.mlflow=true", "data.labels=30")
    grown = open_comparison(experiment(*AUTO, *more), axes, tmp_path, resume=True)
    assert grown.labels == (10, "all", 20)
    assert len(grown.cells) == 2 * 3 * 4


def test_a_comparison_that_was_begun_without_tpp_grows_by_it(tmp_path):
    """What TPP does and sees is settled when its first arm comes, and held to from then on."""
    write_folder(tmp_path / "pool", n=12, size=32, seed=3)
    out, unlabelled = tmp_path / "out", f"data.unlabelled=[{tmp_path / 'pool' / 'images'}]"
    alone = Axes(labels=(10,), seeds=1, inits=("standard",))
    begun = open_comparison(experiment(*AUTO), alone, out)
    assert not begun.prepared.experiment.tpp.enabled
    assert "finetune.learning_rate" in refused(out, "finetune.learning_rate=0.01", unlabelled)
    grown = open_comparison(experiment(*AUTO, unlabelled), AXES, out, resume=True)
    assert grown.budget.finetune[10] == begun.budget.finetune[10]
    assert {cell.arm.init for cell in grown.cells} == {"standard", "tpp"}
    assert len(grown.prepared.tpp) > len(grown.prepared.cases("train"))
    assert "images of TPP" in refused(out)
    assert "tpp.steps" in refused(out, unlabelled, "tpp.steps=3")
    assert "pretext.mask_ratio" in refused(out, unlabelled, "pretext.mask_ratio=0.5")


def test_folders_of_older_versions_are_gone_on_with(tmp_path):
    begun = open_comparison(experiment(*AUTO), AXES, tmp_path)
    as_older_versions_left_it(tmp_path, begun)
    said = refused(tmp_path, source=load_experiment(tmp_path / "experiment.yaml"))
    assert f"finetune.batch_size with 10 labels: {begun.budget.batch[10]} there" in said
    assert "tuner.rank" in refused(tmp_path, "tuner.rank=2")
    assert open_comparison(experiment(*AUTO), AXES, tmp_path, resume=True).budget == begun.budget
    assert "finetune.steps: auto there, 255 now" in refused(tmp_path, "finetune.steps=255")


@pytest.mark.parametrize("written", range(4))
def test_a_comparison_that_was_killed_as_it_began_is_gone_on_with(tmp_path, monkeypatch, written):
    whole = tmp_path / "whole"
    open_comparison(experiment(*AUTO), AXES, whole)
    out, make, count = tmp_path / "out", tempfile.mkstemp, iter(range(9))

    def killed(*arguments, dir, **options):
        if dir == out and next(count) == written:
            raise KeyboardInterrupt
        return make(*arguments, dir=dir, **options)

    with monkeypatch.context() as patched:
        patched.setattr("medtpp.files.tempfile.mkstemp", killed)
        with pytest.raises(KeyboardInterrupt):
            open_comparison(experiment(*AUTO), AXES, out)
    assert len(list(out.iterdir())) == written
    if written:
        with pytest.raises(ConfigError, match=r"tuner\.rank"):
            open_comparison(experiment(*AUTO, "tuner.rank=2"), AXES, out, resume=True)
    open_comparison(experiment(*AUTO), AXES, out, resume=True)
    assert files(out) == files(whole)


def test_a_folder_that_older_versions_began_and_did_not_end_is_gone_on_with(tmp_path):
    begun = open_comparison(experiment(*AUTO), AXES, tmp_path)
    as_older_versions_left_it(tmp_path, begun)
    (tmp_path / "inputs.json").rename(tmp_path / "kept.json")
    with pytest.raises(ConfigError, match="made otherwise"):
        open_comparison(experiment(*AUTO), AXES, tmp_path, resume=True)
    (tmp_path / "cells").rename(tmp_path / "none")
    open_comparison(experiment(*AUTO), AXES, tmp_path, resume=True)
