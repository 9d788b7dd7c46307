"""Folders as `medtpp run` writes them for a segmentation, made up; and a data set with masks."""

from functools import partial

import numpy as np
import pandas as pd
from PIL import Image

from comparisons import write_losses
from medtpp.data.phantom import generate
from medtpp.evaluation import Segmentations, evaluate_segmentation, write_segmentations
from medtpp.evaluation.overlays import choose_cases, draw_overlay, write_overlays
from medtpp.files import write_json, write_text
from medtpp.inference.stored import planes
from volumes import blobs, geometry


def write_masks(folder, count=30, size=32):
    """Radiographs with masks of body and, in half of them, lesion; a manifest names the patients."""
    phantoms = generate(count, size, 0)
    rows = ["image,mask,patient"]
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number, (image, mask) in enumerate(zip(phantoms.images, phantoms.masks, strict=True)):
        labels = np.where(mask > 0, 2, image > 60).astype(np.uint8)
        Image.fromarray(image).save(folder / f"images/{number:03d}.png")
        Image.fromarray(labels).save(folder / f"masks/{number:03d}.png")
        rows.append(f"images/{number:03d}.png,masks/{number:03d}.png,{phantoms.patients[number]}")
    write_text(folder / "manifest.csv", "\n".join(rows) + "\n")
    return folder


def table_of(count=9, structures=("organ", "lesion"), seed=0, patients=True):
    """Test cases, in some of which the last structure is missed, invented, or not there at all."""
    rng = np.random.default_rng(seed)
    shape = (count, len(structures))
    volume, volume_true = rng.uniform(1, 2, shape), rng.uniform(1, 2, shape)
    if len(structures) > 1:
        volume[0, -1] = volume_true[1, -1] = volume[2, -1] = volume_true[2, -1] = 0
    one, neither = (volume == 0) ^ (volume_true == 0), (volume == 0) & (volume_true == 0)
    dice = np.where(one, 0.0, np.where(neither, np.nan, rng.uniform(0.5, 0.95, shape)))
    return Segmentations(
        cases=tuple(f"scans/{row}.nii.gz" for row in range(count)),
        split=("test",) * count,
        patients=tuple(f"p{row}" if patients else None for row in range(count)),
        sites=(None,) * count,
        structures=tuple(structures),
        dice=dice,
        hd95=20 * (1 - dice),
        nsd=dice**2,
        volume=volume,
        volume_true=volume_true,
    )


def evaluate_into(folder, table):
    """Write a table and its evaluation into a run."""
    write_segmentations(folder / "evaluation" / "segmentation.csv", table)
    evaluate_segmentation(table, resamples=50, seed=0).save(folder / "evaluation")


def write_segmented_run(folder, table=None, data="hippocampus", overlays=True):
    """A finished run on volumes."""
    table = table or table_of()
    rng = np.random.default_rng(0)
    for name in ("evaluation", "tpp", "finetune/adapter"):
        (folder / name).mkdir(parents=True)
    evaluate_into(folder, table)
    text = f"seed: 0\ndata:\n  path: /home/doctor/{data}\n  labels: all\nbackbone:\n  name: tiny\n"
    write_text(folder / "experiment.yaml", f"{text}tuner:\n  name: lora\npretext:\n  name: mae\n")
    parts = [*(("train", row) for row in range(20)), *(("val", row) for row in range(20, 24))]
    rows = [(f"scans/t{row}.nii.gz", part, "", f"q{row}") for part, row in parts]
    rows += [(case, "test", "", patient or "") for case, patient in zip(table.cases, table.patients, strict=True)]
    pd.DataFrame(rows, columns=["case", "split", "label", "patient"]).to_csv(folder / "split.csv", index=False)
    card = {
        "backbone": {"architecture": "vit_tiny", "image_size": [36, 56, 40]},
        "preprocessing": {"patch": [36, 56, 40], "spacing": [1.0, 1.0, 1.0], "size": None},
        "task": {"options": {"name": "segmentation", "head": "unetr", "class_weights": []}},
        "tpp": {"images": 20, "transductive": False},
        "versions": {"medtpp": "0.1.0"},
    }
    write_json(folder / "finetune" / "adapter" / "medtpp.json", card)
    stage = {"steps": 40, "batch_size": 4, "learning_rate": 1e-3, "seconds": 61.5, "images_per_second": 2.5}
    stage |= {"waiting": 0.01, "peak_memory_mib": 900.0, "target_parameters": 1000, "backbone_parameters": 50_000}
    write_json(
        folder / "finetune" / "complete.json", stage | {"best": {"score": 0.81, "step": 20}, "head_parameters": 7}
    )
    effect = {"pretext_loss_on": 0.7, "pretext_loss_off": 0.9, "feature_drift": 0.1}
    write_json(folder / "tpp" / "complete.json", stage | effect)
    for name in ("tpp", "finetune"):
        write_losses(folder / name / "log.csv", rng, 0.9)
    log = pd.read_csv(folder / "finetune" / "log.csv")
    log["validation"] = np.where(log.step % 10 == 0, 0.81 - (log.step - 20).abs() / 400, np.nan)
    log.to_csv(folder / "finetune" / "log.csv", index=False)
    if overlays:
        write_overlays(folder / "evaluation" / "overlays", table, _drawn(table))
    write_json(folder / "summary.json", {})
    return folder


def _drawn(table):
    where = geometry((30, 36, 32), seed=2)
    split = partial(planes, structures=len(table.structures), overlapping=False)
    labels = blobs(where.shape) % (len(table.structures) + 1)
    image = 0.4 + 0.2 * labels
    for kind, row in choose_cases(table).items():
        yield kind, row, draw_overlay(image, labels, np.roll(labels, 1, axis=0), where, split)
