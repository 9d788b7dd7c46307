"""From the table of test segmentations to metrics with intervals, for each structure and over structures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medtpp.errors import DataError
from medtpp.evaluation.bootstrap import (
    Bootstrap,
    Estimate,
    estimate_all,
    estimate_text,
    group_by_patient,
    patient_notes,
)
from medtpp.evaluation.segmentation_table import METRICS, Segmentations, Unit
from medtpp.files import write_json

SCHEMA = 1
TITLES = {"dice": "Dice", "hd95": "HD95", "nsd": "NSD"}
_LONGEST_NAME = 18

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class StructureResult:
    """How one structure came out.

    Attributes:
        n: Cases that show it or in which it was predicted: those that the metrics are averaged over.
        absent: Cases that neither show it nor predict it, left out.
        missed: Cases that show it and in which nothing was predicted.
        invented: Cases that do not show it and in which it was predicted.
        metrics: Mean over the n cases of each of `METRICS`.
    """

    n: int
    absent: int
    missed: int
    invented: int
    metrics: dict[str, Estimate]


@dataclass(frozen=True)
class SegmentationEvaluation:
    """What `evaluation.json` holds of a segmentation.

    Attributes:
        n_cases: Cases evaluated.
        n_patients: Patients they come from; a case of unknown patient counts as one.
        unit: Of HD95 and the tolerance, "mm" or "px".
        tolerance: Of the surface Dice.
        metrics: Each of `METRICS`, averaged over the structures' means.
        structures: Structure name to its result.
        bootstrap: How the intervals were made.
        notes: What a reader must know: cases left out, structures missed or invented.
    """

    n_cases: int
    n_patients: int
    unit: Unit
    tolerance: float
    metrics: dict[str, Estimate]
    structures: dict[str, StructureResult]
    bootstrap: Bootstrap
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The contents of `evaluation.json`."""
        return {"schema": SCHEMA, "task": "segmentation", **asdict(self), "notes": list(self.notes)}

    def save(self, folder: Path) -> None:
        """Write `evaluation.json`.

        Raises:
            OutputError: The file cannot be written.
        """
        write_json(folder / "evaluation.json", self.to_json())

    def table(self) -> list[tuple[str, str]]:
        """Rows of a title and a value with its interval, at most 80 columns wide together."""
        groups = f"{self.n_patients} patients" if self.bootstrap.unit == "patient" else "patients unknown"
        units = {"hd95": f" ({self.unit})", "nsd": f" ({self.tolerance:g} {self.unit})"}
        titles = {name: f"{title}{units.get(name, '')}" for name, title in TITLES.items()}
        rows = [("cases", f"{self.n_cases} ({groups})")]
        rows += [(titles[name], estimate_text(found)) for name, found in self.metrics.items()]
        if len(self.structures) > 1:
            rows += [
                (f"{titles[name]}, {_short(structure)}", estimate_text(found))
                for structure, result in self.structures.items()
                for name, found in result.metrics.items()
            ]
        return rows


def structure_means(values: Floats, weights: Floats) -> Floats:
    """(r, k) weighted means over the cases in which a value is defined; not-a-number where there is none.

    Args:
        values: (n, k), not-a-number where undefined.
        weights: (r, n).
    """
    defined = ~np.isnan(values)
    total = weights @ defined.astype(np.float64)
    summed = weights @ np.where(defined, values, 0.0)
    means: Floats = np.divide(summed, total, out=np.full(total.shape, np.nan), where=total > 0)
    return means


def overall_means(values: Floats, weights: Floats) -> Floats:
    """(r,) the mean of `structure_means` over the structures that have a defined value in any of the cases.

    A resample in which one of these structures has none is not-a-number: it is not comparable to the others.
    """
    somewhere = ~np.isnan(values).all(axis=0)
    if not somewhere.any():
        return np.full(len(weights), np.nan)
    means: Floats = structure_means(values[:, somewhere], weights).mean(axis=1)
    return means


def evaluate_segmentation(
    test: Segmentations, *, resamples: int = 2000, seed: int, level: float = 0.95, notes: Sequence[str] = ()
) -> SegmentationEvaluation:
    """Mean metrics, each with a percentile interval from a bootstrap over patients.

    A structure's metric is its mean over the cases that show or predict it; over structures, the mean of these means,
    so that a structure which few cases show counts as much as the others (as in nnU-Net).

    Args:
        test: Of the test cases alone (`Segmentations.select`).
        resamples: Bootstrap resamples.
        seed: Of the bootstrap.
        level: Coverage of the intervals.
        notes: What a reader must know beforehand.

    Raises:
        ConfigError: The bootstrap cannot be made so.
        DataError: There is no case.
    """
    if not len(test):
        raise DataError("There is no segmentation to evaluate: no case has a mask.")
    bootstrap = Bootstrap(resamples, level, seed, "patient" if any(test.patients) else "case")
    groups = group_by_patient(test)

    def score(weights: Floats) -> dict[tuple[str | None, str], Floats]:
        scores: dict[tuple[str | None, str], Floats] = {}
        for name in METRICS:
            values = test.numbers[name]
            scores[None, name] = overall_means(values, weights)
            means = structure_means(values, weights)
            scores |= {(structure, name): means[:, index] for index, structure in enumerate(test.structures)}
        return scores

    found = estimate_all(score, groups, bootstrap)
    predicted, true = test.volume > 0, test.volume_true > 0
    structures = {
        structure: StructureResult(
            n=int((predicted | true)[:, index].sum()),
            absent=int((~predicted & ~true)[:, index].sum()),
            missed=int((~predicted & true)[:, index].sum()),
            invented=int((predicted & ~true)[:, index].sum()),
            metrics={name: found[structure, name] for name in METRICS},
        )
        for index, structure in enumerate(test.structures)
    }
    n_patients = int(groups.max()) + 1
    return SegmentationEvaluation(
        n_cases=len(test),
        n_patients=n_patients,
        unit=test.unit,
        tolerance=test.tolerance,
        metrics={name: found[None, name] for name in METRICS},
        structures=structures,
        bootstrap=bootstrap,
        notes=(*notes, *_notes(structures, len(test)), *patient_notes(test.patients, n_patients)),
    )


def _notes(structures: dict[str, StructureResult], n_cases: int) -> list[str]:
    notes: list[str] = []
    for name, result in structures.items():
        if not result.n:
            notes.append(
                f"No case shows {name!r} and none predicts it: its metrics are undefined and left out of means."
            )
        elif result.absent:
            notes.append(f"{name!r} is neither there nor predicted in {result.absent} of {n_cases} cases: left out.")
        if result.missed or result.invented:
            notes.append(
                f"{name!r} is missed altogether in {result.missed} of {n_cases} cases, and predicted in "
                f"{result.invented} that do not show it: Dice and NSD are 0 there, HD95 is the diagonal of the image."
            )
    return notes


def _short(name: str) -> str:
    return name[: _LONGEST_NAME - 1] + "…" if len(name) > _LONGEST_NAME else name
