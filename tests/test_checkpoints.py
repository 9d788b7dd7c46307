"""Local weights in the layouts that training codes really write, each from randomly initialised weights."""

import argparse
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from medtpp import backbones
from medtpp.backbones.checkpoints import describe, load_strict, read_checkpoint, strip_prefix
from medtpp.config import BackboneOptions
from medtpp.errors import ConfigError, WeightsError

SMALL = {"embed_dim": 64, "depth": 4, "num_heads": 2, "num_classes": 0}


def architecture(name, kind, **defaults):
    """Make a small network known to timm by a name, as real architectures are."""

    def build(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
        network = kind(**{**SMALL, **defaults, **kwargs})
        network.pretrained_cfg = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
        return network

    build.__name__, build.__module__ = name, __name__
    register_model(build)
    return build


vit = architecture("medtpp_ckpt_vit16", VisionTransformer)
distilled = architecture("medtpp_ckpt_distilled16", VisionTransformerDistilled)
dinov2 = architecture("medtpp_ckpt_dinov2_14", VisionTransformer, patch_size=14, img_size=112, init_values=1e-5)
dinov2_reg = architecture(
    "medtpp_ckpt_dinov2_reg14", VisionTransformer, patch_size=14, img_size=112, init_values=1e-5, reg_tokens=4,
    no_embed_class=True,
)  # fmt: skip
dinov3 = architecture(
    "medtpp_ckpt_dinov3_16", Eva, img_size=64, qkv_bias=False, init_values=1e-5, rope_type="dinov3",
    use_rot_pos_emb=True, use_abs_pos_emb=False, num_reg_tokens=4, use_fc_norm=False, rope_temperature=100,
    rope_rotate_half=True, dynamic_img_size=True,
)  # fmt: skip


def randomised(build, **kwargs):
    """A network none of whose weights is zero or one, so that each of them matters."""
    torch.manual_seed(1)
    network = build(**kwargs).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def state_of(network):
    return {key: value.clone() for key, value in network.state_dict().items()}


def prefixed(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def noise(state):
    return {key: torch.randn_like(value) for key, value in state.items()}


def load(name, path, image_size=None, **options):
    return backbones.load(BackboneOptions(name=name, weights=str(path), **options), image_size=image_size)


@torch.no_grad()
def assert_same(backbone, network):
    images = torch.rand(2, 3, *backbone.spec.image_size)
    expected = network.forward_features(backbone.normalise(images))
    torch.testing.assert_close(backbone.encode(images).tokens, expected, atol=1e-5, rtol=1e-5)


def mae(state):
    decoder = {
        "mask_token": torch.zeros(1, 1, 32),
        "decoder_pos_embed": torch.zeros(1, 17, 32),
        "decoder_embed.weight": torch.zeros(32, 64),
        "decoder_blocks.0.attn.qkv.weight": torch.zeros(96, 32),
        "decoder_blocks.1.attn.qkv.weight": torch.zeros(96, 32),
        "decoder_norm.weight": torch.zeros(32),
        "decoder_pred.weight": torch.zeros(768, 32),
    }
    options = argparse.Namespace(model="mae_vit_base_patch16", lr=None, betas=(0.9, 0.95))
    return {"model": state | decoder, "optimizer": {"state": {}}, "epoch": 799, "scaler": {}, "args": options}


LAYOUTS = {
    "MAE": mae,
    "DINO": lambda state: {
        "student": prefixed("module.backbone.", noise(state)) | {"module.head.last_layer.weight_v": torch.zeros(3)},
        "teacher": prefixed("backbone.", state) | {"head.last_layer.weight_v": torch.zeros(3)},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small"),
        "dino_loss": {"center": torch.zeros(1, 3)},
    },
    "DeiT": lambda state: {"model": state | {"head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}},
    "MoCo-v3": lambda state: {
        "epoch": 300,
        "arch": "vit_small",
        "state_dict": prefixed("module.base_encoder.", state | {"head.0.weight": torch.zeros(8, 64)})
        | prefixed("module.momentum_encoder.", noise(state))
        | {"module.predictor.0.weight": torch.zeros(8, 8)},
    },
    "OpenCLIP": lambda state: {
        "epoch": 1,
        "state_dict": prefixed("visual.trunk.", state)
        | {"logit_scale": torch.zeros(()), "visual.head.proj.weight": torch.zeros(8, 64)}
        | {"transformer.resblocks.0.attn.in_proj_weight": torch.zeros(24, 8)},
    },
    "timm": lambda state: state,
    "timm with an average": lambda state: {"arch": "vit", "state_dict": noise(state), "state_dict_ema": state},
    "Lightning backbone": lambda state: {"state_dict": prefixed("backbone.", state), "hyper_parameters": {"lr": 1e-3}},
    "Lightning model": lambda state: {
        "state_dict": prefixed("model.", state) | {"criterion.weight": torch.zeros(2)},
        "pytorch-lightning_version": "2.5",
    },
    "compiled": lambda state: {"model": prefixed("_orig_mod.", state)},
    "compiled, distributed": lambda state: {"model": prefixed("module._orig_mod.", state)},
    "I-JEPA": lambda state: {
        "encoder": prefixed("module.", noise(state)),
        "target_encoder": prefixed("module.", state),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_network_it_was_written_from(tmp_path, layout):
    network = randomised(vit, img_size=64)
    torch.save(LAYOUTS[layout](state_of(network)), tmp_path / "weights.pth")
    backbone = load("medtpp_ckpt_vit16", tmp_path / "weights.pth")
    assert backbone.spec.image_size == (64, 64)
    assert backbone.spec.objective == ("pixels" if layout == "MAE" else "unknown")
    assert backbone.spec.pooling == ("mean" if layout == "MAE" else "cls")
    assert_same(backbone, network)


def test_safetensors(tmp_path):
    network = randomised(vit, img_size=64)
    save_file(prefixed("encoder.", state_of(network)), tmp_path / "weights.safetensors")
    assert_same(load("medtpp_ckpt_vit16", tmp_path / "weights.safetensors"), network)


def test_the_hash_is_of_the_weights_not_of_their_file(tmp_path):
    state = state_of(randomised(vit, img_size=64))
    torch.save(state, tmp_path / "plain.pth")
    torch.save(mae(state), tmp_path / "mae.pth")
    first, second = load("medtpp_ckpt_vit16", tmp_path / "plain.pth"), load("medtpp_ckpt_vit16", tmp_path / "mae.pth")
    resampled = load("medtpp_ckpt_vit16", tmp_path / "plain.pth", image_size=96)
    assert first.spec.sha256 == second.spec.sha256 == resampled.spec.sha256 == first.source_hash()
    state["norm.bias"][0] += 1e-3
    torch.save(state, tmp_path / "other.pth")
    assert load("medtpp_ckpt_vit16", tmp_path / "other.pth").spec.sha256 != first.spec.sha256


def test_distilled_deit(tmp_path):
    network = randomised(distilled, img_size=64)
    torch.save({"model": state_of(network) | {"head_dist.weight": torch.zeros(5, 64)}}, tmp_path / "deit.pth")
    backbone = load("medtpp_ckpt_distilled16", tmp_path / "deit.pth")
    assert backbone.spec.prefix == 2
    assert backbone.spec.image_size == (64, 64)
    assert_same(backbone, network)
    with pytest.raises(WeightsError, match="unexpected: dist_token"):
        load("medtpp_ckpt_vit16", tmp_path / "deit.pth")


def test_deit3_calls_its_layer_scale_gamma(tmp_path):
    network = randomised(vit, img_size=64, init_values=1e-4, no_embed_class=True)
    official = {re.sub(r"ls([12])\.gamma", r"gamma_\1", key): value for key, value in state_of(network).items()}
    torch.save({"model": official}, tmp_path / "deit3.pth")
    encoder = vit(img_size=64, init_values=1e-4, no_embed_class=True)
    architecture("medtpp_ckpt_deit3", VisionTransformer, init_values=1e-4, no_embed_class=True)
    assert "blocks.0.ls1.gamma" in encoder.state_dict()
    assert_same(load("medtpp_ckpt_deit3", tmp_path / "deit3.pth"), network)


def chunked(state, size=2):
    """DINOv2's training code keeps blocks in chunks, with their number inside the whole: blocks.1.3 is block 3."""
    return {
        re.sub(r"^blocks\.(\d+)\.", lambda m: f"blocks.{int(m[1]) // size}.{m[1]}.", k): v for k, v in state.items()
    }


def dinov2_training(state):
    state = state | {"mask_token": torch.zeros(1, 64)}
    return {
        "model": prefixed("student.backbone.", chunked(noise(state)))
        | prefixed("teacher.backbone.", chunked(state))
        | {"teacher.dino_head.mlp.0.weight": torch.zeros(8, 64), "dino_loss.center": torch.zeros(1, 8)},
        "iteration": 9,
    }


def test_dinov2_training_checkpoint(tmp_path):
    network = randomised(dinov2)
    torch.save(dinov2_training(state_of(network)), tmp_path / "dinov2.pth")
    assert_same(load("medtpp_ckpt_dinov2_14", tmp_path / "dinov2.pth"), network)


def test_dinov2_with_registers(tmp_path):
    network = randomised(dinov2_reg)
    official = state_of(network)
    official["register_tokens"] = official.pop("reg_token")
    # The official network adds a position to the class token; timm's has it inside the token.
    first = torch.randn(1, 1, 64)
    official["cls_token"] = official["cls_token"] - first
    official["pos_embed"] = torch.cat([first, official["pos_embed"]], dim=1)
    torch.save({"teacher": prefixed("backbone.", official | {"mask_token": torch.zeros(1, 64)})}, tmp_path / "reg.pth")
    backbone = load("medtpp_ckpt_dinov2_reg14", tmp_path / "reg.pth")
    assert backbone.spec.prefix == 5
    assert_same(backbone, network)


def test_dinov3(tmp_path):
    network = randomised(dinov3)
    official = {re.sub(r"gamma_([12])", r"ls\1.gamma", key): value for key, value in state_of(network).items()}
    official["storage_tokens"] = official.pop("reg_token")
    official |= {"rope_embed.periods": torch.zeros(8), "mask_token": torch.zeros(1, 64)}
    torch.save(official, tmp_path / "dinov3.pth")
    backbone = load("medtpp_ckpt_dinov3_16", tmp_path / "dinov3.pth")
    assert backbone.spec.prefix == 5
    assert_same(backbone, network)


def test_a_file_of_another_image_size_is_resampled_once_from_its_own(tmp_path):
    network = randomised(vit, img_size=96)
    torch.save(mae(state_of(network)), tmp_path / "mae96.pth")
    assert load("medtpp_ckpt_vit16", tmp_path / "mae96.pth").spec.image_size == (96, 96)
    backbone = load("medtpp_ckpt_vit16", tmp_path / "mae96.pth", image_size=128)
    assert backbone.spec.grid == (8, 8)
    network.set_input_size((128, 128))
    assert_same(backbone, network)


def test_a_files_own_patches_and_channels_are_kept(tmp_path):
    torch.save(state_of(randomised(vit, img_size=40, patch_size=8, in_chans=1)), tmp_path / "grey8.pth")
    spec = load("medtpp_ckpt_vit16", tmp_path / "grey8.pth").spec
    assert (spec.patch, spec.channels, spec.image_size) == ((8, 8), 1, (40, 40))
    assert spec.mean == pytest.approx([(0.485 + 0.456 + 0.406) / 3])


def test_patches_are_resampled_on_request(tmp_path):
    network = randomised(dinov2)
    torch.save(state_of(network), tmp_path / "dinov2.pth")
    backbone = load("medtpp_ckpt_dinov2_14", tmp_path / "dinov2.pth", image_size=128, patch_size=16)
    assert (backbone.spec.patch, backbone.spec.grid) == ((16, 16), (8, 8))
    network.set_input_size((128, 128), (16, 16))
    assert_same(backbone, network)
    with pytest.raises(ConfigError, match=r"100 is not a multiple of the patch size 16\. Use .*96 or 112"):
        load("medtpp_ckpt_dinov2_14", tmp_path / "dinov2.pth", image_size=100, patch_size=16)


def test_missing_blocks_are_listed_folded(tmp_path):
    state = state_of(randomised(vit, img_size=64))
    torch.save({k: v for k, v in state.items() if not re.match(r"blocks\.[23]\.", k)}, tmp_path / "half.pth")
    with pytest.raises(WeightsError) as caught:
        load("medtpp_ckpt_vit16", tmp_path / "half.pth")
    assert "missing: blocks.*.attn.qkv.weight (2)" in caught.value.problems
    assert len(caught.value.problems) == 12
    assert "half.pth" in caught.value.message


def test_a_larger_network_is_not_cut_to_fit(tmp_path):
    torch.save(state_of(randomised(vit, img_size=64, depth=6)), tmp_path / "deep.pth")
    with pytest.raises(WeightsError, match=r"unexpected: blocks\.\*\.mlp\.fc1\.bias \(2\)"):
        load("medtpp_ckpt_vit16", tmp_path / "deep.pth")


def test_another_width_names_the_architecture_of_the_file(tmp_path):
    torch.save(state_of(vit(img_size=64, embed_dim=192, depth=12, num_heads=3)), tmp_path / "tiny.pth")
    with pytest.raises(WeightsError, match=r"12 blocks of width 192 .* such as vit_tiny_patch16_224") as caught:
        load("medtpp_ckpt_vit16", tmp_path / "tiny.pth")
    assert any(re.match(r"shape of blocks\.\*\.attn\.qkv\.weight.*\(4\)$", p) for p in caught.value.problems)


@pytest.mark.parametrize(
    ("extra", "name"),
    [({}, "vit_small_patch14_dinov2"), ({"reg_token": torch.zeros(1, 4, 384)}, "vit_small_patch14_reg4_dinov2")],
)
def test_dinov2_is_described_by_its_name(extra, name):
    state = {f"blocks.{index}.ls1.gamma": torch.zeros(384) for index in range(12)}
    assert describe(state | extra | {"patch_embed.proj.weight": torch.zeros(384, 3, 14, 14)}).endswith(f"{name}.")


def test_nothing_is_described_where_nothing_is_known():
    assert describe({"conv1.weight": torch.zeros(3)}) == ""


def test_what_is_not_used_is_reported():
    network = vit(img_size=64)
    report = load_strict(network, mae(state_of(network))["model"], "mae.pth")
    assert report.loaded == len(network.state_dict())
    assert str(report) == (
        f"{report.loaded} tensors loaded; not used: decoder_blocks (2), decoder_embed (1), decoder_norm (1), "
        "decoder_pos_embed (1), decoder_pred (1), mask_token (1)"
    )


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_python_objects_are_refused_unexecuted(tmp_path):
    witness = tmp_path / "executed"
    torch.save({"model": state_of(vit(img_size=64)), "callback": Harmful(witness)}, tmp_path / "harmful.pth")
    with pytest.raises(WeightsError, match=r"holds Python objects \(.*\).*state dict alone"):
        read_checkpoint(tmp_path / "harmful.pth")
    assert not witness.exists()


def test_whole_modules_are_refused(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(WeightsError, match="Linear"):
        read_checkpoint(tmp_path / "module.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<!DOCTYPE html>", None])
def test_broken_files_are_told_from_dangerous_ones(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    state = state_of(vit(img_size=64))
    if content is None:
        torch.save(state, path) if suffix == ".pth" else save_file(state, path)
        content = path.read_bytes()[:5000]
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"weights\.\w+ cannot be read as weights .*incomplete"):
        read_checkpoint(path)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(WeightsError, match="There is no weights file"):
        load("medtpp_ckpt_vit16", tmp_path / "nothing.pth")
    with pytest.raises(WeightsError, match="is a folder, not a weights file"):
        load("medtpp_ckpt_vit16", tmp_path)


def test_a_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    torch.save(state_of(vit(img_size=64)), tmp_path / "weights.pth")
    assert load("medtpp_ckpt_vit16", "~/weights.pth").spec.width == 64


def test_a_file_without_tensors(tmp_path):
    torch.save({"epoch": 3, "model": {"lr": 1.0}}, tmp_path / "empty.pth")
    with pytest.raises(WeightsError, match=r"empty\.pth holds no state dict"):
        read_checkpoint(tmp_path / "empty.pth")


@given(
    prefix=st.lists(st.sampled_from(["module", "backbone", "model", "net", "_orig_mod"]), max_size=3),
    other=st.sampled_from(["head", "predictor", "decoder"]),
)
def test_any_prefix_is_found(prefix, other):
    inner = {"patch_embed.proj.weight": torch.zeros(1), "blocks.0.norm1.weight": torch.ones(1)}
    path = "".join(f"{part}." for part in prefix)
    state = prefixed(path, inner) | {f"{other}.weight": torch.zeros(1)}
    expected = inner if prefix else state
    assert strip_prefix(state).keys() == expected.keys()


def test_a_broken_card(tmp_path):
    (tmp_path / "backbone.json").write_text('{"schema": 1, "archi', encoding="utf-8")
    with pytest.raises(WeightsError, match=r"backbone\.json is broken"):
        backbones.load(str(tmp_path))
