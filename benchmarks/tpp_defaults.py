"""Which settings of TPP make frozen features worth more: one setting at a time, on development cases alone.

    python benchmarks/prepare.py DATA TASKS
    python benchmarks/tpp_defaults.py TASKS/ultrasound_breast-development/manifest.csv --seeds 3
      --vary tpp.steps=100,300,1000 --vary tpp.learning_rate=3e-4,3e-3 --out results/FILE.json

TPP trains on the training cases of the development manifest. Its tuned features are then frozen; a linear probe gets 10
labels per class of the training cases, 30 times, and is measured on the validation and test cases of the development
manifest. The row "no TPP" has the features of the tuner's own start.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _features import DRAWS, PER_CLASS, probed
from medtpp import backbones, tuners
from medtpp.adapter import load_adapter
from medtpp.files import MARKER, read_json
from medtpp.seeds import Seeds
from medtpp.workflow.experiment import load_experiment
from medtpp.workflow.pool import Job, run_jobs
from medtpp.workflow.prepare import prepare
from medtpp.workflow.run import tpp_stage


@dataclass(frozen=True)
class Trial:
    """Settings beside the common ones, and a seed; no settings at all is the default, None is no TPP."""

    varied: str | None
    seed: int


def probe(manifest: Path, settings: list[str], trial: Trial, threads: int) -> dict[str, Any]:
    """Mean AUC of the probe after TPP, and what TPP told."""
    torch.set_num_threads(threads)
    chosen = [*settings, f"seed={trial.seed}", f"hardware.threads={threads}", "logging.tensorboard=false"]
    experiment = load_experiment(manifest, [*chosen, *([trial.varied] if trial.varied else [])])
    prepared = prepare(experiment)
    told: dict[str, Any] = {}
    if trial.varied is None:
        backbone = backbones.load(prepared.experiment.backbone, image_size=prepared.preprocessing.patch)
        tuned = tuners.attach(backbone, prepared.experiment.tuner, seed=Seeds(trial.seed))
    else:
        with tempfile.TemporaryDirectory() as name:
            tuned = load_adapter(tpp_stage(prepared, Path(name) / "tpp", print)).backbone
            told = read_json(Path(name) / "tpp" / MARKER)
    kept = ("steps", "seconds", "pretext_loss_on", "pretext_loss_off", "feature_drift")
    return {"auc": probed(tuned, prepared), **{name: told[name] for name in kept if name in told}}


def trials(varied: list[str], seeds: int) -> Iterator[Trial]:
    """All trials, seed by seed."""
    settings: list[str | None] = [None, ""]
    for text in varied:
        field, _, values = text.partition("=")
        settings += [f"{field}={value}" for value in values.split(",")]
    for seed in range(seeds):
        for setting in settings:
            yield Trial(setting, seed)


def main() -> None:
    """Print each trial as it ends and a table of gains; --out gets all trials so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--tuner", default="lora")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--vary", action="append", default=[])
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    settings = [f"tuner={options.tuner}", "data.image_size=128", *options.settings]
    threads = max(1, torch.get_num_threads() // options.jobs)
    planned = {f"{trial.varied} {trial.seed}": trial for trial in trials(options.vary, options.seeds)}
    with tempfile.TemporaryDirectory() as logs:
        jobs = [
            Job(name, functools.partial(probe, options.manifest, settings, trial, threads), Path(logs) / f"{index}.log")
            for index, (name, trial) in enumerate(planned.items())
        ]
        rows: list[dict[str, Any]] = []
        for outcome in run_jobs(jobs, processes=options.jobs, threads=threads):
            trial = planned[outcome.job.name]
            if outcome.error is not None:
                print(f"{outcome.job.name}: {outcome.error}")
                continue
            name = "no TPP" if trial.varied is None else trial.varied or "default"
            rows.append({"setting": name, "seed": trial.seed, **outcome.value})
            print(f"{name:32} seed {trial.seed} AUC {outcome.value['auc']:.4f}", flush=True)
            if options.out:
                about = {"task": options.manifest.parent.name, "settings": settings}
                about |= {"per_class": PER_CLASS, "draws": DRAWS, "rows": rows}
                options.out.write_text(json.dumps(about, indent=1) + "\n")
    base = {row["seed"]: row["auc"] for row in rows if row["setting"] == "no TPP"}
    for name in dict.fromkeys(row["setting"] for row in rows):
        gains = [100 * (row["auc"] - base[row["seed"]]) for row in rows if row["setting"] == name]
        print(f"{name:32} {np.mean(gains):+.2f} points, seeds {' '.join(f'{gain:+.1f}' for gain in gains)}")


if __name__ == "__main__":
    main()
