"""What the report on a comparison says follows from its files."""

import shutil

import pytest

from comparisons import write_comparison
from medtpp.files import read_json, write_json
from medtpp.report import write_report
from reports import page


@pytest.mark.parametrize("verdict", ["better", "worse", "helps", "hurts"])  # the last two of older versions
def test_a_verdict_beside_another_method(tmp_path, verdict):
    folder = write_comparison(tmp_path, extras=("linear",))
    table = read_json(folder / "comparison.json")
    other = table["differences"][0] | {"baseline": "linear", "verdict": verdict}
    write_json(folder / "comparison.json", table | {"differences": [*table["differences"], other]})
    text = write_report(folder).read_text()
    sign = {"better": "▲", "worse": "▼", "helps": "▲", "hurts": "▼"}[verdict]
    assert f'<span class="verdict {verdict}"><span aria-hidden="true">{sign}</span> {verdict}</span>' in text
    assert "TPP helped" in page(folder).text


def test_seeds_are_those_that_the_answer_has(tmp_path):
    """Not those that were planned."""
    folder = write_comparison(tmp_path, labels=(30, 150), seeds=3)
    table = read_json(folder / "comparison.json")
    first, second = table["differences"]
    write_json(folder / "comparison.json", table | {"seeds": list(range(10)), "differences": [first, second]})
    assert "with 3 seeds." in page(folder).text
    write_json(folder / "comparison.json", table | {"differences": [first | {"seeds": 2}, second]})
    assert "with 2 to 3 seeds." in page(folder).text


def test_arms_that_failed_are_not_said_to_be_missing(tmp_path):
    folder = write_comparison(tmp_path, extras=("linear",))
    table = read_json(folder / "comparison.json")
    other = table["differences"][0] | {"baseline": "linear", "verdict": "better"}
    write_json(folder / "comparison.json", table | {"differences": [other]})
    text = page(folder).text
    assert "No seed of TPP and of the tuner's own start is done in both, so this comparison does not say" in text
    assert "differs in TPP alone" not in text
    arms = [arm for arm in table["arms"] if arm["init"] == "tpp" or arm["tuner"] == "linear"]
    means = [one for one in table["means"] if one["arm"] != "lora standard"]
    write_json(folder / "comparison.json", table | {"differences": [other], "arms": arms, "means": means})
    shutil.rmtree(folder / "cells" / "lora-standard")
    cells = (folder / "cells.csv").read_text().splitlines()
    (folder / "cells.csv").write_text("\n".join(line for line in cells if "lora standard" not in line) + "\n")
    assert "No pair of arms differs in TPP alone, so this comparison does not say" in page(folder).text


def test_what_the_arms_share_is_said_of_them_alone(tmp_path):
    same = page(write_comparison(tmp_path / "same")).text
    assert "augmentation, and the number of steps; the weights" in same
    assert "opened once" not in same
    longer = page(write_comparison(tmp_path / "longer", extras=("longer",))).text
    assert "the number of steps (but “longer”, which has those that TPP takes the time of on top); the" in longer


@pytest.mark.parametrize(
    ("views", "said"),
    [
        ([], "the image; what the network was shown of it; what it restored."),
        (["masked", "restored"], "shown of it, the hidden patches in grey; what it restored."),
        (["changed", "restored"], "shown of it, changed; what it restored."),
        (["mae masked", "mae restored", "restoration changed", "restoration restored"],
         "mae: what it restored; restoration: what the network was shown of it, changed; restoration: what it"),
        (["own"], "the image; own."),
    ],
)  # fmt: skip
def test_the_rows_of_a_preview_are_those_of_the_pretext_task(tmp_path, views, said):
    folder = write_comparison(tmp_path)
    table = read_json(folder / "comparison.json")
    tpp = [one | {"views": views} for one in table["tpp"]]
    write_json(folder / "comparison.json", table | {"tpp": tpp})
    text = page(folder).text
    assert said in text
    assert "most patches" not in text
