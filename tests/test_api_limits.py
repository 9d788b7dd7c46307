"""The library calls at their limits: what a user's model, images and settings may be like."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import medtpp
from medtpp import backbones, tuners
from medtpp.config import BackboneOptions
from medtpp.errors import ConfigError, DataError, MedtppError, OutputError
from plain_networks import made, state
from small_vits import BRIEF, attached, lora, normalised, unit

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


@pytest.mark.parametrize("model", [lora, attached])
def test_a_script_without_gradients_does_no_harm(model):
    images = unit() if model is attached else normalised()
    first, second = model(), model()
    medtpp.tpp(first, images, **BRIEF)
    with torch.no_grad():
        medtpp.tpp(second, images, **BRIEF)
        if model is attached:
            medtpp.finetune(second, images, list("ab" * 4), steps=2, precision="32")
        assert not torch.is_grad_enabled()
    if model is attached:
        medtpp.finetune(first, images, list("ab" * 4), steps=2, precision="32")
    after = state(second)
    assert all(torch.equal(value, after[name]) for name, value in state(first).items())


def test_inference_mode_is_refused():
    model = attached()
    with torch.inference_mode():
        with pytest.raises(ConfigError, match=r"medtpp\.tpp trains.*call it outside"):
            medtpp.tpp(model, unit(), **BRIEF)
        with pytest.raises(ConfigError, match=r"medtpp\.finetune trains.*call it outside"):
            medtpp.finetune(model, unit(), list("ab" * 4), steps=2)


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


# Data sets


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_arrays_are_taken_as_a_loader_takes_them(dtype):
    arrays = normalised().numpy().astype(dtype)
    items = [{"path": "a.png", "image": array, "label": np.int64(1)} for array in arrays]
    models = [lora(), lora(), lora()]
    for model, images in zip(models, (normalised(), [(array, 0) for array in arrays], items), strict=True):
        medtpp.tpp(model, images, **BRIEF)
    first, *others = map(state, models)
    assert all(torch.equal(value, other[name]) for other in others for name, value in first.items())


def test_of_items_the_images_alone_are_put_together():
    """What a loader of torch would refuse, such as a picture beside the image, does no harm."""
    items = [{"image": image, "picture": Image.new("L", (4, 4)), "boxes": [0] * n} for n, image in enumerate(unit())]
    assert medtpp.tpp(attached(), items, **BRIEF).trained


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ((Image.new("L", (4, 4)), 3), ["tuple of PIL.Image, int", "Add ToTensor()"]),
        (torch.zeros(64, 64), ["tensor (64, 64)", "Add a channel: x[None]"]),
        (np.zeros((64, 64), np.float32), ["array (64, 64)", "Add a channel: x[None]"]),
        ({"path": "a.png", "sizes": (1, 2)}, ["dict of path: str, sizes: tuple of int, int."]),
        (np.zeros((3, 8, 8), np.uint8), ["uint8", "floating point"]),
    ],
)
def test_items_without_images_are_described(item, words):
    with pytest.raises(ConfigError) as caught:
        medtpp.tpp(lora(), [item] * 8, **BRIEF)
    assert [word for word in words if word not in str(caught.value)] == [], caught.value


def cut(images, number):
    """The images, of which one lacks a row."""
    return [image[:, 1:] if place == number else image for place, image in enumerate(images)]


@pytest.mark.parametrize(
    "images",
    [
        lambda: cut(normalised(), 3),
        lambda: cut(normalised(64), 30),  # which is not looked at before
        lambda: DataLoader(cut(normalised(), 3), batch_size=1),
    ],
    ids=["among the first", "later", "loader"],
)
def test_images_of_different_sizes_are_told(images):
    with pytest.raises(DataError, match=r"different sizes: (3x32x32, 3x31x32|3x31x32, 3x32x32)\. Resize or crop"):
        medtpp.tpp(lora(), images(), **{**BRIEF, "steps": 16})


@pytest.mark.parametrize("wrap", [list, lambda images: DataLoader(images, batch_size=4)], ids=["data set", "loader"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_images_that_are_not_finite_are_told_wherever_they_are(wrap, value):
    images = normalised(64)
    images[30, 0, 5, 5] = value
    model = lora()
    before = state(model)
    with pytest.raises(ConfigError, match="images hold NaN or infinite values") as caught:
        medtpp.tpp(model, wrap(images), **{**BRIEF, "steps": 20})
    assert "--" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_messages_name_arguments_and_no_options_of_the_command_line(tmp_path):
    with pytest.raises(MedtppError, match='precision="32"') as caught:
        medtpp.tpp(lora(), normalised(), learning_rate=1e30, head_learning_rate=1e30, **{**BRIEF, "steps": 30})
    assert "--" not in str(caught.value)
    model = attached()
    (tmp_path / "a file").write_text("")
    with pytest.raises(OutputError, match=r"not empty\. Replace it with overwrite=True") as caught:
        medtpp.save(tmp_path, model, channels=1)
    assert "resume" not in str(caught.value)
    with pytest.raises(OutputError, match=r"not made by medtpp, so overwrite=True does not touch it"):
        medtpp.save(tmp_path, model, channels=1, overwrite=True)


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


# Seeds in the folder


@pytest.mark.parametrize("tuner", ["lora", "fourierft"])
def test_a_tuner_of_another_seed_is_loaded_as_it_was(tmp_path, tuner):
    """FourierFT's frequencies are no parameters: they are drawn again from the seed."""
    model = attached(tuner, seed=3)
    medtpp.tpp(model, unit(), seed=5, **BRIEF)
    card = medtpp.load_adapter(medtpp.save(tmp_path / "first", model)).card
    assert (card.seed, card.tuner_seed) == (5, 3)
    task = medtpp.finetune(model, unit(), list("ab" * 4), steps=2, precision="32", seed=3)
    adapter = medtpp.load_adapter(medtpp.save(tmp_path / "second", model, task))
    assert (adapter.card.seed, adapter.card.tuner_seed) == (3, None)
    with torch.no_grad():
        assert torch.equal(adapter.backbone.encode(unit()).tokens, model.eval().encode(unit()).tokens)
