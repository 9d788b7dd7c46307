"""What TPP may see, and what was seen before and is no test."""

import json

import pytest
from PIL import Image, ImageOps

import medtpp.workflow.run as workflow
from medtpp.errors import OutputError
from medtpp.workflow.prepare import prepare
from runs import (
    adapter_folder,
    backbone_folder,
    data_folder,
    done,
    experiment,
    manifest,
    other_folder,
    pool_folder,
    refused,
    run_folder,
    settings,
    split_of,
    with_rows,
)

# What TPP sees


def seen_by_tpp(monkeypatch, out, *arguments):
    """Ids of the cases that TPP is given, and what the command says."""
    seen = []

    def spy(inputs, folder):
        seen.extend(case.id for case in inputs.data.cases)
        raise OutputError("enough")

    with monkeypatch.context() as patch:
        patch.setattr(workflow, "run_tpp", spy)
        said = refused("tpp", *arguments, "--out", out, *settings())
    assert "enough" in said, said
    return seen, said


def test_tpp_sees_training_images_alone(tmp_path, monkeypatch):
    seen, _ = seen_by_tpp(monkeypatch, tmp_path / "run", data_folder())
    assert sorted(seen) == sorted(split_of(tmp_path / "run")["train"])
    card = json.loads((run_folder() / "tpp" / "adapter" / "medtpp.json").read_text())
    prepared = prepare(experiment())
    held_out = {prepared.records[case.id].fingerprint for case in prepared.cases("val", "test")}
    assert held_out.isdisjoint(card["tpp"]["fingerprints"]["images"])
    assert len(card["tpp"]["fingerprints"]["images"]) == len(seen)


def test_tpp_uses_all_training_images_whatever_the_labels(tmp_path, monkeypatch):
    seen, _ = seen_by_tpp(monkeypatch, tmp_path / "run", data_folder(), "--set", "data.labels=12")
    assert sorted(seen) == sorted(split_of(tmp_path / "run")["train"])
    prepared = prepare(experiment("data.labels=12"))
    assert len(prepared.cases("train", "val")) == 12
    assert {case.id for case in prepared.tpp} == set(seen)
    more = prepare(experiment("data.labels=20"))
    for part in ("train", "val"):
        assert {case.id for case in prepared.cases(part)} <= {case.id for case in more.cases(part)}
    assert prepared.cases("test") == more.cases("test")


def test_copies_of_test_images_among_the_unlabelled_are_left_out(tmp_path, monkeypatch):
    parts = split_of(run_folder())
    pool = tmp_path / "pool"
    pool.mkdir()
    for split in ("test", "val", "train"):
        case = min(parts[split])
        Image.open(data_folder() / case).save(pool / f"{split}.bmp")  # the same pixels, other bytes
    ImageOps.mirror(Image.open(data_folder() / min(parts["train"]))).save(pool / "new.png")
    (pool / "broken.png").write_bytes(b"no image")
    seen, said = seen_by_tpp(monkeypatch, tmp_path / "run", data_folder(), "--unlabelled", pool)
    added = {case for case in seen if case.startswith("unlabelled:")}
    assert added == {"unlabelled:pool/new.png", "unlabelled:pool/train.bmp"}
    assert "3 unlabelled images are left out of TPP" in said


def test_unlabelled_cases_of_test_patients_are_left_out(tmp_path, monkeypatch):
    rows = manifest()
    patient = {row.split(",")[0]: row.split(",")[2] for row in rows}
    parts = split_of(run_folder())
    # Three new images without a label: of a test patient, of a training patient, of somebody else.
    names = {"images/t.png": patient[min(parts["test"])], "images/u.png": patient[min(parts["train"])]}
    names["images/v.png"] = "somebody"
    data = with_rows(tmp_path / "data", [*rows, *(f"{name},,{who}" for name, who in names.items())])
    for level, name in enumerate(names):
        Image.new("L", (32, 32), 50 * level).save(data / name)
    seen, _ = seen_by_tpp(monkeypatch, tmp_path / "run", data)
    assert split_of(tmp_path / "run") == parts
    assert {name for name in names if name in seen} == {"images/u.png", "images/v.png"}


# What was seen before is no test


@pytest.fixture(scope="module")
def leaky(tmp_path_factory):
    """An adapter whose TPP saw all the data's images: they were the unlabelled ones beside another data set."""
    folder = tmp_path_factory.mktemp("leaky")
    command = ["--unlabelled", data_folder() / "images", *settings("tpp.steps=2")]
    done("run", other_folder(), "--out", folder / "run", *command, "--set", "finetune.steps=2")
    return folder / "run"


def test_an_adapter_whose_tpp_saw_test_cases_is_refused(leaky, tmp_path):
    said = refused(
        "finetune", data_folder(), "--adapter", leaky / "tpp" / "adapter", "--out", tmp_path / "f", *settings()
    )
    assert "saw" in said
    assert "test cases (same pixels or same patient)" in said
    assert min(split_of(run_folder())["test"]) in said
    assert not (tmp_path / "f" / "finetune").exists()
    said = refused("evaluate", data_folder(), "--adapter", leaky / "finetune" / "adapter", "--out", tmp_path / "e")
    assert "TPP of" in said
    assert not (tmp_path / "e" / "evaluation").exists()


def test_an_adapter_that_was_trained_on_test_cases_is_refused(tmp_path):
    """With another seed, training cases of the run are test cases."""
    command = [data_folder(), "--adapter", adapter_folder(), "--out", tmp_path / "x", *settings("seed=5")]
    said = refused("evaluate", *command)
    assert f"The adapter {adapter_folder()} saw" in said
    assert f"The adapter {adapter_folder()} saw" in refused("finetune", *command, "--overwrite")


def test_fine_tuning_twice_remembers_both(tmp_path):
    """An adapter fine-tuned on one data set and then on another is no fair test on the first."""
    brief = settings("finetune.steps=2")
    done("finetune", data_folder(), "--out", tmp_path / "first", *brief)
    start = tmp_path / "first" / "finetune" / "adapter"
    done("finetune", other_folder(), "--adapter", start, "--out", tmp_path / "second", *brief)
    adapter = tmp_path / "second" / "finetune" / "adapter"
    said = refused("evaluate", data_folder(), "--adapter", adapter, "--out", tmp_path / "e", "--set", "seed=5")
    assert f"The adapter {adapter} saw" in said


def test_patients_are_known_again_in_other_images(tmp_path):
    """The same patients with other pixels, in another file and under other names."""
    rows = manifest()
    data = tmp_path / "later"
    (data / "images").mkdir(parents=True)
    for row in rows[1:]:
        name = row.split(",")[0]
        ImageOps.mirror(Image.open(data_folder() / name)).save(data / name.replace("images/", "images/later-"))
    (data / "list.csv").write_text("\n".join(row.replace("images/", "images/later-") for row in rows))
    said = refused(
        "evaluate", data / "list.csv", "--adapter", adapter_folder(), "--out", tmp_path / "e", "--set", "seed=5"
    )
    assert "same patient" in said


def test_data_of_another_hospital_are_evaluated_whole(tmp_path):
    """All labelled cases are test cases, and none of them may be one that was trained on."""
    command = ("--adapter", adapter_folder(), "--all", "--out")
    done("evaluate", other_folder(), *command, tmp_path / "e")
    assert len((tmp_path / "e" / "evaluation" / "predictions.csv").read_text().splitlines()) == 41
    alone = tmp_path / "alone.csv"
    rows = [f"{path},{path.parent.name},test" for path in sorted(other_folder().glob("*/*.png"))]
    alone.write_text("\n".join(["image,label,split", *rows]))
    done("evaluate", alone, *command, tmp_path / "f")
    assert "saw" in refused("evaluate", data_folder(), *command, tmp_path / "g")


def test_a_backbone_that_saw_test_images_is_refused(tmp_path):
    said = refused("run", pool_folder(), "--out", tmp_path / "run", "--modality", "xray", *settings())
    assert f"The backbone {backbone_folder()} saw" in said
    assert not list((tmp_path / "run").iterdir())  # so that the same command works when this is mended
    assert "saw" in refused("evaluate", pool_folder(), "--adapter", adapter_folder(), "--out", tmp_path / "e")


def test_transductive_tpp_is_allowed_and_flagged(tmp_path):
    out = tmp_path / "run"
    result = done(
        "run", data_folder(), "--out", out, *settings("tpp.transductive=true", "tpp.steps=2", "finetune.steps=2")
    )
    for stage in ("tpp", "finetune"):
        card = json.loads((out / stage / "adapter" / "medtpp.json").read_text())
        assert card["tpp"]["transductive"] is True
        assert card["tpp"]["images"] == sum(map(len, split_of(out).values()))
        assert "Transductive" in (out / stage / "adapter" / "README.md").read_text()
    notes = json.loads((out / "evaluation" / "evaluation.json").read_text())["notes"]
    count = len(split_of(out)["test"])
    assert f"Transductive: TPP saw {count} of the test images, without their labels." in notes
    assert "Transductive" in result.out
