"""The stages: same seed, same bits; a killed run ends where a whole one ends; pre-trained weights are used."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric import Fabric
from safetensors.torch import load_file, save_file

import stages
from medtpp import backbones, tuners
from medtpp.adapter import load_adapter, read_card
from medtpp.backbones.base import PLAIN_VIT
from medtpp.backbones.folder import seen_by
from medtpp.config import TUNERS, AugmentOptions, FinetuneOptions, TPPOptions
from medtpp.data.augment import Augmenter
from medtpp.data.store import VolumeStore
from medtpp.data.volume_preprocess import LEVELS, VolumePreprocessing
from medtpp.errors import ConfigError, WeightsError
from medtpp.evaluation import read_predictions
from medtpp.files import MARKER, read_json
from medtpp.seeds import Seeds
from medtpp.training import loop, validation
from medtpp.training.finetune import resolve_finetune, run_finetune
from medtpp.training.loop import Group
from medtpp.training.pretrain import run_pretrain
from medtpp.training.resume import RESUME
from medtpp.training.stage import PretextModule, StageData, warm_up_heads
from medtpp.training.tpp import make_pretext, resolve_tpp, run_tpp


@pytest.fixture(scope="module")
def phantoms(phantom_folder):
    return phantom_folder


@pytest.fixture(scope="module")
def tpp(phantoms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tpp")
    return folder, run_tpp(stages.tpp_inputs(phantoms), folder)


@pytest.fixture(scope="module")
def finetuned(phantoms, tpp, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetuned")
    return folder, run_finetune(stages.finetune_inputs(phantoms, tpp[0] / "adapter"), folder)


@pytest.fixture(scope="module")
def pretrained(phantoms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained")
    return folder, run_pretrain(stages.pretrain_inputs(phantoms, steps=100, learning_rate=2e-3), folder)


def tensors(folder):
    """All tensors of a stage's results, by file and name."""
    return {
        f"{path.relative_to(folder)}:{name}": value
        for path in sorted(folder.rglob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def same(one, other):
    assert one
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def close(one, other, atol=1e-6):
    assert one
    assert one.keys() == other.keys()
    torch.testing.assert_close(dict(one), dict(other), atol=atol, rtol=1e-4)


def runs(phantoms, seed=0):
    """Each stage as a function of its folder."""
    return {
        "tpp": lambda folder: run_tpp(stages.tpp_inputs(phantoms, seed=seed), folder),
        "finetune": lambda folder: run_finetune(stages.finetune_inputs(phantoms, seed=seed), folder),
        "fitted": lambda folder: run_finetune(stages.finetune_inputs(phantoms, seed=seed, **FITTED), folder),
        "pretrain": lambda folder: run_pretrain(stages.pretrain_inputs(phantoms, seed), folder),
    }


FITTED = {"finetune": {"head_start": "fitted"}}  # whose penalty a resumed run has to find again
STAGES = ("tpp", "finetune", "fitted", "pretrain")


@pytest.mark.parametrize("stage", STAGES)
def test_the_seed_decides_every_bit(stage, phantoms, tmp_path):
    runs(phantoms)[stage](tmp_path / "one")
    torch.manual_seed(12345)  # the global stream decides nothing
    runs(phantoms)[stage](tmp_path / "again")
    runs(phantoms, seed=1)[stage](tmp_path / "other")
    one, again, other = (tensors(tmp_path / name) for name in ("one", "again", "other"))
    assert same(one, again)
    assert not same(one, other)


class Killed(BaseException):
    """What no handler catches."""


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_stage_ends_in_the_same_bits(stage, phantoms, tmp_path, monkeypatch):
    run = runs(phantoms)[stage]
    run(tmp_path / "whole")
    backward = loop._backward
    calls = []

    def kill_in_the_last_step(*args):
        calls.append(1)
        if (tmp_path / "killed" / RESUME).is_file() and len(calls) > 5:
            raise Killed
        return backward(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_backward", kill_in_the_last_step)
        with pytest.raises(Killed):
            run(tmp_path / "killed")
    assert (tmp_path / "killed" / RESUME).is_file()
    assert not (tmp_path / "killed" / MARKER).exists()
    run(tmp_path / "killed")
    assert same(tensors(tmp_path / "whole"), tensors(tmp_path / "killed"))
    assert not (tmp_path / "killed" / RESUME).exists()
    whole, killed = (read_json(tmp_path / name / MARKER) for name in ("whole", "killed"))
    assert killed["last_loss"] == whole["last_loss"]
    assert killed["best"] == whole["best"]


@pytest.mark.parametrize("tuner", [name for name, method in TUNERS.items() if method.needs <= PLAIN_VIT])
def test_every_tuner_goes_through_both_stages(tuner, phantoms, tmp_path):
    sections = {"tuner": {"name": tuner}}
    if TUNERS.get(tuner).needs_grid:
        sections["pretext"] = {"name": "simmim"}
    start = None
    if TUNERS.get(tuner).has_targets:
        result = run_tpp(stages.tpp_inputs(phantoms, **sections), tmp_path / "tpp")
        start = tmp_path / "tpp" / "adapter"
        assert result.figures["feature_drift"] > 0
        assert result.figures["pretext_loss_on"] != result.figures["pretext_loss_off"]
        before = load_adapter(start).backbone
    else:
        with pytest.raises(ConfigError, match="nothing to pre-train"):
            run_tpp(stages.tpp_inputs(phantoms, **sections), tmp_path / "tpp")
        before = None
    run_finetune(stages.finetune_inputs(phantoms, start, **sections), tmp_path / "finetuned")
    after = load_adapter(tmp_path / "finetuned" / "adapter")
    plain = backbones.load("test_vit", weights="random", image_size=stages.SIZE)
    assert after.backbone.source_hash() == plain.source_hash()  # frozen is bit-frozen
    assert after.task is not None
    for name in after.backbone.targets if before else ():
        assert not torch.equal(after.backbone.targets[name], before.targets[name])
    pickles = [path for path in tmp_path.rglob("*") if path.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt")]
    assert pickles == []


def test_tpp_tells_what_it_did(phantoms, tpp):
    folder, result = tpp
    card = read_card(folder / "adapter")
    data = stages.data_of(phantoms)
    assert card.tpp.pretext["name"] == "mae"
    assert (card.tpp.steps, card.tpp.head_warmup, card.tpp.batch_size) == (6, 2, 8)
    assert card.tpp.images == len(data.splits["train"])
    assert card.tpp.fingerprints == data.fingerprints("train")
    assert not card.tpp.transductive
    assert card.task is None
    assert load_adapter(folder / "adapter").task is None
    assert read_json(folder / MARKER) == {**result.summary(), "views": ["masked", "restored"]}
    assert (folder / "log.csv").read_text().count("\n") == 7
    assert not list(folder.rglob(".*"))


def test_fine_tuning_keeps_what_tpp_told_and_adds_its_own(phantoms, tpp, finetuned):
    folder, _ = finetuned
    adapter = load_adapter(folder / "adapter")
    data = stages.data_of(phantoms)
    assert adapter.card.tpp == read_card(tpp[0] / "adapter").tpp
    assert adapter.card.trained_on == data.fingerprints("train", "val")
    assert adapter.card.task.classes == ("lesion", "normal")
    assert adapter.card.task.thresholds
    predictions = read_predictions(folder / "validation.csv")
    assert predictions.cases == tuple(case.id for case in data.splits["val"])
    images = torch.from_numpy(data.cache.images[data.stage("val").rows]).float() / 255
    with torch.no_grad():
        expected = adapter.task.probabilities(adapter.task(adapter.backbone.encode(images)))
    torch.testing.assert_close(
        torch.as_tensor(predictions.probabilities).double(), expected.double(), atol=1e-5, rtol=1e-4
    )


def test_fine_tuning_starts_where_tpp_ended(phantoms, tpp, tmp_path):
    still = {"finetune": {"learning_rate": 1e-12}}  # a head on targets that stay where they are
    run_finetune(stages.finetune_inputs(phantoms, tpp[0] / "adapter", **still), tmp_path / "tpp")
    run_finetune(stages.finetune_inputs(phantoms, **still), tmp_path / "own")
    start, own = (tensors(tmp_path / name / "adapter") for name in ("tpp", "own"))
    primed = tensors(tpp[0] / "adapter")
    close({name: start[name] for name in primed}, primed)
    with pytest.raises(AssertionError):
        close({name: own[name] for name in primed}, primed)


def test_an_adapter_made_otherwise_is_not_started_from(phantoms, tpp, tmp_path):
    sections = {"tuner": {"name": "lora", "rank": 4}}
    inputs = stages.finetune_inputs(phantoms, tpp[0] / "adapter", **sections)
    other = inputs.preprocessing.model_copy(update={"fit": "pad"})
    with pytest.raises(ConfigError, match="made otherwise") as raised:
        run_finetune(replace(inputs, preprocessing=other), tmp_path)
    assert [problem.split(":")[0] for problem in raised.value.problems] == ["tuner", "preprocessing"]


def test_an_adapter_of_another_backbone_is_not_started_from(phantoms, tpp, tmp_path):
    sections = {"backbone": {"name": "test_vit2", "weights": "random"}}
    with pytest.raises(WeightsError, match="belongs to the backbone test_vit"):
        run_finetune(stages.finetune_inputs(phantoms, tpp[0] / "adapter", **sections), tmp_path)


def test_an_adapter_with_other_patches_is_not_started_from(phantoms, tpp, tmp_path):
    sections = {"backbone": {"patch_size": 8}}
    with pytest.raises(ConfigError, match="made otherwise") as raised:
        run_finetune(stages.finetune_inputs(phantoms, tpp[0] / "adapter", **sections), tmp_path)
    assert raised.value.problems == ["backbone.patch_size: None in the adapter, 8 in the experiment"]


def test_last_weights_are_kept_where_they_are_asked_for(phantoms, tmp_path, monkeypatch):
    """Scores of validation cases are logged, choose nothing, and change no bit of what is trained."""
    monkeypatch.setattr(validation, "SHARE", 5.0)  # six steps are too few to be scored, and so are these cases
    monkeypatch.setattr(validation, "FEWEST", 2)
    inputs = stages.finetune_inputs(phantoms, finetune={"keep": "last"})
    scored = run_finetune(inputs, tmp_path / "scored")
    assert scored.record.best is None
    assert [row["step"] for row in scored.record.rows if "validation" in row] == [3, 6]
    assert "validation" in (tmp_path / "scored" / "log.csv").read_text()
    monkeypatch.undo()
    unscored = run_finetune(inputs, tmp_path / "unscored")
    assert all("validation" not in row for row in unscored.record.rows)
    for name in ("adapter_model.safetensors", "head.safetensors"):
        first, second = ((tmp_path / kept / "adapter" / name).read_bytes() for kept in ("scored", "unscored"))
        assert first == second
    assert [row["loss"] for row in scored.record.rows] == [row["loss"] for row in unscored.record.rows]


def test_scores_that_choose_nothing_take_a_share_of_the_training():
    data = StageData(SimpleNamespace(), tuple(SimpleNamespace(id=str(number)) for number in range(400)))
    few = replace(data, cases=data.cases[:22])
    plan = validation.plan_scores(few, steps=200, batch_size=32, every=10, masks=False)
    assert plan.data.cases == few.cases
    assert plan.every == 14  # 14 scores of 22 cases in 6,400
    plan = validation.plan_scores(data, steps=2000, batch_size=32, every=100, masks=False)
    assert (len(plan.data), plan.every) == (validation.MOST, 160)
    assert [plan.data.cases[place].id for place in (0, -1)] == ["0", "399"]
    assert validation.plan_scores(few, steps=200, batch_size=32, every=50, masks=False).every == 50
    assert len(validation.plan_scores(data, steps=600, batch_size=16, every=30, masks=True).data) == 24
    five = replace(data, cases=data.cases[:5])
    assert validation.plan_scores(five, steps=600, batch_size=16, every=30, masks=False) is None
    assert validation.plan_scores(five, steps=600, batch_size=16, every=30, masks=True) is not None
    assert validation.plan_scores(replace(data, cases=()), steps=600, batch_size=16, every=30, masks=True) is None


def test_large_scans_are_not_scored_where_that_would_take_long():
    records = tuple(SimpleNamespace(shape=(1, 8, 16, 16 * (1 + number % 3))) for number in range(8))
    store = VolumeStore(Path(), VolumePreprocessing(patch=(8, 16, 16), windows=(LEVELS,)), (), records)
    store.__dict__["row"] = {str(number): number for number in range(8)}
    data = StageData(store, tuple(SimpleNamespace(id=str(number)) for number in range(8)))
    whole = validation.plan_scores(data, steps=1600, batch_size=2, every=60, masks=True)
    assert (len(whole.data), whole.every) == (8, 150)  # 15 patches each time
    assert len(validation.plan_scores(data, steps=1000, batch_size=2, every=60, masks=True).data) == 5
    assert validation.plan_scores(data, steps=600, batch_size=2, every=60, masks=True) is None


def test_a_pretrained_backbone_loads_from_its_folder(phantoms, pretrained):
    folder, result = pretrained
    assert result.record.rows[-1]["loss"] < 0.97 * result.record.rows[0]["loss"]
    backbone = backbones.load(str(folder), image_size=stages.SIZE)
    assert backbone.spec.objective == "pixels"
    assert backbone.spec.pooling == "mean"
    assert backbone.pretext_heads.keys() == {"mae"}
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    fingerprints = seen_by(
        stages.experiment(phantoms, backbone={"name": str(folder), "weights": "pretrained"}).backbone
    )
    assert fingerprints == stages.data_of(phantoms).fingerprints("train")
    assert backbones.load(str(folder), image_size=96).spec.image_size == (96, 96)


def test_tpp_goes_on_with_the_head_of_its_backbone(phantoms, pretrained, tmp_path):
    folder = pretrained[0]
    sections = {"backbone": {"name": str(folder), "weights": "pretrained"}, "tpp": {"head_warmup": "auto"}}
    own = run_tpp(stages.tpp_inputs(phantoms, **sections), tmp_path / "own")
    assert own.figures["head_warmup"] == 0
    sections["pretext"] = {"decoder_width": 64}  # another shape: a new head
    sections["tpp"] = {"head_warmup": 0}
    new = run_tpp(stages.tpp_inputs(phantoms, **sections), tmp_path / "new")
    assert own.record.rows[0]["loss"] < 0.95 * new.record.rows[0]["loss"]


def test_with_a_decoder_batches_of_tpp_are_those_of_fine_tuning_on_masks():
    spec = backbones.load("test_vit", weights="random", image_size=256).spec
    known = {"images": 1000, "learning_rate": 1e-3, "spec": spec, "trained_head": True}
    alone = resolve_tpp(TPPOptions(), **known)
    dense = resolve_tpp(TPPOptions(decoder=True), **known)
    tuned = resolve_finetune(FinetuneOptions(), tuner="lora", task="segmentation", cases=1000, spec=spec)
    assert dense.batch_size == tuned.batch_size == 16 < alone.batch_size
    assert dense.steps == 2000


def test_a_new_head_is_warmed_up_by_default(phantoms):
    for steps, warmup in ((300, 200), (5000, 500)):
        made = stages.experiment(phantoms, tpp={"head_warmup": "auto", "steps": steps})
        known = {"images": 100, "learning_rate": 1e-3, "spec": backbones.load("test_vit", weights="random").spec}
        assert resolve_tpp(made.tpp, trained_head=False, **known).head_warmup == warmup
        assert resolve_tpp(made.tpp, trained_head=True, **known).head_warmup == 0


def test_head_warm_up_leaves_the_targets_alone(phantoms, tmp_path):
    """With hardly a learning rate for the targets, TPP with a long warm-up ends at the tuner's own start."""
    inputs = stages.tpp_inputs(phantoms, tpp={"head_warmup": 10, "steps": 2, "learning_rate": 1e-12})
    run_tpp(inputs, tmp_path)
    plain = backbones.load(inputs.experiment.backbone, image_size=stages.SIZE)
    start = tuners.attach(plain, inputs.experiment.tuner, seed=0)
    close(load_file(tmp_path / "adapter" / "adapter_model.safetensors"), dict(start.adapter_state()), atol=1e-9)


def test_the_time_of_a_head_warm_up_counts(phantoms, tmp_path, monkeypatch):
    monkeypatch.setattr("medtpp.training.tpp.warm_up_heads", lambda *_: 1000.0)
    run_tpp(stages.tpp_inputs(phantoms, tpp={"head_warmup": 1, "steps": 1}), tmp_path)
    assert read_json(tmp_path / MARKER)["seconds"] > 1000


def test_head_warm_up_leaves_no_gradients_behind(phantoms):
    inputs = stages.tpp_inputs(phantoms)
    backbone = backbones.load(inputs.experiment.backbone, image_size=stages.SIZE)
    pretext, trained = make_pretext(inputs.experiment.pretext, backbone, Seeds(0))
    assert not trained
    tuned = tuners.attach(backbone, inputs.experiment.tuner)
    fabric = Fabric(accelerator="cpu", devices=1)
    head, targets = Group("pretext", dict(pretext.named_parameters()), 1e-3), Group("tuner", tuned.targets, 1e-3)
    module = PretextModule(tuned, pretext, Augmenter(AugmentOptions(), "xray"))
    warm_up_heads(fabric, module, [head], [targets], inputs.data.stream(8, Seeds(0), fabric), 2)
    for parameter in tuned.targets.values():
        assert parameter.requires_grad
        assert parameter.grad is None


def test_tampered_backbone_weights_are_refused(pretrained, tmp_path):
    folder = tmp_path / "tampered"
    shutil.copytree(pretrained[0], folder)
    state = load_file(folder / "model.safetensors")
    state["norm.weight"][0] += 1
    save_file(state, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"not those its backbone\.json names"):
        backbones.load(str(folder))
    (folder / "model.safetensors").write_bytes((pretrained[0] / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(WeightsError, match="missing or broken"):
        backbones.load(str(folder))
    card = json.loads((folder / "backbone.json").read_text())
    (folder / "backbone.json").write_text(json.dumps({**card, "schema": 99}))
    with pytest.raises(WeightsError, match="schema 99"):
        backbones.load(str(folder))


@pytest.mark.parametrize("stage", ["tpp", pytest.param("finetune", marks=pytest.mark.slow)])
def test_two_processes_end_where_one_ends(stage, phantoms, tmp_path):
    """With gloo on the CPU; starting the processes takes nearly all of the time."""
    for devices in (1, 2):
        sections = {"hardware": {"devices": devices}, "finetune": {"keep": "last"}}
        if stage == "tpp":
            run_tpp(stages.tpp_inputs(phantoms, **sections), tmp_path / str(devices))
        else:
            run_finetune(stages.finetune_inputs(phantoms, **sections), tmp_path / str(devices))
    close(tensors(tmp_path / "1"), tensors(tmp_path / "2"), atol=1e-4)
    one, two = (read_json(tmp_path / devices / MARKER) for devices in ("1", "2"))
    assert two["last_loss"] == pytest.approx(one["last_loss"], rel=1e-4)
