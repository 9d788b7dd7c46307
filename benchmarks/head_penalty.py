"""How strongly a head on frozen features should be held back with few labels, on development cases.

    python benchmarks/prepare.py DATA TASKS
    python benchmarks/head_penalty.py TASKS/xray_lung-development/manifest.csv --labels 20,100
      --set data.modality=xray --out results/FILE.json

For each draw of labels, as `medtpp compare` draws them for a seed, a head is fitted to the features of the training
cases as they are, with each of some penalties, and its macro AUC is measured on the validation and test cases of the
development manifest. With --adapter the features are those of an adapter, such as TPP/adapter of

    medtpp tpp TASKS/xray_lung-development/manifest.csv --out TPP --modality xray --set data.image_size=128
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

from _features import features
from medtpp import backbones
from medtpp.adapter import load_adapter
from medtpp.data.cache import ImageCache
from medtpp.seeds import Seeds
from medtpp.tasks import classification
from medtpp.tasks.classification import Classification, ClassificationOptions
from medtpp.workflow.experiment import load_experiment
from medtpp.workflow.prepare import prepare

STRENGTHS = (2.0, 10.0, 50.0, 250.0, 1250.0)


def main() -> None:
    """Print and write the mean AUC for each number of labels and penalty."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--labels", default="30,150")
    parser.add_argument("--draws", type=int, default=30)
    parser.add_argument("--set", action="append", default=[], dest="settings")
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    common = ["data.image_size=128", *options.settings]
    whole = prepare(load_experiment(options.manifest, common))
    if not isinstance(whole.store, ImageCache):
        raise SystemExit(f"{options.manifest} holds volumes; the probe takes images.")
    cases = [case for case in whole.dataset.cases if case.id in whole.whole_split]
    row = {case.id: number for number, case in enumerate(cases)}
    backbone = (
        load_adapter(options.adapter).backbone
        if options.adapter
        else backbones.load(whole.experiment.backbone, image_size=whole.preprocessing.patch)
    )
    labels = torch.tensor([whole.dataset.classes.index(case.labels[0]) for case in cases])
    values = torch.from_numpy(features(backbone, whole.store, whole.data(cases).rows))
    tested = [row[case.id] for case in cases if whole.whole_split[case.id] != "train"]
    kind = ClassificationOptions()
    rows: list[dict[str, float]] = []
    for count in map(int, options.labels.split(",")):
        for seed in range(options.draws):
            drawn = prepare(load_experiment(options.manifest, [*common, f"data.labels={count}", f"seed={seed}"]))
            chosen = [row[case.id] for case in drawn.cases("train")]
            head = Classification(kind, backbone.spec, whole.dataset.classes, False, Seeds(seed))
            read = head.norm(values).detach()  # as `Classification.read` of mean-pooled tokens
            for strength in STRENGTHS:
                classification.STRENGTH = strength
                head.fit(read[chosen], labels[chosen])
                scores = head.probabilities(head.linear(read[tested])).detach().numpy()
                scores = scores[:, 1] if scores.shape[1] == 2 else scores
                auc = roc_auc_score(labels[tested], scores, multi_class="ovr")
                rows.append({"labels": count, "seed": seed, "strength": strength, "auc": float(auc)})
        print(pd.DataFrame(rows).groupby(["labels", "strength"])["auc"].mean().round(4).to_string(), flush=True)
    about = {"task": options.manifest.parent.name, "settings": common, "draws": options.draws, "rows": rows}
    options.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
