"""What the frozen features of each start of a comparison are worth, before anything is fine-tuned.

    medtpp compare TASKS/ultrasound_breast/manifest.csv --out OUT --tuner lora --foreign OTHER_IMAGES
      --init standard,tpp,tpp_labelled,tpp_foreign,random_direction
    python benchmarks/start_features.py OUT --out results/FILE.json

For each adapter that the comparison's TPP runs and controls left, and for none, a linear probe gets 10 labels per class
of the training cases, 30 times, and is measured on the validation and test cases, as in tpp_defaults.py. It is for
development tasks: test cases are looked at.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from _features import DRAWS, PER_CLASS, probed
from medtpp import backbones
from medtpp.adapter import load_adapter
from medtpp.files import MARKER, read_json
from medtpp.workflow.experiment import load_experiment
from medtpp.workflow.prepare import prepare


def main() -> None:
    """Print and write the mean AUC of every start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found: Path = options.comparison
    prepared = prepare(load_experiment(found / "experiment.yaml", []), split_file=found / "split.csv")
    plain = backbones.load(prepared.experiment.backbone, image_size=prepared.preprocessing.patch)
    rows: list[dict[str, Any]] = [{"start": "standard", "seed": None, "auc": probed(plain, prepared)}]
    print(rows[0], flush=True)
    for marker in sorted((found / "tpp").rglob(MARKER)):
        start = marker.parent.relative_to(found / "tpp")
        told = read_json(marker)
        kept = {name: told[name] for name in ("pretext_loss_on", "pretext_loss_off", "feature_drift") if name in told}
        value = probed(load_adapter(marker.parent / "adapter").backbone, prepared)
        rows.append({"start": "/".join(start.parts[:-1]), "seed": int(start.name.removeprefix("seed")), "auc": value})
        rows[-1] |= kept
        print(rows[-1], flush=True)
    about = {"data": prepared.dataset.root.name, "per_class": PER_CLASS, "draws": DRAWS, "rows": rows}
    options.out.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
