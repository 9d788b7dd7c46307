"""DoRA, where it is more than LoRA."""

import pytest
import torch

import matrix
from medtpp import tuners
from medtpp.tuners.lora import DoRAOptions

VARIANT = "medtpp_test_registers"
MAGNITUDE = "lora_magnitude_vector"


@pytest.fixture(scope="module")
def images():
    return matrix.images()


def weight_of(model, path):
    """(O, I), by the paper's formula."""
    layer = model.encoder.get_submodule(path)
    low, high = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    direction = layer.base_layer.weight + layer.scaling["default"] * high @ low
    return layer.lora_magnitude_vector["default"].weight[:, None] * direction / direction.norm(dim=1, keepdim=True)


@torch.no_grad()
def test_merged_weights_are_those_of_the_paper():
    model = tuners.attach(matrix.load(VARIANT), DoRAOptions(rank=3, alpha=5.0))
    matrix.perturb(model)
    merged = model.merged()
    paths = model.layout.paths("attention.qkv", "attention.projection", "mlp.in", "mlp.out")
    assert len(paths) == 4 * matrix.DEPTH
    for path in paths:
        weight = merged.encoder.get_submodule(path).weight
        torch.testing.assert_close(weight, weight_of(model, path), atol=1e-6, rtol=1e-5)


def test_the_lengths_are_targets_and_start_as_those_of_the_weights(images):
    model = matrix.attach("dora", VARIANT)
    lengths = {name: parameter for name, parameter in model.targets.items() if MAGNITUDE in name}
    assert len(lengths) == 4 * matrix.DEPTH
    source = matrix.load(VARIANT).encoder
    for name, parameter in lengths.items():
        path = name[: name.index(f".{MAGNITUDE}")].removeprefix("source.encoder.")
        torch.testing.assert_close(parameter.detach(), source.get_submodule(path).weight.norm(dim=1))
    model.encode(images).tokens.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in lengths.values())


@torch.no_grad()
def test_the_start_is_the_plain_backbone_in_bfloat16_too(images):
    """The lengths of the weights are taken in float32, whatever the type of the layer's input."""
    model, plain = matrix.attach("dora", VARIANT), matrix.load(VARIANT)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.encode(images).tokens, plain.encode(images).tokens)
