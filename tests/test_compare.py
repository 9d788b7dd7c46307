import csv
import json
import shutil
from dataclasses import asdict, replace
from statistics import median

import pytest

import slurm
from medtpp.data.fingerprints import patient_hash
from medtpp.errors import ConfigError, OutputError
from medtpp.files import read_json
from medtpp.report import write_report
from medtpp.workflow.compare import Axes, Comparison, hold, open_comparison, summarise
from medtpp.workflow.compare.comparison import Budget, Machine
from medtpp.workflow.compare.plan import Arm, Cell, base_experiment, cell_experiment
from medtpp.workflow.compare.work import Timing
from medtpp.workflow.study import StudyPart, summarise_study
from runs import (
    cli,
    compare_command,
    compared,
    data_folder,
    done,
    experiment,
    manifest,
    refused,
    same_files,
    settings,
    split_of,
    with_rows,
)
from segmented import write_masks

CELL_FILES = (
    "finetune/adapter/adapter_model.safetensors",
    "finetune/adapter/head.safetensors",
    "evaluation/predictions.csv",
)


def cells(folder):
    with (folder / "cells.csv").open() as stream:
        return list(csv.DictReader(stream))


def trained_on(folder):
    """The case ids whose pixels a cell was fine-tuned or validated on."""
    return set(read_json(folder / "finetune" / "adapter" / "medtpp.json")["trained_on"]["images"])


def test_every_cell_is_done_and_told():
    folder, said = compared()
    rows = cells(folder)
    assert len(rows) == 8
    assert {row["status"] for row in rows} == {"done"}
    assert {(row["arm"], row["labels"], row["seed"]) for row in rows} == {
        (arm, labels, seed) for arm in ("lora standard", "lora tpp") for labels in ("12", "all") for seed in "01"
    }
    summary = read_json(folder / "comparison.json")
    assert [row["verdict"] for row in summary["differences"]] == ["too few seeds"] * 2
    means = {(row["arm"], row["labels"]): row["value"] for row in summary["means"]}
    for (arm, labels), value in means.items():
        own = [float(row["auc"]) for row in rows if (row["arm"], row["labels"]) == (arm, labels)]
        assert value == pytest.approx(sum(own) / 2)
    for mean in summary["means"]:
        own = [row for row in rows if (row["arm"], row["labels"]) == (mean["arm"], mean["labels"])]
        peaks = [max(float(row[name] or 0) for name in ("peak_memory_mib", "tpp_peak_memory_mib")) for row in own]
        assert mean["peak_memory_mib"] == pytest.approx(median(peaks))
        assert all(bool(row["tpp_peak_memory_mib"]) == (row["init"] == "tpp") for row in own)
    for row in summary["differences"]:
        assert row["value"] == pytest.approx(means["lora tpp", row["labels"]] - means["lora standard", row["labels"]])
    assert max(map(len, said.out.splitlines())) <= 80
    assert "2 seeds are too few" in said.text
    assert (folder / "report.html").is_file()


def test_a_study_of_one_comparison_says_the_same(tmp_path):
    """Same draws, same intervals: a study's page does not contradict the comparison's own."""
    folder, _ = compared()
    found = summarise_study([StudyPart("phantom", "", "", "", folder)], tmp_path)
    told = read_json(folder / "comparison.json")
    assert [one.name for one in found.levels] == ["12", "all"]
    for ours, theirs in zip(found.gains, told["differences"], strict=True):
        assert (ours.level, ours.arm, ours.baseline) == (theirs["labels"], theirs["arm"], theirs["baseline"])
        assert ours.value == pytest.approx(theirs["value"])
        assert (ours.low, ours.high, ours.p) == pytest.approx((theirs["low"], theirs["high"], theirs["p"]))
    assert {(one.measure, one.seeds, one.costed) for one in found.reach} == {("training loss", 2, True)}
    assert all(one.steps is None or 0 < one.steps <= one.total for one in found.reach)
    assert len(found.equal) == 2


def test_arms_share_everything_but_the_start():
    folder, _ = compared()
    for labels in ("12", "all"):
        for seed in (0, 1):
            standard, tpp = (folder / "cells" / f"lora-{init}" / labels / f"seed{seed}" for init in ("standard", "tpp"))
            assert trained_on(standard) == trained_on(tpp)
            first, second = (read_json(path / "finetune" / "inputs.json")["inputs"] for path in (standard, tpp))
            differing = {name for name in first if first[name] != second[name]}
            assert differing == {"start", "start card"}
            assert read_json(standard / "finetune/complete.json")["best"] is None  # the last weights, for both


def test_labels_are_nested_and_drawn_anew_for_each_seed():
    folder, _ = compared()
    few, many = (
        {seed: trained_on(folder / "cells" / "lora-tpp" / labels / f"seed{seed}") for seed in (0, 1)}
        for labels in ("12", "all")
    )
    assert all(len(few[seed]) == 12 and few[seed] < many[seed] for seed in (0, 1))
    assert few[0] != few[1]
    assert many[0] == many[1]


def test_tpp_runs_once_for_a_seed_and_sees_no_held_out_case():
    folder, _ = compared()
    runs = sorted(path.parent.name for path in (folder / "tpp" / "lora").glob("*/complete.json"))
    assert runs == ["seed0", "seed1"]
    held_out = split_of(folder)["test"] | split_of(folder)["val"]
    card = read_json(folder / "tpp" / "lora" / "seed1" / "adapter" / "medtpp.json")
    with (folder / "split.csv").open() as stream:
        patients = {patient_hash(row["patient"]) for row in csv.DictReader(stream) if row["case"] in held_out}
    assert len(patients) > 5
    assert patients.isdisjoint(card["tpp"]["fingerprints"]["patients"])
    assert card["tpp"]["images"] == len(split_of(folder)["train"])


def test_more_seeds_go_on_from_what_is_there(tmp_path):
    """One process or two, whole or resumed: the same bits."""
    folder, _ = compared()
    part = tmp_path / "part"
    shutil.copytree(folder, part)
    kept = part / "cells" / "lora-tpp" / "12" / "seed0"
    before = (kept / "complete.json").stat().st_mtime_ns
    for gone in ("cells/lora-tpp/12/seed1", "cells/lora-standard/all/seed1", "tpp/lora/seed1"):
        shutil.rmtree(part / gone)
    done(*compare_command(), "--set", "hardware.threads=1", "--out", part, "--resume")
    assert (kept / "complete.json").stat().st_mtime_ns == before
    for gone in ("cells/lora-tpp/12/seed1", "cells/lora-standard/all/seed1"):
        same_files(folder / gone, part / gone, CELL_FILES)
    assert (part / "cells.csv").read_text().count("done") == 8


def test_a_broken_cell_does_not_stop_the_rest(tmp_path):
    folder, _ = compared()
    shutil.copytree(folder, tmp_path / "copy")
    broken = tmp_path / "copy" / "tpp" / "lora" / "seed1"
    for path in (broken, *(tmp_path / "copy" / "cells").glob("*/*/seed1")):
        shutil.rmtree(path)
    broken.mkdir()
    (broken / "stray.txt").write_text("not medtpp's")
    result = cli(*compare_command(), "--out", tmp_path / "copy", "--resume")
    assert result.status == 1
    assert "failed: TPP of lora, seed 1" in result.text
    assert "--resume tries them again" in result.text
    status = {(row["arm"], row["seed"]): row["status"] for row in cells(tmp_path / "copy")}
    assert status["lora tpp", "1"] == "failed"
    assert status["lora standard", "1"] == "done"
    summary = read_json(tmp_path / "copy" / "comparison.json")
    assert len(summary["failed"]) == 3  # the pretext stage and the two cells that wait for it
    (broken / "stray.txt").unlink()
    done(*compare_command(), "--out", tmp_path / "copy", "--resume")
    assert not read_json(tmp_path / "copy" / "comparison.json")["failed"]


def test_cells_on_a_cluster_are_those_of_this_machine(tmp_path):
    """The same bits; a cell that fails does not stop the rest."""
    folder, _ = compared()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    broken, *others = sorted(path.relative_to(copy) for path in (copy / "cells").glob("*/*/seed1"))
    for path in (broken, *others, "tpp/lora/seed1"):
        shutil.rmtree(copy / path)
    (copy / broken / "finetune").mkdir(parents=True)
    (copy / broken / "finetune" / "stray.txt").write_text("not medtpp's")
    (tmp_path / "cluster.yaml").write_text("executor: local\n")
    result = cli(*compare_command(), "--out", copy, "--resume", "--cluster", tmp_path / "cluster.yaml")
    assert result.status == 1
    assert [row["status"] for row in cells(copy)].count("failed") == 1
    for path in others:
        same_files(folder / path, copy / path, CELL_FILES)
    assert not list((copy / "cluster").rglob("*.pkl"))


def test_steps_are_measured_where_the_cells_will_be(tmp_path, monkeypatch):
    fake = slurm.install(tmp_path / "slurm", monkeypatch)
    (tmp_path / "cluster.yaml").write_text("partition: small\nat_once: 3\n")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = ("--init", "standard", "--labels", "12", "--dry-run", "--cluster", "../cluster.yaml")
    result = done(*compare_command(), *options)
    assert "processes 2, threads 1 each" in result.text
    assert "?" not in result.out
    assert "--partition=small" in (fake / "101.sh").read_text()
    assert not list((tmp_path / "here").iterdir())


def test_a_dry_run_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = done(*compare_command(), "--arm", "longer,full", "--dry-run", "--jobs", "1")
    assert list(tmp_path.iterdir()) == []
    assert "16 cells and 2 runs of TPP" in result.text
    assert "lora longer" in result.text
    assert max(map(len, result.out.splitlines())) <= 80


def test_mistakes_are_told_together():
    text = refused(
        "compare", data_folder(), "--out", "x", "--init", "tpp,random", "--tuner", "lora,ssf,lora", "--arm", "short",
        "--metric", "beauty", "--margin", "-1",
    )  # fmt: skip
    for part in (
        "no init 'random'",
        "no arm 'short'",
        "no metric 'beauty'",
        "margin is -1.0",
        "lora is named twice",
    ):
        assert part in text
    assert "no metric dice of a classification" in refused(*compare_command(), "--dry-run", "--metric", "dice")
    assert "--out" in refused("compare", data_folder())
    assert "--init standard" in refused("compare", data_folder(), "--dry-run", "--tuner", "lora,linear")
    assert "hardware.devices=1" in refused("compare", data_folder(), "--dry-run", "--set", "hardware.devices=2")
    assert "not many" in refused("compare", data_folder(), "--dry-run", "--labels", "10,many")
    assert "transductive" in refused("compare", data_folder(), "--dry-run", *settings("tpp.transductive=true"))
    assert "data.labels=4000" in refused("compare", data_folder(), "--dry-run", *settings(), "--labels", "4000")


def test_what_would_not_be_comparable_is_refused(tmp_path):
    """Another experiment, precision, metric or data in the folder of a comparison; nothing in it is changed."""
    folder, _ = compared()
    before = {path: path.read_bytes() for path in folder.glob("*.*")}
    again = (*compare_command(), "--out", folder, "--resume")
    assert "tpp.steps" in refused(*again, "--set", "tpp.steps=5")
    assert "precision" in refused(*again, "--set", "hardware.precision=bf16")
    assert "--metric auc" in refused(*again, "--metric", "accuracy")
    assert "--metric auc" in refused(*again, "--margin", "0.1")
    header, *rows = manifest()
    other = {"normal": "lesion", "lesion": "normal"}
    cells_of_row = [other.get(cell, cell) for cell in rows[0].split(",")]
    flipped = with_rows(tmp_path / "flipped", [header, ",".join(cells_of_row), *rows[1:]])
    again = ("compare", flipped, *compare_command()[2:], "--out", folder, "--resume")
    assert "cases" in refused(*again)
    assert before == {path: path.read_bytes() for path in folder.glob("*.*")}


def test_a_mistake_deletes_nothing(tmp_path):
    folder, _ = compared()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    command = [*compare_command(), "--out", copy]
    command[command.index("12,all")] = "4000"
    assert "data.labels=4000" in refused(*command, "--overwrite")
    assert (copy / "cells.csv").read_bytes() == (folder / "cells.csv").read_bytes()
    command[command.index(copy)] = tmp_path / "new"
    refused(*command)
    assert not any((tmp_path / "new").iterdir())


def test_one_process_at_a_time(tmp_path):
    with hold(tmp_path / "out"):
        assert "at work" in refused(*compare_command(), "--out", tmp_path / "out", "--overwrite")
        assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="at work"), hold(tmp_path / "out"), hold(tmp_path / "out"):
        pass
    assert not (tmp_path / ".out.lock").exists()


def test_axes_grow_and_never_shrink():
    before = Axes(tuners=("lora",), labels=(10, "all"), seeds=5, extras=("full",))
    now = Axes(tuners=("ssf",), inits=("standard",), labels=(20,), seeds=3)
    both = now.joined(before)
    assert (both.tuners, both.labels, both.seeds) == (("lora", "ssf"), (10, "all", 20), 5)
    assert (both.inits, both.extras) == (("standard", "tpp"), ("full",))
    assert Axes.load(json.loads(json.dumps(asdict(both)))) == both
    with pytest.raises(ConfigError, match="--metric auc"):
        Axes(metric="brier").joined(before.measured(masks=False))
    begun = replace(before, metric="hd95", margin=1.5)
    assert (now.joined(begun).metric, now.joined(begun).margin) == ("hd95", 1.5)


def test_masks_are_compared_by_dice(tmp_path):
    """Two arms, two label counts, one seed: the numbers of the cells are those of the comparison."""
    data, out = write_masks(tmp_path / "data"), tmp_path / "out"
    more = ("finetune.batch_size=4", "data.structures={body: 1, lesion: 2}", "hardware.threads=2")
    said = done("compare", data, *settings(*more), "--labels", "5,all", "--seeds", "1", "--out", out)
    assert max(len(line) for line in said.out.splitlines() if str(out) not in line) <= 80
    assert "Dice, mean over the seeds" in said.text
    rows = cells(out)
    assert {row["status"] for row in rows} == {"done"}
    assert {(row["labels"], row["n_train"]) for row in rows} >= {("5", "4")}
    summary = read_json(out / "comparison.json")
    assert (summary["metric"], summary["margin"], summary["metric_unit"]) == ("dice", 0.01, "")
    for mean in summary["means"]:
        (own,) = (row for row in rows if (row["arm"], row["labels"]) == (mean["arm"], mean["labels"]))
        assert mean["value"] == pytest.approx(float(own["dice"]))
    assert (out / "report.html").is_file()
    assert not list(out.glob("cells/**/overlays"))
    axes = Axes.load(read_json(out / "axes.json"))
    opened = open_comparison(experiment(*more, data=data), axes, out, dry_run=True)
    distances = summarise(replace(opened, axes=replace(axes, metric="hd95", margin=0.5)), out)
    assert (distances.metric_unit, distances.higher_is_better) == ("px", False)
    assert "px" in distances.differences[0].sentence


def test_an_undefined_metric_is_told(tmp_path):
    """One class in the test set: no AUC, no verdict, and a report all the same."""
    folder, _ = compared()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for path in copy.glob("cells/*/*/*/evaluation/predictions.csv"):
        path.write_text(path.read_text().replace(",normal,", ",lesion,"))
    axes = Axes.load(read_json(copy / "axes.json"))
    opened = open_comparison(experiment("hardware.threads=2", "data.modality=xray"), axes, copy, dry_run=True)
    summary = summarise(opened, copy)
    assert {row.verdict for row in summary.differences} == {"undefined"}
    assert all(value is None for row in summary.differences for value in row.by_seed.values())
    assert "undefined" in write_report(copy).read_text()


def test_more_tests_take_more_draws(tmp_path):
    tuners = ("lora", "ssf", "bitfit", "dora", "vera", "ia3", "hra", "boft", "oft", "vpt_deep", "adaptformer")
    axes = Axes(tuners=tuners, labels=(12, "all"), seeds=2)
    opened = open_comparison(experiment("data.modality=xray"), axes, None, dry_run=True)
    assert summarise(opened, tmp_path).resamples == 100 * 2 * len(tuners)  # of which none is there, yet
    assert read_json(compared()[0] / "comparison.json")["resamples"] == 2000


def test_longer_takes_as_long_as_tpp():
    timing = Timing(tpp_step=0.2, finetune_step=0.5, tpp_rest=2.0, cell_rest=1.0, memory_mib=100)
    axes = Axes(tuners=("lora",), extras=("longer",), labels=("all",), seeds=3)
    base = base_experiment(experiment(), axes)
    budget = Budget(tpp={"": 40}, finetune={"all": 30}, batch={"all": 16})
    unknown = Comparison(axes, base, None, budget, Machine(2, 1))
    comparison = Comparison(axes, base, None, budget, Machine(2, 1), {"lora 16": timing})
    tpp, longer = Cell(Arm("lora", "tpp"), "all", 0), Cell(Arm("lora", "longer"), "all", 0)
    assert comparison.steps(tpp) == unknown.steps(tpp) == 30
    assert comparison.steps(longer) == 30 + 20  # (40 x 0.2 + 2) / 0.5
    assert unknown.steps(longer) is None
    assert comparison.seconds(longer) == pytest.approx(comparison.tpp_seconds("lora") + comparison.seconds(tpp))
    assert comparison.seconds_left(None) == pytest.approx((3 * 10 + 6 * 16 + 3 * 26) / 2)


def test_options_belong_to_the_tuner_that_was_named():
    written = experiment("tuner.rank=2", "finetune.learning_rate=0.5", "tpp.learning_rate=0.25")
    base = base_experiment(written, Axes())
    own = cell_experiment(base, Cell(Arm("lora", "tpp"), 12, 3), threads=2)
    assert (own.tuner.rank, own.finetune.learning_rate, own.tpp.learning_rate) == (2, 0.5, 0.25)
    assert (own.seed, own.data.labels, own.hardware.threads, own.tpp.enabled) == (3, 12, 2, True)
    other = cell_experiment(base, Cell(Arm("full", "standard"), 12, 3), steps=7)
    assert (other.tuner.name, other.finetune.learning_rate, other.finetune.steps) == ("full", "auto", 7)
    assert not other.tpp.enabled


def test_a_frozen_backbone_gets_its_fitted_head_whatever_was_said_beside_a_tuner():
    """`medtpp init` writes all answers out, "random" for LoRA among them."""
    for given, starts in (("random", ["random", "random", "auto"]), ("fitted", ["fitted", "fitted", "auto"])):
        base = base_experiment(experiment(f"finetune.head_start={given}"), Axes())
        cells = (Cell(Arm(tuner, "standard"), 12, 0) for tuner in ("lora", "ssf", "linear"))
        assert [cell_experiment(base, cell).finetune.head_start for cell in cells] == starts


def test_loras_other_starts_are_arms():
    written = experiment("tuner.rank=2", "finetune.learning_rate=0.5")
    axes = Axes(tuners=("lora",), inits=("standard", "tpp", "pissa", "olora", "eva", "lora_ga"), labels=(12,), seeds=1)
    base = base_experiment(written, axes)
    made = {cell.arm.init: cell_experiment(base, cell) for cell in axes.cells(written)}
    assert {init: one.tuner.start for init, one in made.items()} == {
        "standard": "standard",
        "tpp": "standard",
        "pissa": "pissa",
        "olora": "olora",
        "eva": "eva",
        "lora_ga": "lora_ga",
    }
    assert [init for init, one in made.items() if one.tpp.enabled] == ["tpp"]
    assert {one.tuner.rank for one in made.values()} == {2}
    assert {one.finetune.learning_rate for one in made.values()} == {0.5}
    with pytest.raises(ConfigError, match="The start eva is one of LoRA's; ssf has none such"):
        base_experiment(written, Axes(tuners=("lora", "ssf"), inits=("standard", "eva")))


def test_axes_without_an_arm_are_refused():
    with pytest.raises(ConfigError, match="there is no arm"):
        Axes(inits=(), extras=())
    with pytest.raises(ConfigError, match="as long as TPP"):
        Axes(inits=("standard",), extras=("longer",))
