"""Backbones by name: which are refused, which need no network, and what is asked of the hub."""

import json
import socket
import time

import huggingface_hub
import pytest
import timm
import torch
from safetensors.torch import save_file

from medtpp import backbones
from medtpp.backbones.base import hash_state
from medtpp.backbones.timm_vit import TimmViTFamily
from medtpp.config import BACKBONES, BackboneOptions
from medtpp.errors import ConfigError, WeightsError


@pytest.fixture
def no_network(monkeypatch):
    """Fail on any connection."""
    touched = []

    def refuse(*args, **kwargs):
        touched.append(args)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not touched


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maxvit_tiny_tf_224", r"another kind \(maxxvit\)"),
        ("vit_base_r50_s16_224", r"another kind \(vision_transformer_hybrid\)"),
        ("timm/efficientnet_b0.ra_in1k", r"b0\.ra_in1k is a timm model of another kind \(efficientnet\)"),
        ("vit_base_patch16_xp_224", "attention and MLP side by side"),
        ("vit_small_patch16_rope_mixed_224", "rotary positions per layer"),
        ("vit_small_patch16_224.nonsense", r"has no weights .*nonsense\. It has: .*vit_small_patch16_224\.dino"),
        ("vit_smal_patch16_224.dino", r"No backbone is called .* for example: vit_small_patch16_224\.dino"),
        ("vit_small_patch16_224_dino", r"No backbone is called .* for example: vit_small_patch16_224\.dino"),
        ("vit_base_patch16_224.mea", r"It has: .*vit_base_patch16_224\.mae"),
    ],
)
def test_names_that_do_not_fit_are_refused_before_any_download(no_network, name, message):
    with pytest.raises(ConfigError, match=message):
        backbones.load(name, weights="random")


@pytest.mark.parametrize("name", TimmViTFamily.examples)
def test_every_example_is_known_to_timm(name):
    if not timm.is_model(name.split(".")[0]):
        pytest.skip("this timm does not have it yet")
    assert name in timm.list_pretrained()
    assert TimmViTFamily.recognises(name)


def test_every_example_belongs_to_one_family():
    families = list(BACKBONES.values())
    for family in families:
        for name in family.examples:
            assert [other for other in families if other.recognises(name)][:1] in ([family], [])


def test_random_weights_need_no_network_and_are_the_same_on_every_load(no_network):
    first = backbones.load("vit_tiny_patch16_224", weights="random", image_size=64)
    second = backbones.load("timm/vit_tiny_patch16_224", weights="random")
    assert first.spec.sha256 == second.spec.sha256
    assert (first.spec.image_size, second.spec.image_size) == ((64, 64), (224, 224))
    assert (first.spec.objective, first.spec.source) == ("unknown", "random")


def test_local_weights_need_no_network(no_network, tmp_path, caplog):
    save_file(
        timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=64).state_dict(), tmp_path / "w.safetensors"
    )
    backbone = backbones.load("vit_tiny_patch16_224", weights=str(tmp_path / "w.safetensors"))
    assert backbone.spec.image_size == (64, 64)
    assert backbone.spec.objective == "unknown"
    assert "has no tag" in caplog.text


@pytest.mark.parametrize("offline", [True, False])
def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path, offline):
    def refuse(*args, **kwargs):
        raise OSError("unreachable")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the hub's library tries again five times
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("vit_tiny_patch16_224.augreg_in21k", "hf-hub:somebody/something"):
        with pytest.raises(WeightsError, match=r"could not be downloaded .*--set backbone\.weights=FILE"):
            backbones.load(name)


# The hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with one repository; gives its folder and the list of what is asked of it."""
    asked = []

    def download(repo_id, filename, revision=None, **kwargs):
        asked.append((repo_id, revision))
        return str(tmp_path / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    return tmp_path, asked


def publish(folder, network, **model_args):
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, folder / "model.safetensors")
    cfg = {"tag": "mae", "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "input_size": [3, 160, 160], "num_classes": 0,
           "fixed_input_size": True, "first_conv": "patch_embed.proj", "classifier": "head"}  # fmt: skip
    config = {"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": cfg, "model_args": model_args}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def randomised(**kwargs):
    torch.manual_seed(3)
    network = timm.create_model("test_vit", num_classes=0, **kwargs).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


@torch.no_grad()
def test_a_hub_repository_at_a_revision(hub):
    folder, asked = hub
    network = randomised()
    publish(folder, network)
    backbone = backbones.load(BackboneOptions(name="hf-hub:somebody/vit", revision="v2"), image_size=96)
    assert set(asked) == {("somebody/vit", "v2")}
    spec = backbone.spec
    assert (spec.source, spec.mean, spec.objective) == ("hf-hub:somebody/vit@v2", (0.1, 0.2, 0.3), "pixels")
    assert spec.sha256 == hash_state(network.state_dict())
    network.set_input_size((96, 96))
    images = torch.rand(1, 3, 96, 96)
    torch.testing.assert_close(backbone(images).tokens, network.forward_features(backbone.normalise(images)))


@torch.no_grad()
def test_a_layer_scale_that_a_repository_does_not_declare_is_still_loaded(hub):
    network = randomised(init_values=0.1)
    publish(hub[0], network)
    backbone = backbones.load("hf-hub:somebody/vit")
    images = torch.rand(1, 3, 160, 160)
    torch.testing.assert_close(backbone(images).tokens, network.forward_features(backbone.normalise(images)))


def test_a_repository_whose_weights_do_not_fit_is_refused(hub):
    publish(hub[0], randomised(qk_norm=True))
    with pytest.raises(WeightsError, match=r"unexpected: blocks\.\*\.attn\.k_norm\.weight \(6\)"):
        backbones.load("hf-hub:somebody/vit")


def test_a_repository_of_another_library(hub):
    folder, _ = hub
    publish(folder, randomised())
    (folder / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    with pytest.raises(ConfigError, match="is no timm model"):
        backbones.load("hf-hub:somebody/transformers-vit")


def test_a_timm_name_at_a_revision(hub):
    folder, asked = hub
    publish(folder, timm.create_model("test_vit"))
    backbone = backbones.load(BackboneOptions(name="test_vit.r160_in1k", revision="abc123"))
    assert set(asked) == {("timm/test_vit.r160_in1k", "abc123")}
    assert backbone.spec.source == "timm:test_vit.r160_in1k@abc123"
    assert backbone.spec.objective == "supervised"


def test_a_revision_needs_weights_of_the_hub(no_network):
    with pytest.raises(ConfigError, match=r"backbone\.revision .*backbone\.weights is random"):
        backbones.load(BackboneOptions(name="test_vit", weights="random", revision="v1"))
