"""Published medical networks: the tables against their model cards, and files in their layouts, small and at random."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked
from torch import nn

from medtpp import backbones, tuners
from medtpp.backbones.medical import NETWORKS
from medtpp.config import BACKBONES, BackboneOptions
from medtpp.errors import WeightsError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
# As the model cards call timm.create_model.
_GATED = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU, "init_values": 1e-5, "num_classes": 0}
CARDS = {
    "biomedclip": {"model_name": "vit_base_patch16_224", "num_classes": 0},
    "uni": {"model_name": "vit_large_patch16_224", "img_size": 224, "init_values": 1e-5, "num_classes": 0},
    "uni2_h": {
        **_GATED, "model_name": "vit_giant_patch14_224", "img_size": 224, "patch_size": 14, "depth": 24,
        "num_heads": 24, "embed_dim": 1536, "mlp_ratio": 2.66667 * 2, "no_embed_class": True, "reg_tokens": 8,
    },
    "virchow": {**_GATED, "model_name": "vit_huge_patch14_224", "img_size": 224, "mlp_ratio": 5.3375},
    "virchow2": {**_GATED, "model_name": "vit_huge_patch14_224", "img_size": 224, "mlp_ratio": 5.3375, "reg_tokens": 4},
}  # fmt: skip
TINY = {"depth": 2, "embed_dim": 96, "num_heads": 3}


@pytest.fixture(params=NETWORKS)
def name(request):
    return request.param


@pytest.fixture
def network(name, monkeypatch):
    """A small network of this kind, random weights none of which is zero or one; the table is as small."""
    published = NETWORKS[name]
    small = {**TINY, "img_size": 56 if "patch14" in published.architecture else 64}
    monkeypatch.setitem(NETWORKS, name, replace(published, arguments={**published.arguments, **small}))
    torch.manual_seed(1)
    network = timm.create_model(**{**CARDS[name], **small}).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def published_state(name, network):
    """The state as the authors store it."""
    state = {key: value.clone() for key, value in network.state_dict().items()}
    if name != "biomedclip":
        return state
    return {f"visual.trunk.{key}": value for key, value in state.items()} | {
        "visual.head.proj.weight": torch.zeros(8, 96),
        "text.transformer.embeddings.word_embeddings.weight": torch.zeros(9, 8),
        "text.transformer.encoder.layer.0.attention.self.query.weight": torch.zeros(8, 8),
        "text.proj.0.weight": torch.zeros(8, 8),
        "logit_scale": torch.zeros(()),
    }


@torch.no_grad()
def assert_same(backbone, network):
    images = torch.rand(2, 3, *backbone.spec.image_size)
    expected = network.forward_features(backbone.normalise(images))
    torch.testing.assert_close(backbone.encode(images).tokens, expected, atol=1e-5, rtol=1e-5)


def load(name, weights="pretrained", image_size=None, **options):
    return backbones.load(BackboneOptions(name=name, weights=str(weights), **options), image_size=image_size)


def test_the_table_makes_the_networks_of_the_model_cards(name):
    with torch.device("meta"):
        card = timm.create_model(**CARDS[name])
        ours = timm.create_model(NETWORKS[name].architecture, num_classes=0, **NETWORKS[name].arguments)
    shapes = {key: value.shape for key, value in ours.state_dict().items()}
    assert shapes == {key: value.shape for key, value in card.state_dict().items()}
    assert str(ours.blocks[0]) == str(card.blocks[0])
    assert ours.blocks[0].attn.num_heads == card.blocks[0].attn.num_heads


def test_published_sizes():
    """Of the files: UNI2-h has positions of patches alone, Virchow2 of all tokens."""
    with torch.device("meta"):
        made = {
            name: timm.create_model(NETWORKS[name].architecture, num_classes=0, **NETWORKS[name].arguments).state_dict()
            for name in ("uni2_h", "virchow2")
        }
    for name, width, inner, positions, registers in (("uni2_h", 1536, 8192, 256, 8), ("virchow2", 1280, 6832, 261, 4)):
        state = made[name]
        assert state["blocks.0.mlp.fc1.weight"].shape == (inner, width)
        assert state["blocks.0.mlp.fc2.weight"].shape == (width, inner // 2)
        assert state["pos_embed"].shape == (1, positions, width)
        assert state["reg_token"].shape == (1, registers, width)


def test_a_local_file(name, network, tmp_path):
    torch.save(published_state(name, network), tmp_path / "pytorch_model.bin")
    backbone = load(name, tmp_path / "pytorch_model.bin")
    assert_same(backbone, network)
    spec = backbone.spec
    assert (spec.mean, spec.std) == (CLIP if name == "biomedclip" else IMAGENET)
    assert (spec.pooling, spec.family, spec.architecture) == ("cls", "medical", name)
    assert spec.objective == ("language" if name == "biomedclip" else "features")
    assert spec.prefix == {"uni2_h": 9, "virchow2": 5}.get(name, 1)
    larger = load(name, tmp_path / "pytorch_model.bin", image_size=spec.image_size[0] * 2)
    assert larger.spec.sha256 == spec.sha256
    network.set_input_size((spec.image_size[0] * 2,) * 2)
    assert_same(larger, network)


def test_from_the_hub(name, network, tmp_path, monkeypatch):
    asked = []

    def download(repo_id, filename, revision=None, **kwargs):
        asked.append((repo_id, filename, revision))
        return str(tmp_path / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    file = "open_clip_model.safetensors" if name == "biomedclip" else "model.safetensors"
    save_file(published_state(name, network), tmp_path / file)
    backbone = load(name, revision="v1")
    assert asked == [(NETWORKS[name].repository, file, "v1")]
    assert backbone.spec.source == f"hf-hub:{NETWORKS[name].repository}@v1"
    assert_same(backbone, network)


def test_what_does_not_fit(name, network, tmp_path, monkeypatch):
    state = published_state(name, network)
    save_file({key: value for key, value in state.items() if ".1.norm1." not in key}, tmp_path / "cut.safetensors")
    with pytest.raises(WeightsError, match=r"missing: blocks\.1\.norm1\.bias"):
        load(name, tmp_path / "cut.safetensors")

    def unreachable(*args, **kwargs):
        raise OSError("unreachable")

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", unreachable)
    with pytest.raises(WeightsError, match=r"could not be downloaded.*--set backbone\.weights=FILE"):
        load(name)
    random = load(name, "random").spec
    assert (random.source, random.objective) == ("random", "unknown")


@pytest.mark.parametrize("tuner", ["lora", "ia3", "ssf", "adaptformer", "convpass", "bitfit", "vpt_deep"])
@pytest.mark.parametrize("name", ["virchow2"])
@torch.no_grad()
def test_tuners_change_a_gated_mlp(name, network, tmp_path, tuner):
    """One layer holds the gate and what it gates: half of its outputs go into the next."""
    torch.save(network.state_dict(), tmp_path / "w.bin")
    plain, tuned = load(name, tmp_path / "w.bin"), tuners.attach(load(name, tmp_path / "w.bin"), tuner)
    images = torch.rand(2, 3, 56, 56)
    assert len(tuned.layout.paths("mlp.in")) == len(tuned.layout.paths("mlp.out")) == 2
    for parameter in tuned.targets.values():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    moved = tuned(images).tokens
    assert not torch.allclose(moved, plain(images).tokens, atol=1e-3)
    with tuned.disabled():
        assert torch.equal(tuned(images).tokens, plain(images).tokens)
    if tuner in ("lora", "ia3", "ssf", "bitfit"):
        torch.testing.assert_close(tuned.merged()(images).tokens, moved, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["uni2_h"])
def test_volumes(name, network, tmp_path):
    torch.save(network.state_dict(), tmp_path / "w.bin")
    backbone = load(name, tmp_path / "w.bin", image_size=(28, 56, 56), dims=3, patch_size=14)
    assert backbone(torch.rand(1, 1, 28, 56, 56)).patches.shape == (1, 32, 96)


def test_every_name_of_the_documentation_is_one():
    page = (Path(__file__).parents[1] / "docs" / "backbones.md").read_text(encoding="utf-8")
    table = page.partition("## Medical vision transformers")[2]
    names = re.findall(r"backbone\.name=(\S+?)`", table)
    assert len(names) > 8
    for each in names:
        assert any(family.recognises(each) for family in BACKBONES.values()), each
    assert set(NETWORKS) <= set(names)
