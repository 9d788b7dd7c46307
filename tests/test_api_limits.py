"""The library calls at their limits: what a user's model, images and settings may be like."""

import pytest
import torch

import medtpp
from medtpp import backbones, tuners
from medtpp.config import BackboneOptions
from medtpp.errors import ConfigError
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
