"""The library calls at their limits: what a user's model, images and settings may be like."""

import pytest
import torch
from torch import nn

import medtpp
from medtpp import backbones, tuners
from medtpp.config import BackboneOptions
from medtpp.errors import ConfigError
from plain_networks import made
from small_vits import BRIEF, attached, lora, normalised, state, unit

# What a training script leaves behind


def left_over(model, *, value):
    """The model with gradients of its trained parameters, as an interrupted loop leaves them."""
    for parameter in model.parameters():
        if parameter.requires_grad and value is not None:
            parameter.grad = torch.full_like(parameter, value)
    return model


def test_gradients_that_were_there_take_no_part_in_tpp():
    first, second = left_over(lora(), value=None), left_over(lora(), value=9.0)
    for model in (first, second):
        medtpp.tpp(model, normalised(), **BRIEF)
    after = state(second)
    assert all(torch.equal(value, after[name]) for name, value in state(first).items())
    gradients = [parameter.grad for parameter in second.parameters() if parameter.requires_grad]
    assert all(bool((gradient == 9).all()) for gradient in gradients)


def test_gradients_that_were_there_take_no_part_in_fine_tuning():
    first, second = left_over(attached(), value=None), left_over(attached(), value=9.0)
    held = [parameter.grad for parameter in second.parameters() if parameter.requires_grad]
    for model in (first, second):
        medtpp.finetune(model, unit(), list("ab" * 4), steps=3, batch_size=4, precision="32")
    after = state(second)
    assert all(torch.equal(value, after[name]) for name, value in state(first).items())
    assert all(bool((gradient == 9).all()) for gradient in held)


# Weights in other precisions


@pytest.mark.parametrize("model", [lora, attached, made], ids=["of timm", "attached", "plain"])
@pytest.mark.parametrize(("dtype", "option"), [("bfloat16", "bf16"), ("float16", "16"), ("float64", None)])
def test_weights_must_be_in_float32(model, dtype, option):
    network = model().to(getattr(torch, dtype))
    images = unit() if model is attached else normalised()
    before = state(network)
    for given in (images, images.to(getattr(torch, dtype))):
        with pytest.raises(
            ConfigError, match=rf"is in torch\.{dtype}.*model\.float\(\).*model\.to\(torch\.{dtype}"
        ) as caught:
            medtpp.tpp(network, given, **BRIEF)
        assert (f"precision='{option}'" in str(caught.value)) is (option is not None)
    assert all(torch.equal(value, before[name]) for name, value in state(network).items())
    if model is attached:
        with pytest.raises(ConfigError, match="needs float32"):
            medtpp.finetune(network, images, list("ab" * 4), steps=2)


def test_only_what_is_trained_must_be_in_float32():
    """A model may hold another part, such as an encoder of text, in a precision of its own."""
    model = nn.ModuleDict({"text": nn.Linear(4, 4, dtype=torch.bfloat16).requires_grad_(False), "image": lora()})
    assert medtpp.tpp(model, normalised(), **BRIEF).trained


# What is no adapter folder


def of_size(*sides):
    """A tuned backbone for images or volumes of these sides."""
    volume = {"dims": 3, "patch_size": (4, 8, 8)} if len(sides) == 3 else {}
    return tuners.attach(backbones.load(BackboneOptions(name="test_vit", weights="random", **volume), image_size=sides))


@pytest.mark.parametrize(
    ("sides", "channels", "words"),
    [
        ((8, 16, 16), 1, ["square 2D images", "8x16x16", "medtpp.run"]),
        ((32, 48), 3, ["square 2D images", "32x48", "medtpp.load"]),
        ((32, 32), 4, ["channels=1", "channels=3", "4 channels"]),
        ((32, 32), 0, ["channels=1", "channels=3", "0 channels"]),
        ((32, 32), None, ["Say how many channels"]),
    ],
)
def test_a_model_that_no_folder_describes_is_not_saved(tmp_path, sides, channels, words):
    with pytest.raises(ConfigError) as caught:
        medtpp.save(tmp_path / "adapter", of_size(*sides), channels=channels)
    assert [word for word in words if word not in str(caught.value)] == [], caught.value
    assert not (tmp_path / "adapter").exists()
