"""Recipes of data sets: small copies of the official downloads, prepared, checked, and broken in the usual ways."""

import csv
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import downloads
from dicoms import SECRETS
from medtpp.config import RECIPES
from medtpp.data.recipes.base import Part
from medtpp.data.sources import split_of
from runs import cli, done, refused

# Cases in train, val and test of the small copies.
SPLITS = {
    "chestxr": (12, 3, 6),
    "qata_cov19_v2": (4, 1, 2),
    "nct_crc": (36, 9, 9),
    "glas": (8, 2, 3),
    "lits": (5, 0, 1),
    "la2018": (4, 0, 1),
    "ricord": (6, 2, 2),
    "vs": (5, 0, 1),
}


def table(folder):
    with (folder / "manifest.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def make(name, folder):
    return getattr(downloads, name)(folder)


def prepared(name, source, out, *more):
    return done("data", "prepare", name, "--source", source, "--out", out, "--allow-incomplete", *more)


def checked(name, out, status=0):
    recipe = RECIPES.get(name)
    structures = str(dict(recipe.structures)).replace("'", "")
    sets = [f"task={recipe.kind}", *([f"data.structures={structures}"] if recipe.structures else [])]
    command = ("check", out, "--modality", recipe.modality, *(part for text in sets for part in ("--set", text)))
    result = cli(*command)
    assert result.status == status, result.text
    return result.text


def test_every_recipe_is_tried():
    assert sorted(SPLITS) == RECIPES.names()
    text = done("data", "list").text
    for name, recipe in RECIPES.items():
        assert name in text
        assert recipe.citation
        assert all(split_of(split) for split in recipe.shares)


def test_the_page_tells_of_every_recipe():
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name, recipe in RECIPES.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` "))
        assert all(word in row for word in re.findall(r"https://[^ ]+", recipe.access))
        assert sum(part.count for part in recipe.parts) == sum(
            int(number.replace(",", "")) for number in re.findall(r"[\d,]+", row.split("|")[3])
        )


@pytest.mark.parametrize("name", SPLITS)
def test_a_download_becomes_a_data_set(name, tmp_path):
    source, out = make(name, tmp_path / "download"), tmp_path / "data" / name
    files = {path: path.stat().st_mtime_ns for path in source.rglob("*") if path.is_file()}
    said = prepared(name, source, out).text
    assert f"manifest {out / 'manifest.csv'}".replace(" ", "") in said.replace(" ", "")
    assert {path: path.stat().st_mtime_ns for path in source.rglob("*") if path.is_file()} == files

    rows = table(out)
    counts = Counter(row["split"] for row in rows)
    assert tuple(counts[split] for split in ("train", "val", "test")) == SPLITS[name]
    assert all((out / row[column]).exists() for row in rows for column in ("image", "mask") if row.get(column))
    patients = {}
    for row in rows:
        if row.get("patient"):
            patients.setdefault(row["patient"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in patients.values())
    assert "0 errors" in (text := checked(name, out)) or "No problems" in text

    card = (out / "README.md").read_text(encoding="utf-8")
    recipe = RECIPES.get(name)
    assert all(words in card for words in (recipe.licence, recipe.access, recipe.citation, recipe.protocol))
    assert str(tmp_path) not in card
    everything = said + (out / "manifest.csv").read_text(encoding="utf-8") + card
    assert not any(secret in everything for secret in SECRETS)


@pytest.mark.parametrize("name", ["chestxr", "glas", "ricord"])
def test_the_split_is_the_same_everywhere(name, tmp_path):
    splits = []
    for place in ("here", "there/deeper"):
        source, out = make(name, tmp_path / place / "download"), tmp_path / place / "out"
        prepared(name, source, out)
        splits.append({row["image"]: row["split"] for row in table(out)})
    assert splits[0] == splits[1]


def test_classes_are_in_proportion(tmp_path):
    prepared("nct_crc", make("nct_crc", tmp_path / "download"), tmp_path / "out")
    counts = Counter((row["label"], row["split"]) for row in table(tmp_path / "out"))
    assert {counts[label, split] for label in ("ADI", "TUM") for split in ("train",)} == {4}
    assert {counts[label, split] for label in ("ADI", "TUM") for split in ("val", "test")} == {1}


def test_patients_of_the_official_test_set_are_not_trained_on(tmp_path):
    source = make("qata_cov19_v2", tmp_path / "download")
    said = prepared("qata_cov19_v2", source, tmp_path / "out").text
    assert "1 cases are left out of train and val: their patients are in the official test set." in said
    rows = {row["image"].rpartition("/")[2]: row for row in table(tmp_path / "out")}
    assert "sub-S002_ses-E3_run-1.png" not in rows
    assert rows["sub-S002_ses-E4_run-1.png"]["split"] == "test"
    assert rows["sub-S001_ses-E1_run-1.png"]["split"] == rows["sub-S001_ses-E2_run-1.png"]["split"]


def test_glands_lose_their_numbers_alone(tmp_path):
    source = make("glas", tmp_path / "download")
    prepared("glas", source, tmp_path / "out")
    for row in table(tmp_path / "out"):
        mask = np.asarray(Image.open(tmp_path / "out" / row["mask"]))
        official = np.asarray(Image.open(tmp_path / "out" / row["image"].replace(".bmp", "_anno.bmp")))
        np.testing.assert_array_equal(mask, official > 0)
    assert {row["grade"] for row in table(tmp_path / "out")} == {"benign", "malignant"}
    assert "flatters" in (tmp_path / "out" / "README.md").read_text()


def test_a_whole_download_needs_no_leave(tmp_path, monkeypatch):
    monkeypatch.setattr(RECIPES.get("chestxr"), "parts", (Part("train", 15), Part("validation", 6)))
    source = make("chestxr", tmp_path / "download")
    text = done("data", "prepare", "chestxr", "--source", source, "--out", tmp_path / "out").text
    assert "note" not in text
    (source / "train" / "covid" / "covid_1.jpg").unlink()
    said = refused("data", "prepare", "chestxr", "--source", source, "--out", tmp_path / "other")
    assert "train: found 14 of 15 images" in said
    assert "--allow-incomplete" in said
    assert not (tmp_path / "other").exists()
    shutil.copy(source / "train" / "normal" / "normal_1.jpg", source / "train" / "normal" / "more.jpg")
    shutil.copy(source / "train" / "normal" / "normal_1.jpg", source / "train" / "normal" / "more2.jpg")
    assert "found 16 of 15" in refused("data", "prepare", "chestxr", "--source", source, "--out", tmp_path / "other")


def test_what_is_missing_is_named(tmp_path):
    source = make("lits", tmp_path / "download")
    (source / "Training Batch 1" / "volume-2.nii").unlink()
    said = refused("data", "prepare", "lits", "--source", source, "--out", tmp_path / "out")
    assert "scans: found 5 of 131 scans; missing: volume-2, volume-6, volume-7" in said
    assert "and 116 more" in said


BROKEN = {
    "chestxr": ("train/covid/covid_1.jpg", None),
    "qata_cov19_v2": (
        "QaTa-COV19-v2/Train Set/Images/covid_2.png",
        "QaTa-COV19-v2/Train Set/Ground-truths/mask_covid_2.png",
    ),
    "nct_crc": ("NCT-CRC-HE-100K/ADI/ADI-00000001.tif", None),
    "glas": (
        "Warwick QU Dataset (Released 2016_07_08)/train_2.bmp",
        "Warwick QU Dataset (Released 2016_07_08)/train_2_anno.bmp",
    ),
    "lits": ("Training Batch 1/volume-1.nii", "Training Batch 1/segmentation-1.nii"),
    "la2018": ("Training Set/LA1AB/lgemri.nrrd", "Training Set/LA1AB/laendo.nrrd"),
    "ricord": (
        "manifest-B/MIDRC-RICORD-1B/MIDRC-RICORD-1B-419639-000003/08-02-2002-NA-CT CHEST-04614/"
        "2.000000-ROUTINE CHEST-97100/1-003.dcm",
        None,
    ),
    "vs": (
        "Vestibular-Schwannoma-SEG/VS-SEG-002/09-06-1993-NA-MRT-17621/5.000000-A-1/1-004.dcm",
        "contours/vs_gk_2_t1/contours.json",
    ),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_broken_file_is_told_and_can_be_left_out(name, tmp_path):
    source = make(name, tmp_path / "download")
    (source / BROKEN[name][0]).write_bytes(b"nothing that can be read")
    said = refused("data", "prepare", name, "--source", source, "--out", tmp_path / "out")
    folder, _, file = BROKEN[name][0].rpartition("/")
    assert file in said or folder in said
    assert not (tmp_path / "out" / "manifest.csv").exists()
    assert not any(secret in said for secret in SECRETS)
    prepared(name, source, tmp_path / "out")
    assert not any(row["image"].endswith(BROKEN[name][0]) for row in table(tmp_path / "out"))
    assert len(table(tmp_path / "out")) == sum(SPLITS[name]) - 1
    assert "left out: " in (tmp_path / "out" / "README.md").read_text()
    checked(name, tmp_path / "out")


@pytest.mark.parametrize("name", [name for name, (_, mask) in BROKEN.items() if mask])
def test_a_missing_mask_is_told_and_can_be_left_out(name, tmp_path):
    source = make(name, tmp_path / "download")
    (source / BROKEN[name][1]).unlink()
    said = refused("data", "prepare", name, "--source", source, "--out", tmp_path / "out")
    assert "missing" in said or "has no contours.json" in said
    prepared(name, source, tmp_path / "out")
    assert len(table(tmp_path / "out")) == sum(SPLITS[name]) - 1


@pytest.mark.parametrize("name", SPLITS)
def test_another_layout_is_told(name, tmp_path):
    (tmp_path / "download" / "photos").mkdir(parents=True)
    downloads.picture(tmp_path / "download" / "photos" / "1.png", 0)
    said = refused("data", "prepare", name, "--source", tmp_path / "download", "--out", tmp_path / "out")
    assert "as it is downloaded. Expected in there:" in said
    assert RECIPES.get(name).layout[0] in said
    assert not (tmp_path / "out").exists()


def test_mistakes_in_the_command(tmp_path):
    source = make("chestxr", tmp_path / "download")
    assert "Did you mean 'chestxr'?" in refused("data", "prepare", "chestx", "--source", source)
    nowhere = tmp_path / "nowhere"
    assert "There is no folder" in refused("data", "prepare", "chestxr", "--source", nowhere, "--out", tmp_path / "out")
    assert "is the download itself" in refused("data", "prepare", "chestxr", "--source", source, "--out", source)
    prepared("chestxr", source, tmp_path / "out")
    again = ("data", "prepare", "chestxr", "--source", source, "--out", tmp_path / "out", "--allow-incomplete")
    assert "has a manifest.csv and a README.md already. Use --overwrite" in refused(*again)
    done(*again, "--overwrite")


def test_the_usual_folder_is_named_after_the_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = make("chestxr", tmp_path / "data" / "chestxr" / "official")
    done("data", "prepare", "chestxr", "--source", source, "--allow-incomplete")
    assert {row["image"].split("/")[0] for row in table(tmp_path / "data" / "chestxr")} == {"official"}


def test_a_mask_of_another_size_is_told(tmp_path):
    source = make("qata_cov19_v2", tmp_path / "download")
    mask = source / "QaTa-COV19-v2" / "Train Set" / "Ground-truths" / "mask_covid_2.png"
    downloads.labels(mask, downloads.square(255, (8, 8)))
    said = refused("data", "prepare", "qata_cov19_v2", "--source", source, "--out", tmp_path / "out")
    assert "the mask has another size than its image (16 x 16 and 8 x 8 of covid_2.png)" in said
