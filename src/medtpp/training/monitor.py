"""What TPP does to features that labels will be asked of: a linear probe on training labels, now and then.

The labels are those of training cases alone; each case is scored by a probe that did not see its patient. The targets
of the best score are kept, so labels choose the step: the adapter says so, and comparisons refuse it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from lightning.fabric import Fabric

from medtpp.backbones import Backbone
from medtpp.config import Experiment
from medtpp.data.case import Case
from medtpp.errors import ConfigError
from medtpp.seeds import Seeds
from medtpp.training.features import as_they_are, read_features
from medtpp.training.stage import StageData, number

SHARE = 0.1  # of the stage's time, at most: a step takes at least as long as its images take to be encoded
MOST, LEAST = 256, 20  # cases
FOLDS = 5  # that patients are divided into; each class has as many patients
SCORES = 20  # in a stage, at most
PATIENCE = 10  # scores in a row that gain nothing, after which the stage ends


@dataclass(frozen=True)
class MonitorPlan:
    """What is looked at and when; it pickles.

    Attributes:
        data: Labelled training cases.
        every: Steps between scores; the last step has one, too.
    """

    data: StageData
    every: int


def plan_monitor(experiment: Experiment, data: StageData) -> MonitorPlan:
    """Choose cases, first one of each patient, as many of each class, and steps within `SHARE` of the stage's time.

    The clock has no part in it, so that the same seed keeps the same step.

    Args:
        experiment: With `auto` values answered.
        data: The labelled training cases.

    Raises:
        ConfigError: The task is no classification with one label, there are too few cases, or the stage is too short.
    """
    if experiment.task.name != "classification":
        raise _refusal("it asks features of whole images for labels, and here there are masks")
    if experiment.data.multilabel:
        raise _refusal("it asks features for one label, and here a case may have several (data.multilabel)")
    cases = _in_turn([case for case in data.cases if case.labelled], Seeds(experiment.seed))
    classes = len({case.labels for case in cases})
    least = max(LEAST, FOLDS * classes)
    if classes < 2 or len(cases) < least:
        raise _refusal(
            f"it needs {least} labelled training cases, of two classes or more with {FOLDS} patients each; there are "
            f"{len(cases)} of {classes}"
        )
    steps, batch = number(experiment.tpp.steps), number(experiment.tpp.batch_size)
    seen = SHARE * steps * batch  # images that may be encoded for it
    wanted = min(MOST, len(cases), max(least, int(seen / (SCORES / 2))))
    every = max(math.ceil(steps / SCORES), math.ceil(wanted / (SHARE * batch)))
    if every > steps:
        raise _refusal(
            f"{wanted} cases would take more than {SHARE:.0%} of the time of {steps} steps of {batch} images"
        )
    return MonitorPlan(StageData(data.store, tuple(cases[:wanted])), every)


def _refusal(reason: str) -> ConfigError:
    return ConfigError(f"tpp.monitor cannot be: {reason}. Use --set tpp.monitor=false.")


def _in_turn(cases: Sequence[Case], seeds: Seeds) -> list[Case]:
    """Cases of the classes that have enough patients; any first ones hold all classes and many patients."""
    patients: dict[tuple[str, ...], set[str]] = {}
    for case in cases:
        patients.setdefault(case.labels, set()).add(_patient(case))
    order = seeds.numpy("monitor").permutation(len(cases))
    visits, ranks = Counter[object](), Counter[object]()
    places: list[tuple[int, int, int]] = []
    for at, index in enumerate(order.tolist()):
        label, patient = cases[index].labels, _patient(cases[index])
        if len(patients[label]) < FOLDS:
            continue
        visit = visits[label, patient]
        places.append((visit, ranks[label, visit], at))
        visits[label, patient] += 1
        ranks[label, visit] += 1
    return [cases[order[at]] for _, _, at in sorted(places)]


def _patient(case: Case) -> str:
    return case.id if case.patient is None else f"patient {case.patient}"


class Monitor:
    """Scores a backbone that trains.

    Args:
        backbone: Tuned, on the device of `fabric`.
        fabric: Where to compute, in which precision.
        data: From the plan.
    """

    def __init__(self, backbone: Backbone, fabric: Fabric, data: StageData) -> None:
        self.backbone, self.fabric, self.data = backbone, fabric, data
        classes = sorted({case.labels for case in data.cases})
        self.labels = np.array([classes.index(case.labels) for case in data.cases])
        self.patients = [_patient(case) for case in data.cases]

    def score(self) -> float:
        """Macro AUC of a linear probe on mean patch tokens; of volumes, of the patch in the middle."""
        from medtpp.evaluation.probe import across_patients_auc  # scikit-learn takes a second to load

        batches = as_they_are(self.data, self.backbone.spec.image_size)
        features = read_features(lambda found: found.pooled("mean"), self.backbone, self.fabric, batches)
        auc = across_patients_auc(features.numpy(), self.labels, self.patients, FOLDS)
        return float(self.fabric.broadcast(auc))  # processes keep, and end at, the same step
