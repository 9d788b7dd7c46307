"""The arm "scratch": the same network from random weights, and in all else the arm "full"."""

import csv
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from safetensors.torch import load_file

from medtpp import backbones
from medtpp.adapter import load_adapter, read_card
from medtpp.config import BackboneOptions
from medtpp.errors import ConfigError
from medtpp.files import read_json
from medtpp.workflow.compare import Axes
from medtpp.workflow.compare.opening import _require_same_network
from medtpp.workflow.compare.plan import Arm, Cell, base_experiment, cell_experiment
from medtpp.workflow.study import StudyPart, summarise_study
from monai_networks import SIZES, file_of
from runs import data_folder, done, experiment, refused, settings

_HOLD = TemporaryDirectory(prefix="medtpp-scratch-")
STEPS = ("tpp.steps=3", "finetune.steps=3", "data.modality=xray", "hardware.threads=2")


def command(arms, *more):
    axes = ("--labels", "12", "--seeds", "1", "--arm", arms)
    return ["compare", data_folder(), *axes, *settings(*STEPS), *more]


@cache
def compared():
    folder = Path(_HOLD.name) / "compared"
    return folder, done(*command("full,scratch"), "--out", folder)


def adapter_of(arm):
    return compared()[0] / "cells" / arm / "12" / "seed0" / "finetune" / "adapter"


def test_it_is_an_arm_once_for_all_tuners():
    axes = Axes(tuners=("lora", "ssf"), extras=("scratch", "full"))
    assert [arm.name for arm in axes.arms(experiment())][-2:] == ["full", "scratch"]
    alone = Axes(inits=(), extras=("scratch",))
    assert alone.arms(experiment()) == (Arm("full", "scratch"),)


def test_it_is_trained_as_full_is():
    """The user's options are of the user's tuner; the backbone's revision is one of weights."""
    written = experiment("finetune.learning_rate=0.5")
    base = base_experiment(written, Axes(extras=("scratch",)))
    full, scratch = (cell_experiment(base, Cell(Arm("full", init), 12, 3)) for init in ("standard", "scratch"))
    assert scratch.backbone.weights == "random"
    assert scratch.model_copy(update={"backbone": full.backbone}) == full
    assert scratch.finetune.learning_rate == "auto"
    named = base.model_copy(update={"backbone": BackboneOptions(name="vit_tiny_patch16_224", revision="abc")})
    assert cell_experiment(named, Cell(Arm("full", "scratch"), 12, 3)).backbone.revision is None


def test_its_cell_is_done_and_told():
    folder, said = compared()
    with (folder / "cells.csv").open() as stream:
        rows = {row["arm"]: row for row in csv.DictReader(stream)}
    assert {arm: row["status"] for arm, row in rows.items()} == dict.fromkeys(
        ("lora standard", "lora tpp", "full", "scratch"), "done"
    )
    for column in ("steps", "batch_size", "target_parameters", "n_train"):
        assert rows["full"][column] == rows["scratch"][column]
    summary = read_json(folder / "comparison.json")
    (gap,) = (row for row in summary["differences"] if row["baseline"] == "scratch")
    assert gap["arm"] == "lora tpp"
    assert gap["p_holm"] == gap["p"]  # a family of its own
    assert "TPP from training from scratch" in gap["sentence"]
    described = {arm["name"]: arm["description"] for arm in summary["arms"]}
    assert described["scratch"] == "all weights of the backbone trained from random ones"
    assert gap["sentence"] in said.text
    page = (folder / "report.html").read_text()
    assert "scratch" in page
    assert described["scratch"] in page


def test_it_differs_from_full_by_the_weights_it_starts_from_alone():
    folder = compared()[0]
    full, scratch = (
        read_json(folder / f"cells/full-{init}/12/seed0/finetune/inputs.json")["inputs"]
        for init in ("standard", "scratch")
    )
    assert {name for name in full if full[name] != scratch[name]} == {"backbone"}
    options = load_adapter(adapter_of("full-standard")).backbone.options
    untrained = backbones.load(backbones.untrained(options)).encoder.state_dict()
    pretrained = backbones.load(options).encoder.state_dict()
    card = read_card(adapter_of("full-scratch"))
    assert card.backbone.options.weights == "random"
    assert load_adapter(adapter_of("full-scratch")).backbone.spec.sha256 == card.backbone.sha256
    trained = load_file(adapter_of("full-scratch") / "adapter_model.safetensors")
    name = next(name for name in trained if name.endswith("blocks.0.attn.qkv.weight"))
    near, far = (trained[name] - state["blocks.0.attn.qkv.weight"] for state in (untrained, pretrained))
    assert 0 < near.abs().max() < 1e-3 < far.abs().max()  # three steps of 1e-4


def test_a_study_knows_it_from_full(tmp_path):
    found = summarise_study([StudyPart("phantom", "", "", "", compared()[0])], tmp_path)
    assert {gain.baseline: gain.kind for gain in found.gains} == {
        "lora standard": "standard",
        "full": "full",
        "scratch": "scratch",
    }


def test_what_has_no_other_weights_is_refused():
    said = refused(*command("scratch", "--set", "backbone.weights=random"), "--dry-run")
    assert "from scratch already" in said
    fits = BackboneOptions(name=str(experiment().backbone.name))
    _require_same_network(fits, (32, 32))
    sized_by_its_file = BackboneOptions(name="monai:segresnet", weights=file_of("segresnet"))
    with pytest.raises(ConfigError, match="weights of monai:segresnet decide how large"):
        _require_same_network(sized_by_its_file, SIZES["segresnet"])


def test_what_is_prepared_keeps_the_weights_of_the_others():
    """Where it is the only arm, too: more may be added later."""
    from medtpp.workflow.compare import open_comparison

    axes = replace(Axes(inits=(), extras=("scratch",)), labels=(12,), seeds=1)
    opened = open_comparison(experiment(*STEPS), axes, None, dry_run=True)
    assert opened.base.backbone.weights == opened.prepared.experiment.backbone.weights == "pretrained"
    assert [cell.name for cell in opened.cells] == ["scratch, 12 labels, seed 0"]
