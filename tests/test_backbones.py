"""The contract of a backbone, on small networks with the parts of each family of vision transformers."""

from functools import partial

import pytest
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from medtpp import backbones
from medtpp.backbones.base import Features, hash_state
from medtpp.backbones.folder import seen_by
from medtpp.backbones.timm_vit import resample, wrap_vit
from medtpp.config import PRETEXTS, BackboneOptions
from medtpp.errors import ConfigError, DataError
from medtpp.seeds import Seeds

SMALL = {"embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 0, "img_size": 48, "patch_size": 8}
VIT, EVA = partial(VisionTransformer, **SMALL), partial(Eva, **SMALL)
ROPE = {"use_rot_pos_emb": True, "use_fc_norm": False}
FAMILIES = {
    "vit": VIT,
    "deit distilled": partial(VisionTransformerDistilled, **SMALL),
    "deit3": partial(VIT, no_embed_class=True, init_values=1e-2),
    "dinov2": partial(VIT, init_values=1e-2, patch_size=14, img_size=84),
    "dinov2 with registers": partial(
        VIT, init_values=1e-2, patch_size=14, img_size=84, reg_tokens=4, no_embed_class=True
    ),
    "dinov3": partial(
        EVA, rope_type="dinov3", use_abs_pos_emb=False, num_reg_tokens=4, qkv_bias=False, init_values=1e-2, **ROPE
    ),
    "eva": partial(EVA, use_fc_norm=False),
    "eva02": partial(EVA, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, **ROPE),
    "without class token": partial(VIT, class_token=False, global_pool="avg"),
    "clip": partial(VIT, pre_norm=True),
}


def make(family, **kwargs):
    torch.manual_seed(0)
    network = FAMILIES[family](**kwargs).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network


def wrap(network):
    return wrap_vit(network, "test", "test", "test", "")


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


# Encoding


@pytest.mark.parametrize("factor", [1, 1.5])
@torch.no_grad()
def test_encode_equals_timm(family, factor):
    network = make(family)
    resample(network, int(network.patch_embed.img_size[0] * factor), None)
    backbone = wrap(network)
    images = torch.rand(2, 3, *backbone.spec.image_size)
    features = backbone(images)
    torch.testing.assert_close(features.tokens, network.forward_features(backbone.normalise(images)))
    assert features.patches.shape == (2, backbone.spec.grid[0] ** 2, 64)
    assert features.tokens.shape[1] == backbone.spec.prefix + features.patches.shape[1]


@torch.no_grad()
def test_taps_equal_forward_intermediates(family):
    network = make(family)
    backbone = wrap(network)
    images = torch.rand(2, 3, *backbone.spec.image_size)
    features = backbone.encode(images, taps=(0, 2))
    expected = network.forward_intermediates(backbone.normalise(images), indices=[0, 2], intermediates_only=True)
    assert len(features.maps) == len(expected) == 2
    for ours, timms in zip(features.maps, expected, strict=True):
        torch.testing.assert_close(ours, timms)
    assert features.strides == (backbone.spec.patch,) * 2


@torch.no_grad()
def test_the_order_of_visible_patches_does_not_matter(family):
    backbone = wrap(make(family))
    images = torch.rand(2, 3, *backbone.spec.image_size)
    keep = torch.stack([torch.randperm(36)[:12] for _ in range(2)])
    order = torch.randperm(12)
    first, second = backbone.encode(images, keep=keep), backbone.encode(images, keep=keep[:, order])
    torch.testing.assert_close(second.patches, first.patches[:, order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(second.tokens[:, : second.prefix], first.tokens[:, : first.prefix], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_keeping_all_patches_is_keeping_none_from_falling(family):
    backbone = wrap(make(family))
    images = torch.rand(2, 3, *backbone.spec.image_size)
    everything = backbone.encode(images, keep=torch.arange(36).expand(2, -1)).tokens
    torch.testing.assert_close(everything, backbone(images).tokens, atol=1e-4, rtol=1e-4)


class Drop(nn.Module):
    """Drops the patches that it is told, where timm drops at random."""

    def __init__(self, keep, prefix, with_indices):
        super().__init__()
        self.keep, self.prefix, self.with_indices = keep, prefix, with_indices

    def forward(self, x):
        index = self.keep[..., None].expand(-1, -1, x.shape[-1])
        x = torch.cat([x[:, : self.prefix], x[:, self.prefix :].gather(1, index)], dim=1)
        return (x, self.keep) if self.with_indices else x


@torch.no_grad()
def test_visible_patches_are_encoded_as_by_timms_patch_dropout(family):
    backbone = wrap(make(family))
    images = torch.rand(2, 3, *backbone.spec.image_size)
    keep = torch.stack([torch.randperm(36)[:9] for _ in range(2)])
    ours = backbone.encode(images, keep=keep).tokens
    network = make(family)
    network.patch_drop = Drop(keep, backbone.spec.prefix, isinstance(network, Eva))
    torch.testing.assert_close(ours, network.forward_features(backbone.normalise(images)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_hidden_patches_leave_no_trace(family):
    backbone = wrap(make(family))
    images = torch.rand(1, 3, *backbone.spec.image_size)
    keep = torch.arange(1, 36)[None]
    changed = images.clone()
    changed[..., : backbone.spec.patch[0], : backbone.spec.patch[1]] = 0
    assert torch.equal(backbone.encode(images, keep=keep).tokens, backbone.encode(changed, keep=keep).tokens)
    assert not torch.equal(backbone(images).tokens, backbone(changed).tokens)


@pytest.mark.parametrize("token", [None, torch.linspace(-1, 1, 64)])
@torch.no_grad()
def test_a_mask_replaces_the_patch_embedding(family, token):
    network = make(family)
    backbone = wrap(network)
    images = torch.rand(2, 3, *backbone.spec.image_size)
    mask = torch.rand(2, 36) < 0.5
    ours = backbone.encode(images, mask=mask, mask_token=token).tokens
    value = torch.zeros(64) if token is None else token
    network.patch_embed.register_forward_hook(lambda module, args, out: torch.where(mask[..., None], value, out))
    torch.testing.assert_close(ours, network.forward_features(backbone.normalise(images)))


def test_maps_need_all_patches_and_blocks_that_exist():
    backbone = wrap(make("vit"))
    images = torch.rand(1, 3, 48, 48)
    with pytest.raises(ConfigError, match="exclude each other"):
        backbone.encode(images, keep=torch.zeros(1, 4, dtype=torch.long), taps=(1,))
    for taps in ((3,), (0, -1)):
        with pytest.raises(ConfigError, match="blocks 0 to 2"):
            backbone.encode(images, taps=taps)


# Images


@torch.no_grad()
def test_grey_and_colour_are_matched():
    colour, grey = wrap(make("vit")), wrap(make("vit", in_chans=1))
    images = torch.rand(2, 1, 48, 48)
    assert torch.equal(colour(images).tokens, colour(images.expand(-1, 3, -1, -1)).tokens)
    torch.testing.assert_close(grey(images.expand(-1, 3, -1, -1)).tokens, grey(images).tokens)
    red = torch.zeros(1, 3, 48, 48)
    red[:, 0] = 1
    torch.testing.assert_close(grey.normalise(red), grey.normalise(torch.full((1, 1, 48, 48), 0.299)))


def test_images_that_do_not_fit_are_refused():
    backbone = wrap(make("vit"))
    with pytest.raises(DataError, match=r"48x40 pixels; .* was loaded for 48x48"):
        backbone(torch.rand(1, 3, 48, 40))
    with pytest.raises(DataError, match="Images have 4 channels; the backbone takes 3"):
        backbone(torch.rand(1, 4, 48, 48))


def test_images_are_normalised_per_channel():
    network = make("vit")
    network.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 1.0, 2.0)}
    normalised = wrap(network).normalise(torch.full((1, 3, 48, 48), 0.5))
    torch.testing.assert_close(normalised[0, :, 0, 0], torch.tensor([0.8, 0.3, 0.1]))


def test_pooling():
    tokens = torch.tensor([[[9.0], [1.0], [3.0]]])
    features = Features(torch.zeros(1, 1, 2, 4), tokens, 1, (1, 2))
    assert features.pooled("cls").item() == 9
    assert features.pooled("mean").item() == 2
    with pytest.raises(ConfigError, match="no class token"):
        Features(torch.zeros(1, 1, 2, 4), tokens, 0, (1, 3)).pooled("cls")


# Being frozen


def test_a_backbone_is_frozen_and_stays_in_evaluation_mode(family):
    backbone = wrap(make(family, proj_drop_rate=0.5, drop_path_rate=0.5)).train()
    assert not any(module.training for module in backbone.encoder.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    images = torch.rand(1, 3, *backbone.spec.image_size)
    assert torch.equal(backbone(images).tokens, backbone(images).tokens)


def test_the_layout_names_every_layer(family):
    backbone = wrap(make(family))
    modules = dict(backbone.encoder.named_modules())
    linears = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    roles = ("attention.qkv", "attention.projection", "mlp.in", "mlp.out")
    assert set(backbone.layout.paths(*roles)) == linears
    norms = backbone.layout.paths("norm.attention", "norm.mlp", "norm.final")
    assert all(isinstance(modules[path], nn.LayerNorm) for path in norms)
    assert len(backbone.layout.paths("norm.attention")) == len(backbone.layout.blocks) == 3


def test_a_hash_sees_names_types_shapes_and_bits():
    state = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3)}
    others = [
        {"c": state["a"], "b": state["b"]},
        {"a": state["a"].double(), "b": state["b"]},
        {"a": state["a"][None], "b": state["b"]},
        {"a": state["a"] + 2**-23, "b": state["b"]},
    ]
    assert len({hash_state(each) for each in (state, *others)}) == 5
    assert hash_state(dict(reversed(state.items()))) == hash_state(state)


# Finding a backbone in a model


class Classifier(nn.Module):
    def __init__(self, *encoders):
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.head = nn.Linear(64, 2)


@pytest.mark.parametrize("kind", ["vit", "dinov3"])
@torch.no_grad()
def test_find_wraps_without_copying_and_does_not_normalise(kind):
    network = make(kind)
    network.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "architecture": "any"}
    backbone = backbones.find(Classifier(network), (48, 48))
    assert backbone.encoder is network
    assert (backbone.spec.mean, backbone.spec.std) == ((0.0,) * 3, (1.0,) * 3)
    images = torch.randn(1, 3, 48, 48)
    torch.testing.assert_close(backbone(images).tokens, network.forward_features(images))


@pytest.mark.parametrize("kind", ["vit", "deit3", "dinov3", "eva02"])
@torch.no_grad()
def test_find_takes_networks_of_any_image_size(kind):
    network = make(kind, dynamic_img_size=True)
    backbone = backbones.find(network, (64, 32))
    images = torch.randn(2, 3, 64, 32)
    features = backbone.encode(images, taps=(1,))
    torch.testing.assert_close(features.tokens, network.forward_features(images))
    assert features.maps[0].shape == (2, 64, 8, 4)
    mask = torch.ones(2, 32, dtype=torch.bool)
    masked = backbone.encode(images, mask=mask).tokens
    assert torch.equal(masked, backbone.encode(-images, mask=mask).tokens)
    keep = torch.stack([torch.randperm(32) for _ in range(2)])
    shuffled = backbone.encode(images, keep=keep).patches
    expected = features.patches.gather(1, keep[..., None].expand(-1, -1, 64))
    torch.testing.assert_close(shuffled, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="whole patches"):
        backbones.find(network, (60, 32))


def test_find_refuses_to_choose():
    with pytest.raises(ConfigError, match="holds 2 backbones"):
        backbones.find(Classifier(make("vit"), make("eva")), (48, 48))


class TestTrainingAttention:
    """Attention by plain matrix products, where CPUs are quicker with it."""

    def heads(self):
        generator = torch.Generator().manual_seed(0)
        packed = torch.randn(2, 5, 3, 4, 16, generator=generator).bfloat16().requires_grad_()
        return packed, packed.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, d) each

    def is_plain(self, tokens, **options):
        heads = [part.to(options.pop("dtype", part.dtype)) for part in self.heads()[1]]
        with backbones.training_attention(tokens):
            return "Plain" in type(scaled_dot_product_attention(*heads, **options).grad_fn).__name__

    def test_it_is_chosen_where_it_pays(self):
        tokens = torch.zeros(1, 5, 64)
        assert not self.is_plain(tokens), "float32 has a quick kernel"
        with torch.autocast("cpu", torch.bfloat16):
            assert self.is_plain(tokens, attn_mask=None, dropout_p=0.0, is_causal=False)
            assert not self.is_plain(torch.zeros(1, 601, 64)), "long sequences would take too much memory"
            assert not self.is_plain(tokens, is_causal=True)
            assert not self.is_plain(tokens, attn_mask=torch.zeros(5, 5, dtype=torch.bfloat16))
            with torch.no_grad():
                assert not self.is_plain(tokens), "nothing goes backward"

    def test_it_is_torch_s_and_keeps_no_copies(self):
        (packed, heads), (plain_packed, plain_heads) = self.heads(), self.heads()
        expected = scaled_dot_product_attention(*heads)
        kept = []
        with (
            torch.autocast("cpu", torch.bfloat16),
            torch.autograd.graph.saved_tensors_hooks(lambda kept_one: kept.append(kept_one) or kept_one, lambda x: x),
            backbones.training_attention(torch.zeros(1, 5, 64)),
        ):
            found = scaled_dot_product_attention(*plain_heads)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.01)
        assert [value.untyped_storage().data_ptr() for value in kept[:3]] == [plain_packed.data_ptr()] * 3
        for value in (expected, found):
            value.backward(expected.detach())
        torch.testing.assert_close(plain_packed.grad, packed.grad, rtol=0.05, atol=0.02)


def test_the_default_backbone_comes_with_the_package():
    options = BackboneOptions()
    backbone = backbones.load(options)
    assert (options.name, backbone.spec.image_size, backbone.spec.objective) == (
        "medtpp_vit_tiny",
        (160, 160),
        "pixels",
    )
    mae = PRETEXTS.get("mae")
    assert mae(mae.Options(), backbone.spec, Seeds(0)).load_head(backbone.pretext_heads)
    assert len(seen_by(options).images) > 7000
    larger = backbones.load(options, image_size=224)
    assert larger.encode(torch.rand(1, 1, 224, 224)).patches.shape == (1, 196, 192)
    assert larger.spec.sha256 == backbone.spec.sha256
