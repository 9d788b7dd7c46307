"""What frozen features are worth: linear probe and k-NN with few labels, over many draws of them.

    python benchmarks/prepare.py DATA TASKS
    python benchmarks/probe.py TASKS/ultrasound_breast/manifest.csv [MORE ...] --out results/backbone_probe.json

A backbone is a name, a folder, NAME:random, or a resume file that `medtpp pretrain` wrote on its way. Features are
mean-pooled patch tokens, standardised on the draw. Each draw takes the same number of labels of each class; the macro
AUC (one against rest) is measured on all other cases.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch

import medtpp
from _features import features
from medtpp.backbones import Backbone
from medtpp.backbones.folder import save_backbone
from medtpp.config import DataOptions
from medtpp.data.cache import build
from medtpp.data.fingerprints import Fingerprints
from medtpp.data.preprocess import Preprocessing
from medtpp.data.read import read_dataset
from medtpp.evaluation.probe import CLASSIFIERS, few_label_auc

ARCHITECTURE = "vit_tiny_patch16_224"


def load(name: str, size: int, trained_at: int) -> Backbone:
    """A backbone by what the command line calls it."""
    if not name.endswith(".pt"):
        plain, _, weights = name.partition(":")
        return medtpp.load(plain, weights=weights or "pretrained", image_size=size)
    spec = medtpp.load(ARCHITECTURE, weights="random", image_size=trained_at).spec
    state, prefix = torch.load(name, weights_only=True)["parameters"], "backbone.encoder."
    encoder = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    card = {name: getattr(spec, name) for name in ("architecture", "channels", "mean", "std", "objective")}
    with tempfile.TemporaryDirectory() as folder:
        save_backbone(Path(folder), encoder, {}, {**card, "image_size": trained_at}, Fingerprints(), half=True)
        return medtpp.load(folder, image_size=size)


def main() -> None:
    """Print a table, and write every draw with --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="+")
    parser.add_argument("--backbones", default=f"medtpp_vit_tiny,{ARCHITECTURE}:random")
    parser.add_argument("--size", type=int, default=128, help="pixels of the images")
    parser.add_argument("--trained-at", type=int, default=160, help="pixels that resume files were trained at")
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for path in options.data:
        task = path.parent.name
        dataset = read_dataset(DataOptions(path=path))
        cache = build(dataset.cases, Preprocessing(image_size=options.size, channels=1))
        places = np.array([cache.row[case.id] for case in dataset.cases])
        labels = np.array([dataset.classes.index(case.labels[0]) for case in dataset.cases])
        for name in options.backbones.split(","):
            values = features(load(name, options.size, options.trained_at), cache, places)
            for classifier in CLASSIFIERS:
                scores = [
                    few_label_auc(classifier, values, labels, options.per_class, draw) for draw in range(options.draws)
                ]
                shown = Path(name).name
                rows.append({"task": task, "backbone": shown, "classifier": classifier, "auc": scores})
                error = np.std(scores, ddof=1) / len(scores) ** 0.5
                print(f"{task:20} {shown:30} {classifier:7} AUC {np.mean(scores):.3f} (standard error {error:.3f})")
    if options.out:
        settings = {"size": options.size, "per_class": options.per_class, "draws": options.draws}
        options.out.write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
