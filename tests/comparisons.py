"""Folders as `medtpp compare` writes them, made up."""

import itertools
from typing import get_args

import numpy as np
import pandas as pd
from PIL import Image

from medtpp.evaluation.paired import Verdict
from medtpp.files import write_json, write_text

VERDICTS = tuple(one for one in get_args(Verdict) if one not in ("better", "worse"))  # of TPP against no TPP


def arm_name(tuner, init):
    return tuner if tuner in ("linear", "full") else f"{tuner} {init}"


def write_comparison(folder, *, tuners=("lora",), extras=(), labels=(30,), seeds=3, data="phantom", **changes):
    """A finished comparison. `changes` replace fields of comparison.json."""
    rng = np.random.default_rng(0)
    names = [str(count) for count in labels]
    inits = ("standard", "tpp", *(("longer",) if "longer" in extras else ()))
    pairs = [*itertools.product(tuners, inits), *((name, "standard") for name in extras if name != "longer")]
    means, differences, tpp, rows = [], [], [], []
    for (at, (tuner, init)), count in itertools.product(enumerate(pairs), names):
        value = 0.62 + 0.06 * names.index(count) + 0.012 * at
        cost = {"seconds": 61.2, "tpp_seconds": 100.0 if init == "tpp" else None, "peak_memory_mib": 900.0}
        means.append(
            {"arm": arm_name(tuner, init), "labels": count, "seeds": seeds, "value": value, "low": value - 0.03}
            | {"high": value + 0.03, **cost, "target_parameters": 150_000}
        )
        if init == "tpp":
            gaps = rng.normal(0.01, 0.02, seeds)
            verdict = VERDICTS[len(differences) % len(VERDICTS)]
            differences.append(
                {"arm": arm_name(tuner, init), "baseline": arm_name(tuner, "standard"), "labels": count}
                | {"seeds": seeds, "value": gaps.mean(), "low": gaps.mean() - 0.015, "high": gaps.mean() + 0.02}
                | {"p": 0.2, "p_holm": 0.4, "verdict": verdict, "sentence": f"{tuner}, {count} labels: {verdict}."}
                | {"by_seed": {str(seed): gap for seed, gap in enumerate(gaps)}}
            )
        for seed in range(seeds):
            cell = f"cells/{tuner}-{init}/{count}/seed{seed}"
            rows.append((tuner, init, arm_name(tuner, init), count, seed, "done", value, cell))
            write_losses(folder / cell / "finetune" / "log.csv", rng, 0.7 - 0.01 * at)
    for tuner, seed in itertools.product(tuners, range(seeds)):
        path = f"tpp/{tuner}/seed{seed}"
        write_losses(folder / path / "log.csv", rng, 0.9)
        Image.fromarray(rng.integers(0, 255, (48, 96, 3), np.uint8)).save(folder / path / "preview.png")
        tpp.append(
            {"tuner": tuner, "seed": seed, "pretext_loss_on": 0.8 - 0.01 * seed, "pretext_loss_off": 0.85}
            | {"feature_drift": 0.1 + 0.01 * seed, "seconds": 50.0}
            | {"log": f"{path}/log.csv", "preview": f"{path}/preview.png"}
        )
    columns = ["tuner", "init", "arm", "labels", "seed", "status", "auc", "folder"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "cells.csv", index=False)
    write_text(folder / "experiment.yaml", f"seed: 0\ndata:\n  path: /home/doctor/{data} # where\n")
    write_json(
        folder / "comparison.json",
        {"schema": 1, "data": data, "metric": "auc", "metric_title": "macro AUC", "higher_is_better": True}
        | {"margin": 0.005, "level": 0.95, "n_cases": 156, "n_patients": 150, "unit": "patient", "resamples": 2000}
        | {"seeds": list(range(seeds)), "labels": names}
        | {"label_counts": {name: 624 if name == "all" else int(name) for name in names}}
        | {"arms": [{"name": arm_name(*pair), "tuner": pair[0], "init": pair[1], "description": "…"} for pair in pairs]}
        | {"means": means, "differences": differences, "tpp": tpp, "failed": [], "notes": []}
        | changes,
    )
    return folder


def write_losses(path, rng, start):
    """A log of a stage: losses that fall from `start`."""
    steps = np.arange(1, 41)
    path.parent.mkdir(parents=True, exist_ok=True)
    losses = start * np.exp(-steps / 60) + rng.normal(0, 0.02, len(steps))
    pd.DataFrame({"step": steps, "loss": losses, "lr_tuner": 1e-3}).to_csv(path, index=False)
