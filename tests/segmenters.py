"""Fine-tuned adapters of random weights that segment or classify, and scans for them."""

import csv

import numpy as np
import torch

from medtpp import backbones, tuners
from medtpp.adapter import TaskCard, new_card, save_adapter
from medtpp.config import TASKS, BackboneOptions, Window
from medtpp.data.volume_preprocess import VolumePreprocessing
from medtpp.inference.write import write_mask
from medtpp.seeds import Seeds
from volumes import blobs, geometry

VALUES = (3, 7)  # of the structures in the masks of the training
PATCH = {2: (32, 32), 3: (8, 16, 16)}


def adapter(
    folder, dims=3, *, task="segmentation", tuner="lora", seed=0, values=((3,), (7,)), overlapping=False, **how
):
    """A fine-tuned adapter folder, whose weights are random and whose images have levels from 0 to 2."""
    options = BackboneOptions(name="test_vit", weights="random", dims=dims, patch_size=(4, 8, 8) if dims == 3 else 16)
    tuned = tuners.attach(backbones.load(options, image_size=PATCH[dims]), tuner, seed=seed)
    with torch.no_grad(), Seeds(seed).scope("move"):
        for parameter in [*tuned.targets.values(), *tuned.embed.values()]:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    classes = ("organ", "lesion")
    own = {"head": "light"} if task == "segmentation" else {}
    chosen = TASKS.get(task).Options(**own)
    made = TASKS.get(task)(chosen, tuned.spec, classes, overlapping, Seeds(seed))
    with torch.no_grad(), Seeds(seed).scope("head"):
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    wanted = {"patch": PATCH[dims], "windows": (Window(kind="fixed", low=0, high=2),)}
    card = new_card(tuned, VolumePreprocessing(**{**wanted, **how}), "unknown", seed)
    masks = {"mask_values": values} if task == "segmentation" else {}
    task_card = TaskCard(options=chosen.model_dump(mode="json"), classes=classes, multilabel=overlapping, **masks)
    save_adapter(folder, tuned, card.model_copy(update={"task": task_card}), made)
    return folder


def table(folder):
    with (folder / "volumes.csv").open(newline="") as stream:
        return {(row["case"], row["structure"]): (float(row["volume"]), row["unit"]) for row in csv.DictReader(stream)}


def values_of(folder):
    """What stands for each structure, by case."""
    with (folder / "volumes.csv").open(newline="") as stream:
        return {(row["case"], row["structure"]): int(row["value"]) for row in csv.DictReader(stream)}


def in_training(labels):
    return np.array([0, *VALUES], np.uint8)[labels]


def scans(folder, names="abc", shape=(10, 20, 18), suffix=".nii.gz"):
    """Scans of labels 0, 1, 2 in odd places, and the labels."""
    made = {}
    for number, name in enumerate(names):
        labels = blobs(shape, number)
        write_mask(folder / f"{name}{suffix}", labels, geometry(shape, (2.3, 0.7, 1.1), 2 * number + 1))
        made[name] = labels
    return made
