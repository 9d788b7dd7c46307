"""Images and masks that lie as class folders do, and classes that only look as if they did."""

import numpy as np
import pytest
from PIL import Image

from folders import read, touch
from medtpp.errors import DataError
from runs import cli, refused


def problems(dataset):
    return {problem.code: problem for problem in dataset.problems}


def numbered(*patterns, count=4):
    return [pattern.format(number) for pattern in patterns for number in range(count)]


@pytest.mark.parametrize(
    ("patterns", "told"),
    [
        (("imagesTr/{}_0000.nii.gz", "labelsTr/{}.nii.gz"), "imagesTr/ is named like a folder of images"),
        (
            ("images/{}.png", "msk/{}.png"),
            "images/ is named like a folder of images, not like a class (beside it: msk/)",
        ),
        (("images/{}.png", "mask_png/{}.png"), "(beside it: mask_png/)"),
        (("images/{}.png",), "images/ is named like a folder of images, not like a class. What is it?"),
        (("images/benign/{}.png", "images/malignant/{}.png"), "images/ is named like a folder of images"),
        (("train/img_png/{}.png", "test/img_png/{}.png"), "test/img_png/ is named like a folder of images"),
        (("ct/{}.nii.gz", "ct_seg/{}_seg.nii.gz"), "ct_seg/ and ct/ look like masks and their images"),
        (("test/ct/{}_0000.nii.gz", "test/LabelsCT/{}.nii.gz"), "4 of 4 names are the same in both"),
    ],
)
def test_masks_are_no_class(tmp_path, patterns, told):
    touch(tmp_path, *numbered(*patterns))
    said = refused("check", tmp_path)
    for words in (told, "images/ and masks/", f"use {tmp_path}", "--set data.layout=folders"):
        assert words in said
    dataset = read(tmp_path, layout="folders")  # the way out that is told
    assert len(dataset.cases) == 4 * len(patterns)


@pytest.mark.parametrize(
    "patterns",
    [
        ("normal/{:03}.png", "lesion/{:03}.png"),
        ("mask/{:03}.png", "no_mask/{:03}.png"),  # both speak of masks: people with masks on their faces
        ("labelled_cells/{:03}.png", "others/{:03}.png"),
        ("normal/{:03}.png", "roi/x{:03}.png"),
        ("liver_images/{:03}.png", "lung_images/{:03}.png"),
        ("imaging/{:03}.png", "segmental/{:03}.png"),
        ("a/scan{}/1.png", "b/scan{}/1.png"),
    ],
)
def test_classes_stay_classes(tmp_path, patterns):
    dataset = read(touch(tmp_path, *numbered(*patterns)))
    assert set(dataset.classes) == {pattern.split("/")[0] for pattern in patterns}
    assert dataset.problems == ()


def test_masks_inside_class_folders(tmp_path):
    touch(tmp_path, *numbered("benign/images/{}.png", "benign/masks/{}.png", "malignant/images/{}.png"))
    with pytest.raises(
        DataError, match=r"4 files in class folders lie in a folder of masks.*benign/masks/0\.png"
    ) as told:
        read(tmp_path)
    (way,) = [line for line in told.value.problems if "data.exclude" in line]
    assert """--set 'data.exclude=["*/masks/*"]'""" in way
    assert {case.id.split("/")[1] for case in read(tmp_path, exclude=["*/masks/*"]).cases} == {"images"}


@pytest.mark.parametrize(
    ("names", "masks", "pattern"),
    [
        (numbered("{}.nii.gz", "{}_seg.nii.gz"), 4, "*_seg.*"),
        (numbered("b/c ({}).png", "b/c ({})_mask.png", "a/c ({}).png"), 4, "*_mask.*"),
        (["a/1.png", "a/1_mask.png", "a/1_mask_1.png", "b/2.png"], 2, "*_mask_[0-9]*"),
        (numbered("p{0}/p{0}_t1.nii.gz", "p{0}/p{0}_t2.nii.gz", "p{0}/p{0}_seg.nii.gz"), 4, "*_seg.*"),
    ],
)
def test_masks_beside_their_images(tmp_path, names, masks, pattern):
    found = problems(read(touch(tmp_path, *names)))["masks-among-images"]
    assert found.severity == "error"
    assert len(found.cases) == masks
    assert f'"{pattern}"' in found.message
    assert "If they are images: --set data.layout=folders" in found.message
    assert problems(read(tmp_path, layout="folders"))["masks-among-images"].severity == "warning"
    rest = read(tmp_path, exclude=["*_seg.*", "*_mask.*", "*_mask_[0-9]*"])
    assert "masks-among-images" not in problems(rest)
    assert len(rest.cases) == len(names) - masks


def test_endings_that_belong_to_no_other_file(tmp_path):
    dataset = read(touch(tmp_path, "a/1_label.png", "a/2_label.png", "b/1.png", "b/mask.png", "b/12_1.png", "b/12.png"))
    assert dataset.problems == ()


def test_advice_that_is_followed_is_enough(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(24):
        folder = tmp_path / "ab"[number % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 24), dtype=np.uint8)).save(folder / f"{number}.png")
        Image.fromarray(rng.integers(0, 2, (16, 24), dtype=np.uint8) * 255).save(folder / f"{number}_mask.png")
    said = refused("check", tmp_path)
    assert "24 files are named as masks of others and are taken for images: a/0_mask.png" in said
    option = said.split("--set '", 1)[1].split("'", 1)[0]
    result = cli("check", tmp_path, "--set", option)
    assert result.status == 0, result.text
    assert "cases 24" in result.text
