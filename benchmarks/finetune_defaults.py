"""Which settings of fine-tuning keep what TPP found: each for both starts, on development cases alone.

    python benchmarks/prepare.py DATA TASKS
    python benchmarks/finetune_defaults.py TASKS/ultrasound_breast-development/manifest.csv --labels 30 --seeds 6 \
      --set data.modality=ultrasound --try finetune.head_start=fitted \
      --try "finetune.head_start=fitted finetune.learning_rate=3e-4" --out results/FILE.json

A seed draws the labels and starts the parameters; its TPP is done once and fine-tuned by every setting. The metric is
the macro AUC on the test cases of the development manifest, which holds none of the task's. The last weights count, as
in `medtpp compare`.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medtpp.config import Experiment
from medtpp.files import MARKER, read_json
from medtpp.workflow.experiment import load_experiment
from medtpp.workflow.pool import Job, run_jobs
from medtpp.workflow.prepare import prepare
from medtpp.workflow.run import evaluate_stage, finetune_stage, tpp_stage

DEFAULT = "default"


def trial(manifest: Path, common: list[str], tries: list[str], seed: int, threads: int) -> list[dict[str, Any]]:
    """All settings of one seed, from both starts."""
    torch.set_num_threads(threads)
    chosen = [*common, f"seed={seed}", f"hardware.threads={threads}", "logging.tensorboard=false", "finetune.keep=last"]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapter = tpp_stage(prepare(load_experiment(manifest, chosen)), folder / "tpp", print)
        for number, settings in enumerate(tries):
            prepared = prepare(_experiment(manifest, chosen, settings))
            for start in ("standard", "tpp"):
                own = folder / f"{number}-{start}"
                made = finetune_stage(prepared, own / "finetune", print, start=adapter if start == "tpp" else None)
                evaluation = evaluate_stage(prepared, made, own / "evaluation", mistakes=False, resamples=100)
                told = read_json(own / "finetune" / MARKER)
                row = {"settings": settings, "start": start, "seed": seed, "auc": evaluation.metrics["auc"].value}
                rows.append({**row, "seconds": told["seconds"], "last_loss": told["last_loss"]})
    return rows


def _experiment(manifest: Path, common: list[str], settings: str) -> Experiment:
    return load_experiment(manifest, [*common, *(settings.split() if settings != DEFAULT else [])])


def main() -> None:
    """Print each seed as it ends and a table; write all rows with --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--tuner", default="lora")
    parser.add_argument("--labels", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--try", action="append", default=[], dest="tries", help="settings, apart by spaces")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    common = [f"tuner={options.tuner}", "data.image_size=128", f"data.labels={options.labels}", *options.settings]
    tries = [DEFAULT, *options.tries]
    for settings in tries:
        _experiment(options.manifest, common, settings)  # a mistake is told before anything is trained
    threads = max(1, torch.get_num_threads() // options.jobs)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as logs:
        jobs = [
            Job(
                f"seed {seed}",
                functools.partial(trial, options.manifest, common, tries, seed, threads),
                Path(logs) / f"{seed}.log",
            )
            for seed in range(options.seeds)
        ]
        for outcome in run_jobs(jobs, processes=options.jobs, threads=threads):
            if outcome.error is not None:
                print(f"{outcome.job.name}: {outcome.error}")
                continue
            rows += outcome.value
            print(f"{outcome.job.name} done", flush=True)
            if options.out:
                about = {"task": options.manifest.parent.name, "common": common}
                options.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    for settings in tries:
        found = {(row["start"], row["seed"]): 100 * row["auc"] for row in rows if row["settings"] == settings}
        seeds = sorted({seed for _, seed in found})
        standard, tpp = (np.array([found[start, seed] for seed in seeds]) for start in ("standard", "tpp"))
        gains = " ".join(f"{gain:+.1f}" for gain in tpp - standard)
        print(f"{settings}\n  standard {standard.mean():.1f}, tpp {tpp.mean():.1f}, gains {gains}")


if __name__ == "__main__":
    main()
