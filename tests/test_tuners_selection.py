"""What BitFit and LN-tuning select."""

from functools import partial

import pytest
import torch
from timm.layers import RmsNorm
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import matrix
from medtpp import tuners
from medtpp.backbones.timm_vit import wrap_vit
from medtpp.errors import ConfigError

SMALL = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 0, "img_size": matrix.SIZE}


def plain(kind, **options):
    return wrap_vit(kind(**SMALL, **options), "small", "small", "random", "")


def selected(backbone, tuner):
    return set(tuners.attach(backbone, tuner).names)


def without_number(names):
    return {".".join(part for part in name.split(".") if not part.isdigit()) for name in names}


def test_bitfit_trains_all_biases():
    expected = {"patch_embed.proj.bias", "norm.bias", *(f"blocks.norm{number}.bias" for number in (1, 2))}
    expected |= {f"blocks.{part}.bias" for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    names = selected(matrix.load("medtpp_test_registers"), "bitfit")
    assert without_number(names) == expected
    assert len(names) == 2 + 6 * matrix.DEPTH


def test_bitfit_trains_the_biases_beside_fused_layers():
    names = without_number(selected(matrix.load("medtpp_test_fused_bias"), "bitfit"))
    assert {"blocks.attn.q_bias", "blocks.attn.v_bias"} < names


def test_ln_tuning_trains_the_norms_inside_and_outside_the_blocks():
    options = {"pre_norm": True, "qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True}
    names = selected(plain(VisionTransformer, **options), "ln_tuning")
    parts = {"norm_pre", "norm"}
    parts |= {f"blocks.{part}" for part in ("norm1", "norm2", "attn.q_norm", "attn.k_norm", "attn.norm", "mlp.norm")}
    assert without_number(names) == {f"{part}.{leaf}" for part in parts for leaf in ("weight", "bias")}
    assert len(names) == 2 * (2 + 6 * 2)


def test_ln_tuning_trains_the_weights_of_rms_norms():
    names = without_number(selected(plain(VisionTransformer, norm_layer=RmsNorm), "ln_tuning"))
    assert names == {"norm.weight", "blocks.norm1.weight", "blocks.norm2.weight"}


@pytest.mark.parametrize("tuner", ["bitfit", "ln_tuning"])
@pytest.mark.parametrize(
    "make",
    [
        partial(VisionTransformer, global_pool="avg", class_token=False),  # fc_norm comes after pooling, so it goes
        partial(VisionTransformer, pre_norm=True, qk_norm=True, reg_tokens=2),
        partial(Eva, use_fc_norm=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, qkv_fused=False),
        partial(Eva, use_fc_norm=False, attn_type="rope", use_rot_pos_emb=True, qk_norm=True),
        partial(Eva, use_post_norm=True, init_values=0.1),
    ],
)
def test_every_target_is_reached(tuner, make):
    network = make(**SMALL)
    network.fc_norm = nn.Identity()
    model = tuners.attach(wrap_vit(network, "small", "small", "random", ""), tuner)
    tokens = model.encode(matrix.images(channels=3), keep=torch.arange(5).expand(8, -1)).tokens
    (tokens * torch.randn_like(tokens)).sum().backward()
    assert {name for name, p in model.targets.items() if p.grad is None or not p.grad.any()} == set()


@pytest.mark.parametrize(("tuner", "what"), [("bitfit", "biases"), ("ln_tuning", "norms")])
def test_nothing_to_train_is_told(tuner, what):
    backbone = matrix.load("medtpp_test_class_token")
    encoder = nn.Module()
    encoder.layer = nn.Linear(2, 2, bias=False)
    backbone.encoder = encoder
    with pytest.raises(ConfigError, match=f"has no {what}"):
        tuners.attach(backbone, tuner)
    assert not backbone.taken
