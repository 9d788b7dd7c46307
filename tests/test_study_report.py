"""The page of a study: what it shows, where it leads, and that a diagram tells its arms."""

import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from medtpp.errors import DataError
from medtpp.files import read_json, write_json, write_text
from medtpp.report import write_report
from medtpp.report.figures import critical_figure
from medtpp.workflow.study.across import summarise_study
from reports import Page, page
from studies import NAME, part, rising, write_part, write_study


@pytest.fixture(scope="module")
def made():
    with TemporaryDirectory(prefix="medtpp-study-") as folder:
        yield write_study(Path(folder) / "study")


@pytest.fixture
def study(made, tmp_path):
    """A study to spoil: its summary alone, which is all that a page is made of."""
    write_json(tmp_path / "across.json", read_json(made / "across.json"))
    return tmp_path


def test_the_numbers_of_a_study(study):
    found, file = page(study), read_json(study / "across.json")
    assert file["answer"] in found.text
    assert all(one["sentence"] in found.text for one in file["pooled"] if one["kind"] == "standard")
    gain = file["gains"][0]
    value, low, high = (f"{100 * gain[name]:+.1f}" for name in ("value", "low", "high"))
    assert f"{value} [{low}, {high}]".replace("-", "−") in found.text
    assert {"sets", "others", "ranks", "efficiency", "convergence", "power", "comparisons", "failed"} <= set(found.ids)
    means = [one for one in file["pooled"] if one["kind"] == "standard"]
    assert found.text.count("Mean, sets like these") == len(means) == 4
    assert "in mm" in found.text
    assert "so the smoothed training loss is followed" in found.text


def test_names_and_reasons_are_shown_as_they_are(study):
    found = page(study)
    assert found.text.count(NAME) >= 4
    assert "Cannot read …/1.png: <i>broken</i>" in found.text
    assert "1 comparison could not be read" in found.text
    assert "nowhere, vit, fold 2" in found.text
    assert "distance, without site north" in found.text


def test_links_lead_to_the_comparisons_reports(study):
    assert not [given for given in page(study).all("a") if given["href"].endswith("report.html")]
    write_text(study / "set 0" / "report.html", "<p>")
    links = [given["href"] for given in page(study).all("a") if not given["href"].startswith("#")]
    assert links == ["set%200/report.html"]


def test_a_diagram_tells_its_arms(study):
    file = read_json(study / "across.json")
    images = [given["aria-label"] for tag, given in page(study).elements if given.get("role") == "img"]
    told = [text for text in images if text.startswith("Mean ranks")]
    assert len(told) == len(file["ranks"]) == 2
    for text, ranks in zip(told, file["ranks"], strict=True):
        assert all(f"{arm} {rank:.2f}" in text for arm, rank in zip(ranks["arms"], ranks["ranks"], strict=True))
        assert f"Critical difference {ranks['critical']:.2f}" in text


@pytest.mark.parametrize("critical", [0.8, 9.0])
def test_a_diagram_holds_what_it_draws(critical):
    names = ("lora random_direction", "$x$ <b>", "ssf tpp", "linear")
    svg = str(
        critical_figure(names, (1.2, 1.9, 3.1, 3.8), ((0, 1), (2, 3)), critical, (False, False, True, False), "k")
    )
    found = Page(svg)
    assert all(name in found.text for name in names)
    width = float(re.search(r"viewBox=\"0 0 ([\d.]+) ", svg).group(1))
    places = [float(x) for path in re.findall(r' d="([^"]+)"', svg) for x in re.findall(r"[ML] ([-\d.]+) ", path)]
    assert -5 <= min(places) <= max(places) <= width
    assert "var(--series-1)" in svg
    assert "#0" not in svg


def test_the_smallest_study(tmp_path):
    folder = write_part(tmp_path / "only", lambda *_: 0.7, labels=(30,), seeds=1, cases=4)
    summarise_study([part(folder)], tmp_path)
    found = page(tmp_path)
    assert "Does TPP help, over 1 data set?" in found.text
    assert "There were too few seeds to say." in found.text
    assert "Ranks take 3 data sets or more" in found.text
    assert "efficiency" not in found.ids


def test_a_study_without_a_pair(tmp_path):
    folder = write_part(tmp_path / "only", lambda *_: 0.7, labels=(30,), seeds=2, cases=4)
    write_json(folder / "comparison.json", read_json(folder / "comparison.json") | {"differences": []})
    summarise_study([part(folder)], tmp_path)
    found = page(tmp_path)
    assert "No pair of arms differs in TPP alone" in found.text
    assert not {"sets", "power", "convergence", "efficiency"} & set(found.ids)


def test_a_page_is_always_the_same_and_knows_no_folder(made):
    first = write_report(made).read_bytes()
    assert write_report(made).read_bytes() == first
    assert str(made).encode() not in first
    assert b"http:" not in first


def test_a_broken_summary_is_named(study):
    for content in ("", "{", '{"schema": 1}'):
        (study / "across.json").write_text(content)
        with pytest.raises(DataError, match=r"across\.json"):
            write_report(study)
    shutil.rmtree(study)


def test_documented_code_runs(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[1] / "docs" / "study-summary.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)
    for name in ("xray_lung", "ultrasound_breast"):
        write_part(tmp_path / "study" / name, rising((0.03,)), labels=(30,), seeds=5, cases=6)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/study-summary.md", "exec"), {})
    assert "Measured on 2 data sets." in capsys.readouterr().out
    assert (tmp_path / "study" / "report.html").is_file()
