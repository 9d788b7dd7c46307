"""Where adapters and AdaptFormer add their bottlenecks, by the formulas of their papers."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch.nn import functional as F

import matrix
from medtpp import tuners
from medtpp.backbones.timm_vit import wrap_vit
from medtpp.errors import ConfigError
from medtpp.seeds import Seeds
from medtpp.tuners.adapter import AdapterOptions
from medtpp.tuners.adaptformer import AdaptFormerOptions

SMALL = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 0, "img_size": matrix.SIZE}
POST_NORM = {
    "vit": partial(VisionTransformer, block_fn=ResPostBlock, **SMALL),
    "eva": partial(Eva, use_post_norm=True, use_fc_norm=False, **SMALL),
}
VIT = "medtpp_test_registers"  # has LayerScale
HOULSBY = AdapterOptions(placement="houlsby")
METHODS = [AdapterOptions(), HOULSBY, AdaptFormerOptions()]


@pytest.fixture(scope="module")
def images():
    return matrix.images(channels=3)


def tuned(options, variant=VIT):
    """A backbone with a tuner that has moved."""
    model = tuners.attach(matrix.load(variant), options)
    matrix.perturb(model)
    return model


def post_norm(kind):
    with Seeds(0).scope("post-norm"):
        return wrap_vit(POST_NORM[kind](), kind, kind, "random", "")


def through_first_block(model, images):
    """Input and output of the first block."""
    seen = []
    block = model.encoder.get_submodule(model.layout.blocks[0])
    handle = block.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0], output]))
    with torch.no_grad():
        model.encode(images)
    handle.remove()
    return seen


def bottleneck(model, index, x, activation):
    parts = model.bottlenecks[index]
    hidden = activation(x @ parts.down.weight.T + parts.down.bias)
    return hidden @ parts.up.weight.T + parts.up.bias


def assert_close(one, other):
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_adaptformer_reads_the_tokens_before_the_norm_and_passes_layer_scale_by(images):
    model = tuned(AdaptFormerOptions(scale=0.3))
    x, given = through_first_block(model, images)
    block = matrix.load(VIT).encoder.blocks[0]
    x = x + block.ls1(block.attn(block.norm1(x)))
    assert_close(given, x + block.ls2(block.mlp(block.norm2(x))) + 0.3 * bottleneck(model, 0, x, F.relu))


@torch.no_grad()
def test_adaptformer_reads_the_same_in_eva(images):
    model = tuned(AdaptFormerOptions(), "medtpp_test_fused_bias")
    x, given = through_first_block(model, images)
    block = matrix.load("medtpp_test_fused_bias").encoder.blocks[0]
    x = x + block.attn(block.norm1(x))
    assert_close(given, x + block.mlp(block.norm2(x)) + 0.1 * bottleneck(model, 0, x, F.relu))


@torch.no_grad()
@pytest.mark.parametrize("kind", POST_NORM)
def test_adaptformer_reads_the_tokens_where_the_norm_comes_after(images, kind):
    model = tuners.attach(post_norm(kind), AdaptFormerOptions())
    matrix.perturb(model)
    x, given = through_first_block(model, images)
    block = post_norm(kind).encoder.blocks[0]
    x = x + block.norm1(block.attn(x))
    assert_close(given, x + block.norm2(block.mlp(x)) + 0.1 * bottleneck(model, 0, x, F.relu))


@torch.no_grad()
def test_houlsby_is_inside_both_skip_connections(images):
    model = tuned(HOULSBY)
    x, given = through_first_block(model, images)
    block = matrix.load(VIT).encoder.blocks[0]
    part = block.attn(block.norm1(x))
    x = x + block.ls1(part + bottleneck(model, 0, part, F.gelu))
    part = block.mlp(block.norm2(x))
    second = len(model.layout.blocks)  # attention's of all blocks come first
    assert_close(given, x + block.ls2(part + bottleneck(model, second, part, F.gelu)))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pre-norm", *POST_NORM])
def test_pfeiffer_is_after_the_block(images, kind):
    model, plain = (matrix.load(VIT) if kind == "pre-norm" else post_norm(kind) for _ in range(2))
    model = tuners.attach(model, "adapter")
    matrix.perturb(model)
    x, given = through_first_block(model, images)
    x = plain.encoder.blocks[0](x)
    assert_close(given, x + bottleneck(model, 0, x, F.relu))


def test_adaptformer_starts_as_the_plain_backbone(images):
    one, other = tuners.attach(matrix.load(VIT), "adaptformer"), matrix.load(VIT)
    with torch.no_grad():
        assert torch.equal(one.encode(images).tokens, other.encode(images).tokens)


@pytest.mark.parametrize("options", [AdapterOptions(), HOULSBY])
def test_adapters_start_near_the_plain_backbone(options, images):
    model = tuners.attach(matrix.load(VIT), options)
    weights = torch.cat([p.detach().flatten() for name, p in model.targets.items() if name.endswith("weight")])
    assert weights.abs().max() <= 0.02
    assert 0.008 < weights.std() < 0.01  # the cut at two deviations leaves 0.88 of the deviation
    with torch.no_grad():
        moved = model.encode(images).tokens - matrix.load(VIT).encode(images).tokens
    assert 0 < moved.abs().max() < 0.05


@pytest.mark.parametrize("options", METHODS)
def test_each_bottleneck_has_a_start_of_its_own(options):
    model = tuners.attach(matrix.load(VIT), options)
    downs = [item.down.weight for item in model.bottlenecks]
    assert not any(torch.equal(one, other) for one, other in pairwise(downs))


def test_a_forward_pass_that_broke_off_leaves_nothing(images):
    """After an out-of-memory error, the loop goes on with fewer images."""
    model = tuned(AdaptFormerOptions())
    with torch.no_grad():
        expected = model.encode(images[:2]).tokens
        handle = model.encoder.blocks[0].mlp.fc2.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.encode(images)
        handle.remove()
        assert torch.equal(model.encode(images[:2]).tokens, expected)


@pytest.mark.parametrize(
    ("options", "missing"),
    [(HOULSBY, "attention.projection, mlp.out"), (AdaptFormerOptions(), "norm.mlp, mlp.in")],
)
def test_missing_roles_are_told(options, missing):
    backbone = matrix.load(VIT)
    backbone.layout = replace(backbone.layout, roles={})
    with pytest.raises(ConfigError, match=f"no modules with the roles {missing}"):
        tuners.attach(backbone, options)
    assert not backbone.taken


@pytest.mark.parametrize("options", METHODS)
def test_the_options_say_how_large(options):
    model = tuners.attach(matrix.load(VIT), options.model_copy(update={"bottleneck": 3}))
    places = matrix.DEPTH * (2 if options == HOULSBY else 1)
    assert sum(p.numel() for p in model.targets.values()) == places * (2 * 3 * matrix.WIDTH + 3 + matrix.WIDTH)
