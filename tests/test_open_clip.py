"""Image towers of open_clip: those of timm inside it, its own converted into timm, its own in memory refused."""

import pytest
import torch
from timm.models import register_model
from timm.models.vision_transformer import vit_base_patch16_clip_224

import medtpp
from medtpp import backbones
from medtpp.config import BackboneOptions
from medtpp.errors import ConfigError

open_clip = pytest.importorskip("open_clip")

TEXT = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
OWN = {"image_size": 64, "patch_size": 16, "width": 128, "layers": 2}


@register_model
def medtpp_clip_vit16(pretrained=False, **kwargs):
    """timm's network for open_clip's ViT-B/16, but small."""
    return vit_base_patch16_clip_224(embed_dim=128, depth=2, num_heads=2, **{"img_size": 64, **kwargs})


def randomised(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def own_tower():
    return randomised(open_clip.CLIP(embed_dim=16, vision_cfg=OWN, text_cfg=TEXT))


def timm_tower():
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    return randomised(open_clip.CustomTextCLIP(embed_dim=16, vision_cfg=vision, text_cfg=TEXT))


@torch.no_grad()
def test_a_tower_of_timm_is_used_as_it_is():
    model = timm_tower()
    backbone = backbones.find(model, (160, 160))
    assert backbone.encoder is model.visual.trunk
    pixels = torch.randn(2, 3, 160, 160)
    torch.testing.assert_close(backbone(pixels).tokens, model.visual.trunk.forward_features(pixels))


def test_tpp_of_a_tower_of_timm():
    model = timm_tower().requires_grad_(False)
    bias = model.visual.trunk.blocks[0].mlp.fc1.bias.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    medtpp.tpp(model, torch.randn(4, 3, 160, 160), steps=1, head_warmup=1, batch_size=4, precision="32")
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == ["visual.trunk.blocks.0.mlp.fc1.bias"]
    assert bias.requires_grad


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"epoch": 1, "state_dict": state}])
@torch.no_grad()
def test_a_file_of_its_own_tower_becomes_a_network_of_timm(tmp_path, wrap):
    model = own_tower()
    torch.save(wrap(model.state_dict()), tmp_path / "clip.pt")
    backbone = backbones.load(BackboneOptions(name="medtpp_clip_vit16", weights=str(tmp_path / "clip.pt")))
    assert (backbone.spec.image_size, backbone.spec.prefix) == ((64, 64), 1)
    images = torch.rand(2, 3, 64, 64)
    model.visual.output_tokens, model.visual.proj = True, None
    pooled, patches = model.visual(backbone.normalise(images))
    features = backbone(images)
    torch.testing.assert_close(features.tokens[:, 0], pooled, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.patches, patches, atol=1e-5, rtol=1e-5)
    larger = backbones.load("medtpp_clip_vit16", weights=str(tmp_path / "clip.pt"), image_size=96)
    assert larger.spec.sha256 == backbone.spec.sha256


def test_its_own_tower_in_memory_is_refused_with_what_to_do():
    with pytest.raises(
        ConfigError, match=r"open_clip's own.*medtpp\.load\(NAME, weights=FILE\).*vit_base_patch16_clip"
    ):
        backbones.find(own_tower(), (64, 64))
