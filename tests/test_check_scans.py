"""`medtpp check` and `medtpp predict` on DICOM files that a copy, an export or a scanner left in a bad state."""

import numpy as np
import pytest
from pydicom.uid import generate_uid

from dicoms import SECRETS, save, slices
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
    assert "not images" not in said
    result = cli("predict", adapter(tmp_path / "adapter"), tmp_path / "data" / "a", "-o", tmp_path / "out")
    assert f"bad/{names[-1]}" in result.text
    assert "could not be read" in result.text


def test_notes_among_slices_are_no_slices(tmp_path):
    classes(tmp_path)
    (tmp_path / "a" / "s0" / "VERSION").write_text("1.0\n")
    (tmp_path / "a" / "s0" / "done.txt").write_bytes(b"")
    (tmp_path / "a" / "EMPTY").write_bytes(b"")  # no slice lies in this folder
    result = cli("check", tmp_path)
    assert result.status == 0, result.text
    assert "3 files are not images" in result.text


# What headers do not tell


def test_a_series_without_pixel_spacing_is_no_screenshot(tmp_path):
    images = series(9)
    for image in images:
        del image.PixelSpacing
    save(classes(tmp_path) / "a" / "bad", images, NAMES)
    said = cli("check", tmp_path).text
    assert "a/bad/IM000: is a slice (CT) that tells no pixel spacing: it is read as a single image" in said
    assert "screenshot" not in said
    assert not [secret for secret in SECRETS if secret in said]


def test_findings_in_several_cases_stand_on_lines(tmp_path):
    for name in ("a/x.dcm", "b/y.dcm"):
        (classes(tmp_path) / name).write_text("<html>Please log in, Doe^Jane</html>")
    result = cli("check", tmp_path)
    assert result.status == 2
    advice = "is no DICOM file, or its header is broken. Copy or export it again."
    assert f"DICOM, 2 cases: - a/x.dcm: {advice} - b/y.dcm: {advice}" in result.text
    assert "Doe^Jane" not in result.text
