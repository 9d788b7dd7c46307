"""Thin volumes in bfloat16 on a CPU."""

import pytest
import torch
from torch import nn

from medtpp.training.thin import exact_thin_convolutions


def gradient(layer, images):
    """Of the kernel, and the type that the layer computes in."""
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(images)
        output.float().square().mean().backward()
    return layer.weight.grad.clone(), output.dtype


@pytest.mark.parametrize(("kernel", "depth"), [(3, 2), (3, 1), (5, 3), (5, 4)])
def test_their_gradients_are_those_of_float32(kernel, depth):
    layer = nn.Conv3d(16, 16, kernel, padding=kernel // 2)
    images = torch.randn(2, 16, depth, 8, 8)
    layer(images).square().mean().backward()
    exact = layer.weight.grad.clone()
    with exact_thin_convolutions(nn.Sequential(layer)):
        found, computed = gradient(layer, images)
    assert computed == torch.float32
    assert torch.equal(found, exact)


def test_other_convolutions_stay_as_they_are():
    thick, flat = nn.Conv3d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    frozen = nn.Conv3d(8, 8, 3, padding=1).requires_grad_(False)
    with exact_thin_convolutions(nn.ModuleList([thick, flat, frozen])), torch.autocast("cpu", torch.bfloat16):
        assert thick(torch.randn(1, 8, 3, 4, 4)).dtype == torch.bfloat16
        assert flat(torch.randn(1, 8, 2, 4)).dtype == torch.bfloat16
        assert frozen(torch.randn(1, 8, 2, 4, 4)).dtype == torch.bfloat16
        with torch.no_grad():
            assert thick(torch.randn(1, 8, 2, 4, 4)).dtype == torch.bfloat16


def test_autocast_is_as_before_after_an_error_and_the_layer_too():
    layer = nn.Conv3d(8, 8, 3, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        with exact_thin_convolutions(layer):
            with pytest.raises(RuntimeError, match="channels"):
                layer(torch.randn(1, 7, 2, 4, 4))
            assert torch.is_autocast_enabled("cpu")
            assert layer(torch.randn(1, 8, 3, 4, 4)).dtype == torch.bfloat16
        with torch.no_grad():
            assert layer(torch.randn(1, 8, 2, 4, 4)).dtype == torch.bfloat16
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks
