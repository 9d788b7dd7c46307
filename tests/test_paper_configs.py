"""The experiment files of the paper's data sets: each loads, and agrees with its recipe and the protocol."""

import re
from pathlib import Path

import pytest

from medtpp.config import RECIPES
from medtpp.workflow.experiment import load_experiment, read_yaml
from medtpp.workflow.study import make_axes
from runs import done

FOLDER = Path(__file__).parents[1] / "configs" / "paper"
# Input, batch, passes over the training cases, cases in training.
PROTOCOL = {
    "chestxr": (224, 32, 80, 14364),
    "qata_cov19_v2": (224, 16, 100, 5716),
    "ricord": ((64, 192, 192), 8, 200, 194),
    "lits": ((64, 192, 192), 2, 100, 104),
    "la2018": ((64, 192, 192), 2, 80, 80),
    "vs": ((64, 192, 192), 2, 100, 194),
    "nct_crc": (224, 32, 10, 80000),
    "glas": (512, 4, 100, 68),
}


def test_there_is_a_file_for_each_recipe():
    assert RECIPES.names() == sorted(PROTOCOL)
    assert {path.stem for path in FOLDER.glob("*.yaml")} >= PROTOCOL.keys()


@pytest.mark.parametrize("name", PROTOCOL)
def test_a_file_loads_and_says_what_the_protocol_says(name):
    experiment = load_experiment(FOLDER / f"{name}.yaml")
    recipe = RECIPES.get(name)
    size, batch, passes, cases = PROTOCOL[name]
    data, stage = experiment.data, experiment.finetune
    assert data.path == Path(f"data/{name}/manifest.csv")
    assert (data.modality, experiment.task.name) == (recipe.modality, recipe.kind)
    assert data.structures == recipe.structures
    assert size in (data.image_size, data.volume.patch)
    assert (stage.batch_size, stage.steps) == (batch, passes * -(-cases // batch))
    assert "auto" == stage.learning_rate == experiment.tpp.learning_rate
    assert experiment.tuner.name == "lora"
    if isinstance(size, tuple):
        assert experiment.backbone.patch_size == (16, 16, 16)


@pytest.mark.parametrize("name", PROTOCOL)
def test_a_comparison_measures_what_the_protocol_reports(name):
    """The files tell its metrics in a comment; the study of all says which one of them it takes."""
    reported = re.search(r"Reported there:([^.]*)\.", (FOLDER / f"{name}.yaml").read_text().replace("\n#", ""))[1]
    axes = make_axes({"metric": read_yaml(FOLDER / "all.yaml")["metric"]})
    metric = axes.measured(masks=RECIPES.get(name).kind == "segmentation").metric
    assert metric in reported.lower()


def test_the_study_of_them_is_planned_without_their_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = done("compare", FOLDER / "all.yaml", "--dry-run")
    rows = said.out.splitlines()[2:10]
    assert [row.split()[0] for row in rows] == list(PROTOCOL)
    assert {tuple(row.split()[1:]) for row in rows} == {("?", "60", "10", "missing")}
    assert "480 cells and 80 runs without their data" in said.text
    for name in PROTOCOL:
        assert f"data/{name}/manifest.csv is missing: medtpp data prepare {name}" in said.out
    assert max(map(len, said.out.splitlines())) <= 80
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["chestxr", "nct_crc", "lits", "vs", "la2018"])
def test_the_cases_in_training_follow_from_the_recipe(name):
    recipe = RECIPES.get(name)
    drawn = [part.count for part in recipe.parts if part.name.startswith(("train", "NCT", "scans", "patients"))]
    share = recipe.shares["train"] / sum(recipe.shares.values())
    assert abs(sum(drawn) * share - PROTOCOL[name][3]) < 1
