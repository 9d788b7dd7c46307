"""The scripts in examples/ run, on very little: medtpp.tpp in three kinds of training."""

import importlib.util
import re
from pathlib import Path

import pytest

import medtpp
from medtpp import api

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = {
    "plain_loop": {"count": 16, "size": 32, "tpp_steps": 3, "steps": 5},
    "trainer_lora": {"count": 16, "size": 32, "tpp_steps": 3, "epochs": 1},
    "monai_swinunetr": {"count": 2, "size": 32, "tpp_steps": 2, "epochs": 2},
}


def test_every_script_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == TINY.keys()


@pytest.mark.parametrize("name", TINY)
def test_the_scripts_run(name, monkeypatch, tmp_path, capsys):
    records = []

    def brief(model, images, *arguments, **options):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        record = api.tpp(model, images, *arguments, head_warmup=1, precision="32", **options)
        changed = {key for key, value in model.state_dict().items() if not value.equal(before[key])}
        assert changed == set(record.trained)
        records.append(record)
        return record

    monkeypatch.setattr(medtpp, "tpp", brief, raising=False)
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    before, after = script.main(**TINY[name])
    assert after < before
    assert len(re.findall(r"loss \d\.\d+ to \d\.\d+", capsys.readouterr().out)) == 2
    (record,) = records
    expected = {"plain_loop": "restoration", "trainer_lora": "mae", "monai_swinunetr": "restoration"}
    assert record.card.pretext["name"] == expected[name]
    heads = {"plain_loop": "head", "trainer_lora": "classifier"}
    assert all(heads[name] in parameter for parameter in record.untouched)
    assert bool(record.untouched) == (name in heads)
