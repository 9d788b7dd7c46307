"""What frozen features are worth: logistic regression with few labels, over many draws of them.

    python benchmarks/probe.py DATA --backbones medtpp_vit_tiny,vit_tiny_patch16_224:random --out results/FILE.json

Features are mean-pooled patch tokens, standardised on the training draw. Each draw takes the same number of labels of
each class; the macro AUC (one against rest) is measured on all other cases.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import medtpp
from medtpp.backbones import Backbone
from medtpp.config import DataOptions
from medtpp.data.cache import ImageCache, build
from medtpp.data.preprocess import Preprocessing
from medtpp.data.read import read_dataset


@torch.no_grad()
def features(backbone: Backbone, cache: ImageCache, rows: np.ndarray) -> np.ndarray:
    """(n, D) mean-pooled patch tokens."""
    parts = []
    for start in range(0, len(rows), 64):
        images = torch.from_numpy(cache.images[rows[start : start + 64]]).float() / 255
        parts.append(backbone.encode(images).pooled("mean"))
    return torch.cat(parts).numpy()


def auc(values: np.ndarray, labels: np.ndarray, per_class: int, draw: int) -> float:
    """AUC of one draw of labels."""
    rng = np.random.default_rng(draw)
    train = np.concatenate([rng.choice(np.flatnonzero(labels == k), per_class, replace=False) for k in set(labels)])
    test = np.setdiff1d(np.arange(len(labels)), train)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(values[train], labels[train])
    scores = model.predict_proba(values[test])
    binary = scores.shape[1] == 2
    return float(roc_auc_score(labels[test], scores[:, 1] if binary else scores, multi_class="ovr"))


def main() -> None:
    """Print a table, and write every draw with --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--backbones", default="medtpp_vit_tiny,vit_tiny_patch16_224:random")
    parser.add_argument("--exclude", nargs="*", default=[])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--per-class", type=int, default=10)
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    dataset = read_dataset(DataOptions(path=options.data, exclude=options.exclude))
    cache = build(dataset.cases, Preprocessing(image_size=options.size, channels=1))
    rows = np.array([cache.row[case.id] for case in dataset.cases])
    labels = np.array([dataset.classes.index(case.labels[0]) for case in dataset.cases])
    results = {}
    for name in options.backbones.split(","):
        plain, _, weights = name.partition(":")
        backbone = medtpp.load(plain, weights=weights or "pretrained", image_size=options.size)
        values = features(backbone, cache, rows)
        scores = [auc(values, labels, options.per_class, draw) for draw in range(options.draws)]
        results[name] = scores
        print(f"{name:40} AUC {np.mean(scores):.4f} (standard error {np.std(scores) / len(scores) ** 0.5:.4f})")
    if options.out:
        settings = {"data": options.data.name, "size": options.size, "per_class": options.per_class}
        options.out.write_text(json.dumps({**settings, "cases": len(labels), "auc": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
