"""`medtpp check` and `medtpp predict` on DICOM files that a copy, an export or a scanner left in a bad state."""

import nibabel
import numpy as np
import pytest
from pydicom.uid import generate_uid

from dicoms import SECRETS, read, save, slices
from medtpp.inference.write import write_mask
from runs import cli, refused
from segmenters import adapter

NAMES = [f"IM{number:03}" for number in range(6)]


def series(seed=0, depth=6, **elements):
    """Slices of a scan of its own."""
    values = np.random.default_rng(seed).integers(0, 2000, (depth, 20, 18)).astype(np.uint16)
    own = {name: generate_uid() for name in ("SeriesInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID")}
    return slices(values, **own, PatientID=f"PAT-{seed}", **elements)


def classes(folder):
    """Four sound scans in two classes."""
    for number in range(4):
        save(folder / "ab"[number % 2] / f"s{number}", series(number), NAMES)
    return folder


# Slices of which nothing is left


@pytest.mark.parametrize(
    ("names", "content", "told"),
    [
        (NAMES, b"", "a/bad/IM005: is empty (0 bytes)"),
        ([f"1.2.840.{number}" for number in range(6)], b"", "a/bad/1.2.840.5: is empty (0 bytes)"),
        (NAMES, bytes(100), "a/bad/IM005: breaks off"),
    ],
)
def test_an_end_slice_of_which_nothing_is_left_is_missed(tmp_path, names, content, told):
    paths = save(classes(tmp_path / "data") / "a" / "bad", series(9), names)
    paths[-1].write_bytes(content)
    said = refused("check", tmp_path / "data")
    assert f"{told} and lies among DICOM files: a slice may be missing." in said
    assert "1 error" in said
    assert "no image" not in said
    result = cli("predict", adapter(tmp_path / "adapter"), tmp_path / "data" / "a", "-o", tmp_path / "out")
    assert f"bad/{names[-1]}" in result.text
    assert "1 of 4 files could not be read." in result.text


def test_notes_among_slices_are_no_slices(tmp_path):
    classes(tmp_path)
    (tmp_path / "a" / "s0" / "VERSION").write_text("1.0\n")
    (tmp_path / "a" / "s0" / "done.txt").write_bytes(b"")
    (tmp_path / "a" / "EMPTY").write_bytes(b"")  # no slice lies in this folder
    result = cli("check", tmp_path)
    assert result.status == 0, result.text
    assert "3 files are no images: a/EMPTY, a/s0/VERSION, a/s0/done.txt" in result.text


# What headers do not tell


def test_a_series_without_pixel_spacing_is_no_screenshot(tmp_path):
    images, alone = series(9), series(8, depth=1)
    for image in [*images, *alone]:
        del image.PixelSpacing
    save(classes(tmp_path) / "a" / "bad", images, NAMES)
    save(tmp_path / "b", alone, ["alone"])
    said = refused("check", tmp_path)
    assert "a/bad: its 6 slices tell no pixel spacing, and make no volume. Export it again" in said
    assert "cannot be used" not in said
    assert "b/alone: is a slice (CT) that tells no pixel spacing, and is read as a single image." in said
    assert "screenshot" not in said
    assert """leave the fewer out: --set 'data.exclude=["b/alone"]'""" in said
    assert not [secret for secret in SECRETS if secret in said]


def test_findings_in_several_cases_stand_on_lines(tmp_path):
    for name in ("a/x.dcm", "b/y.dcm"):
        (classes(tmp_path) / name).write_text("<html>Please log in, Doe^Jane</html>")
    result = cli("check", tmp_path)
    assert result.status == 2
    advice = "is no DICOM file, or its header is broken. Copy or export it again."
    assert f"DICOM, 2 findings: - a/x.dcm: {advice} - b/y.dcm: {advice}" in result.text
    assert "Doe^Jane" not in result.text


# Several scans in a folder


def segmented(folder):
    """Four scans, with a mask each that has the name of their folder."""
    for number in range(4):
        paths = save(folder / "images" / f"s{number}", series(number), NAMES)
        volume = read(paths)
        mask = np.zeros(volume.array.shape[1:], np.uint8)
        mask[2:5, 3:9, 4 + number : 8 + number] = 1
        write_mask(folder / "masks" / f"s{number}.nii.gz", mask, volume.geometry)
    return folder


def test_the_mask_of_a_folder_with_two_stacks(tmp_path):
    segmented(tmp_path)
    save(tmp_path / "images" / "s1", series(20, depth=4), [f"X{number}" for number in range(4)])
    said = refused("check", tmp_path)
    assert "1 mask is called after a folder with several scans: masks/s1.nii.gz (images/s1#1 or images/s1#2)." in said
    assert "or call the mask after one, such as masks/s1#1.nii.gz" in said
    option = said.split("such as --set '", 1)[1].split("'", 1)[0]
    assert option == 'data.exclude=["images/s1#2"]'
    result = cli("check", tmp_path, "--set", option)
    assert result.status == 0, result.text
    assert "cases 4" in result.text
    assert "masks 4" in result.text
    for words in ("no image of the same name", "has no mask", "several"):
        assert words not in result.text
    # The other way that is told
    (tmp_path / "masks" / "s1.nii.gz").rename(tmp_path / "masks" / "s1#1.nii.gz")
    assert "1 of 5 images has no mask and counts as unlabelled: images/s1#2." in cli("check", tmp_path).text


def test_two_stacks_in_every_folder(tmp_path):
    segmented(tmp_path)
    for number in range(4):
        save(tmp_path / "images" / f"s{number}", series(20, depth=4), [f"X{number}" for number in range(4)])
    assert "4 masks are called after a folder with several scans: masks/s0.nii.gz" in refused("check", tmp_path)
    result = cli("check", tmp_path, "--set", 'data.exclude=["*#2"]')
    assert result.status == 0, result.text
    assert "masks 4" in result.text


def test_what_is_left_out_is_missed_no_more(tmp_path):
    segmented(tmp_path)
    save(tmp_path / "images" / "s0", series(30, depth=1, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), ["SCOUT"])
    (tmp_path / "images" / "s3.nii.gz").write_bytes(b"")  # of the same name as a scan
    said = refused("check", tmp_path)
    assert "images/s0/SCOUT: is a localizer" in said
    assert "images/s3 (images/s3, images/s3.nii.gz, masks/s3.nii.gz)" in said
    chosen = 'data.exclude=["images/s0/SCOUT", "images/s1", "images/s3.nii.gz"]'
    result = cli("check", tmp_path, "--set", chosen)
    assert result.status == 0, result.text
    assert "masks 3" in result.text
    assert "no image of the same name" not in result.text
    assert "has no mask" not in result.text


def test_a_manifest_names_a_series_of_a_folder(tmp_path):
    segmented(tmp_path)
    save(tmp_path / "images" / "s0", series(30, depth=1, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), ["SCOUT"])

    def write(first):
        names = [first, "s1", "s2", "s3"]
        rows = (f"images/{name},masks/s{number}.nii.gz\n" for number, name in enumerate(names))
        (tmp_path / "manifest.csv").write_text("image,mask\n" + "".join(rows))

    write("s0")
    said = refused("check", tmp_path)
    assert "(images/s0#1: CT, 6 slices of 20 x 18; images/s0/SCOUT: CT, 1 slice of 20 x 18)" in said
    write("s0#1")
    result = cli("check", tmp_path)
    assert result.status == 0, result.text
    assert "masks 4" in result.text


def test_numbers_and_nouns_agree(tmp_path):
    segmented(tmp_path / "data")
    values = np.random.default_rng(0).normal(size=(18, 20, 6)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(values, None), tmp_path / "data" / "images" / "plain.nii")
    assert "unknown in 1 case " in cli("check", tmp_path / "data").text
    (tmp_path / "empty.nii").write_bytes(b"")
    result = cli("predict", adapter(tmp_path / "adapter"), tmp_path / "empty.nii", "-o", tmp_path / "out")
    assert "1 of 1 file could not be read." in result.text
