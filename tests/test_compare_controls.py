"""Controls for what TPP does: as many steps on other images, and as long a step in another direction."""

import csv
import shutil
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file

import scans
import stages
from medtpp import backbones, tuners
from medtpp.adapter import RandomDirectionCard, TPPCard, load_adapter, new_card, read_card, save_adapter
from medtpp.data.fingerprints import Fingerprints
from medtpp.data.preprocess import Preprocessing
from medtpp.errors import ConfigError, DataError
from medtpp.evaluation.bootstrap import Estimate
from medtpp.evaluation.paired import Difference
from medtpp.files import read_json, write_json
from medtpp.seeds import Seeds
from medtpp.training.dense import make_dense
from medtpp.training.random_direction import random_step, run_random_direction
from medtpp.workflow.compare import Axes, open_comparison
from medtpp.workflow.compare.plan import CONTROLS, Arm, Cell, base_experiment, cell_experiment
from medtpp.workflow.compare.summary import notes_of
from medtpp.workflow.compare.words import QUESTIONS, Measure, sentence
from medtpp.workflow.prepare import arrange, foreign_pool, prepare
from medtpp.workflow.run import finetune_stage, tpp_stage
from runs import cli, data_folder, done, experiment, other_folder, pool_folder, refused, settings, split_of

_HOLD = TemporaryDirectory(prefix="medtpp-controls-")
_ROOT = Path(_HOLD.name)
ALL = ("standard", "tpp", *CONTROLS)
STEPS = ("tpp.steps=3", "finetune.steps=2", "data.modality=xray", "hardware.threads=2")


def command(inits, *more, labels="12"):
    axes = ("--labels", labels, "--seeds", "1", "--init", ",".join(inits))
    return ["compare", data_folder(), *axes, *settings(*STEPS), *more]


@cache
def foreign_folder():
    """Radiographs of other patients, and copies of a test and of a training image."""
    folder = _ROOT / "foreign"
    folder.mkdir()
    for path in sorted((pool_folder() / "images").iterdir())[:6]:
        shutil.copy(path, folder / path.name)
    for part in ("test", "train"):
        shutil.copy(data_folder() / min(split_of(compared()[0])[part]), folder / f"copy of {part}.png")
    return folder


@cache
def compared():
    """A comparison of TPP alone, its folder as it was before controls were added."""
    folder = _ROOT / "compared"
    return folder, done(*command(("standard", "tpp")), "--out", folder)


@cache
def controlled():
    """The same, gone on with for the controls."""
    folder = _ROOT / "controlled"
    shutil.copytree(compared()[0], folder)
    return folder, done(*command(ALL, "--foreign", foreign_folder()), "--out", folder, "--resume")


def adapter_of(init, labels=""):
    tuner = "lora" if init == "tpp" else f"lora-{init}"
    return controlled()[0] / "tpp" / tuner / labels / "seed0" / "adapter"


def pixels_of(cases):
    """The fingerprints of some of the downstream cases."""
    records = prepare(experiment(*STEPS), split_file=controlled()[0] / "split.csv").records
    return {records[case].fingerprint for case in cases}


def test_controls_are_added_to_a_comparison_that_is_there():
    (before, _), (folder, said) = compared(), controlled()
    with (folder / "cells.csv").open() as stream:
        rows = {row["init"]: row for row in csv.DictReader(stream)}
    assert {init: row["status"] for init, row in rows.items()} == dict.fromkeys(ALL, "done")
    assert "3 cells and 2 runs of TPP" in said.text  # the random direction is no run
    assert {bool(rows[init]["tpp_feature_drift"]) for init in ("tpp", "tpp_labelled", "tpp_foreign")} == {True}
    for kept in ("cells/lora-tpp/12/seed0", "cells/lora-standard/12/seed0", "tpp/lora/seed0"):
        assert (before / kept / "complete.json").read_bytes() == (folder / kept / "complete.json").read_bytes()
    assert max(map(len, said.out.splitlines())) <= 80


def test_each_control_has_its_question_and_its_family():
    folder, said = controlled()
    summary = read_json(folder / "comparison.json")
    pairs = {row["baseline"].split()[1]: row for row in summary["differences"]}
    assert list(pairs) == ["standard", *CONTROLS]
    assert {init: row["question"] for init, row in pairs.items()} == {"standard": "", **QUESTIONS}
    page = (folder / "report.html").read_text()
    for init, question in QUESTIONS.items():
        assert question in said.text
        assert page.count(question) == 1
        assert pairs[init]["p_holm"] == pairs[init]["p"]  # one label count: nothing to adjust for
        assert pairs[init]["sentence"] in said.text
        assert pairs[init]["sentence"] in page
    assert [stage["init"] for stage in summary["tpp"]] == ["tpp", "tpp_labelled", "tpp_foreign"]
    assert "lora tpp_labelled, 12 labels" in page
    assert not any("would be TPP itself" in note for note in summary["notes"])  # nothing was left out


def test_longer_fine_tuning_takes_the_steps_that_tpp_would_have_taken(tmp_path):
    """A cell is trained for as many steps as the times in the folder imply, on the labels and batches of the others."""
    folder = tmp_path / "copy"
    shutil.copytree(compared()[0], folder)
    (key,) = measured = read_json(folder / "timing.json")
    known = measured[key] | {"tpp_step": 0.2, "tpp_rest": 0.7, "finetune_step": 0.1}
    write_json(folder / "timing.json", {key: known})
    said = done(*command(("standard", "tpp")), "--arm", "longer", "--out", folder, "--resume")
    stages = {init: folder / f"cells/lora-{init}/12/seed0/finetune" for init in ("standard", "tpp", "longer")}
    steps = {init: read_json(stage / "complete.json")["steps"] for init, stage in stages.items()}
    assert steps == {"standard": 2, "tpp": 2, "longer": 2 + 13}  # 3 steps of TPP at 0.2 s and 0.7 s beside them
    with (stages["longer"] / "log.csv").open() as stream:
        assert [int(row["step"]) for row in csv.DictReader(stream)] == list(range(1, 16))
    cards = [read_card(stage / "adapter") for stage in stages.values()]
    assert cards[0].trained_on == cards[2].trained_on
    assert cards[2].tpp is None
    pairs = {row["baseline"]: row for row in read_json(folder / "comparison.json")["differences"]}
    assert list(pairs) == ["lora standard", "lora longer"]
    assert pairs["lora longer"]["value"] is not None
    assert pairs["lora longer"]["sentence"] in said.text


def test_controls_see_their_own_images_alone():
    folder, split = controlled()[0], split_of(controlled()[0])
    held_out, trained = pixels_of(split["test"] | split["val"]), pixels_of(split["train"])
    cell = read_card(folder / "cells/lora-tpp_labelled/12/seed0/finetune/adapter")
    labelled = set(read_card(adapter_of("tpp_labelled", "12")).tpp.fingerprints.images)
    assert labelled == set(cell.trained_on.images) - held_out
    assert 5 < len(labelled) < 12
    foreign = read_card(adapter_of("tpp_foreign")).tpp
    assert len(foreign.fingerprints.images) == foreign.images == 6
    assert set(foreign.fingerprints.images).isdisjoint(held_out | trained)
    assert set(read_card(adapter_of("tpp")).tpp.fingerprints.images) == trained
    assert "2 foreign images are left out" in controlled()[1].text
    assert "whose the 6 foreign images are" in controlled()[1].text


def test_controls_have_the_steps_of_tpp():
    made = [adapter.parent for adapter in map(adapter_of, ("tpp", "tpp_labelled", "tpp_foreign"), ("", "12", ""))]
    for name in ("tpp", "pretext"):
        assert len({str(read_json(folder / "inputs.json")["inputs"][name]) for folder in made}) == 1
    assert {read_json(folder / "complete.json")["steps"] for folder in made} == {3}


def test_cells_differ_in_their_start_alone():
    folder = controlled()[0]
    made = [read_json(folder / f"cells/lora-{init}/12/seed0/finetune/inputs.json")["inputs"] for init in ALL]
    for other in made[1:]:
        assert {name for name in other if other[name] != made[0][name]} == {"start", "start card"}
    assert len({inputs["start"] for inputs in made}) == len(ALL)


def test_budgets_that_follow_the_images_are_those_of_tpp():
    """TPP decides on steps and batch size by what it sees, its controls do not."""
    axes = Axes(inits=ALL, labels=(12,), seeds=1, foreign=(str(foreign_folder()),))
    written = experiment(*STEPS, "tpp.steps=auto", "tpp.batch_size=auto", "tpp.head_warmup=auto")
    opened = open_comparison(written, axes, None, dry_run=True)
    seen = opened.prepared.experiment.tpp
    assert seen.batch_size == len(opened.prepared.tpp) > 12
    for cell in opened.cells:
        for start in cell.starts:
            tpp = arrange(opened.prepared, cell_experiment(opened.base, start.cell)).experiment.tpp
            assert (tpp.steps, tpp.batch_size, tpp.head_warmup) == (seen.steps, seen.batch_size, seen.head_warmup)


def start_of(written, spec_of):
    """The parameters that TPP starts from, of all groups."""
    source = backbones.load(written.backbone, image_size=spec_of.backbone.spec.image_size)
    tuned = tuners.attach(source, written.tuner, seed=written.seed)
    dense = make_dense(written, tuned.spec, Seeds(written.seed))
    return parameters_of(tuned, dense.decoder.state_dict() if dense else {})


def parameters_of(tuned, decoder):
    named = {**tuned.targets, **tuned.embed, **{f"decoder.{name}": value for name, value in decoder.items()}}
    return {name: value.detach().clone() for name, value in named.items()}


def require_a_random_direction(start, pretrained, moved):
    """As far as TPP, tensor by tensor, and elsewhere."""
    assert start.keys() == pretrained.keys() == moved.keys()
    for name, value in start.items():
        change, step = (pretrained[name] - value).double(), (moved[name] - value).double()
        torch.testing.assert_close(step.norm(), change.norm(), rtol=1e-3, atol=1e-7)
        if change.numel() > 1000 and change.any():
            assert abs(torch.cosine_similarity(step.flatten(), change.flatten(), dim=0)) < 0.2, name


def test_a_random_direction_is_as_far_from_the_start(tmp_path):
    folder = controlled()[0]
    pretrained, moved = load_adapter(adapter_of("tpp")), load_adapter(adapter_of("random_direction"))
    base = base_experiment(experiment(*STEPS), Axes())
    written = cell_experiment(base, Cell(Arm("lora", "random_direction"), "all", 0))
    found = [parameters_of(one.backbone, {}) for one in (pretrained, moved)]
    require_a_random_direction(start_of(written, moved), *found)
    assert any((found[0][name] != found[1][name]).any() for name in found[0])
    run_random_direction(written, adapter_of("tpp"), tmp_path)
    again = tmp_path / "adapter" / "adapter_model.safetensors"
    assert again.read_bytes() == (adapter_of("random_direction") / "adapter_model.safetensors").read_bytes()
    # What it is goes along, and so does what TPP saw: the length of the step is learnt from these images.
    after = read_card(folder / "cells/lora-random_direction/12/seed0/finetune/adapter").tpp
    assert isinstance(after, RandomDirectionCard)
    assert after.fingerprints == pretrained.card.tpp.fingerprints
    assert "random direction" in (adapter_of("random_direction") / "README.md").read_text()
    assert not isinstance(pretrained.card.tpp, RandomDirectionCard)


@pytest.mark.parametrize("tuner", ["bitfit", "adalora", "vera", "vpt_deep"])
def test_whatever_a_tuner_trains_is_moved(tuner, tmp_path):
    """Copies of the backbone's own weights, prompts, and what stands beside parameters that are not trained."""
    written = stages.experiment(tmp_path, tuner={"name": tuner}, seed=3)
    tuned = tuners.attach(backbones.load(written.backbone, image_size=32), written.tuner, seed=3)
    with torch.no_grad(), Seeds(0).scope("TPP"):
        for parameter in tuned.targets.values():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    card = new_card(tuned, Preprocessing(image_size=32, channels=1), "xray", 3)
    did = {"pretext": {"name": "mae"}, "steps": 1, "head_warmup": 0, "batch_size": 1, "learning_rate": 1.0, "images": 1}
    tpp = TPPCard(**did, seed=3, transductive=False, fingerprints=Fingerprints())
    save_adapter(tmp_path / "tpp", tuned, card.model_copy(update={"tpp": tpp}))
    run_random_direction(written, tmp_path / "tpp", tmp_path / "moved")
    moved = load_adapter(tmp_path / "moved" / "adapter")
    require_a_random_direction(start_of(written, moved), parameters_of(tuned, {}), parameters_of(moved.backbone, {}))


def test_directions_are_drawn_by_name():
    change = torch.linspace(-1, 1, 400).reshape(20, 20)
    first, same, other = (random_step(change, Seeds(seed), "a") for seed in (0, 0, 1))
    assert torch.equal(first, same)
    for different in (other, random_step(change, Seeds(0), "b")):
        torch.testing.assert_close(different.norm(), change.norm())
        assert abs(torch.cosine_similarity(first.flatten(), different.flatten(), dim=0)) < 0.3
    assert not random_step(torch.zeros(3), Seeds(0), "a").any()


def test_an_embedding_for_volumes_and_a_decoder_move_too(tmp_path):
    folder = scans.write_volumes(tmp_path / "scans")
    prepared = prepare(scans.experiment(folder, "tpp.decoder=true"))
    quiet = lambda _: None  # noqa: E731
    start = tpp_stage(prepared, tmp_path / "tpp", quiet)
    run_random_direction(prepared.experiment, start, tmp_path / "moved")
    moved = tmp_path / "moved" / "adapter"
    ends = [load_adapter(one) for one in (start, moved)]
    found = [parameters_of(one.backbone, one.decoder) for one in ends]
    assert ends[0].backbone.embed
    assert any(name.startswith("decoder.") for name in found[0])
    require_a_random_direction(start_of(prepared.experiment, ends[0]), *found)
    adapter = finetune_stage(prepared, tmp_path / "finetune", quiet, start=moved)
    assert load_file(adapter / "decoder.safetensors").keys()


def test_foreign_volumes_are_told_from_those_of_the_data_set(tmp_path):
    prepared = prepare(scans.experiment(scans.write_volumes(tmp_path / "scans")))
    more = scans.write_volumes(tmp_path / "more", cases=8)  # the first six are the same
    pool = foreign_pool(prepared, [more / "images"])
    assert {case.image.name for case in pool.tpp} == {"p6.nii.gz", "p7.nii.gz"}
    images = replace(prepared, store=pool.store, tpp=pool.tpp).data(pool.tpp).images(limit=2)
    assert images.shape[2:] == prepared.preprocessing.patch
    with pytest.raises(DataError, match="No image of --foreign is left"):
        foreign_pool(prepared, [scans.write_pictures(tmp_path / "flat") / "images"])


def test_what_is_no_control_is_refused(tmp_path):
    text = refused(*command(("standard", *CONTROLS)), "--dry-run")
    assert "--foreign" in text
    for init in CONTROLS:
        assert f"{init} is a control for TPP, so the init tpp has to be there" in text
    assert "is for the init tpp_foreign" in refused(*command(("tpp",), "--foreign", tmp_path), "--dry-run")
    foreign = ("standard", "tpp", "tpp_foreign")
    empty = refused(*command(foreign, "--foreign", tmp_path), "--dry-run")
    assert "(--foreign) cannot be used" in empty
    assert "holds no images" in empty
    own = refused(*command(foreign, "--foreign", data_folder() / "images"), "--dry-run")
    assert "No image of --foreign is left: all 48 belong to the data set" in own
    same = refused(*command(("tpp", "tpp_labelled"), labels="all"), "--dry-run")
    assert "tpp_labelled would be the same" in same
    assert "no target parameters" in refused(*command(("tpp", "random_direction"), "--tuner", "linear"), "--dry-run")
    controls = command(("tpp", "random_direction"), "--set", "tpp.transductive=true")
    assert "transductive" in refused(*controls, "--dry-run")


def test_the_foreign_images_of_a_comparison_stay_the_same(tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(controlled()[0], folder)
    again = (*command(("standard", "tpp")), "--out", folder)
    assert "0 cells and 0 runs of TPP" in done(*again, "--dry-run").text  # they are known from the folder
    other = (*command(ALL, "--foreign", other_folder()), "--out", folder)
    assert "foreign images" in refused(*other, "--resume")
    inside = folder / "foreign"
    shutil.copytree(foreign_folder(), inside)
    assert "to be read" in refused(*command(ALL, "--foreign", inside), "--out", folder, "--overwrite")


def test_a_control_that_fails_takes_its_own_cells_alone(tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(controlled()[0], folder)
    for init in ("random_direction", "tpp_labelled"):
        shutil.rmtree(folder / "cells" / f"lora-{init}")
    stage = folder / "tpp" / "lora-random_direction" / "seed0"
    shutil.rmtree(stage)
    write_json(stage / "stray.json", "not medtpp's")
    result = cli(*command(ALL), "--foreign", foreign_folder(), "--out", folder, "--resume")
    assert result.status == 1
    assert "failed: random direction of lora, seed 0" in result.text
    summary = read_json(folder / "comparison.json")
    assert len(summary["failed"]) == 2
    assert [mean["arm"] for mean in summary["means"] if not mean["seeds"]] == ["lora random_direction"]


def test_labelled_images_that_are_all_there_are_no_control():
    axes = Axes(inits=("standard", "tpp", "tpp_labelled"), labels=(12, "all"), seeds=1)
    opened = open_comparison(experiment(*STEPS), axes, None, dry_run=True)
    counts = {cell.labels for cell in opened.cells if cell.arm.init == "tpp_labelled"}
    assert counts == {12}
    assert any("would be TPP itself" in note for note in notes_of(opened, []))
    more = open_comparison(experiment(*STEPS, unlabelled=[foreign_folder()]), axes, None, dry_run=True)
    assert {cell.labels for cell in more.cells if cell.arm.init == "tpp_labelled"} == {12, "all"}
    assert len({start.folder(Path()) for start in more.starts}) == len(more.starts) == 3


def test_starts_come_in_order_and_lie_apart():
    assert Cell(Arm("lora", "standard"), 12, 0).starts == ()
    plain, moved = Cell(Arm("lora", "random_direction"), 12, 0).starts
    assert (plain,) == Cell(Arm("lora", "tpp"), "all", 0).starts
    assert moved.origin == plain
    assert plain.folder(Path("out")) == Path("out/tpp/lora/seed0")
    assert moved.folder(Path("out")) == Path("out/tpp/lora-random_direction/seed0")
    (labelled,) = Cell(Arm("lora", "tpp_labelled"), 12, 0).starts
    assert labelled.folder(Path("out")) == Path("out/tpp/lora-tpp_labelled/12/seed0")


def test_axes_keep_the_foreign_folders():
    before = Axes(inits=ALL, labels=(12,), foreign=("pool",)).resolved(experiment())
    assert before.foreign == (str(Path("pool").absolute()),)
    assert Axes(labels=(12,)).joined(before).foreign == before.foreign
    older = {name: value for name, value in asdict(Axes()).items() if name != "foreign"}
    assert Axes.load(older) == Axes()
    with pytest.raises(ConfigError, match="a control for TPP"):
        Axes(inits=("standard", "tpp_labelled"))


@pytest.mark.parametrize(
    ("init", "said"),
    [
        ("tpp_labelled", "AUC is 2.0 points higher than with TPP on the labelled images alone"),
        ("tpp_foreign", "AUC is 2.0 points higher than with TPP on foreign images"),
        ("random_direction", "AUC is 2.0 points higher than with a step as large in a random direction"),
    ],
)
def test_sentences_name_the_control(init, said):
    estimate = Estimate(0.02, 0.01, 0.03, 0.0)
    gap = Difference(estimate, estimate, 0.01, dict.fromkeys(range(6), 0.02))
    measure = Measure("auc", "AUC", "", 0.005)
    assert said in sentence(Arm("lora", "tpp"), Arm("lora", init), "5", gap, "helps", measure)
