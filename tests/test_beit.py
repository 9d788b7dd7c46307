"""BEiT: biases by relative position that follow dropped patches, and weights from before fine-tuning."""

from functools import partial

import pytest
import torch
from timm.models import register_model
from timm.models.beit import Beit

import matrix
from medtpp import backbones
from medtpp.errors import WeightsError
from medtpp.seeds import Seeds

_SMALL = partial(
    Beit,
    img_size=32,
    patch_size=8,
    embed_dim=64,
    depth=2,
    num_heads=2,
    num_classes=0,
    init_values=0.1,
    use_abs_pos_emb=False,
)
VARIANTS = {
    "each_block": {"use_rel_pos_bias": True},
    "shared": {"use_shared_rel_pos_bias": True},
    "both_and_positions": {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True, "use_abs_pos_emb": True},
    "none": {},
}
# As timm's own are: biases of each block, and a norm after pooling.
NAME = "medtpp_test_beit_by_name"
register_model(matrix._entry(NAME, partial(_SMALL, use_rel_pos_bias=True), "timm.models.beit"))


def make(**arguments):
    with Seeds(0).scope("beit"):
        network = _SMALL(**{"use_fc_norm": False, **arguments})
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return network.eval()


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_features_are_those_of_timm(variant):
    network, images = make(**VARIANTS[variant]), torch.rand(2, 3, 32, 32)
    expected = network.forward_features(images)
    backbone = backbones.find(network, (32, 32))
    features = backbone.encode(images, taps=(0, 1))
    torch.testing.assert_close(features.tokens, expected)
    maps = network.forward_intermediates(images, indices=[0, 1], intermediates_only=True)
    for found, timms in zip(features.maps, maps, strict=True):
        torch.testing.assert_close(found, timms)
    torch.testing.assert_close(network.forward_features(images), expected)  # timm's own forward is as it was
    assert backbone.spec.capabilities == backbones.kinds()["ViT"]
    assert (backbone.spec.prefix, backbone.spec.pooling) == (1, "mean")


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_dropped_patches_are_as_if_nobody_attended_to_them(variant):
    network, images = make(**VARIANTS[variant]), torch.rand(2, 3, 32, 32)
    keep = torch.tensor([[3, 7, 1, 12, 15], [0, 2, 9, 4, 5]])
    few = backbones.find(network, (32, 32)).encode(images, keep=keep).tokens
    x = torch.cat([network.cls_token.expand(2, -1, -1), network.patch_embed(images)], dim=1)
    x = x if network.pos_embed is None else x + network.pos_embed
    unseen = torch.full((2, 1, 1, 17), float("-inf"))
    for case, visible in enumerate(keep):
        unseen[case, :, :, [0, *(1 + visible).tolist()]] = 0
    shared = 0 if network.rel_pos_bias is None else network.rel_pos_bias()
    for block in network.blocks:
        x = block(x, shared_rel_pos_bias=shared + unseen)
    places = torch.cat([torch.zeros(2, 1, dtype=torch.int64), 1 + keep], dim=1)
    expected = network.norm(x).gather(1, places[..., None].expand(-1, -1, 64))
    torch.testing.assert_close(few, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_biases_are_resampled_to_other_sizes(tmp_path):
    network = make(use_rel_pos_bias=True, use_fc_norm=True)
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    own = backbones.load(NAME, weights=str(tmp_path / "weights.pt"))
    larger = backbones.load(NAME, weights=str(tmp_path / "weights.pt"), image_size=48)
    network.set_input_size(img_size=48)
    images = torch.rand(2, 3, 48, 48)
    network.fc_norm = torch.nn.Identity()
    torch.testing.assert_close(larger.encode(images).tokens, network.forward_features((images - 0.5) / 0.25))
    assert own.spec.sha256 == larger.spec.sha256


@torch.no_grad()
def test_weights_from_before_fine_tuning(tmp_path):
    """All blocks share one table, and there is a norm at the end: in timm's network, each block gets the table."""
    pretrained, images = make(use_shared_rel_pos_bias=True), torch.rand(2, 3, 32, 32)
    state = {**pretrained.state_dict(), "mask_token": torch.ones(1, 1, 64), "lm_head.weight": torch.ones(9, 64)}
    state["rel_pos_bias.relative_position_index"] = pretrained.rel_pos_bias.relative_position_index
    torch.save({"model": state}, tmp_path / "weights.pth")
    backbone = backbones.load(NAME, weights=str(tmp_path / "weights.pth"))
    expected = pretrained.forward_features((images - 0.5) / 0.25)
    torch.testing.assert_close(backbone.encode(images).tokens, expected)
    del state["blocks.1.norm2.bias"]
    torch.save({"model": state}, tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match="do not fit") as error:
        backbones.load(NAME, weights=str(tmp_path / "weights.pth"))
    assert "missing: blocks.1.norm2.bias" in str(error.value)


def test_tables_get_gradients_where_all_is_trained():
    network = make(use_rel_pos_bias=True)
    backbone = backbones.find(network, (32, 32))
    network.requires_grad_(True)
    keep = torch.rand(2, 16).argsort(dim=1)[:, :6]
    backbone.encode(torch.rand(2, 3, 32, 32), keep=keep).tokens.square().sum().backward()
    assert all(block.attn.relative_position_bias_table.grad.any() for block in network.blocks)
