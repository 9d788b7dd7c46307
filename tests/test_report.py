"""Reports of runs and comparisons: what they show, that they need nothing else, and what is said of broken folders."""

import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path, PurePosixPath

import pytest

from comparisons import VERDICTS, write_comparison
from medtpp.errors import DataError
from medtpp.evaluation import read_predictions, write_predictions
from medtpp.files import read_json, write_json
from medtpp.report import write_report
from reports import NASTY, changed, page, pages, reevaluate, write_mistake
from runs import data_folder, done, refused, run_folder


@pytest.fixture
def run(tmp_path):
    """A run to spoil."""
    return Path(shutil.copytree(run_folder(), tmp_path / "run"))


KINDS = ("run", "nasty", "several labels", "small comparison", "large comparison", "study")


# What every page is


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_needs_nothing_beside_itself(kind):
    found = pages()[kind]
    links = [value for _, given in found.elements for name, value in given.items() if name in ("src", "href")]
    assert links
    assert [link[:40] for link in links if not link.startswith(("data:", "#"))] == []
    assert [name for name in ("iframe", "object", "embed", "base") if found.all(name)] == []
    policy = next(given["content"] for given in found.all("meta") if "http-equiv" in given)
    assert policy.startswith("default-src 'none';")


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_sound(kind):
    found = pages()[kind]
    assert sorted(found.ids) == sorted(set(found.ids))
    assert {given["href"][1:] for given in found.all("a")} <= set(found.ids)
    assert {given["href"][1:] for given in found.all("use")} <= set(found.ids)
    levels = [int(tag[1]) for tag, _ in found.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(given["alt"] for given in found.all("img"))
    assert len(found.all("caption")) == len(found.all("table"))
    assert all(given.get("aria-label") for _, given in found.elements if given.get("role") in ("img", "region"))
    assert len(found.all("script")) == 1
    assert not {"on" + name for name in ("click", "load", "error")} & {
        key for _, given in found.elements for key in given
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_section_is_in_the_contents(kind):
    found = pages()[kind]
    sections = [given["id"] for given in found.all("section")]
    linked = [given["href"][1:] for given in found.all("a")]
    assert [name for name in linked if name in sections][: len(sections)] == sections


def test_a_page_is_written_whole_and_always_the_same(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first
    assert first.rstrip().endswith(b"</html>")
    assert b"http:" not in first
    assert b"https:" not in first
    assert len(first) < 3_000_000


# Runs


def test_the_numbers_of_a_run(run):
    found = page(run)
    evaluation = read_json(run / "evaluation" / "evaluation.json")
    for name in ("auc", "sensitivity", "specificity", "accuracy", "ece"):
        assert f"{evaluation['metrics'][name]['value']:.3f}" in found.text, name
    auc = evaluation["metrics"]["auc"]
    assert f"AUC of {auc['value']:.3f} (95% interval {auc['low']:.3f} to {auc['high']:.3f})" in found.text
    seen = read_json(run / "finetune" / "adapter" / "medtpp.json")["tpp"]["images"]
    assert f"TPP saw {seen} images, without labels." in found.text
    assert "No patient is in more than one part." in found.text
    best = read_json(run / "finetune" / "complete.json")["best"]["step"]
    assert f"of step {best}, the best on the validation cases" in found.text
    assert "curves" in found.ids
    assert "efficiency" not in found.ids


def test_no_path_of_the_machine(run):
    evaluation = read_json(run / "evaluation" / "evaluation.json")
    write_json(run / "evaluation" / "evaluation.json", evaluation | {"notes": [f"{data_folder()}/images is odd."]})
    text = write_report(run).read_text(encoding="utf-8")
    assert str(run) not in text
    assert str(data_folder().parent) not in text
    assert f"…/{data_folder().name}" in text
    assert "…/images is odd." in text


def test_names_are_shown_as_they_are():
    found = pages()["nasty"]
    assert all(found.text.count(name) >= 2 for name in NASTY)


def test_a_run_without_tpp(run):
    shutil.rmtree(run / "tpp")
    card = run / "finetune" / "adapter" / "medtpp.json"
    write_json(card, read_json(card) | {"tpp": None})
    found = page(run)
    assert "tpp" not in found.ids
    assert "without target parameter pre-training" in found.text
    assert "with TPP" not in found.text


def test_a_run_of_an_older_version(run):
    """No mistakes, no numbers of parameters, no memory."""
    shutil.rmtree(run / "evaluation" / "mistakes", ignore_errors=True)
    keys = ("steps", "batch_size", "learning_rate", "seconds", "images_per_second", "waiting")
    for stage in ("tpp", "finetune"):
        told = read_json(run / stage / "complete.json")
        write_json(run / stage / "complete.json", {key: told[key] for key in keys})
    found = page(run)
    assert "mistakes" not in found.ids
    assert "not recorded" in found.text
    assert "did not record what TPP changed" in found.text
    assert "of the last step" in found.text


def test_mistakes_are_shown(run):
    write_mistake(run, label="")
    found = page(run)
    assert "truth no label predicted normal , 97.0% a.png" in found.text
    picture = next(given for given in found.all("img") if given["alt"] == "Image of case a.png")
    assert picture["src"].startswith("data:image/webp;base64,")


def test_several_labels():
    found = pages()["several labels"]
    assert "each of 2 labels from its absence" in found.text
    assert "Each label is decided at its threshold" in found.text
    assert len([given for given in found.all("table") if given.get("class") == "matrix"]) == 2
    assert len(found.all("option")) == 3


def test_a_metric_that_does_not_exist(run):
    before = read_predictions(run / "evaluation" / "predictions.csv")
    reevaluate(run, changed(before, labels=(before.classes[:1],) * len(before)))
    found = page(run)
    assert "the AUC is undefined: see the notes" in found.text
    assert "curves" not in found.ids
    assert "undefined" in found.text


@pytest.mark.parametrize(
    ("drift", "on", "said"),
    [(0.0, 0.9, "does not test TPP"), (0.2, 0.95, "not done better"), (0.2, 0.5, "44.4% lower")],
)
def test_what_tpp_changed(run, drift, on, said):
    path = run / "tpp" / "complete.json"
    write_json(path, read_json(path) | {"feature_drift": drift, "pretext_loss_on": on, "pretext_loss_off": 0.9})
    found = page(run)
    assert said in found.text
    assert ("does not test TPP" in found.text) == (drift == 0)


def test_the_rows_of_the_preview_are_those_of_the_pretext_task(run):
    path = run / "tpp" / "complete.json"
    write_json(path, read_json(path) | {"views": ["mae masked", "mae restored", "restoration changed"]})
    assert "mae: what it restored; restoration: what the network was shown of it, changed." in page(run).text


# Folders that cannot be reported on


NEEDED = (
    "evaluation/evaluation.json",
    "evaluation/predictions.csv",
    "finetune/validation.csv",
    "finetune/complete.json",
    "finetune/log.csv",
    "finetune/adapter/medtpp.json",
    "tpp/log.csv",
    "split.csv",
    "experiment.yaml",
)
MAY_LACK = ("tpp/complete.json", "tpp/preview.png")


def test_a_missing_file_is_named(run):
    for name in NEEDED:
        shutil.move(run / name, run / "away")
        with pytest.raises(DataError, match=re.escape(PurePosixPath(name).name)):
            write_report(run)
        shutil.move(run / "away", run / name)
    write_report(run)


@pytest.mark.parametrize("name", [*NEEDED, *MAY_LACK])
def test_a_broken_file_is_named(run, name):
    (run / "report.html").unlink(missing_ok=True)
    for content in (b"", b"{", b"\xff\xfe\x00", b'{"steps": "many"}', b"a,b\n1,2\n"):
        (run / name).write_bytes(content)
        with pytest.raises(DataError, match=re.escape(PurePosixPath(name).name)):
            write_report(run)
    assert [file.name for file in run.iterdir() if "report" in file.name] == []


def test_all_that_a_file_lacks_is_said_together(run):
    write_json(run / "finetune" / "complete.json", {"steps": "many"})
    with pytest.raises(DataError) as error:
        write_report(run)
    assert {problem.partition(":")[0] for problem in error.value.problems} >= {"steps", "batch_size", "seconds"}


def test_files_of_two_evaluations(run):
    predictions = read_predictions(run / "evaluation" / "predictions.csv")
    write_predictions(run / "evaluation" / "predictions.csv", predictions.take([0, 1]))
    with pytest.raises(DataError, match="different evaluations"):
        write_report(run)


@pytest.mark.parametrize("image", ["../../tpp/preview.png", "/etc/hostname", "01.png"])
def test_an_image_of_a_mistake_is_in_its_folder(run, image):
    write_mistake(run, image=image)
    with pytest.raises(DataError, match=r"outside its folder|cannot be read"):
        write_report(run)


def test_folders_without_a_result(tmp_path, run):
    for name in ("nothing", "begun", "comparing"):
        (tmp_path / name).mkdir()
    (tmp_path / "begun" / "experiment.yaml").write_text("seed: 0\n")
    (tmp_path / "comparing" / "cells").mkdir()
    said = {name: refused("report", tmp_path / name) for name in ("missing", "nothing", "begun", "comparing")}
    assert "There is no folder" in said["missing"]
    assert "neither a run nor a comparison" in said["nothing"]
    assert "no summary.json" in said["begun"]
    assert "--resume" in said["begun"]
    assert "no comparison.json" in said["comparing"]


def test_the_command_prints_where_the_page_is(run):
    (run / "report.html").unlink(missing_ok=True)
    assert str(run / "report.html") in done("report", run).text
    assert (run / "report.html").is_file()


def test_the_command_line_starts_without_the_report():
    heavy = "{'matplotlib', 'jinja2', 'pandas'} & set(sys.modules)"
    code = f"import sys; from medtpp.cli._app import app; assert not {heavy}, {heavy}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Comparisons


def test_a_comparison_says_what_came_out():
    found = pages()["large comparison"]
    assert "Of 9 comparisons, TPP helped in 2; TPP did harm in 2;" in found.text
    assert all(f"{verdict}." in found.text for verdict in VERDICTS)
    assert {"arms", "differences", "seeds", "efficiency", "learning", "tpp", "cost", "how"} <= set(found.ids)
    assert len(found.all("option")) == 1 + 10


def test_an_arm_looks_the_same_in_all_plots(tmp_path):
    folder = write_comparison(tmp_path, tuners=("lora", "ssf"), extras=("linear",), labels=(30, 150))
    text = write_report(folder).read_text()
    arms, tuned = (
        dict(re.findall(r'<li data-series="(\d+)">.*?</svg>\s*([^<>]+)</li>', legend, flags=re.DOTALL))
        for legend in re.findall(r'<ul class="legend">(.*?)</ul>', text, flags=re.DOTALL)[:2]
    )
    assert set(tuned.values()) == {"lora standard", "lora tpp", "ssf standard", "ssf tpp"}
    assert tuned.items() <= arms.items()


def test_the_smallest_comparison():
    found = pages()["small comparison"]
    assert "At 30 labels, TPP helped." in found.text
    assert "efficiency" not in found.ids
    assert "with 1 seed." in found.text


def test_cells_that_failed(tmp_path):
    failed = [{"cell": "lora tpp, 30 labels, seed 1", "reason": "Cannot read /home/doctor/scans/1.png: <i>broken</i>"}]
    folder = write_comparison(tmp_path, failed=failed)
    table = read_json(folder / "comparison.json")
    nothing = dict.fromkeys(("value", "low", "high", "seconds", "tpp_seconds", "peak_memory_mib", "target_parameters"))
    means = [table["means"][0], table["means"][1] | nothing | {"seeds": 0}]
    write_json(folder / "comparison.json", table | {"means": means, "differences": []})
    found = page(folder)
    assert "Cannot read …/1.png: <i>broken</i>" in found.text
    assert "1 cell failed" in found.text
    assert "– failed" in found.text
    assert "differences" not in found.ids


def test_differences_of_zero(tmp_path):
    folder = write_comparison(tmp_path, seeds=2, margin=0.0)
    table = read_json(folder / "comparison.json")
    zero = {"value": 0.0, "low": None, "high": None, "p": None, "p_holm": None, "by_seed": {"0": 0.0, "1": 0.0}}
    write_json(folder / "comparison.json", table | {"differences": [table["differences"][0] | zero]})
    assert "0 of 2 seeds better" in page(folder).text


def test_less_is_better(tmp_path):
    folder = write_comparison(tmp_path, higher_is_better=False, metric="ece")
    gaps = read_json(folder / "comparison.json")["differences"][0]["by_seed"].values()
    assert f"{sum(gap < 0 for gap in gaps)} of 3 seeds better" in page(folder).text


@pytest.mark.parametrize(
    "name", ["cells.csv", "experiment.yaml", "tpp/lora/seed0/log.csv", "tpp/lora/seed0/preview.png"]
)
def test_a_broken_file_of_a_comparison_is_named(tmp_path, name):
    folder = write_comparison(tmp_path)
    (folder / name).unlink()
    with pytest.raises(DataError, match=PurePosixPath(name).name):
        write_report(folder)


def test_a_comparison_of_another_schema(tmp_path):
    folder = write_comparison(tmp_path, schema=2)
    with pytest.raises(DataError, match=r"comparison\.json"):
        write_report(folder)


def test_a_comparison_of_arms_that_it_does_not_list(tmp_path):
    folder = write_comparison(tmp_path)
    table = read_json(folder / "comparison.json")
    write_json(folder / "comparison.json", table | {"arms": table["arms"][:1]})
    with pytest.raises(DataError, match="not listed: lora tpp"):
        write_report(folder)


def test_a_comparison_names_no_file_outside_itself(tmp_path):
    folder = write_comparison(tmp_path / "inside")
    table = read_json(folder / "comparison.json")
    tpp = [table["tpp"][0] | {"preview": "../outside.png"}]
    write_json(folder / "comparison.json", table | {"tpp": tpp})
    with pytest.raises(DataError, match="outside itself"):
        write_report(folder)
