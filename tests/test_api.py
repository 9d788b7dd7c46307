import random
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import medtpp
from medtpp.errors import ConfigError, DataError, OutputError, WeightsError
from medtpp.seeds import Seeds
from plain_networks import changed, state, trainable
from runs import SIZE, backbone_folder, data_folder, done
from small_vits import BRIEF, attached, lora, normalised, random_states, unit, vit


class Pairs(Dataset):
    """Images with labels, as dicts; the one of number `broken` cannot be read."""

    def __init__(self, images, broken=None):
        self.images, self.broken = images, broken

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index == self.broken:
            raise OSError("the disk is gone")
        return {"label": index % 2, "index": torch.tensor([index]), "pixel_values": self.images[index]}


# What is trained


@pytest.mark.parametrize(
    "wrap",
    [
        lambda images: images,
        lambda images: TensorDataset(images, torch.arange(len(images))),
        lambda images: Pairs(images),
        lambda images: DataLoader(TensorDataset(torch.arange(len(images)), images), batch_size=3, shuffle=True),
        lambda images: DataLoader(Pairs(images), batch_size=4, drop_last=True),
    ],
    ids=["tensor", "dataset", "dicts", "loader", "loader of dicts"],
)
def test_exactly_the_trainable_parameters_change(wrap):
    model = lora()
    before, wanted = state(model), trainable(model)
    record = medtpp.tpp(model, wrap(normalised()), **BRIEF)
    assert changed(before, model) == wanted == set(record.trained)
    assert record.untouched == ()
    assert (record.steps, record.card.images, len(record.losses)) == (3, 8, 3)


def test_trainable_parameters_of_any_kind_change():
    """No peft: somebody's own choice, here the biases."""
    model = vit()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("qkv.bias"))
    before = state(model)
    medtpp.tpp(model, normalised(), **BRIEF)
    assert changed(before, model) == trainable(model)


def test_a_head_outside_the_backbone_is_listed_and_left_alone():
    model = lora(classes=3, modules_to_save=["head"])
    before, wanted = state(model), trainable(model)
    heads = {name for name in wanted if "head" in name}
    assert heads
    record = medtpp.tpp(model, normalised(), **BRIEF)
    assert set(record.untouched) == heads
    assert changed(before, model) == wanted - heads == set(record.trained)
    assert trainable(model) == wanted


def test_a_backbone_inside_a_larger_model_is_found():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = lora()
            self.classify = nn.Linear(64, 2)

    model = Classifier()
    record = medtpp.tpp(model, normalised(), **BRIEF)
    assert record.untouched == ("classify.weight", "classify.bias")
    assert all(name.startswith("encoder.") for name in record.trained)


def test_the_pretext_loss_falls():
    model = attached()
    images = nn.functional.interpolate(torch.rand(16, 1, 4, 4, generator=Seeds(1).generator("x")), size=SIZE)
    losses = medtpp.tpp(model, images, steps=40, batch_size=16, learning_rate=1e-2, precision="32").losses
    assert np.mean(losses[-5:]) < np.mean(losses[:5])


# What is as it was


@pytest.mark.parametrize("broken", [None, 5])
def test_all_else_is_as_it_was_after_an_exception_too(broken):
    model = lora(classes=3, modules_to_save=["head"])
    model.base_model.model.blocks[0].eval()
    parameters = dict(model.named_parameters())
    parameters["base_model.model.norm.weight"].grad = torch.ones(64)
    wanted = trainable(model)
    some = min(wanted)
    parameters[some].grad = torch.ones_like(parameters[some])
    modes = {name: module.training for name, module in model.named_modules()}
    grads = {name: parameter.grad for name, parameter in parameters.items()}
    values = {name: gradient.clone() for name, gradient in grads.items() if gradient is not None}
    before, randomness = state(model), random_states()

    if broken is None:
        medtpp.tpp(model, Pairs(normalised()), **BRIEF)
    else:
        with pytest.raises(OSError, match="the disk is gone"):
            medtpp.tpp(model, Pairs(normalised(), broken), **BRIEF)
        assert changed(before, model) == set()

    assert {name: module.training for name, module in model.named_modules()} == modes
    assert trainable(model) == wanted
    assert all(parameter.grad is grads[name] for name, parameter in model.named_parameters())
    assert all(torch.equal(grads[name], value) for name, value in values.items())
    assert random_states() == randomness


def test_the_same_seed_gives_the_same_bits():
    """Whatever the state of the global generators, from which a user's loader and augmentation draw."""

    class Noisy(Pairs):
        def __getitem__(self, index):
            noise = torch.randn(()) + np.random.normal() + random.gauss(0, 1)  # noqa: NPY002
            return self.images[index] + 0.01 * noise

    def primed(images, seed):
        torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        model = lora()
        medtpp.tpp(model, images, seed=seed, **BRIEF)
        return state(model)

    for images in (normalised(), DataLoader(Noisy(normalised()), batch_size=4, shuffle=True)):
        first, second, other = primed(images, 0), primed(images, 0), primed(images, 1)
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not all(torch.equal(first[name], other[name]) for name in first)


# What is refused


class Stream(IterableDataset):
    def __iter__(self):
        yield from normalised()


@pytest.mark.parametrize(
    ("model", "images", "words"),
    [
        (attached, lambda: unit() * 255, ["[0, 1]", "range from", "Divide by 255"]),
        (attached, lambda: normalised()[:, :1], ["[0, 1]", "do not normalise"]),
        (attached, lambda: (unit() * 255).byte(), ["uint8", "floating point"]),
        (lora, lambda: (unit() * 255).byte(), ["uint8", "floating point"]),
        (lora, lambda: normalised().index_fill(0, torch.tensor([7]), torch.nan), ["NaN or infinite"]),
        (lora, lambda: normalised()[0], ["No image tensor (B, C, H, W)"]),
        (lora, lambda: normalised()[:0], ["There are no images"]),
        (lora, lambda: DataLoader(normalised(2), batch_size=4, drop_last=True), ["no batches", "drop_last"]),
        (lora, lambda: [{"path": "a.png"}], ["No image tensor (C, H, W)"]),
        (lora, Stream, ["no length", "iterable"]),
        (lora, lambda: DataLoader(Stream(), batch_size=2), ["no length", "iterable"]),
        (lambda: vit().requires_grad_(False), normalised, ["No parameter of the model requires gradients"]),
        (lambda: nn.ModuleList([lora(), lora()]), normalised, ["holds 2 backbones"]),
        (lambda: _only_head(lora(3, modules_to_save=["head"])), normalised, ["takes part in the pretext task", "head"]),
    ],
)  # fmt: skip
def test_what_cannot_be_primed_is_refused(model, images, words):
    network = model()
    before, wanted, modes = state(network), trainable(network), [module.training for module in network.modules()]
    with pytest.raises(ConfigError) as caught:
        medtpp.tpp(network, images(), **BRIEF)
    assert [word for word in words if word not in str(caught.value)] == [], caught.value
    assert changed(before, network) == set()
    assert (trainable(network), [module.training for module in network.modules()]) == (wanted, modes)


def _only_head(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("modules_to_save" in name)
    return model


def test_images_of_another_size():
    medtpp.tpp(vit(dynamic_img_size=True), normalised(size=48), **BRIEF)
    with pytest.raises(DataError, match=r"48x48 pixels.*32x32"):
        medtpp.tpp(vit(dynamic_img_size=False), normalised(size=48), **BRIEF)


def test_raw_grey_levels_get_a_warning():
    with pytest.warns(UserWarning, match="as raw grey levels do"):
        medtpp.tpp(lora(), normalised().abs() * 100, **BRIEF)


def test_options_are_checked():
    with pytest.raises(ConfigError, match="stepz") as caught:
        medtpp.tpp(lora(), normalised(), stepz=3, weight_decay=-1)
    assert "weight_decay" in str(caught.value)
    assert "head_warmup" in str(caught.value)  # among those that are known
    with pytest.raises(ConfigError, match=r"no pretext called 'mea'.*'mae'"):
        medtpp.tpp(lora(), normalised(), "mea")


# Fine-tuning, saving, predicting


def test_fine_tune_save_load_predict(tmp_path):
    model = attached()
    record = medtpp.tpp(model, unit(), **BRIEF)
    frozen = model.source_hash()
    labels = ["benign", "malignant"] * 4
    task = medtpp.finetune(model, unit(), labels, steps=4, batch_size=4, precision="32")
    assert model.source_hash() == frozen
    with torch.no_grad():
        expected = task.probabilities(task(model.encode(unit())))
    folder = medtpp.save(tmp_path / "adapter", model, task, tpp=record)
    adapter = medtpp.load_adapter(folder)
    with torch.no_grad():
        found = adapter.task.probabilities(adapter.task(adapter.backbone.encode(unit())))
    assert torch.equal(found, expected)
    assert adapter.card.tpp.steps == 3

    table = medtpp.predict(adapter, data_folder())
    assert table.classes == ("benign", "malignant")
    assert len(table) == len(list((data_folder() / "images").iterdir()))
    first = sorted((data_folder() / "images").iterdir())[0]
    np.testing.assert_allclose(medtpp.predict(adapter, str(first)).probabilities[0], table.probabilities[0], atol=1e-6)
    done("predict", folder, first, "-o", tmp_path / "p.csv")  # the command line reads it too

    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(DataError, match=re.escape("x.png")):
        medtpp.predict(adapter, [first, tmp_path / "x.png"])
    with pytest.raises(OutputError, match="not empty"):
        medtpp.save(folder, model)
    medtpp.save(folder, model, overwrite=True)
    assert not (folder / "head.safetensors").exists()
    with pytest.raises(WeightsError, match="not fine-tuned"):
        medtpp.predict(medtpp.load_adapter(folder), first)


def test_fine_tuning_has_the_same_bits_for_the_same_seed():
    def head(seed):
        torch.rand(1)
        model = attached("linear")
        task = medtpp.finetune(model, unit(), list("abab" * 2), seed=seed, steps=2, precision="32")
        return task.linear.weight.detach()

    first = head(0)
    assert torch.equal(first, head(0))
    assert not torch.equal(first, head(1))


def test_fine_tuning_leaves_the_random_state_alone():
    model = attached()
    randomness = random_states()
    medtpp.finetune(model, unit(), list("abab" * 2), steps=2, precision="32")
    assert random_states() == randomness


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (unit, ["a", "b"], "8 images and 2 labels"),
        (unit, torch.arange(8) % 2, "names of classes; here is a Tensor"),  # each would be a class of its own
        (unit, ["a"] * 8, "two classes"),
        (lambda: unit() * 255, ["a", "b"] * 4, "Divide by 255"),
        (lambda: (unit() * 255).byte(), ["a", "b"] * 4, "Divide by 255"),
        (lambda: unit().numpy(), ["a", "b"] * 4, "of type ndarray: torch.from_numpy(images).float()"),
        (lambda: TensorDataset(unit()), ["a", "b"] * 4, "of type TensorDataset: torch.stack("),
        (lambda: unit()[:, 0], ["a", "b"] * 4, "images (N, C, H, W) for this model, not (8, 32, 32)"),
    ],
)
def test_fine_tuning_refuses_what_does_not_fit(images, labels, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        medtpp.finetune(attached(), images(), labels, steps=2)


def test_fine_tuning_for_segmentation_is_a_run():
    with pytest.raises(ConfigError, match=r"For segmentation use medtpp\.run"):
        medtpp.finetune(attached(), unit(), ["a", "b"] * 4, task="segmentation")


def test_fine_tuning_takes_what_attach_gave():
    with pytest.raises(ConfigError, match=re.escape("medtpp.attach")):
        medtpp.finetune(lora(), normalised(), ["a", "b"] * 4)


def test_a_network_of_memory_cannot_be_saved(tmp_path):
    from medtpp import backbones

    model = medtpp.attach(backbones.find(vit(), (SIZE, SIZE)))
    with pytest.raises(WeightsError, match=re.escape("medtpp.load")):
        medtpp.save(tmp_path / "adapter", model, channels=1)
    assert not (tmp_path / "adapter").exists()


def test_the_example_of_the_package_runs(tmp_path, monkeypatch):
    example = "\n".join(line[4:] for line in medtpp.__doc__.splitlines() if line.startswith("    "))
    assert example.count("medtpp.") == 7
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new_images").symlink_to(data_folder() / "images")
    for call in ("tpp(model, images", "finetune(model, some_images, labels"):
        assert call in example
        example = example.replace(call, f"{call}, steps=2, precision='32'")
    example = example.replace('"medtpp_vit_tiny"', repr(str(backbone_folder())))
    names = {"images": unit(), "some_images": unit(4), "labels": ["a", "b", "a", "b"]}
    exec(example, names)
    assert len(names["table"]) == len(list((data_folder() / "images").iterdir()))


def test_public_names_are_there():
    assert all(getattr(medtpp, name) is not None for name in medtpp.__all__)
    assert set(medtpp.__all__) == set(dir(medtpp))
    with pytest.raises(AttributeError, match="no attribute 'tp'"):
        medtpp.tp  # noqa: B018
