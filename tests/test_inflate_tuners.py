"""Tuners and TPP on backbones that were inflated to volumes: the new embedding is a group of target parameters."""

import copy

import pytest
import torch
from torch.nn import functional as F

import matrix
from inflated import (
    PATCH,
    PATCHES,
    SIZE,
    TUNED,
    WITH_EMBED,
    load,
    params,
    volumes,
)
from medtpp import backbones, tuners
from medtpp.config import TUNERS, BackboneOptions
from medtpp.errors import ConfigError, DataError, WeightsError
from medtpp.seeds import Seeds


def attach(tuner, variant, seed=0):
    return tuners.attach(load(variant), tuner, seed=seed)


def moved(tuner, variant):
    """A tuned backbone whose targets and embedding are no longer where they started."""
    tuned = attach(tuner, variant)
    matrix.perturb(tuned)
    generator = Seeds(5).generator("embed")
    with torch.no_grad():
        for parameter in tuned.embed.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return tuned


def tokens(backbone, images, **options):
    with torch.no_grad():
        return backbone.encode(images, **options).tokens


@pytest.mark.parametrize(("tuner", "variant"), params(TUNED))
class TestTuner:
    def test_the_embedding_is_a_group_of_its_own(self, tuner, variant):
        tuned = attach(tuner, variant)
        trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
        assert trained == tuned.targets.keys() | tuned.embed.keys()
        assert tuned.targets.keys().isdisjoint(tuned.embed)
        assert all(tuned.get_parameter(name) is parameter for name, parameter in tuned.embed.items())
        new = {id(tuned.encoder.patch_embed.proj.weight), id(tuned.encoder.depth_embed)}
        assert {id(parameter) for parameter in tuned.embed.values()} == (
            new if (tuner, variant) in WITH_EMBED else set()
        )
        assert (new <= {id(parameter) for parameter in tuned.targets.values()}) == (tuner == "full")
        assert matrix.attach(tuner, variant).embed_state() == {}

    def test_disabled_is_the_inflated_backbone_before_any_training(self, tuner, variant):
        images, plain, tuned = volumes(), load(variant), moved(tuner, variant)
        active, keep = tokens(tuned, images), torch.rand(4, PATCHES).argsort(dim=1)[:, :5]
        assert torch.equal(active, tokens(plain, images)) == (tuner == "linear")
        with tuned.disabled():
            assert torch.equal(tokens(tuned, images), tokens(plain, images))
            assert torch.equal(tokens(tuned, images, keep=keep), tokens(plain, images, keep=keep))
        with pytest.raises(KeyboardInterrupt), tuned.disabled():
            raise KeyboardInterrupt
        assert torch.equal(tokens(tuned, images), active)
        trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
        assert trained == tuned.targets.keys() | tuned.embed.keys()
        assert all(tuned.get_parameter(name) is parameter for name, parameter in tuned.embed.items())

    def test_what_is_saved_loads_to_the_same_bits(self, tuner, variant):
        images, tuned, other = volumes(), moved(tuner, variant), attach(tuner, variant)
        other.load_adapter_state(tuned.adapter_state())
        if tuned.embed:
            assert not torch.equal(tokens(other, images), tokens(tuned, images))
        other.load_embed_state(tuned.embed_state())
        assert torch.equal(tokens(other, images), tokens(tuned, images))

    def test_prefix_order_and_count_of_tokens(self, tuner, variant):
        images, tuned = volumes(), moved(tuner, variant)
        whole = tuned.encode(images)
        assert whole.tokens.shape == (4, tuned.spec.prefix + PATCHES, matrix.WIDTH)
        if TUNERS.get(tuner).needs_grid:
            return  # neighbours are part of what it computes
        order = torch.rand(4, PATCHES).argsort(dim=1)
        shuffled = tuned.encode(images, keep=order).patches
        expected = whole.patches.gather(1, order[..., None].expand_as(shuffled))
        torch.testing.assert_close(shuffled, expected, atol=1e-4, rtol=1e-5)

    def test_merging_is_exact_and_takes_the_embedding_along(self, tuner, variant):
        if not TUNERS.get(tuner).merges:
            pytest.skip("not linear")
        images, tuned = volumes(), moved(tuner, variant)
        before, merged = tokens(tuned, images), tuned.merged()
        assert (tokens(merged, images) - before).abs().max() <= 1e-5 * before.abs().max()
        assert not any(parameter.requires_grad for parameter in merged.parameters())
        state = merged.source_state()
        assert torch.equal(state["depth_embed"], tuned.encoder.depth_embed)
        assert state["patch_embed.proj.weight"].shape[2:] == PATCH
        assert tuners.attach(merged, "vpt_deep").embed == {}  # the embedding is now the source's own

    def test_a_copy_is_on_its_own(self, tuner, variant):
        images, tuned = volumes(), moved(tuner, variant)
        before, twin = tokens(tuned, images), copy.deepcopy(tuned)
        assert all(twin.get_parameter(name) is parameter for name, parameter in twin.embed.items())
        with torch.no_grad():
            for parameter in [*twin.targets.values(), *twin.embed.values()]:
                parameter.add_(0.1)
        assert torch.equal(tokens(tuned, images), before)
        assert torch.equal(tokens(twin, images), before) == (tuner == "linear")

    def test_bfloat16_is_close(self, tuner, variant):
        images, tuned = volumes(), moved(tuner, variant)
        exact = tokens(tuned, images)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = tokens(tuned, images).float()
        assert F.cosine_similarity(rounded, exact, dim=-1).min() > 0.99


@pytest.mark.parametrize(("tuner", "variant"), params(WITH_EMBED))
def test_every_part_of_the_embedding_gets_a_gradient_at_once(tuner, variant):
    images, tuned = volumes(8), attach(tuner, variant)
    head = matrix.make_pretext(matrix.pretext_of(tuner), tuned)
    head.loss(tuned, images, matrix.draws())[0].backward()
    weight, depth = tuned.encoder.patch_embed.proj.weight, tuned.encoder.depth_embed
    assert weight.grad.flatten(1).any(dim=1).all()
    assert depth.grad.any(dim=1).all()
    assert not torch.equal(depth.grad[0], depth.grad[1])


def test_a_state_that_does_not_fit_is_refused_as_a_whole():
    tuned = attach("lora", "medtpp_test_registers")
    deeper = tuners.attach(load("medtpp_test_registers", (12, 24, 32)), "lora")
    with pytest.raises(WeightsError) as caught:
        tuned.load_embed_state({**deeper.embed_state(), "other": torch.zeros(1)})
    assert caught.value.problems == ["unexpected: other", "shape of depth_embed: (3, 64) in the file, (2, 64) here"]
    with pytest.raises(WeightsError) as caught:
        tuned.load_embed_state({})
    assert caught.value.problems == ["missing: depth_embed", "missing: patch_embed.proj.weight"]


def test_mae_previews_volumes_as_they_lie():
    tuned, images = attach("lora", "medtpp_test_registers"), volumes(2, channels=3)
    mae = matrix.make_pretext("mae", tuned)
    assert mae.positions.shape[0] == len(mae.positions.unique(dim=0)) == PATCHES
    views = mae.preview(tuned, images, matrix.draws(2))
    hidden = (views["masked"] == 0.5).float()
    shown = F.avg_pool3d(hidden[:, 0], PATCH).flatten(1)  # 0 or 1 for each patch
    assert set(shown.unique().tolist()) == {0.0, 1.0}
    assert (shown.sum(dim=1) == PATCHES - mae.num_visible).all()
    assert torch.equal(views["masked"][hidden == 0], images[hidden == 0])
    assert views["restored"].shape == images.shape


def test_modalities_are_channels_of_the_new_embedding():
    variant = TUNED[0][1]
    options = BackboneOptions(name=str(matrix.backbone_folder(variant)), dims=3, patch_size=PATCH)
    several = backbones.load(options.model_copy(update={"channels": 4}), image_size=SIZE)
    assert several.spec.channels == 4
    grey = volumes()
    expected, found = load(variant).encode(grey).tokens, several.encode(grey.expand(-1, 4, -1, -1, -1)).tokens
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    changed = several.encode(torch.cat([grey, 1 - grey, grey, grey], dim=1)).tokens
    assert (changed - expected).abs().max() > 1e-3
    with pytest.raises(DataError, match="channels"):
        several.encode(volumes(channels=2))
    with pytest.raises(ConfigError, match="for volumes alone"):
        backbones.load(BackboneOptions(name=str(matrix.backbone_folder(variant)), channels=4))
