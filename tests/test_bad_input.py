"""Each kind of broken input, made for real: exit status 2, no traceback, and a message that says what to do."""

import importlib.util
import resource
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from runs import SIZE, adapter_folder, data_folder, done, other_folder, refused, settings


def image(path, level=0, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = np.random.default_rng(level).integers(0, 255, (SIZE, SIZE), dtype=np.uint8)
    Image.fromarray(grid).convert(mode).save(path)
    return path


def class_folders(folder, lesion=12, normal=12):
    for number in range(lesion):
        image(folder / "lesion" / f"{number}.png", number)
    for number in range(normal):
        image(folder / "normal" / f"{number}.png", 100 + number)
    return folder


def manifest(folder, text, count=24, encoding="utf-8"):
    for number in range(count):
        image(folder / "images" / f"{number}.png", number)
    (folder / "manifest.csv").write_bytes(text.encode(encoding))
    return folder


def rows(header="image,label,patient", count=24, separator=","):
    """Lines of a manifest that is well."""
    lines = [header, *(f"images/{n}.png,{'lesion' if n % 2 else 'normal'},p{n}" for n in range(count))]
    return [line.replace(",", separator) for line in lines]


def with_split(lines):
    """The same with a split: two thirds in train, the rest in test."""
    return [f"{line},{'split' if n == 0 else 'test' if n % 3 == 0 else 'train'}" for n, line in enumerate(lines)]


def says(words, *arguments):
    said = refused(*arguments)
    assert [word for word in words if word not in said] == [], said


# Data


def empty(folder):
    folder.mkdir()


def only_other_files(folder):
    folder.mkdir()
    (folder / "readme.txt").write_text("images are on the other disk")


def broken_images(folder):
    good = class_folders(folder) / "lesion"
    png = (good / "0.png").read_bytes()
    (good / "0.png").write_bytes(png[: len(png) // 2])
    image(good / "big.jpg", 50)
    jpeg = (good / "big.jpg").read_bytes()
    (good / "big.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (good / "2.png").write_text("an error page of the PACS")
    (good / "3.png").write_bytes(b"")
    Image.fromarray(np.full((SIZE, SIZE), np.nan, dtype=np.float32)).save(good / "4.tiff")


def latin(folder):
    lines = rows()
    lines[3] = lines[3].replace("p2", "Müller")
    manifest(folder, "\n".join(lines), encoding="latin-1")


def doubled_pixels(folder):
    class_folders(folder)
    shutil.copy(folder / "lesion" / "3.png", folder / "normal" / "3-again.png")


def torn_patient(folder):
    lines = [line.replace(",p1,", ",p0,").replace(",p2,", ",p0,") for line in with_split(rows())]
    manifest(folder, "\n".join(lines))


def several_mistakes(folder):
    lines = with_split(rows())
    lines[1] = lines[1].replace("0.png", "gone.png")
    lines[4] = lines[4].replace(",train", ",validate")
    lines[6] = lines[6].replace(",p5,", ",p4,")
    lines[8] = lines[8] + ",more"
    manifest(folder, "\n".join(lines))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: None, ["There is no file or folder", "data.path"]),
        (empty, ["holds no images", "DATA/benign/1.png"]),
        (only_other_files, ["holds no images", "readme.txt"]),
        (lambda folder: class_folders(folder, normal=0), ["All 12 labelled cases are of one class (lesion)"]),
        (lambda folder: class_folders(folder, 2, 2), ["No sensible split", "lesion: 2 different"]),
        (broken_images, ["5 images cannot be read", "0.png", "big.jpg (is truncated", "2.png (is not a PNG",
                         "3.png (the file is empty", "4.tiff (holds NaN", "--set 'data.exclude="]),
        (lambda folder: manifest(folder, "\n".join(rows("file,label,patient"))), ["no column 'image'", "file, label"]),
        (lambda folder: manifest(folder, "\n".join(rows(separator="|"))), ["no column 'image'", "image|label|patient"]),
        (lambda folder: manifest(folder, "image,label\n"), ["has no rows"]),
        (lambda folder: manifest(folder, "\n".join(rows(count=30))), ["6 images do not exist", "line 26: images/24"]),
        (latin, ["is not UTF-8 (line 4)", "CSV UTF-8"]),
        (doubled_pixels, ["the same pixels under different labels", "lesion/3.png (lesion) = normal/3-again.png"]),
        (torn_patient, ["1 patient in two splits: p0", "images/2.png in test", "Move all images of a patient"]),
        (several_mistakes, ["1 image does not exist", "gone.png", "unknown split", "line 5: 'validate'",
                            "patient in two splits: p4", "another number of cells", "line 9"]),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used(tmp_path, make, words):
    data, out = tmp_path / "data", tmp_path / "out"
    make(data)
    says(words, "run", data, "--out", out, *settings())
    assert not list(out.iterdir())
    says(words[:1], "init", data, "-o", tmp_path / "experiment.yaml", *settings())
    assert not (tmp_path / "experiment.yaml").exists()


def test_manifests_of_spreadsheets_are_read(tmp_path):
    """A byte order mark, semicolons, Windows line ends: what Excel writes where the comma marks decimals."""
    manifest(tmp_path / "data", "\ufeff" + "\r\n".join(rows(separator=";")))
    text = done("check", tmp_path / "data").text
    assert "cases 24" in text
    assert "No problems found." in text


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (["data.labels=3"], ["data.labels=3 is not possible", "at least 4"]),
        (["data.labels=1000"], ["data.labels=1000 is not possible"]),
        (["data.image_size=40"], ["40 is not a multiple of the patch size 16", "data.image_size=32 or 48"]),
        (["backbone.name=rensett"], ["No backbone is called 'rensett'", "medtpp list backbones"]),
        (["backbone.name=resnet18", "backbone.weights=random", "pretext=mae"], ["resnet18"]),
        (["backbone.weights=none.pth", "backbone.name=test_vit"], ["There is no weights file none.pth"]),
        (["data.unlabelled=[/nowhere]"], ["/nowhere is not a folder"]),
        (["data.multilabel=true"], ["write a manifest.csv"]),
        (["data.layout=folderz"], ["no source called 'folderz'", "Did you mean 'folders'?"]),
        (["data.columns.image=file", "data.layout=manifest"], ["manifest"]),
    ],
)
def test_settings_that_do_not_fit_the_data(tmp_path, chosen, words):
    says(words, "run", other_folder(), "--out", tmp_path / "out", *settings(*chosen))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "chosen",
    ["tpp.steps=0", "tpp.batch_size=0", "tpp.learning_rate=-1", "tpp.head_warmup=-1", "finetune.validate_every=0",
     "finetune.checkpoint_every=-2", "hardware.threads=0", "data.image_size=0", "data.labels=-4"],
)  # fmt: skip
def test_numbers_have_bounds(tmp_path, chosen):
    says([chosen.split("=")[0], "should be greater than"], "check", other_folder(), "--set", chosen)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    command = ("finetune", data_folder(), "--out", tmp_path / "out")
    says(["The loss is", "learning rate"], *command, *settings("finetune.head_learning_rate=1e30", "finetune.warmup=0"))
    assert not (tmp_path / "out" / "finetune" / "adapter").exists()


# Machine


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path):
    words = ["hardware.accelerator is cuda", "Use auto or cpu"]
    says(words, "run", data_folder(), "--out", tmp_path / "out", *settings("hardware.accelerator=cuda"))
    command = ("predict", adapter_folder(), data_folder(), "-o", tmp_path / "p.csv")
    says(words, *command, "--accelerator", "cuda")
    says(["cuda", "mps"], *command, "--accelerator", "gpu")


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_loggers_that_are_not_installed(tmp_path, name):
    if importlib.util.find_spec(name):
        pytest.skip("it is installed")
    words = [f"logging.{name} needs its package", f"pip install 'medtpp[{name}]'"]
    says(words, "run", data_folder(), "--out", tmp_path / "out", *settings(f"logging.{name}=true"))


def test_output_folders_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    says(["file is a file"], "run", data_folder(), "--out", tmp_path / "file", *settings())
    says(["Cannot make the folder"], "run", data_folder(), "--out", tmp_path / "file" / "run", *settings())
    says(["Cannot make the folder /proc/medtpp"], "phantom", "--out", "/proc/medtpp", "--cases", 10, "--size", 32)
    command = ("predict", adapter_folder(), data_folder(), "-o")
    says([f"{tmp_path / 'file'}"], *command, tmp_path / "file" / "p.csv")


@contextmanager
def largest_file(size):
    """As on a full disk, writing more than `size` bytes to a file fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_while_results_are_written(tmp_path):
    with largest_file(500):
        says(
            ["Cannot write", "p.csv", "Free some space"],
            "predict",
            adapter_folder(),
            data_folder(),
            "-o",
            tmp_path / "p.csv",
        )
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_images_are_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDTPP_CACHE", str(tmp_path / "cache"))
    command = ("run", data_folder(), "--out", tmp_path / "out", *settings("finetune.steps=2", "tpp.enabled=false"))
    with largest_file(20_000):
        says(["The image cache cannot be written", "MEDTPP_CACHE"], *command)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".lock"}
    done(*command)


@pytest.mark.parametrize("every", [1, 100])
def test_a_full_disk_while_training(tmp_path, every):
    """The resume file is torch's, the adapter safetensors': both tell of a full disk in their own way."""
    chosen = settings(f"tpp.checkpoint_every={every}")
    with largest_file(30_000):
        says(["Cannot write", "Free some space"], "tpp", data_folder(), "--out", tmp_path / "out", *chosen)
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert not list((tmp_path / "out").rglob("*.pt"))
    done("tpp", data_folder(), "--out", tmp_path / "out", "--resume", *chosen)
