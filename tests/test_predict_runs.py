"""Prediction of many scans: ensembles, killed runs, output folders, bad files, memory, the library."""

import csv
import os
import subprocess
import sys
import time
import weakref

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image

import medtpp
from medtpp.adapter import load_adapter
from medtpp.config import Window
from medtpp.data.case import Case
from medtpp.data.read import read_unlabelled
from medtpp.data.store import build_store
from medtpp.data.volume_preprocess import VolumePreprocessing
from medtpp.data.volume_scan import Reader
from medtpp.data.volumes import read_mask, read_volume, volume_fingerprint
from medtpp.errors import ConfigError, DataError, WeightsError
from medtpp.inference import scans as reading
from medtpp.inference.ensemble import load_ensemble, share_weights
from medtpp.inference.stored import classify
from runs import cli, done, refused
from segmenters import PATCH, adapter, in_training, scans, table

CPU = torch.device("cpu")


# Ensembles


def storages(*members):
    """Addresses and bytes of the storages of all parameters and buffers."""
    tensors = [tensor for member in members for tensor in (*member.backbone.parameters(), *member.backbone.buffers())]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


@pytest.mark.parametrize("dims", [2, 3])
def test_an_ensemble_has_its_backbone_in_memory_once(tmp_path, dims):
    made = [
        adapter(tmp_path / name, dims, tuner=name, seed=number) for number, name in enumerate(("lora", "ssf", "bitfit"))
    ]
    apart = [load_adapter(folder) for folder in made]
    images = torch.rand(2, 1, *PATCH[dims])
    with torch.no_grad():
        expected = [member.task(member.backbone.encode(images)) for member in apart]
    together = load_ensemble(made, backbone=None, device=CPU)
    one = sum(storages(apart[0]).values())
    trained = [value for member in together[1:] for value in (member.backbone.targets, member.backbone.embed)]
    own = sum(parameter.nbytes for group in trained for parameter in group.values())
    assert sum(storages(*apart).values()) > 2.5 * one
    assert sum(storages(*together).values()) < one + own + 0.05 * one  # and positions, which each resamples
    with torch.no_grad():
        for member, logits in zip(together, expected, strict=True):
            assert torch.equal(member.task(member.backbone.encode(images)), logits)
            assert member.backbone.source_hash() == apart[0].backbone.source_hash()
    share_weights(together[0].backbone, together[1].backbone)  # once more does no harm
    assert all(parameter.requires_grad for parameter in together[1].backbone.targets.values())


def test_an_ensemble_is_the_mean_of_its_members(tmp_path):
    first, second = adapter(tmp_path / "first"), adapter(tmp_path / "second", tuner="vpt_deep", seed=5)
    scans(tmp_path / "in", "a")
    commands = {"1": [first], "2": [second], "both": [first, "--with", second]}
    found = {}
    for name, (start, *more) in commands.items():
        done("predict", start, tmp_path / "in", "-o", tmp_path / name, "--probabilities", *more)
        maps = (tmp_path / name / "a_probabilities" / f for f in ("1_organ.nii.gz", "2_lesion.nii.gz"))
        found[name] = np.stack([read_volume(Case("", path)).array[0] for path in maps])
    np.testing.assert_allclose(found["both"], (found["1"] + found["2"]) / 2, atol=1.1 / 255)
    assert np.abs(found["1"] - found["2"]).max() > 0.1
    whole = np.concatenate([1 - found["both"].sum(axis=0, keepdims=True), found["both"]])
    best = np.sort(whole, axis=0)
    clear = best[-1] - best[-2] > 4 / 255
    mask = read_volume(Case("", tmp_path / "both" / "a.nii.gz")).array[0]
    assert np.array_equal(mask[clear], in_training(whole.argmax(axis=0))[clear])


def test_members_that_differ_are_refused(tmp_path):
    scans(tmp_path / "in", "a")
    first = adapter(tmp_path / "first")
    other = adapter(tmp_path / "other", values=((3,), (8,)), spacing=(1.0, 1.0, 1.0))
    said = refused("predict", first, tmp_path / "in", "-o", tmp_path / "out", "--with", other)
    assert "cannot be averaged" in said
    assert "classes or structures: organ = 3; lesion = 7 in" in said
    assert "preprocessing: spacing: none in" in said
    assert "[1.0, 1.0, 1.0] in" in said
    assert said.count("preprocessing: ") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(WeightsError, match="image size of the backbone"):
        medtpp.predict([load_adapter(first), load_adapter(adapter(tmp_path / "flat", 2))], tmp_path / "in", "out")
    classifier = adapter(tmp_path / "classifier", task="classification")
    assert "task: segmentation in" in refused(
        "predict", first, tmp_path / "in", "-o", tmp_path / "out", "--with", classifier
    )


def test_members_of_other_windows_are_told_to_be_trained_from_one_file(tmp_path):
    scans(tmp_path / "in", "a")
    first = adapter(tmp_path / "first")
    other = adapter(tmp_path / "other", windows=(Window(kind="fixed", low=-1.25, high=2),))
    said = refused("predict", first, tmp_path / "in", "-o", tmp_path / "out", "--with", other)
    assert "medtpp run EXPERIMENT.yaml --set seed=1" in said
    problems = said[said.index(" - ") :]
    assert problems == f" - preprocessing: windows: [fixed 0.0 to 2.0] in {first}, [fixed -1.25 to 2.0] in {other}"
    structures = adapter(tmp_path / "structures", values=((1,), (2,)))
    assert "EXPERIMENT" not in refused("predict", first, tmp_path / "in", "-o", tmp_path / "out", "--with", structures)


# Output folders


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with a name")
def test_a_killed_run_is_gone_on_with(tmp_path):
    """The second scan is a pipe that nobody writes to: the command waits there, with one mask done, and is killed."""
    folder, out = adapter(tmp_path / "adapter"), tmp_path / "out"
    scans(tmp_path / "in", "ac")
    os.mkfifo(tmp_path / "in" / "b.nii.gz")
    command = ["predict", folder, tmp_path / "in", "-o", out, "--probabilities"]
    code = "from medtpp.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, command)], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 600
    try:
        while not (out / "volumes.csv").is_file() or len(table(out)) < 2:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    (tmp_path / "in" / "b.nii.gz").unlink()
    scans(tmp_path / "in", "abc")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.nii.gz")}
    assert {path.name for path in before} == {"a.nii.gz", "1_organ.nii.gz", "2_lesion.nii.gz"}
    with (out / "volumes.csv").open("a") as stream:
        stream.write("b.nii.gz,organ,1,ml\nb.nii.gz,les")  # torn
    assert "is not empty" in refused(*command)
    result = done(*command, "--resume")
    assert "2 images segmented; 1 were there" in result.text
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert done(*command, "--resume").text.startswith("0 images segmented; 3 were there")
    again = tmp_path / "again"
    done(*command[:4], again, "--probabilities")
    names = {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()}
    assert names == {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    (out / "b_probabilities" / "1_organ.nii.gz").unlink()
    assert "1 image segmented; 2 were there" in done(*command, "--resume").text


def test_output_folders_are_not_mixed_up(tmp_path):
    folder, out = adapter(tmp_path / "adapter"), tmp_path / "out"
    scans(tmp_path / "in", "a")
    command = ["predict", folder, tmp_path / "in", "-o", out]
    done(*command)
    assert "made with other overlap" in refused(*command, "--resume", "--overlap", 0.25)
    other = adapter(tmp_path / "other", seed=1)
    assert "made with other adapters" in refused("predict", other, *command[2:], "--resume")
    assert "Choose one" in refused(*command, "--resume", "--overwrite")
    first = (out / "a.nii.gz").read_bytes()
    done("predict", other, *command[2:], "--overwrite")
    assert (out / "a.nii.gz").read_bytes() != first
    scans(tmp_path / "more", "b")  # other scans may follow, and the table keeps the first
    done("predict", other, tmp_path / "more", "-o", out, "--resume")
    assert {case for case, _ in table(out)} == {"a.nii.gz", "b.nii.gz"}
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "experiment.yaml").write_text("of a run")
    for wish in ("--overwrite", "--resume"):
        assert "did not write" in refused(*command[:4], foreign, wish)
    assert [path.name for path in foreign.iterdir()] == ["experiment.yaml"]


def test_masks_of_an_earlier_prediction_are_no_scans(tmp_path):
    """Wherever below the scans they lie; other folders with a file of that name are as all others."""
    scan, folder = tmp_path / "in", adapter(tmp_path / "adapter")
    scans(scan, "a")
    (scan / "b").mkdir()
    (scan / "b" / "inputs.json").write_text('{"inputs": {}}')
    scans(scan / "b", "b")
    first = done("predict", folder, scan, "-o", scan / "by day" / "masks", "--probabilities")
    assert "left out" not in first.text
    second = done("predict", folder, scan, "-o", tmp_path / "out")
    assert "6 files that medtpp predict wrote are left out." in second.text
    assert {case for case, _ in table(tmp_path / "out")} == {"a.nii.gz", "b/b.nii.gz"}
    with pytest.warns(UserWarning, match="6 files that medtpp predict wrote are left out"):
        again = medtpp.predict(load_adapter(folder), scan, scan / "by day" / "masks", probabilities=True, resume=True)
    assert again.skipped == ("a.nii.gz", "b/b.nii.gz")
    assert [case.id for case in read_unlabelled([scan])] == ["unlabelled:in/a.nii.gz", "unlabelled:in/b/b.nii.gz"]
    mask = scan / "by day" / "masks" / "a.nii.gz"
    assert "holds nothing but what medtpp predict wrote" in refused("predict", folder, mask.parent, "-o", scan / "no")
    assert "1 image segmented" in done("predict", folder, mask, "-o", tmp_path / "of a mask").text


def test_bad_scans_are_listed_and_the_rest_is_done(tmp_path):
    scans(tmp_path / "in", "abcd")
    broken = tmp_path / "in" / "b.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-40])
    (tmp_path / "in" / "c.nii.gz").write_text("no scan")
    Image.new("L", (30, 30)).save(tmp_path / "in" / "flat.png")
    nans = np.full((8, 8, 8), np.nan, np.float32)
    nibabel.save(nibabel.Nifti1Image(nans, np.eye(4)), tmp_path / "in" / "nan.nii")
    result = cli("predict", adapter(tmp_path / "adapter"), tmp_path / "in", "-o", tmp_path / "out")
    assert result.status == 1
    for line in (
        "not read: b.nii.gz: is truncated or broken",
        "not read: c.nii.gz: is not a NIfTI file",
        "not read: flat.png: has 2 dimensions, but the training images have 3. Give the whole volume, or leave it out.",
        "not read: nan.nii: holds 512 NaN",
        "4 of 6 files could not be read.",
    ):
        assert line in result.text
    masks = {path.name for path in (tmp_path / "out").iterdir()}
    assert masks == {"a.nii.gz", "d.nii.gz", "volumes.csv", "inputs.json"}


# Classification of volumes, and the library


@pytest.mark.parametrize("dtype", ["float16", "uint8"])
def test_volumes_are_classified_as_in_training(tmp_path, dtype):
    """By the mean of logits over patches, on the bits that a store holds."""
    made = [adapter(tmp_path / name, task="classification", tuner=name, dtype=dtype) for name in ("lora", "ssf")]
    scans(tmp_path / "in", "abc", shape=(20, 30, 18))
    (tmp_path / "in" / "d.nii.gz").write_text("no scan")
    found = []
    for number, members in enumerate(([made[0]], [made[1]], [made[0], "--with", made[1]])):
        path = tmp_path / f"{number}.csv"
        result = cli("predict", members[0], tmp_path / "in", "-o", path, *members[1:])
        assert result.status == 1
        assert f"not read: {tmp_path / 'in' / 'd.nii.gz'}: is not a NIfTI file" in result.text
        with path.open(newline="") as stream:
            found.append([[float(row["p_organ"]), float(row["p_lesion"])] for row in csv.DictReader(stream)])
    np.testing.assert_allclose(found[2], np.mean(found[:2], axis=0), atol=1e-6)
    loaded = load_adapter(made[0])
    cases = [Case(name, tmp_path / "in" / f"{name}.nii.gz") for name in "abc"]
    reader = Reader(read_volume, read_mask, volume_fingerprint)
    store = build_store(cases, loaded.card.preprocessing, (), reader, tmp_path / "store")
    logits = classify(loaded.backbone, loaded.task, store, np.arange(3), device=CPU)
    np.testing.assert_allclose(found[0], loaded.task.probabilities(logits), atol=1e-6)
    assert np.ptp(np.array(found[0])[:, 0]) > 1e-4


def test_the_library_writes_the_same_masks(tmp_path):
    folder = adapter(tmp_path / "adapter")
    scans(tmp_path / "in", "ab")
    done("predict", folder, tmp_path / "in", "-o", tmp_path / "one", "--flips")
    loaded = load_adapter(folder)
    result = medtpp.predict(loaded, tmp_path / "in", tmp_path / "two", flips=True)
    assert result.done == ("a.nii.gz", "b.nii.gz")
    assert {"waiting", "predicting", "writing"} == result.seconds.keys()
    for name in ("a.nii.gz", "b.nii.gz", "volumes.csv", "inputs.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert medtpp.predict(loaded, tmp_path / "in", tmp_path / "two", flips=True, resume=True).skipped == result.done
    with pytest.raises(ConfigError, match="Name a folder"):
        medtpp.predict(loaded, tmp_path / "in")
    with pytest.raises(ConfigError, match="flipz"):
        medtpp.predict(loaded, tmp_path / "in", tmp_path / "three", flipz=True)
    classifier = load_adapter(adapter(tmp_path / "classifier", task="classification"))
    with pytest.raises(ConfigError, match="gives a table"):
        medtpp.predict(classifier, tmp_path / "in", tmp_path / "three")
    assert len(medtpp.predict(classifier, tmp_path / "in")) == 2
    (tmp_path / "in" / "c.nii.gz").write_text("")
    with pytest.raises(DataError, match=r"c\.nii\.gz: the file is empty"):
        medtpp.predict(loaded, tmp_path / "in", tmp_path / "three")
    assert (tmp_path / "three" / "b.nii.gz").is_file()


def test_reading_runs_one_scan_ahead_and_no_further(tmp_path, monkeypatch):
    """However many scans there are, three are in memory at most: in work, waiting or being read."""
    alive, peak = set(), []

    def counted(case):
        volume = read_volume(case)
        alive.add(id(volume.array))
        weakref.finalize(volume.array, alive.discard, id(volume.array))
        return volume

    apply = VolumePreprocessing.apply

    def prepared(self, volume):
        array, restore = apply(self, volume)
        alive.add(id(array))
        weakref.finalize(array, alive.discard, id(array))
        peak.append(len(alive))
        return array, restore

    monkeypatch.setattr(reading, "read_volume", counted)
    monkeypatch.setattr(VolumePreprocessing, "apply", prepared)
    scans(tmp_path / "in", [f"{number:02}" for number in range(12)], shape=(4, 8, 8))
    done("predict", adapter(tmp_path / "adapter"), tmp_path / "in", "-o", tmp_path / "out")
    assert len(peak) == 12
    assert max(peak) <= 3  # one in work, one prepared a moment ago and its source
