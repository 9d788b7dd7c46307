"""Names, dates and ids of DICOM headers appear nowhere, whatever libraries have to say about them."""

import gzip
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from dicoms import SECRETS, dataset, save, slices
from medtpp.data.case import Case
from medtpp.data.volumes import read_volume
from medtpp.inference.write import write_mask
from runs import settings
from scans import SETTINGS

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pydicom.*")  # files against the standard are the point

MEDTPP = """
import json, sys
from medtpp.cli import main
for command in json.loads(sys.argv[1]):
    sys.argv[1:] = command
    try:
        main()
    except SystemExit as end:
        assert not end.code, command
"""
READ_AT_ONCE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from medtpp.data.volumes.header import read_header
from medtpp.data.volumes.pixels import PixelFile
import logging
logging.basicConfig(level=logging.DEBUG)
files = 8 * sorted(Path(sys.argv[1]).rglob("*.dcm"))
with ThreadPoolExecutor(8) as pool:
    for number, header in enumerate(pool.map(read_header, files)):
        assert header.patient
    for values in pool.map(lambda path: PixelFile(path).values(), files):
        assert values.ndim == 2
"""


def python(code, *arguments, folder):
    """A process of its own, whose caches are in a folder, too."""
    environment = {**os.environ, "MEDTPP_CACHE": str(folder / "medtpp"), "XDG_CACHE_HOME": str(folder)}
    environment["PYTHONWARNINGS"] = "default"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, timeout=300, check=False, env=environment)


def careless(image, number=0):
    """The same with values that are against the standard, so that libraries quote them in what they say."""
    with pydicom.config.disable_value_validation():
        image.PatientID = f"{SECRETS[0]} {SECRETS[1]} {number} " * 5  # over 64 characters
        image.StudyDate = f"{SECRETS[4]} {SECRETS[2]}"
        image.SeriesInstanceUID = f"{SECRETS[1]}.{number}"
        image.StudyInstanceUID = image.FrameOfReferenceUID = SECRETS[4]
        image.AcquisitionNumber = None
        image.ImageType = ["ORIGINAL", SECRETS[3]]
        image.SpecificCharacterSet = SECRETS[4]
    wrong = Tag("PatientWeight")
    image[wrong] = RawDataElement(wrong, "DS", 10, f"{SECRETS[0]}  ".encode(), 0, False, True)
    return image


def radiographs(folder, cases=40):
    """Two classes of blobs, a file each."""
    rng = np.random.default_rng(0)
    for number in range(cases):
        pixels = rng.integers(0, 900, (32, 32)).astype(np.uint16)
        pixels[8:24, 8:24] += np.uint16(2000 * (number % 2))
        with pydicom.config.disable_value_validation():
            image = careless(dataset(pixels, Modality="DX", BitsStored=12, HighBit=11), number)
            save(folder / ("normal", "opacity")[number % 2], [image], [f"r{number:02}.dcm"])


def series(folder, cases=6, shape=(14, 20, 18)):
    """CT series in folders with masks beside them, an organ with a lesion in each; every second one is careless."""
    for number in range(cases):
        labels = np.zeros(shape, np.uint8)
        labels[4:10, 5:14, 4:12], labels[6:8, 7:10, 6:9] = 1, 2
        pixels = np.random.default_rng(number).integers(0, 300, shape).astype(np.uint16) + np.uint16(400) * labels
        images = slices(pixels, step=1.2, SeriesInstanceUID=f"1.2.{number}")
        for image in images:
            image.StudyDescription, image.InstitutionName, image.PatientID = *SECRETS[3:5], f"{SECRETS[1]}{number}"
            if number % 2:
                careless(image, number)
        files = save(folder / "images" / f"s{number}", images, [f"{place:02}" for place in range(len(images))])
        geometry = read_volume(Case("", files[0], files=tuple(files))).geometry
        write_mask(folder / "masks" / f"s{number}.nii.gz", labels, geometry)


def told(result):
    return result.stdout + result.stderr


def leaks(*texts):
    """What of the headers is in some bytes."""
    return {secret for secret in SECRETS for text in texts if secret.encode() in text}


def stored(*folders):
    """The bytes of all files, of compressed ones also what is in them, and their names."""
    names = [path for folder in folders for path in folder.rglob("*")]
    files = [path for path in names if path.is_file()]
    inside = [gzip.decompress(path.read_bytes()) for path in files if path.suffix == ".gz"]
    for path in filter(zipfile.is_zipfile, files):
        with zipfile.ZipFile(path) as archive:
            inside += map(archive.read, archive.namelist())
    return [path.read_bytes() for path in files] + inside + [str(path).encode() for path in names]


def tell_nothing(commands, out, caches):
    """Run commands; nothing of the headers is in what they say and write."""
    result = python(MEDTPP, json.dumps([[str(part) for part in command] for command in commands]), folder=caches)
    assert result.returncode == 0, result.stderr.decode()
    assert not leaks(told(result)), told(result).decode()[:2000]
    found = stored(out, caches)
    assert len(found) > 20
    assert any(path.is_file() for path in (caches / "medtpp").rglob("*"))
    assert not leaks(*found)


def test_libraries_that_quote_headers_are_not_heard_in_any_thread(tmp_path):
    radiographs(tmp_path / "in", 12)
    result = python(READ_AT_ONCE, tmp_path / "in", folder=tmp_path)
    assert result.returncode == 0, result.stderr.decode()
    assert not leaks(told(result)), told(result).decode()[:2000]


def test_a_whole_run_on_careless_headers_tells_nothing(tmp_path):
    data, out, caches = tmp_path / "data", tmp_path / "out", tmp_path / "caches"
    radiographs(data)
    experiment = out / "experiment.yaml"
    sets = settings("data.image_size=32")
    commands = [
        ("check", data),
        ("init", data, "--modality", "xray", "-o", experiment, *sets),
        ("run", experiment, "--out", out / "run"),
        ("report", out / "run"),
        ("predict", out / "run" / "finetune" / "adapter", data / "normal", "-o", out / "predicted.csv"),
    ]
    tell_nothing(commands, out, caches)
    assert (out / "run" / "report.html").is_file()


def test_a_whole_segmentation_of_careless_series_tells_nothing(tmp_path):
    data, out, caches = tmp_path / "data", tmp_path / "out", tmp_path / "caches"
    series(data)
    experiment, adapter = out / "experiment.yaml", out / "run" / "finetune" / "adapter"
    sets = [part for setting in (*SETTINGS, "task={name: segmentation, head: light}") for part in ("--set", setting)]
    predict = ("predict", adapter, data / "images", "-o", out / "masks", "--format", "nii.gz", "--probabilities")
    commands = [
        ("check", data),
        ("init", data, "--modality", "ct", "-o", experiment, *sets),
        ("run", experiment, "--out", out / "run"),
        ("report", out / "run"),
        predict,
        ("export", adapter, "--to", "torch", "-o", out / "exported"),
    ]
    tell_nothing(commands, out, caches)
    assert len(list((out / "masks").rglob("*.nii.gz"))) == 18  # a mask and two maps of each
    assert any(map(zipfile.is_zipfile, caches.rglob("*.scan")))  # what reading told was looked into


@pytest.mark.parametrize("keyword", ["SOPInstanceUID", "StudyInstanceUID", "FrameOfReferenceUID"])
def test_a_segmentation_of_a_careless_series(tmp_path, keyword):
    """Written with the patient in it, as the standard demands, or refused; in neither case is anything said."""
    images = slices(FrameOfReferenceUID="1.2.3.4")
    with pydicom.config.disable_value_validation():
        for number, image in enumerate(images):
            image.PatientID, image.StudyDate = SECRETS[0] * 9, SECRETS[3]
            setattr(image, keyword, f"{SECRETS[1]}.{number if keyword == 'SOPInstanceUID' else 0}")
        files = save(tmp_path / "in", images)
    code = """
import sys, logging
from pathlib import Path
import numpy as np
from medtpp.data.case import Structure
from medtpp.inference.write import write_dicom_seg
logging.basicConfig(level=logging.DEBUG)
labels = np.zeros((5, 6, 8), np.uint8)
labels[1:3, 2:4, 2:4] = 1
write_dicom_seg(Path(sys.argv[1]), labels, [Structure("lesion", (1,))], [Path(file) for file in sys.argv[2:]])
"""
    result = python(code, tmp_path / "seg.dcm", *files, folder=tmp_path)
    assert not leaks(told(result)), told(result).decode()
    written = Path(tmp_path / "seg.dcm").is_file()
    assert written or b"Write NIfTI instead" in result.stderr
