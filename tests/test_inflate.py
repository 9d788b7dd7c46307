"""Backbones of images that encode volumes: what stays as in two dimensions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file
from timm.models.eva import Eva
from torch.nn import functional as F

import matrix
from inflated import (
    GRID,
    PATCH,
    PATCHES,
    SIZE,
    load,
    load_flat,
    place,
    tell_depths_apart,
    volumes,
)
from medtpp import backbones
from medtpp.backbones import medcoss
from medtpp.backbones.base import hash_state
from medtpp.backbones.inflate import inflate
from medtpp.backbones.medcoss import MedCoSSViT
from medtpp.config import BackboneOptions
from medtpp.errors import ConfigError, DataError


@pytest.mark.parametrize("patch", [(4, 8, 8), (1, 8, 8), (3, 16, 4), (2, 12, 6)])
@pytest.mark.parametrize("variant", matrix.TIMM)
@torch.no_grad()
def test_a_volume_constant_in_depth_has_the_features_of_the_image(variant, patch):
    size = (2 * patch[1], 3 * patch[2])
    images = torch.rand(2, 3, *size)
    flat = load_flat(variant, size, patch[1:]).encode(images, taps=(0,))
    solid = load(variant, (patch[0], *size), patch).encode(
        images[:, :, None].expand(-1, -1, patch[0], -1, -1), taps=(0,)
    )
    torch.testing.assert_close(solid.tokens, flat.tokens, atol=1e-5, rtol=0)
    torch.testing.assert_close(solid.maps[0][:, :, 0], flat.maps[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_without_prefix_tokens_so_do_several_slices_of_patches():
    """Attention over equal tokens is that over one of them; a class token alone would get less of it."""
    images = torch.rand(2, 3, 24, 32)
    flat = load_flat("medtpp_test_mean")(images)
    solid = load("medtpp_test_mean")(images[:, :, None].expand(-1, -1, 8, -1, -1))
    torch.testing.assert_close(solid.tokens, flat.tokens.repeat(1, 2, 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", matrix.TIMM)
@torch.no_grad()
def test_the_order_of_visible_patches_does_not_matter(variant):
    backbone, images = tell_depths_apart(load(variant)), volumes()
    whole = backbone(images)
    assert whole.tokens.shape == (4, backbone.spec.prefix + PATCHES, matrix.WIDTH)
    order = torch.rand(4, PATCHES).argsort(dim=1)
    shuffled = backbone.encode(images, keep=order)
    back = shuffled.patches.gather(1, order.argsort(dim=1)[..., None].expand_as(shuffled.patches))
    torch.testing.assert_close(back, whole.patches, atol=2e-5, rtol=1e-5)
    prefix = whole.prefix
    torch.testing.assert_close(shuffled.tokens[:, :prefix], whole.tokens[:, :prefix], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("index", [(0, 0, 0), (1, 2, 3), (0, 2, 1), (1, 0, 2)])
@torch.no_grad()
def test_patches_are_numbered_by_depth_row_and_column(index):
    backbone, images = load("medtpp_test_class_token"), volumes()
    inside = tuple(slice(i * side, (i + 1) * side) for i, side in zip(index, PATCH, strict=True))
    other = 1 - images
    other[..., *inside] = images[..., *inside]
    keep = torch.full((4, 1), place(*index))
    assert torch.equal(backbone.encode(images, keep=keep).tokens, backbone.encode(other, keep=keep).tokens)
    first, second = (backbone.encoder.patch_embed(backbone.normalise(x)) for x in (images, other))
    same = torch.isclose(first, second, atol=1e-6).all(dim=2)
    assert same[:, place(*index)].all()
    assert same.sum() == len(images)


@pytest.mark.parametrize("variant", matrix.TIMM)
@torch.no_grad()
def test_depth_is_told_apart_once_it_is_learnt_masked_or_not(variant):
    backbone, images = load(variant), torch.full((1, 1, *SIZE), 0.3)
    mask = torch.zeros(1, PATCHES, dtype=torch.bool)
    mask[:, place(0, 1, 1)] = mask[:, place(1, 1, 1)] = True
    for encode in (lambda: backbone(images), lambda: backbone.encode(images, mask=mask)):
        patches = encode().patches[0].unflatten(0, GRID)
        torch.testing.assert_close(patches[0], patches[1], atol=1e-5, rtol=0)
    tell_depths_apart(backbone)
    patches = backbone.encode(images, mask=mask).patches[0].unflatten(0, GRID)
    assert ((patches[0] - patches[1]).abs().amax(dim=-1) > 0.1).all()


@torch.no_grad()
def test_maps_lie_as_the_volume_does():
    backbone, images = tell_depths_apart(load("medtpp_test_registers")), volumes()
    features = backbone.encode(images, taps=(0, 1))
    assert [tuple(item.shape) for item in features.maps] == [(4, matrix.WIDTH, *GRID)] * 2
    assert (features.grid, features.strides) == (GRID, (PATCH,) * 2)
    last = backbone.encoder.norm(features.maps[1].permute(0, 2, 3, 4, 1))
    torch.testing.assert_close(last.flatten(1, 3), features.patches)


@torch.no_grad()
def test_enlarged_patches_of_an_enlarged_volume_embed_as_before():
    """Resampling patches is the inverse of resampling images: there and back, nothing is lost."""
    small, large = (
        load("medtpp_test_registers", (4, 16, 24), (4, 8, 8)),
        load("medtpp_test_registers", (8, 32, 36), (8, 16, 12)),
    )
    patches = torch.rand(2, 3, 1, 2, 3, 4, 8, 8)
    enlarged = F.interpolate(patches.flatten(0, 5)[:, None], size=(16, 12), mode="bicubic", antialias=True)
    enlarged = enlarged.reshape(2, 3, 1, 2, 3, 4, 16, 12).repeat_interleave(2, dim=5)

    def assemble(parts):  # (B, C, d, h, w, pd, ph, pw) to (B, C, D, H, W)
        b, c, d, h, w, *patch = parts.shape
        sides = (d * patch[0], h * patch[1], w * patch[2])
        return parts.permute(0, 1, 2, 5, 3, 6, 4, 7).reshape(b, c, *sides)

    first = small.encoder.patch_embed(small.normalise(assemble(patches)))
    second = large.encoder.patch_embed(large.normalise(assemble(enlarged)))
    torch.testing.assert_close(second, first, atol=1e-4, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    grid=st.tuples(*[st.integers(1, 3)] * 3),
    patch=st.tuples(st.integers(1, 6), st.integers(3, 12), st.integers(3, 12)),
    variant=st.sampled_from(["medtpp_test_class_token", "medtpp_test_rotary"]),
)
@torch.no_grad()
def test_any_patch_shape(grid, patch, variant):
    size = tuple(n * side for n, side in zip(grid, patch, strict=True))
    backbone = load(variant, size, patch)
    assert (backbone.spec.dims, backbone.spec.image_size, backbone.spec.patch) == (3, size, patch)
    assert backbone.spec.grid == grid
    features = backbone(torch.rand(1, 1, *size))
    assert features.patches.shape == (1, math.prod(grid), matrix.WIDTH)
    assert features.tokens.isfinite().all()


def test_by_default_volumes_and_patches_are_cubes_of_the_backbones_own_size():
    backbone = backbones.load(BackboneOptions(name=str(matrix.backbone_folder("medtpp_test_rotary")), dims=3))
    assert (backbone.spec.image_size, backbone.spec.patch) == ((32,) * 3, (8,) * 3)
    assert load("medtpp_test_rotary", 12, 6).spec.grid == (2, 2, 2)


# Weights


@pytest.mark.parametrize("variant", matrix.TIMM)
def test_the_source_is_that_of_the_image_backbone(variant):
    backbone = load(variant, (6, 20, 30), (3, 10, 10))
    stored = {
        name: value.float() for name, value in load_file(matrix.backbone_folder(variant) / "model.safetensors").items()
    }
    source = backbone.source_state()
    assert source.keys() == stored.keys()
    assert all(torch.equal(source[name], stored[name]) for name in stored)
    assert backbone.source_hash() == backbone.spec.sha256 == hash_state(stored)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_the_backbone_that_comes_with_the_package():
    options = BackboneOptions(name="medtpp_vit_tiny", dims=3, patch_size=(4, 8, 8))
    backbone = backbones.load(options, image_size=(8, 56, 40))
    assert backbone.spec.grid == (2, 7, 5)
    assert backbone.source_hash() == backbone.spec.sha256 == backbones.load("medtpp_vit_tiny").spec.sha256
    # Its MAE head predicts 16 x 16 pixels in colour, as many numbers as 4 x 8 x 8 voxels, but other ones.
    assert backbone.pretext_heads == {}


@pytest.mark.parametrize(
    ("size", "patch", "message"),
    [
        ((8, 20, 32), (4, 8, 8), r"8x20x32 is not a multiple of the patch size 4x8x8\. .*=\[8,16,32\] or \[8,24,32\]"),
        (20, 8, r"size of 20 is not a multiple of the patch size 8\. .*image_size=16 or 24\."),
        ((24, 32), 8, "24x32 has 2 dimensions; backbone.dims is 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(size, patch, message):
    with pytest.raises(ConfigError, match=message):
        load("medtpp_test_class_token", size, patch)


@pytest.mark.parametrize(("dims", "patch"), [(2, (4, 8, 8)), (3, (8, 8))])
def test_a_patch_has_a_side_for_each_axis(dims, patch):
    with pytest.raises(ValidationError, match=f"patch_size has {len(patch)} numbers; dims is {dims}"):
        BackboneOptions(dims=dims, patch_size=patch)


def test_images_and_other_volumes_are_refused():
    backbone = load("medtpp_test_class_token")
    with pytest.raises(DataError, match=r"Images are 24x32 pixels; .* was loaded for 8x24x32"):
        backbone(torch.rand(1, 1, 24, 32))
    with pytest.raises(DataError, match="Images are 8x32x24"):
        backbone.encode(torch.rand(1, 1, 8, 32, 24), keep=torch.zeros(1, 1, dtype=torch.int64))


def test_networks_that_cannot_be_inflated_are_refused(monkeypatch):
    monkeypatch.setattr(medcoss, "MedCoSSViT", lambda **sizes: MedCoSSViT(**{**sizes, "width": 64, "depth": 1}))
    with pytest.raises(ConfigError, match=r"medcoss_vit_base encodes 2D images alone, .* medtpp_vit_tiny"):
        backbones.load(BackboneOptions(name="medcoss_vit_base", weights="random", dims=3))
    network = Eva(
        img_size=32, patch_size=8, embed_dim=128, depth=1, num_heads=2, use_rot_pos_emb=True, rope_type="mrope",
        rope_mrope_section=(8, 12, 12), attn_type="rope",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"RotaryEmbeddingMRope.* cannot be repeated along depth.*DINOv3"):
        inflate(network, SIZE, PATCH)
