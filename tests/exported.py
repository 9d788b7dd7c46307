"""Fine-tuned adapters for tests of exports, and what they must give."""

import json
from functools import cache

import torch

import matrix
from medtpp import backbones, tuners
from medtpp.adapter import Adapter, AdapterCard, BackboneCard, TaskCard, make_task
from medtpp.config import TUNERS, BackboneOptions, Window
from medtpp.data.preprocess import Preprocessing
from medtpp.data.volume_preprocess import LEVELS, VolumePreprocessing
from medtpp.inference.export.network import example
from medtpp.seeds import Seeds

VARIANT = "medtpp_test_class_token"
PERCENTILES = Window(kind="percentiles", low=0.5, high=99.5)
ZSCORE = Window(kind="zscore", low=-3, high=3)
PHOTOGRAPHS = Preprocessing(image_size=32, channels=1)
PLANES = VolumePreprocessing(patch=(32, 32), size=(32, 32), windows=(LEVELS,), dtype="uint8")
SCANS = VolumePreprocessing(patch=(8, 16, 16), spacing=(1.0, 1.0, 1.0), windows=(PERCENTILES,))
CLASSIFY, UNETR, LIGHT = (
    {"name": "classification"},
    {"name": "segmentation", "feature_size": 4},
    {"name": "segmentation", "head": "light"},
)
KINDS = {
    "photographs": (PHOTOGRAPHS, CLASSIFY),
    "masks in 2D": (PLANES, UNETR),
    "masks in 3D": (SCANS, UNETR),
}


def tuned(tuner, variant, preprocessing):
    dims = len(preprocessing.patch)
    volumes = {"patch_size": (4, 8, 8), "channels": len(preprocessing.windows)} if dims == 3 else {}
    options = BackboneOptions(name=str(matrix.backbone_folder(variant)), dims=dims, **volumes)
    backbone = tuners.attach(backbones.load(options, image_size=preprocessing.patch), tuner, seed=0)
    matrix.perturb(backbone)
    return backbone


@cache
def adapter(preprocessing, task, tuner="lora", variant=VARIANT, multilabel=False, values=((1,), (2,))):
    """A fine-tuned adapter, no part of which is at its start. `task` is its options as JSON, to be hashable."""
    backbone = tuned(tuner, variant, preprocessing)
    options = json.loads(task)
    dense = options["name"] == "segmentation"
    card = TaskCard(
        options=options, classes=("organ", "lesion"), multilabel=multilabel, mask_values=values if dense else ()
    )
    head = make_task(card, backbone, Seeds(9)).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=Seeds(5).generator("head")) * 0.1)
    spec = backbone.spec
    whole = AdapterCard(
        backbone=BackboneCard(
            options=backbone.options, architecture=variant, image_size=spec.image_size, sha256=spec.sha256
        ),
        tuner=TUNERS.get(tuner).Options().model_dump(mode="json"),
        preprocessing=preprocessing,
        modality="mri",
        seed=0,
        task=card,
    )
    return Adapter(whole, backbone, head)


def made(kind, **options):
    preprocessing, task = KINDS[kind]
    return adapter(preprocessing, json.dumps(task), **options)


@torch.no_grad()
def own(one, images):
    """The adapter's probabilities."""
    return one.task.probabilities(one.task(one.backbone.encode(images, taps=one.task.taps)))


def stated(folder):
    return json.loads((folder / "preprocessing.json").read_text())


def batches(folder, one):
    """Batches that the network says it takes, none of the size it was traced with."""
    counts = (1, 3) if stated(folder)["input"]["shape"][0] == "batch" else (1,)
    return [example(one, count) for count in counts]
