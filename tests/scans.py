"""Small folders of scans with masks, and experiments on them that take seconds."""

import json
from pathlib import Path

import numpy as np
import SimpleITK
from PIL import Image

from medtpp.config import Experiment
from medtpp.workflow.experiment import load_experiment

SETTINGS = (
    "tuner.roles=[attention.qkv]",
    "pretext={name: mae, decoder_depth: 1, decoder_width: 32}",
    "tpp={steps: 4, batch_size: 2, head_warmup: 2, checkpoint_every: 2}",
    "finetune={steps: 4, batch_size: 2, checkpoint_every: 2, validate_every: 2}",
    "hardware={threads: 1, precision: '32', accelerator: cpu}",
    "logging.tensorboard=false",
    "backbone={name: test_vit, weights: random}",
)


def write_volumes(folder: Path, cases: int = 6) -> Path:
    """NIfTI volumes about 14 x 20 x 18 with odd spacings and directions, an organ with a lesion in each."""
    for number in range(cases):
        rng = np.random.default_rng(number)
        shape = (14 + number % 3, 20, 18)
        labels = _organ(shape, rng)
        image = SimpleITK.GetImageFromArray((40 * labels + rng.normal(0, 4, shape)).astype(np.float32))
        mask = SimpleITK.GetImageFromArray(labels)
        for written, part in ((image, "images"), (mask, "masks")):
            written.SetSpacing((1.0, 1.1, 2.0))
            written.SetOrigin((5.0, -3.0, 10.0 * number))
            if number % 2:
                written.SetDirection((-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0))
            (folder / part).mkdir(parents=True, exist_ok=True)
            SimpleITK.WriteImage(written, str(folder / part / f"p{number}.nii.gz"))
    return folder


def write_modalities(folder: Path, cases: int = 6) -> Path:
    """The same in nnU-Net's layout, with two modalities."""
    write_volumes(folder, cases)
    (folder / "images").rename(folder / "imagesTr")
    (folder / "masks").rename(folder / "labelsTr")
    for path in sorted((folder / "imagesTr").iterdir()):
        image = SimpleITK.ReadImage(str(path))
        for channel, written in enumerate((image, image * -1 + 100)):
            SimpleITK.WriteImage(written, str(path.with_name(path.name.replace(".nii.gz", f"_{channel:04d}.nii.gz"))))
        path.unlink()
    about = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "organ": 1, "lesion": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(about))
    return folder


def write_pictures(folder: Path, cases: int = 8) -> Path:
    """PNG images of 64 x 48 pixels, an organ with a lesion in each."""
    for number in range(cases):
        rng = np.random.default_rng(number)
        labels = _organ((64, 48), rng)
        pixels = np.clip(60 + 60 * labels + rng.normal(0, 10, labels.shape), 0, 255).astype(np.uint8)
        for array, part in ((pixels, "images"), (labels, "masks")):
            (folder / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(folder / part / f"p{number}.png")
    return folder


def experiment(folder: Path, *settings: str) -> Experiment:
    """A quick experiment on a folder; later settings win."""
    return load_experiment(folder, [*SETTINGS, *settings])


def _organ(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """1 in an ellipsoid, 2 in a smaller one inside of it."""
    axes = np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij")
    centre = rng.uniform(-0.2, 0.2, len(shape))
    distance = np.sqrt(sum((axis - place) ** 2 for axis, place in zip(axes, centre, strict=True)))
    return np.where(distance < 0.3, 2, np.where(distance < 0.7, 1, 0)).astype(np.uint8)
