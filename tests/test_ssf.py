"""SSF's memory: what it scales is found again for the gradients, not kept, and they are what they were."""

import copy

import pytest
import timm
import torch
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import matrix
from medtpp import backbones, tuners
from medtpp.tuners import ssf
from medtpp.tuners._scaled import Sum, scale_added, scale_kept, scale_norm, scale_shift, weak_channels, witness

VARIANT = "medtpp_test_class_token"
LAYER_SCALE = "medtpp_test_registers"


@register_model
def medtpp_test_deeper(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
    network = VisionTransformer(
        **{"num_classes": 0, "patch_size": 8, "embed_dim": 64, "depth": 4, "num_heads": 2, **kwargs}
    )
    network.pretrained_cfg = {}
    return network


def perturbed(variant):
    """SSF some way from its start; in each scale two channels whose gamma is of no use for finding anything again."""
    tuned = matrix.attach("ssf", variant)
    matrix.perturb(tuned, scale=0.1)
    with torch.no_grad():
        for scale in tuned.scales:
            scale.gamma[0], scale.beta[0] = 0, 0.5
            scale.gamma[1], scale.beta[1] = 1e-9, 0
    return tuned


def gradients(tuned, *, dtype=torch.float64, bfloat16=False, taps=(), **options):
    """Of all targets, for a loss on tokens, or on feature maps alone where taps are given."""
    tuned = tuned.to(dtype)
    images = matrix.images().to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        features = tuned.encode(images, taps=taps, **options)
        tokens = features.maps if taps else (features.tokens,)
        generator = torch.Generator().manual_seed(0)
        loss = sum((part * torch.randn(part.shape, generator=generator, dtype=torch.float64)).sum() for part in tokens)
    loss.backward()
    return {name: p.grad.double() for name, p in tuned.targets.items() if p.grad is not None}


@pytest.fixture
def by_torch(monkeypatch):
    """Call to have everything scaled by torch's own operation from then on."""

    def turn():
        for kind in (ssf.NormScale, ssf.KeptScale, ssf.AddedScale):
            monkeypatch.setattr(kind, "lightly", ssf.ScaleShift.lightly)

    return turn


def errors(found, expected):
    """Of each target's gradient, relative to its length."""
    assert found.keys() == expected.keys()
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()}


class TestGradients:
    @pytest.mark.parametrize("variant", matrix.VARIANTS)
    def test_they_are_those_of_torch(self, variant, by_torch):
        keep = torch.rand(8, matrix.PATCHES, generator=torch.Generator().manual_seed(0)).argsort(dim=1)[:, :5]
        mask = torch.arange(matrix.PATCHES).expand(8, -1) % 3 == 0
        cases = {"whole": {}, "masked": {"mask": mask}, "maps alone": {"taps": [0]}}
        if "drops_tokens" in matrix.capabilities(variant):
            cases["dropped"] = {"keep": keep}
        found = {name: gradients(perturbed(variant), **options) for name, options in cases.items()}
        by_torch()
        for name, options in cases.items():
            expected = gradients(perturbed(variant), **options)
            assert max(errors(found[name], expected).values()) < 1e-11, name

    @pytest.mark.parametrize("variant", [VARIANT, LAYER_SCALE])
    def test_rounding_loses_no_more_than_torch_does(self, variant, by_torch):
        narrow = {"float32": {"dtype": torch.float32}, "bfloat16": {"dtype": torch.float32, "bfloat16": True}}
        found = {name: gradients(perturbed(variant), **options) for name, options in narrow.items()}
        by_torch()
        exact = gradients(perturbed(variant))
        for name, options in narrow.items():
            ours = errors(found[name], exact)
            theirs = errors(gradients(perturbed(variant), **options), exact)
            assert sum(ours.values()) < 1.1 * sum(theirs.values()), name
            assert max(ours.values()) < 1.5 * max(theirs.values()), name

    def test_of_each_operation(self):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

        norm = nn.LayerNorm(4).double().requires_grad_(False)
        linear = nn.Linear(4, 4).double().requires_grad_(False)
        x, before, gamma, beta, factor = draw(2, 3, 4), draw(2, 3, 4), draw(4), draw(4), draw(4).detach()
        with torch.no_grad():
            gamma[0] = 0
        weak = weak_channels(gamma.detach(), beta.detach(), factor).nonzero().flatten()
        assert 0 in weak
        assert len(weak) < 4

        def added(x, before, gamma, beta):
            to = Sum()
            y = scale_added(linear(x), gamma, beta, weak, before, factor, to)
            return witness(before + factor * y, to) ** 2

        def by_torch(x, before, gamma, beta):
            return (before + factor * scale_shift(linear(x), gamma, beta)) ** 2

        assert torch.autograd.gradcheck(added, (x, before, gamma, beta))
        torch.testing.assert_close(added(x, before, gamma, beta), by_torch(x, before, gamma, beta))
        assert torch.autograd.gradcheck(lambda *a: scale_kept(linear(a[0]), *a[1:], weak) ** 2, (x, gamma, beta))
        assert torch.autograd.gradcheck(lambda *a: scale_norm(norm(a[0]), *a[1:], norm, a[0]) ** 2, (x, gamma, beta))

    def test_a_second_backward_pass_over_the_same_graph(self):
        tuned = perturbed(LAYER_SCALE)
        loss = tuned.encode(matrix.images()).tokens.square().sum()
        targets = list(tuned.targets.values())
        first = torch.autograd.grad(loss, targets, retain_graph=True)
        second = torch.autograd.grad(loss, targets)
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, targets)


class TestMemory:
    def kept(self, tuner, bfloat16):
        """Bytes that autograd keeps of an encoding of 8 images."""
        tuned = tuners.attach(backbones.load("medtpp_test_deeper", weights="random", image_size=64), tuner)
        kept, sizes = [], {}

        def pack(value):
            kept.append(value)  # so that no storage takes the place of another
            if value.shape[:1] == (8,):  # what there is of each image
                sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        images = torch.rand(8, 3, *tuned.spec.image_size)
        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            tuned.encode(images)
        return sum(sizes.values())

    @pytest.mark.parametrize("bfloat16", [False, True])
    def test_it_needs_hardly_more_than_bitfit(self, bfloat16):
        assert self.kept("ssf", bfloat16) <= 1.05 * self.kept("bitfit", bfloat16)

    def test_the_goal_can_be_missed(self, by_torch):
        by_torch()
        assert self.kept("ssf", False) > 1.5 * self.kept("bitfit", False)

    def test_nothing_is_left_behind(self):
        tuned = perturbed(VARIANT)
        tuned.encode(matrix.images())
        with tuned.disabled():
            tuned.encode(matrix.images())
        of_encodings = {
            name: [getattr(scale, name, None) for scale in tuned.scales] for name in ("weak", "_before", "_sum")
        }
        assert of_encodings == {name: [None] * len(tuned.scales) for name in of_encodings}
        copy.deepcopy(tuned)  # only leaves of a graph can be copied


def test_blocks_in_which_nothing_is_known_are_scaled_all_the_same():
    """timm's other kinds of block, and layers that change in place what the layer before gave."""
    network = timm.create_model("medtpp_test_deeper", img_size=matrix.SIZE)
    network.blocks[0].mlp.act = nn.ReLU(inplace=True)
    tuned = tuners.attach(backbones.find(network, (matrix.SIZE,) * 2), "ssf")
    assert not any(path.startswith("blocks.0.") for path in (*tuned.layout.branches, *tuned.layout.kept))
    tuned.encode(matrix.images()).tokens.square().sum().backward()
    assert all(parameter.grad.any() for parameter in tuned.targets.values())


def test_called_past_encode_it_scales_all_the_same():
    tuned = perturbed(VARIANT)
    x = torch.randn(2, 5, matrix.WIDTH)
    block = tuned.encoder.blocks[0]
    with torch.no_grad():
        expected = block(x)
    assert torch.equal(block(x), expected)
    block(x).square().sum().backward()
    first = [scale for scale, path in zip(tuned.scales, tuned.paths, strict=True) if path.startswith("blocks.0.")]
    assert all(scale.gamma.grad.any() for scale in first)
