"""Exports: what is written runs without medtpp's classes and gives the adapter's own probabilities."""

import copy
import json
import re
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from typer.testing import CliRunner

import matrix
from exported import (
    CLASSIFY,
    KINDS,
    LIGHT,
    PHOTOGRAPHS,
    PLANES,
    SCANS,
    UNETR,
    VARIANT,
    ZSCORE,
    adapter,
    batches,
    made,
    own,
    stated,
)
from medtpp.adapter import save_adapter
from medtpp.cli._app import app
from medtpp.errors import ConfigError, MedtppError, WeightsError
from medtpp.inference import export as exports
from medtpp.inference.export import network as networks
from medtpp.inference.export import programs
from medtpp.inference.export.network import ExportedNetwork, example


class TestTorch:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_program_gives_the_same_probabilities(self, kind, tmp_path):
        one = made(kind)
        result = exports.export(one, "torch", tmp_path)
        network = torch.export.load(tmp_path / "model.pt2").module()
        for images in batches(tmp_path, one):
            torch.testing.assert_close(network(images), own(one, images), atol=1e-5, rtol=0)
        assert result.merged
        assert result.difference < 1e-5
        assert result.batch or kind == "masks in 3D"

    @pytest.mark.parametrize("tuner", ["vpt_deep", "convpass"])
    def test_a_tuner_that_does_not_merge_is_exported_as_it_is(self, tuner, tmp_path):
        one = made("photographs", tuner=tuner)
        result = exports.export(one, "torch", tmp_path)
        assert (result.merged, result.batch) == (False, True)
        network = torch.export.load(tmp_path / "model.pt2").module()
        images = example(one, 1)
        torch.testing.assert_close(network(images), own(one, images), atol=1e-5, rtol=0)
        assert stated(tmp_path)["merged"] is False

    def test_no_path_of_this_machine_is_in_the_file(self, tmp_path):
        exports.export(made("photographs"), "torch", tmp_path)
        content = (tmp_path / "model.pt2").read_bytes()
        assert b"timm_vit.py" not in content
        assert b"site-packages" not in content


class TestONNX:
    @pytest.mark.parametrize("kind", KINDS)
    def test_onnxruntime_gives_the_same_probabilities(self, kind, tmp_path):
        one = made(kind)
        exports.export(one, "onnx", tmp_path)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        (given,), (found,) = session.get_inputs(), session.get_outputs()
        assert (given.name, found.name) == ("images", "probabilities")
        assert given.shape == stated(tmp_path)["input"]["shape"]
        for images in batches(tmp_path, one):
            values = session.run(None, {"images": images.numpy()})[0]
            torch.testing.assert_close(torch.from_numpy(values), own(one, images), atol=1e-4, rtol=0)
        assert stated(tmp_path)["opset"] == 20
        assert [path.name for path in tmp_path.glob("model*")] == ["model.onnx"]

    def test_missing_packages_are_named(self, monkeypatch):
        monkeypatch.setattr(exports, "find_spec", lambda name: None if name.startswith("onnx") else object())
        with pytest.raises(ConfigError, match=r"onnx, onnxscript, onnxruntime must.*pip install 'medtpp\[onnx\]'"):
            exports.refuse(made("photographs").card, "onnx", "a")


class TestTimm:
    @pytest.mark.parametrize(
        ("preprocessing", "task", "variant"),
        [
            pytest.param(PHOTOGRAPHS, CLASSIFY, VARIANT, id="class token"),
            pytest.param(PHOTOGRAPHS, {**CLASSIFY, "pooling": "mean"}, "medtpp_test_registers", id="mean"),
            pytest.param(PHOTOGRAPHS, CLASSIFY, "medtpp_test_fused_bias", id="fused bias"),
            pytest.param(PLANES, LIGHT, VARIANT, id="light head"),
            pytest.param(PLANES, UNETR, "medtpp_test_rotary", id="decoder"),
        ],
    )
    def test_the_lines_of_the_readme_give_the_same_probabilities(
        self, preprocessing, task, variant, tmp_path, monkeypatch
    ):
        one = adapter(preprocessing, json.dumps(task), variant=variant)
        exports.export(one, "timm", tmp_path)
        monkeypatch.chdir(tmp_path)
        images = example(one, 3)
        (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
        namespace = {"images": images}
        with torch.no_grad():
            exec(code, namespace)
        torch.testing.assert_close(namespace["probabilities"], own(one, images), atol=1e-5, rtol=0)

    def test_timm_loads_the_same_features_by_name_or_from_the_folder(self, tmp_path):
        one = made("photographs")
        exports.export(one, "timm", tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        model = timm.create_model(
            config["architecture"],
            num_classes=0,
            checkpoint_path=str(tmp_path / "model.safetensors"),
            **config["model_args"],
        ).eval()
        images = example(one, 2).expand(-1, 3, -1, -1)
        mean, std = config["pretrained_cfg"]["mean"], config["pretrained_cfg"]["std"]
        x = (images - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
        with torch.no_grad():
            features = one.backbone.encode(images).tokens
            torch.testing.assert_close(model.forward_features(x), features, atol=1e-5, rtol=1e-5)
            source = matrix.load(VARIANT).encode(images).tokens
        assert (features - source).abs().max() > 0.1  # the tuner is in it

    def test_all_reasons_against_it_are_told_together(self):
        card = made("masks in 3D", tuner="adaptformer").card
        card = card.model_copy(update={"backbone": card.backbone.model_copy(update={"architecture": "medcoss"})})
        with pytest.raises(ConfigError, match="THIS cannot be exported to timm") as raised:
            exports.refuse(card, "timm", "THIS")
        told = "\n".join(raised.value.problems)
        assert len(raised.value.problems) == 3
        assert all(word in told for word in ("adaptformer", "volumes", "medcoss", "monai-bundle"))

    def test_weights_that_timm_has_no_place_for_are_told(self, tmp_path):
        one = adapter(PHOTOGRAPHS, json.dumps(CLASSIFY), tuner="ssf", variant="medtpp_test_rotary")
        with pytest.raises(ConfigError, match="do not fit timm's") as raised:
            exports.export(one, "timm", tmp_path)
        assert "blocks.0.attn.qkv.bias: only in the adapter" in raised.value.problems


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    one, folder = made("photographs"), tmp_path_factory.mktemp("adapter")
    save_adapter(folder, one.backbone, one.card, one.task)
    return folder


def invoke(*words):
    return CliRunner().invoke(app, ["export", *map(str, words)])


def test_the_command_says_what_came_out(saved, tmp_path):
    result = invoke(saved, "--to", "torch", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.pt2", "preprocessing.json", "medtpp.json"}
    text = " ".join(result.output.split())
    assert "lora, merged into the backbone" in text
    assert "of any size" in text
    again = invoke(saved, "--to", "torch", "-o", tmp_path / "out")
    assert "not empty" in str(again.exception)
    assert invoke(saved, "--to", "torch", "-o", tmp_path / "out", "--overwrite").exit_code == 0


def test_a_network_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    one = made("photographs")
    merged = ExportedNetwork(one.backbone.merged(), copy.deepcopy(one.task))
    with torch.no_grad():
        merged.task.linear.bias.add_(torch.tensor([0.1, 0.0]))
    monkeypatch.setattr(programs, "exported_network", lambda _: merged)
    with pytest.raises(WeightsError, match=r"differs from the adapter by 0\.0"):
        exports.export(one, "torch", tmp_path)
    assert not (tmp_path / "preprocessing.json").exists()


def test_an_adapter_without_a_head_and_an_unknown_target_are_refused(tmp_path):
    one = made("photographs")
    with pytest.raises(ConfigError, match=r"was pre-trained .* but not fine-tuned"):
        exports.refuse(one.card.model_copy(update={"task": None}), "torch", "a")
    save_adapter(tmp_path, one.backbone, one.card.model_copy(update={"task": None}))
    result = invoke(tmp_path, "--to", "onnx", "-o", tmp_path / "out")
    assert isinstance(result.exception, MedtppError)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="no export to tensorflow"):
        exports.export(one, "tensorflow", tmp_path)


def test_a_zscore_is_stated(tmp_path, monkeypatch):
    one = adapter(SCANS.model_copy(update={"windows": (ZSCORE,), "air": 20.0}), json.dumps(CLASSIFY))
    monkeypatch.setitem(exports.TARGETS, "torch", lambda *_: networks.Written(("model.pt2",), True, 0.0))
    exports.export(one, "torch", tmp_path)
    words = "the mean of the values above 20, -3 and +3 times their standard deviation, becomes 0 and 1."
    assert any(words in step for step in stated(tmp_path)["how"])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stated_is_complete(kind, tmp_path, monkeypatch):
    one = made(kind)
    monkeypatch.setitem(exports.TARGETS, "torch", lambda *_: networks.Written(("model.pt2",), True, 0.0))
    exports.export(one, "torch", tmp_path)
    said = stated(tmp_path)
    preprocessing = type(one.card.preprocessing).model_validate(said["preprocessing"])
    assert preprocessing == one.card.preprocessing
    dense = kind != "photographs"
    assert said["outputs"] == [*(["background"] if dense else []), "organ", "lesion"]
    assert said["output"]["shape"] == ["batch", len(said["outputs"]), *(preprocessing.patch if dense else ())]
    assert said["structures"] == (
        [{"name": "organ", "values": [1]}, {"name": "lesion", "values": [2]}] if dense else []
    )
    words = " ".join(said["how"])
    wanted = ("EXIF", "bicubic") if kind == "photographs" else ("Pad", "Gaussian", "scan's grid")
    assert all(word in words for word in wanted)
    assert ("head" in words) == (kind == "masks in 3D")  # depth runs to the head
    assert Path(said["target"]).name == "torch"
