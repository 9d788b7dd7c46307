"""Segmentation: logits of the image's size for any patch, a loss that does not depend on how batches are cut."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from matrix import backbone_folder
from medtpp import backbones
from medtpp.backbones import Features, Spec
from medtpp.errors import ConfigError
from medtpp.seeds import Seeds
from medtpp.tasks.decoders import UNETR, token_map
from medtpp.tasks.segmentation import Segmentation, SegmentationOptions, soft_dice_loss
from medtpp.training.thin import exact_thin_convolutions

WIDTH = 24
HEADS = [
    {"head": "light"},
    {"head": "unetr", "feature_size": 4},
    {"head": "unetr", "feature_size": 4, "image_skip": False},
]
# Patch and grid: the usual, an odd patch, anisotropic ones, a patch of one slice.
SHAPES = [
    ((16, 16), (2, 3)),
    ((14, 14), (2, 2)),
    ((6, 10), (3, 2)),
    ((4, 8, 8), (2, 3, 2)),
    ((1, 8, 8), (3, 2, 2)),
    ((5, 7, 12), (2, 2, 2)),
]


def spec_of(patch, grid, depth=12, channels=1, capabilities=frozenset({"dense"})):
    size = tuple(side * count for side, count in zip(patch, grid, strict=True))
    return Spec(
        name="test", family="test", architecture="test", dims=len(patch), channels=channels, mean=(0.5,) * channels,
        std=(0.5,) * channels, image_size=size, patch=patch, width=WIDTH, depth=depth, prefix=1, pooling="mean",
        objective="pixels", capabilities=capabilities, source="", sha256="",
    )  # fmt: skip


def features_of(spec, taps, batch=2, channels=1):
    with Seeds(3).scope("features"):
        images = torch.rand(batch, channels, *spec.image_size)
        tokens = torch.randn(batch, spec.prefix + math.prod(spec.grid), spec.width)
        maps = tuple(torch.randn(batch, spec.width, *spec.grid) for _ in taps)
    return Features(images, tokens, spec.prefix, spec.grid, maps, (spec.patch,) * len(taps))


def task_of(spec, structures=2, overlap=False, seed=0, **options):
    names = ("liver", "tumour", "cyst")[:structures]
    return Segmentation(SegmentationOptions(**options), spec, names, overlap, Seeds(seed))


def dice_of(predicted, truth):
    return float(2 * (predicted & truth).sum() / (predicted.sum() + truth.sum()))


@pytest.mark.parametrize("options", HEADS, ids=["light", "unetr", "no-image"])
@pytest.mark.parametrize(("patch", "grid"), SHAPES, ids=str)
def test_logits_have_the_size_of_the_image_and_every_parameter_learns(patch, grid, options):
    spec = spec_of(patch, grid)
    task = task_of(spec, **options)
    logits = task(features_of(spec, task.taps))
    assert logits.shape == (2, 3, *spec.image_size)
    targets = torch.randint(0, 3, (2, *spec.image_size), generator=Seeds(0).generator("targets"))
    task.loss(logits, targets).backward()
    silent = [name for name, weights in task.named_parameters() if weights.grad is None or not weights.grad.any()]
    assert not silent


@pytest.mark.parametrize(
    ("depth", "patch", "taps"),
    [(12, 16, (3, 6, 9)), (24, 16, (6, 12, 18)), (12, 8, (4, 8)), (12, 32, (2, 4, 7, 9)), (2, 16, (0, 1)), (12, 2, ())],
)
def test_taps_are_spread_over_the_blocks(depth, patch, taps):
    spec = spec_of((patch, patch), (2, 2), depth)
    task = task_of(spec, head="unetr", feature_size=2)
    assert task.taps == taps
    features = features_of(spec, taps)
    for tapped in features.maps:
        tapped.requires_grad_()
    task(features).square().sum().backward()
    assert all(tapped.grad is not None and tapped.grad.any() for tapped in features.maps)


def test_a_decoder_of_12_blocks_and_patches_of_16_is_that_of_monai():
    from monai.networks import nets

    reference = nets.UNETR(1, 3, (32, 32, 32), hidden_size=WIDTH, mlp_dim=8, num_heads=2, norm_name="instance")
    theirs = sum(
        weights.numel() for name, weights in reference.named_parameters() if name.startswith(("encoder", "decoder"))
    )
    ours = sum(weights.numel() for weights in UNETR(spec_of((16, 16, 16), (2, 2, 2)), Seeds(0)).parameters())
    assert ours == theirs


@pytest.mark.parametrize(("patch", "grid"), [((4, 8), (3, 2)), ((4, 8, 8), (2, 3, 4))], ids=str)
def test_each_token_draws_where_its_patch_lies(patch, grid):
    spec = spec_of(patch, grid)
    features = features_of(spec, (), batch=1)
    # The last patch of the first row: another one where axes are confused.
    last = (*(0 for _ in grid[:-1]), grid[-1] - 1)
    assert torch.equal(token_map(features)[(0, slice(None), *last)], features.patches[0, grid[-1] - 1])
    features.tokens.requires_grad_()
    centre = tuple(side * index + side // 2 for side, index in zip(patch, last, strict=True))
    task_of(spec, head="light")(features)[(0, 0, *centre)].backward()
    assert features.tokens.grad[0, spec.prefix :].abs().sum(dim=-1).argmax() == grid[-1] - 1


def test_parts_of_a_patch_are_in_the_order_of_pixels():
    spec = spec_of((4, 4), (2, 2))
    task = task_of(spec, structures=1, head="light")
    with torch.no_grad():
        task.head.linear.weight.zero_()
        task.head.linear.bias.copy_(torch.arange(32.0))
    logits = task(features_of(spec, ()))
    assert torch.equal(logits[0, 0, :4, :4], torch.arange(16.0).reshape(4, 4))
    assert torch.equal(logits[0, 1, 4:, 4:], torch.arange(16.0, 32.0).reshape(4, 4))


def test_without_the_image_skip_the_image_changes_nothing():
    spec = spec_of((8, 8), (2, 2))
    for image_skip in (True, False):
        task = task_of(spec, head="unetr", feature_size=4, image_skip=image_skip)
        features = features_of(spec, task.taps)
        before = task(features)
        features.images.copy_(torch.rand_like(features.images))
        assert torch.equal(before, task(features)) != image_skip


@pytest.mark.parametrize("given", [1, 3])
def test_grey_and_colour_images_are_matched_to_the_backbone(given):
    spec = spec_of((8, 8), (2, 2), channels=3)
    task = task_of(spec, head="unetr", feature_size=4)
    assert task(features_of(spec, task.taps, channels=given)).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("options", [{"head": "light"}, {"head": "unetr"}], ids=["light", "unetr"])
def test_overfitting_one_batch_through_a_backbone(options):
    backbone = backbones.load(str(backbone_folder("medtpp_test_registers")))
    task = task_of(backbone.spec, **options)
    rows, columns = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    masks = torch.stack([((rows - y) ** 2 + (columns - 16) ** 2 < 60) * (1 + (columns > 15)) for y in (9, 22)])
    noise = torch.rand(2, 1, 32, 32, generator=Seeds(0).generator("noise"))
    images = 0.5 * noise + 0.25 * masks[:, None]
    features = backbone.encode(images, taps=task.taps)
    optimiser = torch.optim.AdamW(task.parameters(), 1e-2)

    def worst():
        found = task.probabilities(task(features)).argmax(dim=1)
        return min(dice_of(found == index, masks == index) for index in (1, 2))

    assert worst() < 0.5
    for _ in range(40):
        optimiser.zero_grad()
        task.loss(task(features), masks).backward()
        optimiser.step()
    assert worst() > 0.9


@pytest.mark.parametrize("overlap", [False, True])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), parts=st.sampled_from([1, 2, 3, 6]), empty=st.booleans())
def test_a_batch_cut_in_parts_has_the_same_loss(overlap, seed, parts, empty):
    generator = torch.Generator().manual_seed(seed)
    task = task_of(spec_of((4, 4), (2, 2)), overlap=overlap, head="light", class_weights=(0.5, 3.0, 7.0)[overlap:])
    logits = torch.randn(6, 3 - overlap, 8, 8, generator=generator) * 3
    if overlap:
        targets = torch.randint(0, 2, logits.shape, generator=generator)
    else:
        targets = torch.randint(0, 3, (6, 8, 8), generator=generator)
    if empty:  # cases with no structure, and with one of two
        targets[0] = 0
        targets[1][targets[1] == 2] = 0
        targets[1][-1] = 0
    cut = [task.loss(*pair) for pair in zip(logits.chunk(parts), targets.chunk(parts), strict=True)]
    torch.testing.assert_close(torch.stack(cut).mean(), task.loss(logits, targets))


def test_dice_of_hand_made_cases():
    truth = torch.zeros(2, 2, 1, 4)
    truth[0, 0, 0, :2] = 1  # the second case and the second structure show nothing
    predicted = torch.zeros(2, 2, 1, 4)
    predicted[0, 0, 0] = torch.tensor([1.0, 0.5, 0.5, 0.0])
    predicted[1] = 1.0
    assert soft_dice_loss(predicted, truth).item() == pytest.approx((1 - 2 * 1.5 / (2 + 2)) / 2)
    assert soft_dice_loss(truth, truth).item() == 0.0


def test_the_background_counts_in_the_cross_entropy_and_not_in_dice():
    task = task_of(spec_of((4, 4), (2, 2)), head="light")
    targets = torch.zeros(1, 8, 8, dtype=torch.uint8)
    targets[:, :2] = 1
    dice = 2 * 16 / 3 / (64 / 3 + 16)  # of the first structure alone: a third everywhere, on a quarter of the pixels
    logits = torch.zeros(1, 3, 8, 8).bfloat16()  # in which 1.1 would be 1.1016
    assert task.loss(logits, targets).item() == pytest.approx(math.log(3) + 1 - dice)


@pytest.mark.parametrize("overlap", [False, True])
def test_the_loss_of_a_perfect_prediction_is_zero_and_absent_structures_are_unlearnt(overlap):
    task = task_of(spec_of((4, 4), (2, 2)), overlap=overlap, head="light")
    targets = torch.zeros(1, 8, 8, dtype=torch.uint8)
    targets[0, :4] = 1
    regions = torch.stack([targets == 1, targets == 2], dim=1)
    perfect = torch.stack([targets == 0, targets == 1, targets == 2], dim=1)[:, overlap:].float() * 200 - 100
    goal = regions if overlap else targets
    assert task.loss(perfect, goal).item() == pytest.approx(0, abs=1e-6)
    logits = torch.zeros_like(perfect).requires_grad_()
    task.loss(logits, goal).backward()
    assert (logits.grad[:, -1] > 0).all()  # the structure that is not there goes down everywhere


def test_overlapping_structures_are_independent():
    """A pixel may be of both: tumour core within whole tumour."""
    task = task_of(spec_of((4, 4), (2, 2)), overlap=True, head="light")
    truth = torch.zeros(1, 2, 8, 8)
    truth[:, 0, 2:7], truth[:, 1, 3:5] = 1, 1
    logits = (truth * 8 - 4).bfloat16()
    probabilities = task.probabilities(logits)
    assert probabilities.dtype == torch.float32
    assert torch.equal(probabilities > 0.5, truth.bool())
    changed = truth.clone()
    changed[:, 1] = 0
    assert task.loss(logits, changed) > task.loss(logits, truth)


def test_probabilities_sum_to_one_over_background_and_structures():
    task = task_of(spec_of((4, 4), (2, 2)), head="light")
    probabilities = task.probabilities(torch.randn(2, 3, 8, 8).bfloat16())
    assert probabilities.dtype == torch.float32
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(2, 8, 8))


@pytest.mark.parametrize("overlap", [False, True])
def test_a_weight_scales_the_cost_of_missing_a_structure(overlap):
    spec, targets = spec_of((4, 4), (2, 2)), torch.zeros(1, 8, 8, dtype=torch.long)
    targets[:, :2] = 1
    logits = torch.zeros(1, 3 - overlap, 8, 8)
    if overlap:
        targets = torch.stack([targets == 1, targets == 2], dim=1)
    plain = task_of(spec, overlap=overlap, head="light")
    weighted = task_of(
        spec, overlap=overlap, head="light", class_weights=(1.0, 5.0, 1.0) if not overlap else (5.0, 1.0)
    )
    # A quarter of the pixels are of the first structure; with overlap the mean is also over the two structures.
    extra = 4 * 0.25 * (math.log(2) / 2 if overlap else math.log(3))
    assert (weighted.loss(logits, targets) - plain.loss(logits, targets)).item() == pytest.approx(extra, rel=1e-5)


@pytest.mark.parametrize("options", HEADS, ids=["light", "unetr", "no-image"])
def test_the_start_depends_on_the_seeds_alone(options):
    spec = spec_of((4, 8, 8), (2, 2, 2))
    first = task_of(spec, **options).state_dict()
    torch.randn(7)
    again, other = task_of(spec, **options).state_dict(), task_of(spec, seed=1, **options).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert any(not torch.equal(value, other[name]) for name, value in first.items())


def test_making_a_head_draws_nothing_from_the_global_stream():
    state = torch.random.get_rng_state()
    for options in HEADS:
        task_of(spec_of((4, 4), (2, 2)), **options)
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_decoder_starts_the_same_whatever_the_structures_are():
    """So that a decoder of TPP's and one of the plain start differ by TPP alone."""
    spec = spec_of((8, 8), (2, 2))
    decoder = UNETR(spec, Seeds(0), 4).state_dict()
    for structures in (1, 3):
        other = task_of(spec, structures, head="unetr", feature_size=4).decoder.state_dict()
        assert all(torch.equal(value, other[name]) for name, value in decoder.items())


@pytest.mark.parametrize("options", HEADS, ids=["light", "unetr", "no-image"])
@pytest.mark.parametrize(("patch", "grid"), [((14, 14), (2, 2)), ((4, 8, 8), (2, 2, 2))], ids=str)
def test_bfloat16_autocast_gives_a_float32_loss_near_the_exact_one(patch, grid, options):
    spec = spec_of(patch, grid)
    task = task_of(spec, **options)
    features = features_of(spec, task.taps)
    targets = torch.randint(0, 3, (2, *spec.image_size), generator=Seeds(0).generator("targets"))
    exact = task.loss(task(features), targets)
    with exact_thin_convolutions(task), torch.autocast("cpu", torch.bfloat16):
        logits = task(features)
        loss = task.loss(logits, targets)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.02)
    loss.backward()
    assert all(weights.grad.isfinite().all() for weights in task.parameters())


def test_parameter_groups_hold_everything_once():
    spec = spec_of((8, 8), (2, 2))
    light, unetr = task_of(spec, head="light"), task_of(spec, head="unetr", feature_size=4)
    assert set(light.groups()) == {"head"}
    groups = unetr.groups()
    assert set(groups) == {"decoder", "head"}
    assert set(groups["head"]) == {"head.weight", "head.bias"}
    assert {**groups["decoder"], **groups["head"]} == dict(unetr.named_parameters())
    assert sum(weights.numel() for weights in light.parameters()) < 10_000


def test_mistakes_are_reported_together():
    spec = spec_of((8, 8), (2, 2), capabilities=frozenset())
    with pytest.raises(ConfigError) as raised:
        task_of(spec, head="light", class_weights=(1.0, 2.0))
    assert "grid of tokens" in str(raised.value)
    assert "give 3: background, liver, tumour" in str(raised.value)


def test_patches_of_one_pixel_leave_nothing_to_decode():
    spec = spec_of((1, 1), (4, 4))
    with pytest.raises(ConfigError, match="head=light"):
        task_of(spec, head="unetr")
    assert task_of(spec, head="light")(features_of(spec, ())).shape == (2, 3, 4, 4)
