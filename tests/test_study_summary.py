"""Summaries of studies: known effects in made-up comparisons come out, and what is missing is told."""

import csv
import shutil
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest

from medtpp.errors import DataError
from medtpp.evaluation.paired import holm
from medtpp.files import read_json, write_json
from medtpp.report.schema_study import AcrossFile
from medtpp.workflow.study.across import summarise_study
from medtpp.workflow.study.reach import compare_logs
from studies import cells_of, part, rising, write_classes, write_part

_HOLD = TemporaryDirectory(prefix="medtpp-studies-")
GAINS = (0.03, 0.04, 0.05, 0.02, 0.06, 0.04)
FEW = {"labels": (30,), "seeds": 5, "cases": 8, "noise": 0.002}


def constant(gain):
    """A score with a gain for each seed and label count; seeds scatter, alike in both arms."""
    return lambda arm, index, seed: 0.6 + 0.05 * index + 0.01 * seed + (gain if arm.endswith("tpp") else 0)


@cache
def study():
    """Six data sets with known gains at two label counts, which differ from set to set."""
    root = Path(_HOLD.name)
    for number, gain in enumerate(GAINS):
        labels = (20 + 10 * (number % 2), "all")
        write_part(root / f"set{number}", constant(gain), **FEW | {"labels": labels})
    parts = [part(root / f"set{number}") for number in range(len(GAINS))]
    return root, parts, summarise_study(parts, root)


def rows(path):
    with path.open() as stream:
        return list(csv.DictReader(stream))


def test_known_gains_come_out():
    root, _, found = study()
    gains = {one.dataset: one for one in found.gains if one.level == "lowest"}
    assert [gains[f"set{number}"].value for number in range(6)] == pytest.approx(GAINS)
    assert all(one.verdict == "helps" and one.low <= one.value <= one.high for one in gains.values())
    lowest, every = found.pooled
    assert (lowest.level, every.level) == ("lowest", "all")
    assert lowest.these.value == pytest.approx(np.mean(GAINS))
    assert (lowest.sets, lowest.helps, lowest.hurts) == (6, 6, 0)
    assert (lowest.scope, lowest.verdict) == ("like these", "helps")
    error = np.std(GAINS, ddof=1) / np.sqrt(6)
    assert lowest.like_these.high - lowest.like_these.low == pytest.approx(2 * 2.5706 * error, rel=0.06)
    assert lowest.wilcoxon == pytest.approx(2 / 64)
    assert lowest.wilcoxon_holm == pytest.approx(4 / 64)
    assert "lora, lowest label count (20 to 30): TPP helps: over 6 data sets it is 4.0 points better" in lowest.sentence
    assert "Taken alone, TPP helps on 6, hurts on 0 of them." in lowest.sentence
    assert found.answer.endswith("Mean gains: +4.0 points. Measured on 6 data sets.")
    assert AcrossFile.model_validate(read_json(root / "across.json")) == found


def test_single_sets_are_adjusted_for_all_that_was_looked_at(tmp_path):
    """Over arms, label counts and sets of a kind of baseline; and there are draws enough for all of these."""
    tuners = ("lora", "ssf", "bitfit", "dora", "vera", "ia3", "hra", "boft", "oft")
    many = {"tuners": tuners, "labels": (20, 30, "all"), "seeds": 5, "cases": 4, "extras": ("linear",)}
    gains = rising((0.03, 0.001, 0.06), scatter=0.003)
    sets = [part(write_part(tmp_path / name, gains, **many)) for name in "ab"]
    found = summarise_study(sets, tmp_path)
    for kind in ("standard", "linear"):
        family = [one for one in found.gains if one.kind == kind]
        assert len(family) == 9 * 3 * 2
        assert [one.p_holm for one in family] == pytest.approx(holm([one.p for one in family]))
    standard = [one for one in found.gains if one.kind == "standard"]
    assert min(one.p for one in standard) < 1 / 2000
    assert {one.verdict for one in standard if one.level == "all"} >= {"helps"}
    for one in found.pooled:
        mine = [each.verdict for each in found.gains if (each.arm, each.baseline, each.level) == one_of(one)]
        better, worse = ("better", "worse") if one.kind == "linear" else ("helps", "hurts")
        assert (one.helps, one.hurts, one.equivalent) == tuple(map(mine.count, (better, worse, "equivalent")))
    beside = next(one for one in found.pooled if one.kind == "linear" and one.verdict == "better")
    assert "lora with TPP is better than frozen features on these: over 2 data sets by " in beside.sentence
    assert "Taken alone, lora with TPP is better on " in beside.sentence


def one_of(pooled):
    return pooled.arm, pooled.baseline, pooled.level


def test_the_tables_are_tidy():
    root, _, found = study()
    tables = {path.stem: rows(path) for path in (root / "across").glob("*.csv")}
    assert tables.keys() == {"parts", "sets", "scores", "gains", "pooled", "ranks", "equal", "reach"}
    assert {name: len(table) for name, table in tables.items() if name != "ranks"} == {
        name: len(getattr(found, name)) for name in tables if name != "ranks"
    }
    gain = next(row for row in tables["gains"] if row["dataset"] == "set3" and row["level"] == "all")
    assert float(gain["value"]) == pytest.approx(GAINS[3])
    assert tables["sets"][1]["counts_lowest"] == "30"
    assert float(tables["pooled"][0]["like_these_low"]) == pytest.approx(found.pooled[0].like_these.low)
    assert not any(value.startswith(("{", "[")) for table in tables.values() for row in table for value in row.values())


def test_a_summary_is_always_the_same(tmp_path):
    _, parts, found = study()
    again = summarise_study(parts, tmp_path)
    assert again.gains == found.gains
    assert again.pooled == found.pooled


def test_label_counts_are_aligned_by_number_where_all_sets_have_the_same(tmp_path):
    sets = [write_part(tmp_path / name, constant(0.03), **FEW | {"labels": (30, 150)}) for name in "ab"]
    found = summarise_study([part(folder) for folder in sets], tmp_path)
    assert [(level.name, level.title) for level in found.levels] == [("30", "30 labels"), ("150", "150 labels")]
    other = write_part(tmp_path / "c", constant(0.03), **FEW | {"labels": (40, 150, 500)})
    found = summarise_study([part(folder) for folder in (*sets, other)], tmp_path)
    assert [level.name for level in found.levels] == ["lowest", "second", "third"]
    assert found.levels[0].title == "lowest label count (30 to 40)"
    assert [(one.level, one.sets) for one in found.pooled] == [("lowest", 3), ("second", 3)]  # one set has no mean
    assert "aligned by their rank" in " ".join(found.notes)


def test_few_sets_speak_of_themselves(tmp_path):
    sets = [write_part(tmp_path / name, constant(0.03), **FEW) for name in "abc"]
    found = summarise_study([part(folder) for folder in sets], tmp_path).pooled[0]
    assert (found.scope, found.verdict, found.wilcoxon) == ("these", "helps", None)
    assert "TPP helps on these: over 3 data sets" in found.sentence
    assert "6 data sets or more would be needed to speak of others." in found.sentence
    few = write_part(tmp_path / "d", constant(0.03), **FEW | {"seeds": 2})
    found = summarise_study([part(folder) for folder in (*sets, few)], tmp_path)
    assert found.pooled[0].verdict == "too few seeds"
    assert "Fewer than 5 seeds on d" in " ".join(found.notes)
    alone = summarise_study([part(sets[0])], tmp_path).pooled[0]
    assert (alone.sets, alone.verdict) == (1, "helps")
    assert "TPP helps on this one: over one data set it is 3.0 points better than no TPP" in alone.sentence


def test_what_no_difference_and_equivalence_say(tmp_path):
    wide = [write_part(tmp_path / f"w{n}", constant((-1) ** n * 0.05), **FEW) for n in range(6)]
    found = summarise_study([part(folder) for folder in wide], tmp_path).pooled[0]
    assert (found.verdict, found.helps, found.hurts) == ("no difference seen", 3, 3)
    assert "That is not equivalence" in found.sentence
    small = [write_part(tmp_path / f"s{n}", constant((-1) ** n * 0.0001), **FEW) for n in range(6)]
    found = summarise_study([part(folder) for folder in small], tmp_path)
    assert (found.pooled[0].verdict, found.pooled[0].equivalent) == ("equivalent", 6)
    assert "are equivalent within 1 point" in found.pooled[0].sentence


def test_units_are_never_averaged_and_less_may_be_better(tmp_path):
    dice = [write_part(tmp_path / name, constant(0.03), **FEW) for name in "ab"]
    nearer = {"metric": "hd95", "higher_is_better": False, "margin": 0.5}
    distance = [write_part(tmp_path / f"hd{n}", constant(-0.4), **FEW | nearer) for n in range(2)]
    found = summarise_study([part(folder) for folder in (*dice, *distance)], tmp_path)
    assert [(one.unit, one.sets, one.verdict) for one in found.pooled] == [("points", 2, "helps"), ("mm", 2, "helps")]
    assert found.pooled[1].these.value == pytest.approx(0.4)
    assert "0.40 mm better" in found.pooled[1].sentence
    assert "Mean gains: +3.0 points; +0.40 mm." in found.answer
    assert "different units are never averaged" in " ".join(found.notes)
    assert "signs are turned" in " ".join(found.notes)


def test_folds_are_averaged_and_backbones_of_one_test_stay_paired(tmp_path):
    """Two backbones on the same cases are no more patients; two folds are."""
    noisy = {**FEW, "cases": 12, "noise": 0.05}
    first = write_part(tmp_path / "a", constant(0.03), **noisy)
    copy = Path(shutil.copytree(first, tmp_path / "b"))
    one, backbones, folds = (
        summarise_study([part(folder, dataset="set", **{axis: folder.name}) for folder in folders], tmp_path).gains[0]
        for axis, folders in (("backbone", [first]), ("backbone", [first, copy]), ("fold", [first, copy]))
    )
    assert (one.parts, backbones.parts, folds.parts) == (1, 2, 2)
    assert backbones.value == folds.value == pytest.approx(one.value)
    assert (backbones.low, backbones.high) == pytest.approx((one.low, one.high))
    assert folds.high - folds.low == pytest.approx((one.high - one.low) / np.sqrt(2), rel=0.1)


def test_what_is_missing_failed_or_broken_is_told(tmp_path):
    failed = [{"cell": "lora tpp, 30 labels, seed 4", "reason": "Out of memory."}]
    whole = write_part(tmp_path / "whole", constant(0.03), **FEW)
    partial = write_part(tmp_path / "partial", constant(0.05), failed=failed, **FEW)
    table = pd.read_csv(partial / "cells.csv", dtype=str)
    table.loc[(table.arm == "lora tpp") & (table.seed == "4"), "status"] = "failed"
    table.to_csv(partial / "cells.csv", index=False)
    broken = write_part(tmp_path / "broken", constant(0.03), **FEW)
    cell = broken / cells_of(broken)[0]["folder"] / "evaluation" / "segmentation.csv"
    cell.write_text("case,dice\n")
    (tmp_path / "begun").mkdir()
    folders = (whole, partial, broken, tmp_path / "begun", tmp_path / "nowhere")
    found = summarise_study([part(folder) for folder in folders], tmp_path)
    assert [one.status for one in found.parts] == ["done", "partial", "broken", "missing", "missing"]
    assert found.parts[1].failed == (("lora tpp, 30 labels, seed 4", "Out of memory."),)
    assert (found.parts[1].done, found.parts[1].cells) == (9, 10)
    assert "segmentation.csv" in found.parts[2].reason
    assert "not finished" in found.parts[3].reason
    assert "not there" in found.parts[4].reason
    assert {one.dataset: (one.seeds, round(one.value, 4)) for one in found.gains} == {
        "whole": (5, 0.03),
        "partial": (4, 0.05),
    }
    with pytest.raises(DataError, match="No comparison") as error:
        summarise_study([part(folder) for folder in folders[2:]], tmp_path)
    assert len(error.value.problems) == 3


def test_one_data_set_has_one_metric(tmp_path):
    dice = write_part(tmp_path / "a", constant(0.03), **FEW)
    nsd = write_part(tmp_path / "b", constant(0.03), **FEW | {"metric": "nsd"})
    with pytest.raises(DataError, match="different metrics") as error:
        summarise_study([part(dice, dataset="set", fold="0"), part(nsd, dataset="set", fold="1")], tmp_path)
    assert error.value.problems == ["set: dice, nsd"]


def test_arms_are_ranked_where_all_sets_have_them(tmp_path):
    order = {"lora tpp": 0.04, "lora standard": 0.02, "lora longer": 0.03, "linear": 0.0}
    more = {"extras": ("longer", "linear"), **FEW}
    sets = [write_part(tmp_path / f"r{n}", lambda arm, index, seed: 0.6 + order[arm], **more) for n in range(4)]
    lacking = write_part(tmp_path / "lacking", constant(0.01), **FEW)
    (found,) = summarise_study([part(folder) for folder in (*sets, lacking)], tmp_path).ranks
    assert found.arms == ("lora tpp", "lora longer", "lora standard", "linear")
    assert (found.sets, found.ranks, found.p) == (4, (1, 2, 3, 4), 0)
    assert found.left_out == ("lacking",)
    assert found.critical == pytest.approx(2.345, abs=0.001)
    assert found.sentence.startswith("lora tpp has the best mean rank, 1.00 among 4 arms. lora longer, lora standard")
    (found,) = summarise_study([part(sets[0]), part(lacking)], tmp_path).ranks
    assert "Ranks take 3 data sets or more" in found.reason


def test_ranks_are_of_the_same_seeds(tmp_path):
    """The longer arm is the worst on every seed, but failed on the hard one, without which its mean is the best."""
    order = {"lora tpp": 0.04, "lora standard": 0.02, "lora longer": 0.01}
    hard = lambda arm, index, seed: (0.3 if seed == 0 else 0.6) + order[arm]  # noqa: E731
    sets = [write_part(tmp_path / f"r{n}", hard, extras=("longer",), **FEW) for n in range(3)]
    for folder in sets:
        cells = pd.read_csv(folder / "cells.csv", dtype=str)
        cells.loc[(cells.arm == "lora longer") & (cells.seed == "0"), "status"] = "failed"
        cells.to_csv(folder / "cells.csv", index=False)
    found = summarise_study([part(folder) for folder in sets], tmp_path)
    best = {score.arm: score.value for score in found.scores if score.dataset == "r0"}
    assert max(best, key=best.get) == "lora longer"
    assert found.ranks[0].arms == ("lora tpp", "lora standard", "lora longer")
    assert found.ranks[0].ranks == (1, 2, 3)


def test_labels_saved(tmp_path):
    """0.05 for each step of the label count: a gain of 0.025 is half a step on the logarithmic axis."""
    folder = write_part(tmp_path / "a", rising((0.025, 0.025, 0.0)), seeds=5, cases=8, noise=0.001)
    found = {one.labels: one for one in summarise_study([part(folder)], tmp_path).equal}
    assert found[30].value == pytest.approx(np.sqrt(30 * 150), rel=1e-6)
    assert found[30].low < found[30].value < found[30].high
    assert found[150].value == pytest.approx(np.sqrt(150 * 624), rel=1e-6)
    assert found[624].value == pytest.approx(624)
    assert found[30].sentence.startswith("a, lora: TPP with 30 labels equals the standard start with 67 (")
    better = write_part(tmp_path / "b", rising((-0.1, 0.0, 0.1)), seeds=5, cases=8, noise=0.001)
    found = {one.labels: one for one in summarise_study([part(better)], tmp_path).equal}
    assert (found[30].value, found[30].value_beyond) == (30, "below")
    assert (found[624].value, found[624].value_beyond) == (624, "above")
    assert "is worse than the standard start with the fewest that were tried (30)" in found[30].sentence


def test_labels_saved_of_a_distance(tmp_path):
    """Less is better: 0.6 falls by 0.05 for each step."""
    near = {"metric": "hd95", "higher_is_better": False, "seeds": 5, "cases": 8, "noise": 0.001}
    folder = write_part(
        tmp_path / "a", lambda arm, index, seed: 0.6 - 0.05 * index - 0.025 * arm.endswith("tpp"), **near
    )
    found = summarise_study([part(folder)], tmp_path).equal[0]
    assert found.value == pytest.approx(np.sqrt(30 * 150), rel=1e-6)


def test_a_comparison_of_a_classification(tmp_path):
    folder = write_classes(
        tmp_path / "a", lambda arm, index, seed: 0.8 + 0.4 * arm.endswith("tpp"), labels=(30,), seeds=5
    )
    found = summarise_study([part(folder)], tmp_path)
    assert found.gains[0].value > 0.02
    assert found.sets[0].metric_title == "macro AUC"


# Steps


def losses(arm, seed):
    """Both fall by a straight line; after TPP the loss is where the other is 20 of 100 steps later."""
    steps = np.arange(1, 101)
    return {"step": steps, "loss": 1 - (steps + (20 if arm.endswith("tpp") else 0)) / 200}


def test_steps_and_time_until_tpp_is_as_good(tmp_path):
    folder = write_part(tmp_path / "a", constant(0.0), log=losses, **FEW | {"seeds": 6})
    (found,) = summarise_study([part(folder)], tmp_path).reach
    assert (found.measure, found.seeds, found.reached, found.total) == ("training loss", 6, 6, 100)
    assert found.steps == pytest.approx(79, abs=1)  # the mean at the end reaches back a little
    assert found.share == pytest.approx(found.steps / 100)
    assert (found.share_low, found.share_high) == (found.share, found.share)
    assert found.own_share == 1
    assert found.cost == pytest.approx(0.4 + found.share)  # 40 s of TPP, 100 s of fine-tuning


def test_seeds_that_never_get_there(tmp_path):
    def log(arm, seed):
        table = losses(arm, seed)
        return table | {"loss": table["loss"] + 0.5} if arm.endswith("tpp") and seed > 1 else table

    folder = write_part(tmp_path / "a", constant(0.0), log=log, **FEW | {"seeds": 6})
    (found,) = summarise_study([part(folder)], tmp_path).reach
    assert (found.seeds, found.reached, found.steps, found.share, found.cost) == (6, 2, None, None, None)
    assert found.costed
    assert found.share_low is not None
    assert found.share_high is None


def test_the_score_on_validation_cases_is_followed_where_there_is_one():
    steps = np.arange(1, 11)
    validation = np.where(steps % 5 == 0, -1 + steps / 20, np.nan)
    baseline = pd.DataFrame({"step": steps, "loss": 1.0, "validation": validation})
    arm = baseline.assign(validation=validation + 0.25, loss=9.0)
    found = compare_logs(arm, baseline, (1.0, 10.0, 10.0))
    assert (found.measure, found.steps, found.own, found.total) == ("validation", 5, 10, 10)
    assert found.cost == pytest.approx(0.6)
    assert compare_logs(arm.drop(columns="validation"), baseline, (1.0, 10.0, 10.0)).measure == "training loss"


def test_times_that_were_not_recorded(tmp_path):
    folder = write_part(tmp_path / "a", constant(0.0), log=losses, **FEW)
    table = pd.read_csv(folder / "cells.csv", dtype=str).drop(columns=["seconds", "tpp_seconds"])
    table.to_csv(folder / "cells.csv", index=False)
    (found,) = summarise_study([part(folder)], tmp_path).reach
    assert (found.costed, found.cost) == (False, None)
    assert found.share is not None


def test_no_cell_lies_outside_of_its_comparison(tmp_path):
    folder = write_part(tmp_path / "a", constant(0.0), **FEW)
    other = write_part(tmp_path / "b", constant(0.0), **FEW)
    table = pd.read_csv(folder / "cells.csv", dtype=str)
    table.loc[0, "folder"] = "../b/" + table.folder[0]
    table.to_csv(folder / "cells.csv", index=False)
    found = summarise_study([part(folder), part(other)], tmp_path)
    assert [one.status for one in found.parts] == ["broken", "done"]
    assert "outside" in found.parts[0].reason


def test_numbers_of_another_version_are_refused(tmp_path):
    folder = write_part(tmp_path / "a", constant(0.0), **FEW)
    write_json(folder / "comparison.json", read_json(folder / "comparison.json") | {"schema": 2})
    with pytest.raises(DataError) as error:
        summarise_study([part(folder)], tmp_path)
    assert "schema" in error.value.problems[0]
