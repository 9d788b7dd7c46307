"""The monitor of TPP finds the step where features are worth most, by training labels alone, and disturbs nothing."""

import csv
import functools
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import medtpp
import stages
from medtpp.data.batches import Batch
from medtpp.data.cache import ImageCache
from medtpp.data.case import Case
from medtpp.errors import ConfigError
from medtpp.files import MARKER, read_json
from medtpp.seeds import Draws
from medtpp.training import loop, monitor, tpp
from medtpp.training.device import quiet_fabric
from medtpp.training.loop import Group, Hooks, Schedule, fit
from medtpp.training.monitor import FOLDS, LEAST, MOST, SHARE, Monitor, MonitorPlan, plan_monitor
from medtpp.training.resume import RESUME
from medtpp.training.stage import StageData
from medtpp.training.tpp import run_tpp
from medtpp.workflow.prepare import prepare
from runs import SIZE, data_folder, done, experiment, refused
from runs import settings as tiny

FABRIC = {"accelerator": "cpu", "devices": 1, "precision": "32-true"}
ON = ("tpp.monitor=true", "tpp.steps=40", "tpp.head_warmup=0")


def cases(counts, patients):
    """So many cases of each class, their patients in turn."""
    return tuple(
        Case(f"{label}{index}", data_folder(), (label,), labelled=True, patient=f"{label}-{index % patients}")
        for label, count in counts.items()
        for index in range(count)
    )


def planned(given, *chosen, steps=2000, batch=64):
    chosen = ("task=classification", f"tpp.steps={steps}", f"tpp.batch_size={batch}", *chosen)
    return plan_monitor(experiment(*chosen), StageData(None, tuple(given)))


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 200), min_size=1),
    st.integers(1, 60),
    st.integers(1, 3000),
    st.integers(1, 64),
    st.integers(0, 9),
)
def test_a_plan_keeps_to_its_share_of_the_time_and_holds_all_classes(counts, patients, steps, batch, seed):
    given = cases(counts, patients)
    kept = {label for label, count in counts.items() if min(count, patients) >= FOLDS}
    enough = len(kept) >= 2 and sum(counts[label] for label in kept) >= max(LEAST, FOLDS * len(kept))
    asked = functools.partial(planned, given, f"seed={seed}", steps=steps, batch=batch)
    if not enough or SHARE * steps * batch < max(LEAST, FOLDS * len(kept)):
        with pytest.raises(ConfigError, match="of the time of" if enough else "it needs"):
            asked()
        return
    plan = asked()
    chosen = plan.data.cases
    assert len(set(chosen)) == len(chosen) <= MOST
    assert set(chosen) <= set(given)
    assert {case.labels[0] for case in chosen} == kept
    for label in kept:
        assert len({case.patient for case in chosen if case.labels == (label,)}) >= FOLDS
    assert len(chosen) * (steps // plan.every) <= SHARE * steps * batch
    assert 1 <= steps // plan.every <= 20


def test_the_cases_depend_on_the_seed_alone():
    given = cases({"a": 300, "b": 300}, 300)
    ids = lambda plan: {case.id for case in plan.data.cases}  # noqa: E731
    assert ids(planned(given)) == ids(planned(given)) != ids(planned(given, "seed=1"))
    counts = [sum(name in case.labels for case in planned(given).data.cases) for name in "ab"]
    assert counts == [MOST // 2] * 2, "as many of each class"


@pytest.mark.parametrize(
    ("given", "chosen", "words"),
    [
        (cases({"a": 9, "b": 9}, 99), {}, ["needs 20 labelled training cases", "there are 18 of 2"]),
        (cases({"a": 90}, 99), {}, ["two classes or more"]),
        (cases({"a": 90, "b": 4}, 99), {}, [f"{FOLDS} patients each; there are 90 of 1"]),
        (cases({"a": 90, "b": 90}, 4), {}, ["there are 0 of 0"]),
        ((), {}, ["there are 0 of 0"]),
        (cases({"a": 90, "b": 90}, 99), {"steps": 10, "batch": 4}, ["20 cases", "10% of the time of 10 steps of 4"]),
    ],
)
def test_what_cannot_be_monitored_is_refused_with_the_reason(given, chosen, words):
    with pytest.raises(ConfigError) as caught:
        planned(given, **chosen)
    for text in (*words, "tpp.monitor", "--set tpp.monitor=false"):
        assert text in str(caught.value)


def test_masks_and_several_labels_are_refused():
    given = cases({"a": 90, "b": 90}, 99)
    for chosen, words in (("task=segmentation", "there are masks"), ("data.multilabel=true", "may have several")):
        with pytest.raises(ConfigError, match=words):
            planned(given, chosen)


class Fading(nn.Module):
    """Features with a signal that grows until a step and then fades, in constant noise; the step is the parameter."""

    spec = SimpleNamespace(image_size=(4, 4))
    best = 12

    def __init__(self):
        super().__init__()
        self.steps = nn.Parameter(torch.zeros(()))

    def encode(self, images):
        noise = torch.randn(len(images), 8, generator=torch.Generator().manual_seed(0))
        strength = 1 - abs(self.steps.item() - self.best) / self.best
        return SimpleNamespace(pooled=lambda how: noise + strength * images.mean(dim=(1, 2, 3))[:, None])

    def forward(self, images, targets, visits):
        return self.steps * 1.0, {}


@dataclass(frozen=True)
class Steps:
    """Batches that nobody looks at."""

    waited = 0.0

    def iterate(self, start, stop):
        for _ in range(start, stop):
            yield Batch(torch.zeros(2, 1), None, torch.arange(2), Draws(torch.arange(2)))


def bright(folder):
    """Cases of two classes, one of them with bright images."""
    given = cases({"a": 20, "b": 20}, 20)
    images = np.repeat([60, 190], 20).astype(np.uint8)[:, None, None, None] * np.ones((1, 1, 4, 4), np.uint8)
    images.tofile(folder / "images")
    return StageData(ImageCache(folder / "images", images.shape, (), {c.id: at for at, c in enumerate(given)}), given)


def test_the_step_is_kept_where_a_planted_signal_is_strongest(tmp_path):
    model, fabric = Fading(), quiet_fabric(**FABRIC)
    fabric.launch()
    watching = Monitor(model, fabric, bright(tmp_path))

    def count(step, total):
        model.steps.data.fill_(step)

    record = fit(
        fabric, model, [Group("tuner", dict(model.named_parameters()), 0.0)], Steps(),
        Schedule(24, validate_every=4), hooks=Hooks(count), validate=watching.score, score_name="monitor",
    )  # fmt: skip
    scores = {row["step"]: row["monitor"] for row in record.rows if "monitor" in row}
    assert list(scores) == [4, 8, 12, 16, 20, 24]
    assert record.best == (scores[12], 12)
    assert model.steps.item() == 12, "its parameters are those at the end"
    assert scores[12] > 0.8 > max(scores[4], scores[20])


@pytest.mark.parametrize(
    ("gains", "ends"), [([3, 2, 1, 0, 0, 0], 8), ([0, 1, 1, 2, 2, 2], 12), ([1, 2, 3, 4, 5, 6], 12)]
)
def test_training_ends_after_so_many_scores_without_gain(gains, ends):
    model, fabric, scores = Fading(), quiet_fabric(**FABRIC), iter(gains)
    fabric.launch()
    record = fit(
        fabric, model, [Group("tuner", dict(model.named_parameters()), 0.0)], Steps(),
        Schedule(12, validate_every=2, patience=3), validate=lambda: next(scores),
    )  # fmt: skip
    assert record.rows[-1]["step"] == ends
    assert record.best[0] == max(gains)


def inputs(folder, every=2, **sections):
    data = stages.data_of(folder)
    return replace(stages.tpp_inputs(folder, **sections), monitor=MonitorPlan(data.stage("train"), every))


def weights(folder):
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def test_where_the_last_step_is_best_the_weights_are_those_without_a_monitor(phantom_folder, tmp_path, monkeypatch):
    score, calls = Monitor.score, []

    def rising(self):
        assert 0 <= score(self) <= 1
        calls.append(1)
        return float(len(calls))

    run_tpp(stages.tpp_inputs(phantom_folder), tmp_path / "off")
    monkeypatch.setattr(Monitor, "score", rising)
    run_tpp(inputs(phantom_folder), tmp_path / "on")
    assert weights(tmp_path / "on") == weights(tmp_path / "off")
    assert (tmp_path / "on" / "preview.png").read_bytes() == (tmp_path / "off" / "preview.png").read_bytes()
    assert read_json(tmp_path / "on" / MARKER)["best"] == {"score": 3.0, "step": 6}


def test_an_earlier_step_is_kept_told_and_shown(phantom_folder, tmp_path, monkeypatch):
    scores = iter([0.5, 0.9, 0.7, 0.4])  # the last one without target parameters
    monkeypatch.setattr(Monitor, "score", lambda self: next(scores))
    run_tpp(stages.tpp_inputs(phantom_folder, tpp={"steps": 6}), tmp_path / "off")
    result = run_tpp(inputs(phantom_folder, logging={"tensorboard": True}), tmp_path / "on")
    assert weights(tmp_path / "on") != weights(tmp_path / "off")
    assert (result.record.best, result.figures["monitor_without"]) == ((0.9, 4), 0.4)
    card = read_json(tmp_path / "on" / "adapter" / "medtpp.json")["tpp"]
    labelled = len(stages.data_of(phantom_folder).splits["train"])
    assert card["monitor"] == {
        "cases": labelled,
        "score": 0.9,
        "step": 4,
        "scores": 3,
        "without": 0.4,
        "candidates": {},
    }
    readme = (tmp_path / "on" / "adapter" / "README.md").read_text()
    assert "**Labels chose the step**: of 3 that were scored, step 4 was kept" in readme
    with (tmp_path / "on" / "log.csv").open() as file:
        assert [row["monitor"] for row in csv.DictReader(file) if row["monitor"]] == ["0.5", "0.9", "0.7"]
    events = b"".join(file.read_bytes() for file in (tmp_path / "on").rglob("*tfevents*"))
    assert b"monitor" in events
    assert read_json(tmp_path / "off" / "adapter" / "medtpp.json")["tpp"]["monitor"] is None


class Killed(BaseException):
    """What no handler catches."""


@pytest.mark.parametrize("patience", [0, 2])
def test_a_killed_stage_ends_in_the_same_bits_and_keeps_its_best_score(patience, phantom_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "PATIENCE", patience)
    monkeypatch.setattr("medtpp.training.tpp.PATIENCE", patience)
    given = inputs(phantom_folder, every=1, tpp={"steps": 8})
    scored = Monitor.score
    # Best at step 2; what the probe finds depends on the weights, which a resumed run has to have as well.
    faded = lambda self: scored(self) * 1e-3 - abs(self.backbone.seen - 2)  # noqa: E731
    backward = loop._backward

    def run(folder, last):
        steps = []

        def step(fabric, model, optimizer, batch, micro, divisible):
            tuned = getattr(model, "module", model).backbone
            if any(parameter.requires_grad for parameter in tuned.targets.values()):  # not in the head's warm-up
                steps.append(1)
                if len(steps) == last:
                    raise Killed
                tuned.seen = int(optimizer.state_dict()["state"].get(0, {"step": 0})["step"]) + 1
            return backward(fabric, model, optimizer, batch, micro, divisible)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "_backward", step)
            patch.setattr(Monitor, "score", faded)
            run_tpp(given, folder)

    run(tmp_path / "whole", 0)
    with pytest.raises(Killed):
        run(tmp_path / "killed", 4)
    assert (tmp_path / "killed" / RESUME).is_file()
    run(tmp_path / "killed", 0)
    assert weights(tmp_path / "whole") == weights(tmp_path / "killed")
    whole, killed = (read_json(tmp_path / name / MARKER) for name in ("whole", "killed"))
    assert whole["best"] == killed["best"]
    assert whole["best"]["step"] == 2
    assert whole["steps"] == killed["steps"] == (4 if patience else 8)


def test_the_same_bits_with_the_real_monitor_twice(phantom_folder, tmp_path):
    first, again = (run_tpp(inputs(phantom_folder, every=3), tmp_path / name) for name in ("first", "again"))
    assert first.record.best == again.record.best
    assert weights(tmp_path / "first") == weights(tmp_path / "again")


def test_a_run_scores_training_cases_alone_and_tells(tmp_path, monkeypatch):
    looked, score = set(), Monitor.score

    def spy(self):
        looked.update(case.id for case in self.data.cases)
        return score(self)

    monkeypatch.setattr(Monitor, "score", spy)
    folder = tmp_path / "run"
    said = done("run", data_folder(), "-o", folder, "--modality", "xray", *tiny(*ON))
    prepared = prepare(experiment("data.modality=xray", *ON), split_file=folder / "split.csv")
    train = {case.id for case in prepared.cases("train")}
    assert len(looked) == LEAST
    assert looked <= train
    assert "probe on training labels: AUC 0." in said.text
    page = (folder / "report.html").read_text()
    assert "Labels chose the step: of 4 that were scored" in page
    assert "AUC of a probe on training labels" in page
    assert "without labels; 20 labelled training cases chose the step" in " ".join(page.split())
    assert read_json(folder / "tpp" / "inputs.json")["inputs"]["monitored cases"]
    again = done("run", data_folder(), "-o", folder, "--modality", "xray", "--resume", *tiny(*ON))
    assert "TPP was done before." in again.text


def test_drawn_labels_are_the_only_ones(tmp_path):
    prepared = prepare(experiment("data.labels=28", *ON))
    plan = plan_monitor(prepared.experiment, prepared.data(prepared.cases("train")))
    assert {case.id for case in plan.data.cases} <= {case.id for case in prepared.cases("train")}
    assert len(prepared.cases("train", "val")) == 28


def test_refusals_come_before_any_training(tmp_path):
    out = ("-o", tmp_path / "run")
    assert "there are" in refused("tpp", data_folder(), *out, *tiny(*ON, "data.labels=16"))
    assert "of the time of 4 steps of 16" in refused("run", data_folder(), *out, *tiny("tpp.monitor=true"))
    assert not (tmp_path / "run" / "tpp").exists()
    assert "tpp.monitor is for single runs" in refused("compare", data_folder(), *out, *tiny(*ON))
    tuned = medtpp.attach(medtpp.load("test_vit", weights="random", image_size=SIZE), "lora")
    with pytest.raises(ConfigError, match="monitor needs labels"):
        medtpp.tpp(tuned, torch.rand(8, 3, SIZE, SIZE), steps=2, monitor=True)
    done("init", data_folder(), "-o", tmp_path / "e.yaml", *tiny("tpp.monitor=true", "tpp.enabled=false"))


def test_the_task_with_the_best_score_is_kept_and_the_others_are_told(tmp_path, monkeypatch):
    given = {"MAE": 0.6, "MaskedFeatures": 0.8}
    tasks = []
    made = tpp.make_pretext

    def noting(options, *others):
        tasks.append(made(options, *others))
        return tasks[-1]

    monkeypatch.setattr(tpp, "make_pretext", noting)
    monkeypatch.setattr(Monitor, "score", lambda self: given[type(tasks[-1][0]).__name__])
    chosen = ("tpp.choose=[mae, features]", "pretext.mask_ratio=0.5")
    command = ("run", data_folder(), "--modality", "xray", "-o", tmp_path / "run")
    said = done(*command, *tiny(*ON, *chosen))
    assert "pretext mae, features" in said.text
    assert "best AUC with mae 0.600, features 0.800" in said.text
    folders = {name: tmp_path / "run" / name for name in ("tpp", "tpp-mae", "tpp-features")}
    assert weights(folders["tpp"]) == weights(folders["tpp-features"]) != weights(folders["tpp-mae"])
    cards = {name: read_json(folder / "adapter" / "medtpp.json")["tpp"] for name, folder in folders.items()}
    assert cards["tpp"]["monitor"]["candidates"] == {"mae": 0.6, "features": 0.8}
    assert [cards[name]["pretext"]["name"] for name in folders] == ["features", "mae", "features"]
    assert cards["tpp-mae"]["pretext"]["mask_ratio"] == 0.5, "the options of the section that names it"
    assert cards["tpp-mae"]["steps"] == cards["tpp-features"]["steps"] == 40
    assert (
        "by the best AUC of each: `mae` 0.600, `features` 0.800" in (folders["tpp"] / "adapter/README.md").read_text()
    )
    page = " ".join((tmp_path / "run" / "report.html").read_text().split())
    assert "Labels chose the pretext task, too, by the best AUC of each: mae 0.600, features 0.800." in page
    assert "features (mask ratio 0.75;" in page
    again = done(*command, "--resume", *tiny(*ON, *chosen)).text
    assert again.count("TPP was done before.") == 2
    assert "Fine-tuning was done before." in again


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (("tpp.choose=[mae, simmim]",), "choose needs monitor: true"),
        ((*ON, "tpp.choose=[mae]"), "name two tasks or more"),
        ((*ON, "tpp.choose=[mae, mae]"), "each once"),
        ((*ON, "tpp.choose=[mae, mea]"), "no pretext task 'mea'; known: "),
        ((*ON, "tpp.choose=[mae, simclr]", "tpp.batch_size=16"), "simclr needs batches of at least 32"),
        ((*ON, "tpp.choose=[simmim, mae]", "tuner=convpass"), "convpass and the pretext task mae exclude"),
    ],
)
def test_tasks_that_cannot_be_chosen_are_refused_first(chosen, words, tmp_path):
    assert words in refused("run", data_folder(), "-o", tmp_path / "run", *tiny(*chosen))
    assert not (tmp_path / "run" / "tpp-mae").exists()
