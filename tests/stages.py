"""Stages on phantoms: small inputs for `run_tpp`, `run_finetune` and `run_pretrain`."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from medtpp.config import AugmentOptions, Experiment, HardwareOptions, LoggingOptions, experiment_schema
from medtpp.data.cache import ImageCache, build
from medtpp.data.case import Case
from medtpp.data.fingerprints import Fingerprints
from medtpp.data.preprocess import Preprocessing
from medtpp.data.read import read_dataset
from medtpp.data.split import make_split
from medtpp.pretext.mae import MAEOptions
from medtpp.seeds import Seeds
from medtpp.training.finetune import FinetuneInputs
from medtpp.training.pretrain import PretrainInputs, PretrainOptions
from medtpp.training.stage import StageData
from medtpp.training.tpp import TPPInputs

SIZE = 64
PREPROCESSING = Preprocessing(image_size=SIZE, channels=1)
HARDWARE = {"threads": 1, "precision": "32", "accelerator": "cpu"}


@dataclass(frozen=True)
class Data:
    """A phantom data set, cached and split."""

    cache: ImageCache
    classes: tuple[str, ...]
    splits: dict[str, tuple[Case, ...]]

    def stage(self, split: str) -> StageData:
        return StageData(self.cache, self.splits[split])

    def fingerprints(self, *splits: str) -> Fingerprints:
        records = {record.case: record for record in self.cache.records}
        return Fingerprints.of([case for split in splits for case in self.splits[split]], records)


@cache
def data_of(folder: Path) -> Data:
    """The data set of a folder."""
    dataset = read_dataset(experiment(folder).data)
    cache = build(dataset.cases, PREPROCESSING)
    records = {record.case: record for record in cache.records}
    split = make_split(dataset, records, seeds=Seeds(0), val_fraction=0.2, test_fraction=0.2)
    splits = {
        name: tuple(case for case in dataset.cases if split.get(case.id) == name) for name in ("train", "val", "test")
    }
    return Data(cache, dataset.classes, splits)


def experiment(folder: Path, **sections) -> Experiment:
    """A quick experiment; keyword arguments are sections that replace or extend it."""
    quick = {
        "seed": 0,
        "data": {"path": str(folder)},
        "task": {"name": "classification"},
        "backbone": {"name": "test_vit", "weights": "random"},  # timm's own tiny ViT: 6 blocks of 64
        "tuner": {"name": "lora"},
        "pretext": {"name": "mae", "decoder_depth": 1, "decoder_width": 32},
        "tpp": {"steps": 6, "batch_size": 8, "head_warmup": 2, "checkpoint_every": 2},
        "finetune": {"steps": 6, "batch_size": 8, "checkpoint_every": 2, "validate_every": 3},
        "hardware": HARDWARE,
        "logging": {"tensorboard": False},
    }
    merged = {name: _extended(quick.get(name, {}), value) for name, value in sections.items()}
    return experiment_schema().model_validate({**quick, **merged})


def _extended(section, value):
    """Fields beside those that are there; of another method than theirs, in their place."""
    if not isinstance(value, dict):
        return value
    return value if value.get("name", section.get("name")) != section.get("name") else {**section, **value}


def tpp_inputs(folder: Path, **sections) -> TPPInputs:
    data = data_of(folder)
    return TPPInputs(experiment(folder, **sections), PREPROCESSING, data.stage("train"), data.fingerprints("train"))


def finetune_inputs(folder: Path, start: Path | None = None, **sections) -> FinetuneInputs:
    data = data_of(folder)
    return FinetuneInputs(
        experiment(folder, **sections),
        PREPROCESSING,
        data.stage("train"),
        data.stage("val"),
        data.classes,
        False,
        data.fingerprints("train", "val"),
        start=start,
    )


def pretrain_inputs(folder: Path, seed: int = 0, **options) -> PretrainInputs:
    data = data_of(folder)
    quick = {"architecture": "test_vit", "steps": 6, "batch_size": 8, "checkpoint_every": 2}
    return PretrainInputs(
        options=PretrainOptions(**{**quick, **options}),
        pretext=MAEOptions(decoder_depth=1, decoder_width=32),
        data=data.stage("train"),
        fingerprints=data.fingerprints("train"),
        modality="xray",
        augment=AugmentOptions(),
        hardware=HardwareOptions(**HARDWARE),
        logging=LoggingOptions(tensorboard=False),
        description="phantoms",
        seed=seed,
    )
