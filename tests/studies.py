"""Finished comparisons of a study, made up with effects that are known."""

import csv
from functools import partial

import numpy as np
import pandas as pd

from comparisons import write_comparison
from medtpp.evaluation import Segmentations, write_predictions, write_segmentations
from medtpp.files import read_json, write_json
from medtpp.workflow.study.across import summarise_study
from medtpp.workflow.study.parts import StudyPart
from prediction_tables import binary

LABELS = (30, 150, "all")
NAME = '<b>set</b> "1" & {{ 7 * 7 }}'


def cells_of(folder):
    with (folder / "cells.csv").open() as stream:
        return list(csv.DictReader(stream))


def write_part(folder, score, *, labels=LABELS, seeds=6, cases=20, noise=0.02, metric="dice", log=None, **changes):
    """A comparison of masks whose mean Dice in each cell is `score(arm, index of labels, seed)`, exactly.

    Patients scatter around it by `noise`, alike in all arms. `log(arm, seed)` gives the columns of the cells' logs.
    """
    unit = {"metric_unit": "mm"} if metric == "hd95" else {}
    told = {"metric": metric, "metric_title": f"mean {metric}", "margin": 0.01, "n_cases": cases, "n_patients": cases}
    write_comparison(folder, labels=labels, seeds=seeds, data=folder.name, **(told | unit | changes))
    names = [str(count) for count in labels]
    rng = np.random.default_rng(sum(folder.name.encode()))
    patients = rng.normal(0, noise, cases)
    patients -= patients.mean()
    for row in cells_of(folder):
        value = score(row["arm"], names.index(row["labels"]), int(row["seed"]))
        own = rng.normal(0, noise / 2, cases)
        write_masks(folder / row["folder"], value + patients + own - own.mean())
        if log is not None:
            columns = {name: list(values) for name, values in log(row["arm"], int(row["seed"])).items()}
            pd.DataFrame(columns).to_csv(folder / row["folder"] / "finetune" / "log.csv", index=False)
    add_times(folder)
    add_pairs(folder)
    return folder


def write_masks(cell, values):
    """The test of a cell on masks of one structure: Dice of each case (1 at most), and HD95 in mm, the same number."""
    count = len(values)
    table = Segmentations(
        cases=tuple(f"scans/{row}.nii.gz" for row in range(count)),
        split=("test",) * count,
        patients=tuple(f"p{row}" for row in range(count)),
        sites=(None,) * count,
        structures=("organ",),
        dice=np.minimum(values, 1.0)[:, None],
        hd95=values[:, None],
        nsd=np.minimum(values, 1.0)[:, None],
        volume=np.ones((count, 1)),
        volume_true=np.ones((count, 1)),
    )
    write_segmentations(cell / "evaluation" / "segmentation.csv", table)


def write_classes(folder, strength, *, labels=LABELS, seeds=6, cases=60, **changes):
    """A comparison of a classification; scores follow the truth as `strength(arm, index of labels, seed)` says."""
    write_comparison(folder, labels=labels, seeds=seeds, data=folder.name, **changes)
    names, truth = [str(count) for count in labels], np.random.default_rng(1).random(cases) < 0.4
    for row in cells_of(folder):
        rng = np.random.default_rng([int(row["seed"]), 5])
        logits = strength(row["arm"], names.index(row["labels"]), int(row["seed"])) * truth + rng.normal(size=cases)
        predictions = binary(1 / (1 + np.exp(-logits)), truth, [f"p{index}" for index in range(cases)])
        write_predictions(folder / row["folder"] / "evaluation" / "predictions.csv", predictions)
        thresholds = dict.fromkeys(predictions.classes, 0.5)
        write_json(
            folder / row["folder"] / "evaluation" / "evaluation.json",
            {"thresholds": thresholds, "positive": "positive"},
        )
    add_times(folder)
    return folder


def add_times(folder, seconds=100.0, tpp_seconds=40.0):
    table = pd.read_csv(folder / "cells.csv", dtype=str)
    table["seconds"] = seconds
    table["tpp_seconds"] = np.where(table.init == "tpp", tpp_seconds, np.nan)
    table.to_csv(folder / "cells.csv", index=False)


def add_pairs(folder):
    """TPP against longer fine-tuning and the references, where they are."""
    told = read_json(folder / "comparison.json")
    arms, pairs = {arm["name"]: arm for arm in told["arms"]}, list(told["differences"])
    for pair in told["differences"]:
        for name, arm in arms.items():
            if (arm["init"] == "longer" and arm["tuner"] == arms[pair["arm"]]["tuner"]) or arm["tuner"] == "linear":
                pairs.append(pair | {"baseline": name})
    write_json(folder / "comparison.json", told | {"differences": pairs})


def write_study(out):
    """A study whose names try to break out of its page, with its summary: three sets, two tuners, HD95, failures."""
    arms = {"tuners": ("lora", "ssf"), "extras": ("longer", "linear"), "seeds": 5, "cases": 8}
    failed = [{"cell": "lora tpp, 30 labels, seed 1", "reason": "Cannot read /home/doctor/scans/1.png: <i>broken</i>"}]
    names = (NAME, "a_name_without_spaces_that_is_longer_than_a_phone_is_wide", "third")
    parts = []
    for number, name in enumerate(names):
        score = rising((0.03, 0.01 * number), scatter=0.01)
        labels = (20 + 10 * number, "all")
        folder = write_part(out / f"set {number}", score, labels=labels, failed=failed if number == 1 else [], **arms)
        parts.append(part(folder, dataset=name))
    distance = {"metric": "hd95", "higher_is_better": False, "seeds": 5, "cases": 8, "labels": (20, "all")}
    parts.append(part(write_part(out / "distance", rising((-0.1, 0.1)), **distance), site="north"))
    parts.append(part(out / "nowhere", backbone="vit", fold="2"))
    summarise_study(parts, out)
    return out


def rising(gains, base=0.6, scatter=0.0):
    """Scores of `write_part`: 0.6, 0.65, 0.7 without TPP, plus a gain for each label count; seeds scatter."""

    def score(arm, index, seed, gains):
        wobble = scatter * np.random.default_rng([seed, index, len(arm)]).normal()
        return base + 0.05 * index + (gains[index] if arm.endswith("tpp") else 0.0) + wobble

    return partial(score, gains=gains)


def part(folder, *, dataset=None, backbone="", fold="", site=""):
    return StudyPart(dataset or folder.name, backbone, fold, site, folder)
