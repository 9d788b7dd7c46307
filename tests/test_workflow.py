import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import medtpp.workflow.run as workflow
from medtpp import backbones
from medtpp.config import FinetuneOptions
from medtpp.data.split import read_split
from medtpp.errors import ConfigError, OutputError
from medtpp.files import read_json, write_json
from medtpp.training.finetune import resolve_finetune
from medtpp.workflow.experiment import load_experiment
from medtpp.workflow.prepare import prepare
from medtpp.workflow.steps import refuse_folder, step
from runs import (
    RESULTS,
    adapter_folder,
    backbone_folder,
    cli,
    data_folder,
    done,
    experiment,
    manifest,
    other_folder,
    other_weights,
    pool_folder,
    refused,
    run_folder,
    same_files,
    settings,
    split_of,
    with_rows,
)

TPP_OFF = ("tpp.enabled=false", "finetune.steps=2")


# Resuming


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed in the middle of TPP, with its command."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    sets = settings("tpp.steps=60", "tpp.checkpoint_every=2", "tuner.rank=2")
    command = ["run", str(data_folder()), "--modality", "xray", *sets]
    code = "from medtpp.cli import main; main()"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *command, "--out", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 240
        while not (folder / "tpp" / "resume.pt").exists():
            assert process.poll() is None, process.stdout.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "tpp" / "complete.json").exists()
    return folder, command


def test_a_killed_run_ends_in_the_same_bits(killed, tmp_path):
    folder, command = killed
    assert "--resume" in refused(*command, "--out", folder)
    assert "no adapter folder" in refused(
        "predict", folder / "tpp" / "adapter", data_folder() / "images", "-o", "x.csv"
    )
    shutil.copytree(folder, tmp_path / "killed")
    done(*command, "--out", tmp_path / "killed", "--resume")
    done(*command, "--out", tmp_path / "whole")
    same_files(tmp_path / "killed", tmp_path / "whole", RESULTS)
    assert not list((tmp_path / "killed").rglob("resume.pt"))


def test_a_broken_resume_file_is_named(killed, tmp_path):
    folder, command = killed
    shutil.copytree(folder, tmp_path / "run")
    resume = tmp_path / "run" / "tpp" / "resume.pt"
    resume.write_bytes(resume.read_bytes()[:1000])
    said = refused(*command, "--out", tmp_path / "run", "--resume")
    assert "resume.pt cannot be read" in said
    assert "Delete it" in said


def test_a_changed_experiment_is_not_gone_on_with(killed, tmp_path):
    folder, command = killed
    shutil.copytree(folder, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    changes = ["--set", "tpp.steps=61", "--set", "data.labels=20", "--set", "hardware.threads=1"]
    said = refused(*command, *changes, "--out", tmp_path / "run", "--resume")
    assert "tpp.steps: 60 there, 61 now" in said
    assert "data.labels: all there, 20 now" in said
    assert "threads" not in said  # the machine may change
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_changed_labels_are_not_gone_on_with(tmp_path):
    rows = manifest()
    data = with_rows(tmp_path / "data", rows)
    done("finetune", data, "--out", tmp_path / "run", *settings(*TPP_OFF))
    train = next(case for case in sorted(split_of(tmp_path / "run")["train"]))
    row = next(row for row in rows if row.startswith(train))
    other = row.replace("lesion", "normal") if "lesion" in row else row.replace("normal", "lesion")
    (data / "manifest.csv").write_text("\n".join(other if line == row else line for line in rows))
    said = refused("finetune", data, "--out", tmp_path / "run", "--resume", *settings(*TPP_OFF))
    assert "differing: training cases" in said


def test_another_backbone_in_the_same_place_is_not_gone_on_with(tmp_path):
    backbone = shutil.copytree(backbone_folder(), tmp_path / "backbone")
    command = ("finetune", data_folder(), "--out", tmp_path / "run", *settings(*TPP_OFF, backbone=backbone))
    done(*command)
    other_weights(backbone)
    assert "differing: backbone weights" in refused(*command, "--resume")


def test_what_is_done_is_not_done_again(tmp_path, monkeypatch):
    shutil.copytree(run_folder(), tmp_path / "run")
    command = ["run", data_folder(), "--out", tmp_path / "run", "--modality", "xray", *settings()]
    assert "is not empty" in refused(*command)

    def never(*_):
        raise AssertionError("this stage was done before")

    monkeypatch.setattr(workflow, "run_tpp", never)
    monkeypatch.setattr(workflow, "run_finetune", never)
    said = done(*command, "--resume").text
    assert "TPP was done before." in said
    assert "Fine-tuning was done before." in said
    same_files(tmp_path / "run", run_folder(), RESULTS)


def test_an_adapter_is_whole_or_none(tmp_path, monkeypatch):
    """Killed while it writes its adapter, a stage leaves nothing that passes for one, and can be gone on with."""
    command = ["finetune", data_folder(), "--out", tmp_path / "run", *settings(*TPP_OFF)]
    with monkeypatch.context() as patched:
        write = workflow.write_json

        def kill(path, value):
            if path.name == "medtpp.json":
                raise KeyboardInterrupt
            write(path, value)

        patched.setattr("medtpp.adapter.write_json", kill)
        result = cli(*command)
    assert result.status == 130
    assert "--resume" in result.err
    adapter = tmp_path / "run" / "finetune" / "adapter"
    assert (adapter / "head.safetensors").exists()
    assert "no adapter folder" in refused("predict", adapter, data_folder() / "images", "-o", tmp_path / "p.csv")
    done(*command, "--resume")
    done("predict", adapter, data_folder() / "images", "-o", tmp_path / "p.csv")


# Output folders


def test_overwrite_replaces_when_all_is_well_and_not_before(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "old.txt").write_text("precious")
    command = ["finetune", data_folder(), "--out", out, "--overwrite"]
    refused(*command, *settings("data.labels=1000"))
    assert (out / "old.txt").read_text() == "precious"
    assert "was not made by medtpp" in refused(*command, *settings(*TPP_OFF))
    assert (out / "old.txt").read_text() == "precious"
    (out / "experiment.yaml").write_text("")
    done(*command, *settings(*TPP_OFF))
    assert not (out / "old.txt").exists()


def test_overwrite_does_not_delete_what_is_to_be_read(tmp_path):
    data = with_rows(tmp_path / "data", manifest())
    for out in (data, tmp_path):
        assert "would delete" in refused("run", data, "--out", out, "--overwrite", *settings())
        assert "would delete" in refused("pretrain", data / "images", "--out", out, "--overwrite")
    assert (data / "manifest.csv").exists()
    shutil.copytree(adapter_folder(), tmp_path / "run" / "adapter")
    command = ["evaluate", data, "--adapter", tmp_path / "run" / "adapter", "--out", tmp_path / "run", "--overwrite"]
    assert "would delete" in refused(*command)


def test_resume_does_not_touch_other_folders(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    said = refused("pretrain", pool_folder() / "images", "--out", tmp_path, "--resume", "--set", "steps=1")
    assert "holds other things than a begun run" in said
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_steps(tmp_path):
    folder, made = tmp_path / "step", []

    def work():
        made.append(1)
        (folder / "complete.json").write_text("{}")

    assert step(folder, {"a": 1, "path": Path("x")}, work)
    assert not step(folder, {"a": 1, "path": Path("x")}, work)
    assert made == [1]
    (folder / "complete.json").unlink()
    assert step(folder, {"a": 1, "path": Path("x")}, work)
    with pytest.raises(ConfigError, match=r"\(differing: a, b\)"):
        step(folder, {"a": 2, "path": Path("x"), "b": 3}, work)
    refuse_folder(folder, [tmp_path], resume=False, overwrite=True)  # what is read lies outside
    with pytest.raises(OutputError, match="not empty"):
        refuse_folder(folder, [], resume=False, overwrite=False)


# Experiments


def test_a_run_from_its_own_experiment_file_has_the_same_bits(tmp_path):
    done("run", run_folder() / "experiment.yaml", "--out", tmp_path / "again")
    same_files(tmp_path / "again", run_folder(), (*RESULTS, "experiment.yaml"))


def test_init_resolves_to_itself(tmp_path):
    file = tmp_path / "experiment.yaml"
    done("init", data_folder(), "--out", file, "--modality", "xray", *settings())
    assert file.read_bytes() == (run_folder() / "experiment.yaml").read_bytes()
    written = load_experiment(file)
    assert prepare(written).experiment == written
    assert "auto" not in [written.tpp.head_warmup, written.tpp.checkpoint_every, written.finetune.validate_every]
    assert "exists" in refused("init", data_folder(), "--out", file)


def test_a_kept_split_is_taken(tmp_path):
    prepared = prepare(experiment())
    rows = (run_folder() / "split.csv").read_text().splitlines()
    swapped = [row.replace(",val,", ",VAL,").replace(",test,", ",val,").replace(",VAL,", ",test,") for row in rows]
    (tmp_path / "split.csv").write_text("\n".join(swapped))
    other = prepare(experiment(), split_file=tmp_path / "split.csv")
    assert other.cases("test") == prepared.cases("val")
    assert read_split(tmp_path / "split.csv", prepared.dataset) == other.whole_split


def test_a_moved_data_set_can_be_gone_on_with(tmp_path):
    shutil.copytree(run_folder(), tmp_path / "run")
    data = with_rows(tmp_path / "moved", manifest())
    said = done("run", data, "--out", tmp_path / "run", "--resume", "--modality", "xray", *settings()).text
    assert "Fine-tuning was done before." in said


def test_finetuning_asks_for_the_backbone_of_its_start(tmp_path):
    start = run_folder() / "tpp" / "adapter"
    other = ("backbone.name=test_vit", "backbone.weights=random", "data.image_size=32")
    said = refused("finetune", data_folder(), "--adapter", start, "--out", tmp_path / "f", *settings(*other))
    assert f"belongs to the backbone {backbone_folder()}" in said
    said = refused("finetune", data_folder(), "--adapter", start, "--out", tmp_path / "g", *settings("tuner=ssf"))
    assert "was made otherwise than this experiment says" in said


def test_the_positive_class_is_guessed_or_chosen(tmp_path):
    for chosen, expected in (((), "lesion"), (("data.positive=normal",), "normal")):
        folder = tmp_path / expected
        done("run", data_folder(), "--out", folder, "--modality", "xray", *settings(*chosen))
        assert read_json(folder / "evaluation" / "evaluation.json")["positive"] == expected
    wrong = settings("data.positive=tumour")
    assert "'tumour'" in refused("run", data_folder(), "--out", tmp_path / "no", "--modality", "xray", *wrong)


def test_why_a_threshold_is_a_half_reaches_the_evaluation(tmp_path):
    adapter = tmp_path / "adapter"
    shutil.copytree(adapter_folder(), adapter)
    card = read_json(adapter / "medtpp.json")
    card["task"]["threshold_notes"] = ["The threshold of 'lesion' is 0.5: no case has this class."]
    write_json(adapter / "medtpp.json", card)
    done("evaluate", other_folder(), "--all", "--adapter", adapter, "--out", tmp_path / "e")
    assert card["task"]["threshold_notes"][0] in read_json(tmp_path / "e" / "evaluation" / "evaluation.json")["notes"]


def test_cases_added_after_a_split_are_not_dropped_without_a_word(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(other_folder(), data)
    late = sorted(data.glob("*/*.png"))[0]
    late.rename(tmp_path / late.name)
    done("tpp", data, "--out", out, "--modality", "xray", *settings())
    (tmp_path / late.name).rename(late)
    said = refused("tpp", data, "--out", out, "--modality", "xray", "--resume", *settings())
    assert "does not know 1 labelled cases" in said


def test_tpp_shows_what_it_did():
    with Image.open(run_folder() / "tpp" / "preview.png") as sheet:
        assert (sheet.height, sheet.mode) == (3 * 32, "RGB")
        assert sheet.width % 32 == 0
        pixels = np.asarray(sheet, dtype=np.float64)
    image, masked, restored = np.split(pixels, 3)
    assert (masked == 128).all(axis=-1).mean() == pytest.approx(0.75, abs=0.02)
    shown = (masked != 128).any(axis=-1)
    assert np.abs(image - restored)[shown].max() <= 1


def test_batches_divide_among_devices():
    options = FinetuneOptions()
    known = {"cases": 25, "tuner": "lora", "devices": 2, "task": "classification"}
    known["spec"] = backbones.load("vit_tiny_patch16_224", weights="random", image_size=32).spec
    assert resolve_finetune(options, **known).batch_size == 26
    with pytest.raises(ConfigError, match="does not divide"):
        resolve_finetune(FinetuneOptions(batch_size=25), **known)
