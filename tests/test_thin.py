"""Thin volumes in bfloat16 on a CPU."""

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from torch import nn

from medtpp.data.batches import BatchStream
from medtpp.seeds import Seeds
from medtpp.training.loop import Group, Schedule, fit
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


class Net(nn.Module):
    """Sees images of 4 x 4 pixels as volumes of 2 x 2 x 4."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv3d(1, 8, 3, padding=1)
        self.computed = set()

    def forward(self, images, targets, visits):
        output = self.layer(images.float().view(-1, 1, 2, 2, 4) / 255)
        self.computed.add(output.dtype)
        return output.float().square().mean(), {}


def test_the_training_loop_keeps_them_exact():
    net, rows = Net(), np.arange(8)
    images = np.random.default_rng(0).integers(0, 256, (8, 1, 4, 4), dtype=np.uint8)
    batches = BatchStream(images, rows, rows, torch.arange(8), 4, Seeds(0))
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    fit(fabric, net, [Group("tuner", dict(net.named_parameters()), 1e-3)], batches, Schedule(2))
    assert net.computed == {torch.float32}


def test_a_layer_may_be_called_by_keyword():
    layer = nn.Conv3d(8, 8, 3, padding=1)
    with exact_thin_convolutions(layer):
        assert layer(input=torch.randn(1, 8, 2, 4, 4)).shape == (1, 8, 2, 4, 4)
