import csv
import json
import os
import shutil
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medtpp.config import BACKBONES, PRETEXTS, TASKS, TUNERS
from medtpp.files import read_json, write_json
from medtpp.inference import predict as inference
from runs import (
    CASES,
    SIZE,
    adapter_folder,
    backbone_folder,
    cli,
    data_folder,
    done,
    finished,
    other_folder,
    other_weights,
    pool_folder,
    refused,
    run_folder,
    same_files,
    settings,
)

WIDTH = 80


def python(code, *arguments, **environment):
    """A Python process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": str(WIDTH), **environment},
        timeout=300,
    )


def table(path):
    with Path(path).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# Entry point


def test_help_and_import_do_not_wait_for_torch():
    heavy = "{'torch', 'timm', 'peft', 'pandas', 'sklearn', 'PIL'} & set(sys.modules)"
    assert python(f"import sys, medtpp; assert not {heavy}, {heavy}").returncode == 0
    result = python(
        f"import sys, atexit; atexit.register(lambda: print('heavy', {heavy})); from medtpp.cli import main; main()",
        "-h",
    )
    assert result.returncode == 0, result.stderr
    assert "heavy set()" in result.stdout
    assert all(f" {verb} " in result.stdout for verb in ("check", "run", "predict", "doctor"))


def test_a_mistake_ends_with_status_2_and_one_message(tmp_path):
    (tmp_path / "out.csv").write_text("")
    command = ("from medtpp.cli import main; main()", "predict", "adapter", "images", "-o", tmp_path / "out.csv")
    result = python(*command)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr
    result = python(*command, "--debug")
    assert result.returncode != 0
    assert "Traceback" in result.stderr


def test_a_run_in_a_process_of_its_own(tmp_path):
    """As in the shell: the same bits as in this process, and nothing beside the report at 80 columns."""
    command = ("run", data_folder(), "--out", tmp_path / "run", "--modality", "xray", *settings())
    result = python("from medtpp.cli import main; main()", *command)
    assert result.returncode == 0, result.stderr
    same_files(tmp_path / "run", run_folder(), ("finetune/adapter/head.safetensors", "evaluation/predictions.csv"))
    shown = [line for line in result.stdout.splitlines() if str(tmp_path) not in line]
    assert max(map(len, shown)) <= WIDTH
    assert [line for line in result.stderr.splitlines() if not line.startswith(("TPP: ", "fine-tuning: "))] == []


def test_unknown_verbs_and_options_are_usage_errors():
    assert "No such command" in refused("rnu")
    assert "No such option" in refused("run", data_folder(), "--out", "x", "--lables", "10")
    assert "Missing option" in refused("run", data_folder())


# Each verb


def test_check_counts(tmp_path):
    result = done("check", data_folder())
    assert f"cases {CASES}" in result.text
    assert "No problems found." in result.text
    assert max(map(len, result.out.splitlines())) <= WIDTH
    text = done("check", data_folder(), "--set", f"data.unlabelled=[{pool_folder()}]").text
    assert "24 more images for TPP" in text


def test_check_tells_errors_from_warnings(tmp_path):
    shutil.copytree(other_folder(), tmp_path / "data")
    images = sorted((tmp_path / "data").rglob("*.png"))
    shutil.copy(images[0], images[0].with_name("copy.png"))
    result = done("check", tmp_path / "data")
    assert "warning: Exact copies" in result.text
    assert "0 errors, 1 warning." in result.text
    images[1].write_bytes(b"")
    said = refused("check", tmp_path / "data")
    assert "error: 1 image cannot be read" in said
    assert "1 error, 1 warning." in said
    assert "data.exclude=" in said


def test_run_writes_what_it_says():
    folder, result = finished()
    adapter = {"adapter_config.json", "adapter_model.safetensors", "medtpp.json", "README.md"}
    expected = {"experiment.yaml", "split.csv", "summary.json", "report.html"}
    expected |= {f"evaluation/{name}" for name in ("predictions.csv", "evaluation.json", "mistakes/mistakes.json")}
    mistakes = read_json(folder / "evaluation" / "mistakes" / "mistakes.json")
    assert mistakes
    expected |= {f"evaluation/mistakes/{mistake['image']}" for mistake in mistakes}
    expected |= {f"tpp/{name}" for name in ("complete.json", "inputs.json", "log.csv", "preview.png")}
    expected |= {f"finetune/{name}" for name in ("complete.json", "inputs.json", "log.csv", "validation.csv")}
    expected |= {f"tpp/adapter/{name}" for name in adapter}
    expected |= {f"finetune/adapter/{name}" for name in (*adapter, "head.safetensors")}
    assert files(folder) == expected

    summary = read_json(folder / "summary.json")
    assert (folder / summary["adapter"] / "medtpp.json").is_file()
    assert set(summary["stages"]) == {"tpp", "finetune"}
    assert 0 <= summary["test"]["auc"] <= 1
    assert summary["stages"]["tpp"]["pretext_loss_on"] != summary["stages"]["tpp"]["pretext_loss_off"]

    sizes = {
        name: sum(row["split"] == name for row in table(folder / "split.csv")) for name in ("train", "val", "test")
    }
    assert f"train {sizes['train']}, val {sizes['val']}, test {sizes['test']}; TPP sees {sizes['train']}" in result.text
    assert len(table(folder / "evaluation" / "predictions.csv")) == sizes["test"]
    assert f"medtpp predict {folder}/finetune/adapter IMAGES -o predictions.csv" in result.out  # on one line


def test_the_stages_one_by_one_give_the_same_bits(tmp_path):
    done("tpp", data_folder(), "--out", tmp_path / "tpp", "--modality", "xray", *settings())
    start = tmp_path / "tpp" / "tpp" / "adapter"
    command = ("--out", tmp_path / "finetuned", "--adapter", start)
    result = done("finetune", tmp_path / "tpp" / "experiment.yaml", *command)
    assert "TPP sees" not in result.text
    made = tmp_path / "finetuned" / "finetune" / "adapter"
    for name in ("adapter_model.safetensors", "head.safetensors"):
        assert (made / name).read_bytes() == (adapter_folder() / name).read_bytes()
    # From the data folder alone: backbone, tuner and preprocessing are the adapter's.
    result = done("evaluate", data_folder(), "--adapter", made, "--out", tmp_path / "evaluated", "--set", "seed=0")
    same_files(tmp_path / "evaluated", run_folder(), ("split.csv", "evaluation/predictions.csv"))
    assert "AUC, lesion" in result.text
    assert "fine-tune" in refused("evaluate", data_folder(), "--adapter", start, "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_finetune_without_tpp(tmp_path):
    done("finetune", data_folder(), "--out", tmp_path / "run", *settings("tuner=linear", "finetune.steps=2"))
    card = read_json(tmp_path / "run" / "finetune" / "adapter" / "medtpp.json")
    assert card["tpp"] is None
    assert card["task"]["classes"] == ["lesion", "normal"]
    said = refused("run", data_folder(), "--out", tmp_path / "other", *settings("tuner=linear"))
    assert "no target parameters" in said
    assert "tpp.enabled=false" in said


def test_evaluating_other_classes_is_refused(tmp_path):
    shutil.copytree(other_folder(), tmp_path / "data")
    (tmp_path / "data" / "lesion").rename(tmp_path / "data" / "nodule")
    said = refused("evaluate", tmp_path / "data", "--adapter", adapter_folder(), "--out", tmp_path / "e")
    assert "classes it does not know: nodule (it knows lesion, normal)" in said


def test_pretrain_writes_a_backbone_and_its_fingerprints(tmp_path):
    assert {"backbone.json", "model.safetensors", "pretext_mae.safetensors", "fingerprints.json", "README.md"} <= files(
        backbone_folder()
    )
    assert len(read_json(backbone_folder() / "fingerprints.json")["images"]) == 24
    images = tmp_path / "images"
    images.mkdir()
    (images / "x.png").write_bytes(b"nothing")
    said = refused("pretrain", images, "--out", tmp_path / "b")
    assert "None of the 1 images can be read" in said
    assert "x.png: is not a PNG" in said
    assert "is not a folder" in refused("pretrain", tmp_path / "nowhere", "--out", tmp_path / "c")
    assert "'xry'" in refused("pretrain", images, "--out", tmp_path / "d", "--modality", "xry")


@pytest.mark.parametrize(("kind", "registry"), [("tuners", TUNERS), ("pretexts", PRETEXTS), ("tasks", TASKS)])
def test_list_shows_names_and_options(kind, registry):
    result = done("list", kind)
    for name, entry in registry.items():
        assert name in result.text
        assert all(f"{option}=" in result.out for option in entry.Options.model_fields if option != "name")
    assert max(map(len, result.out.splitlines())) <= WIDTH


def test_list_shows_names_of_backbones_that_can_be_copied():
    result = done("list", "backbones")
    assert [name for family in BACKBONES.values() for name in family.examples if name not in result.out.split()] == []


def test_doctor_says_what_would_be_chosen():
    text = done("doctor").text
    for word in ("python", "torch", "peft", "accelerator", "precision", os.environ["MEDTPP_CACHE"]):
        assert word in text.replace(" ", "") or word in text


def test_phantom_writes_data_that_can_be_checked(tmp_path):
    done("phantom", "--out", tmp_path / "phantoms", "--cases", 12, "--size", 32)
    assert len(list((tmp_path / "phantoms" / "images").iterdir())) == 12
    assert "not empty" in refused("phantom", "--out", tmp_path / "phantoms")
    assert "cases 12" in done("check", tmp_path / "phantoms").text


def test_no_network(tmp_path, monkeypatch):
    def blocked(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    done("run", data_folder(), "--out", tmp_path / "run", *settings("tpp.steps=2", "finetune.steps=2"))


# Predict


def predicted(*arguments):
    output = Path(arguments[-1])
    done("predict", *arguments[:-1], "-o", output)
    return {row["case"]: (float(row["p_lesion"]), float(row["p_normal"])) for row in table(output)}


def test_predictions_are_those_of_the_evaluation(tmp_path):
    evaluated = table(run_folder() / "evaluation" / "predictions.csv")
    images = [data_folder() / row["case"] for row in evaluated]
    found = predicted(adapter_folder(), *images, tmp_path / "p.csv")
    assert list(found) == [str(image) for image in images]
    expected = np.array([[float(row["p_lesion"]), float(row["p_normal"])] for row in evaluated])
    np.testing.assert_allclose(np.array(list(found.values())), expected, atol=1e-6)
    assert np.ptp(expected[:, 0]) > 1e-5  # it is not one number for all
    # A folder of them, and any way to batch them, give the same.
    everything = predicted(adapter_folder(), data_folder(), tmp_path / "all.csv")
    assert len(everything) == CASES
    np.testing.assert_allclose([everything[str(image)] for image in images], expected, atol=1e-6)


def test_unreadable_files_are_listed_and_the_rest_is_done(tmp_path):
    images = tmp_path / "images"
    shutil.copytree(data_folder() / "images", images)
    good = sorted(images.iterdir())
    good[0].write_bytes(good[0].read_bytes()[:100])
    good[1].write_text("not an image")
    result = cli("predict", adapter_folder(), images, "-o", tmp_path / "p.csv")
    assert result.status == 1
    assert f"not read: {good[0]}: " in result.text
    assert "is not a PNG" in result.text
    assert f"2 of {CASES} files could not be read." in result.text
    assert [row["case"] for row in table(tmp_path / "p.csv")] == [str(image) for image in good[2:]]


def test_nothing_readable_writes_nothing(tmp_path):
    (tmp_path / "x.png").write_text("not an image")
    result = cli("predict", adapter_folder(), tmp_path / "x.png", "-o", tmp_path / "p.csv")
    assert result.status == 1
    assert "1 of 1 file" in result.text
    assert not (tmp_path / "p.csv").exists()


def test_predict_says_what_is_missing(tmp_path):
    output = ("-o", tmp_path / "p.csv")
    images = data_folder() / "images"
    assert "is no adapter folder" in refused("predict", tmp_path, images, *output)
    assert "not fine-tuned" in refused("predict", run_folder() / "tpp" / "adapter", images, *output)
    (tmp_path / "empty").mkdir()
    said = refused("predict", adapter_folder(), tmp_path / "empty", tmp_path / "none.png", *output)
    assert "empty holds no images" in said
    assert "none.png does not exist" in said
    (tmp_path / "p.csv").write_text("old")
    assert "exists. Use --overwrite" in refused("predict", adapter_folder(), images, *output)
    done("predict", adapter_folder(), images, *output, "--overwrite")
    assert len(table(tmp_path / "p.csv")) == CASES


def test_a_broken_adapter_is_refused(tmp_path):
    image = next((data_folder() / "images").iterdir())
    for name, words in (
        ("head.safetensors", "is broken"),
        ("adapter_model.safetensors", "is broken"),
        ("medtpp.json", "cannot be read"),
    ):
        adapter = shutil.copytree(adapter_folder(), tmp_path / name)
        content = (adapter / name).read_bytes()
        (adapter / name).write_bytes(content[: len(content) // 2])
        assert words in refused("predict", adapter, image, "-o", tmp_path / "p.csv")
        (adapter / name).unlink()
        assert name in refused("predict", adapter, image, "-o", tmp_path / "p.csv")


def test_a_moved_backbone_is_named(tmp_path):
    adapter = shutil.copytree(adapter_folder(), tmp_path / "adapter")
    card = read_json(adapter / "medtpp.json")
    card["backbone"]["options"]["name"] = "/moved/away"
    write_json(adapter / "medtpp.json", card)
    command = ("predict", adapter, data_folder() / "images", "-o", tmp_path / "p.csv")
    said = refused(*command)
    assert "/moved/away" in said
    assert "--backbone" in said
    done(*command, "--backbone", backbone_folder())
    evaluate = ("evaluate", data_folder(), "--adapter", adapter, "--out", tmp_path / "e")
    assert "--backbone" in refused(*evaluate)
    done(*evaluate, "--backbone", backbone_folder())
    same_files(tmp_path / "e", run_folder(), ("evaluation/predictions.csv",))


def test_another_backbone_is_refused(tmp_path):
    command = ("predict", adapter_folder(), data_folder() / "images", "-o", tmp_path / "p.csv", "--backbone")
    broken = shutil.copytree(backbone_folder(), tmp_path / "tampered")
    content = bytearray((broken / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (broken / "model.safetensors").write_bytes(content)
    assert "not those its backbone.json names" in refused(*command, broken)

    other = other_weights(tmp_path / "other")
    assert "Use the backbone it was made with" in refused(*command, other)


def test_prediction_holds_a_few_batches_at_most(tmp_path, monkeypatch):
    """However many files there are, decoded images wait in a short queue."""
    alive = peak = 0
    apply = inference.Preprocessing.apply

    def gone():
        nonlocal alive
        alive -= 1

    def counted(self, pixels):
        nonlocal alive, peak
        array = apply(self, pixels)
        weakref.finalize(array, gone)
        alive += 1
        peak = max(peak, alive)
        return array

    monkeypatch.setattr(inference.Preprocessing, "apply", counted)
    monkeypatch.setattr(inference, "BATCH", 4)
    copies = tmp_path / "many"
    copies.mkdir()
    image = Image.open(next((data_folder() / "images").iterdir()))
    for number in range(100):
        image.save(copies / f"{number}.png")
    assert len(predicted(adapter_folder(), copies, tmp_path / "p.csv")) == 100
    assert 4 <= peak <= 4 * 4


# Privacy


def test_patients_and_paths_stay_where_they_belong():
    told = {
        path.relative_to(run_folder()).as_posix(): path.read_bytes()
        for path in run_folder().rglob("*")
        if path.is_file()
    }
    cases = {"split.csv", "evaluation/predictions.csv", "finetune/validation.csv"}
    patients = {row["patient"] for row in table(data_folder() / "manifest.csv")}
    names = {row["image"] for row in table(data_folder() / "manifest.csv")}
    assert {name for name, text in told.items() if any(patient.encode() in text for patient in patients)} == cases
    cases |= {"evaluation/mistakes/mistakes.json", "report.html"}
    assert {name for name, text in told.items() if any(image.encode() in text for image in names)} == cases
    assert {name for name, text in told.items() if str(data_folder()).encode() in text} == {"experiment.yaml"}
    said = finished()[1].text
    assert not any(patient in said for patient in patients)


def test_a_backbone_tells_nothing_but_hashes():
    text = json.dumps({path.name: path.read_text() for path in backbone_folder().glob("*.json")})
    assert str(pool_folder()) not in text
    assert "00001.png" not in text
    assert read_json(backbone_folder() / "backbone.json")["image_size"] == SIZE
