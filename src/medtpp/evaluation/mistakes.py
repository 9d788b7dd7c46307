"""The most confident mistakes, with their images: where a model fails, and where a label may be wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medtpp.evaluation.predictions import SEPARATOR, Predictions
from medtpp.files import atomic, write_json

MOST = 12


@dataclass(frozen=True)
class Mistake:
    """A case that came out wrong.

    Attributes:
        case: Its id.
        label: What it is; "" for a case of a multi-label task without any label.
        predicted: What was predicted: a class, or "not CLASS" in a multi-label task.
        probability: Of what was predicted.
        row: Its place among the predictions.
    """

    case: str
    label: str
    predicted: str
    probability: float
    row: int


def confident_mistakes(predictions: Predictions, thresholds: Mapping[str, float], most: int = MOST) -> list[Mistake]:
    """The labelled cases that were predicted wrongly, the most confident first, one mistake for each case.

    Tasks with one label are decided by the most probable class, others for each class by its threshold.
    """
    classes, found = predictions.classes, []
    for row, labels in enumerate(predictions.labels):
        if labels is None:
            continue
        probabilities = predictions.probabilities[row]
        if predictions.multilabel:
            wrong = []
            for at, name in enumerate(classes):
                present = probabilities[at] >= thresholds[name]
                if present != (name in labels):
                    wrong.append(
                        (float(probabilities[at]), name) if present else (1 - float(probabilities[at]), f"not {name}")
                    )
        else:
            top = int(np.argmax(probabilities))
            wrong = [] if classes[top] in labels else [(float(probabilities[top]), classes[top])]
        if wrong:
            confidence, predicted = max(wrong)
            found.append(Mistake(predictions.cases[row], SEPARATOR.join(labels), predicted, confidence, row))
    return sorted(found, key=lambda mistake: -mistake.probability)[:most]


def write_mistakes(folder: Path, mistakes: list[Mistake], images: list[NDArray[np.uint8]]) -> None:
    """Write `mistakes.json` and the image of each mistake as it was seen, as PNG.

    Args:
        folder: Of these files alone.
        mistakes: From `confident_mistakes`.
        images: (C, S, S) each, C being 1 or 3, in the same order.
    """
    from PIL import Image

    table: list[dict[str, Any]] = []
    for number, (mistake, image) in enumerate(zip(mistakes, images, strict=True)):
        name = f"{number:02d}.png"
        pixels = image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)
        with atomic(folder / name) as temporary:
            Image.fromarray(pixels).save(temporary, format="PNG")
        values = asdict(mistake)
        del values["row"]
        table.append({**values, "image": name})
    write_json(folder / "mistakes.json", table)
