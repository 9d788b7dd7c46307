"""`medtpp.tpp` on networks that medtpp does not know."""

import numpy as np
import peft
import pytest
import timm
import torch
from monai.networks.nets import SwinUNETR
from torch import nn

import medtpp
from medtpp import backbones
from medtpp.seeds import Seeds
from medtpp.training.tpp import natural_pretext
from plain_networks import BRIEF, DEEP, SIZE, Maps, Mask, Net, changed, images, made, modes, state, swin, trainable

# What is found out about a network, and what is trained


@pytest.mark.parametrize(
    ("network", "dims", "pretext", "patch"),
    [
        (lambda: made(Net), 2, "byol", (SIZE,) * 2),
        (lambda: made(Net, 3), 3, "byol", (DEEP,) * 3),
        (lambda: made(Mask), 2, "restoration", (1, 1)),
        (lambda: made(Mask, 3), 3, "restoration", (1, 1, 1)),
        (lambda: made(Maps, trained="last"), 2, "restoration", (4, 4)),
        (lambda: made(Maps, 3, trained="last"), 3, "restoration", (4, 4, 4)),
        (swin, 2, "byol", (SIZE,) * 2),
    ],
    ids=["vector", "vector in 3D", "mask", "mask in 3D", "maps", "maps in 3D", "ModelOutput"],
)  # fmt: skip
def test_exactly_the_trainable_parameters_change(network, dims, pretext, patch):
    model = network()
    before, wanted, were = state(model), trainable(model), modes(model)
    record = medtpp.tpp(model, images(dims), **BRIEF)
    assert record.card.pretext["name"] == pretext
    assert changed(before, model) == wanted == set(record.trained)
    assert (trainable(model), modes(model)) == (wanted, were)
    assert backbones.find(model, tuple(images(dims).shape[2:])).spec.patch == patch


@pytest.mark.parametrize(
    "pretext", ["byol", "simclr", "moco_v3", {"name": "sum", "parts": {"byol": {}, "moco_v3": {}}}]
)
def test_tasks_on_vectors(pretext):
    model = made()
    before = state(model)
    record = medtpp.tpp(model, images(count=32), pretext, **BRIEF | {"batch_size": 32})
    assert changed(before, model) == trainable(model) == set(record.trained)


def test_the_pretext_loss_falls():
    smooth = torch.rand(16, 3, 4, 4, generator=Seeds(1).generator("smooth"))
    smooth = nn.functional.interpolate(smooth, size=SIZE, mode="bilinear") * 4 - 2
    model = made(Mask, 2, 16, trained=("stem", "last", "head"))
    longer = BRIEF | {"steps": 60, "batch_size": 16, "learning_rate": 1e-2}
    losses = medtpp.tpp(model, smooth, {"name": "restoration", "intensity": 0}, **longer).losses
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])


def test_statistics_of_batch_norm_and_all_other_buffers_stay():
    model = made(trained=("stem", "last", "head"))
    model.stem.eval()
    before, were = state(model), modes(model)
    medtpp.tpp(model, images(), **BRIEF)
    buffers = {name for name, _ in model.named_buffers()}
    assert "stem.1.running_mean" in buffers
    assert changed(before, model) == before.keys() - buffers
    assert modes(model) == were


def test_of_several_outputs_the_one_behind_most_parameters_is_taken():
    found = [backbones.find(made(kind, trained=("stem", "last", "head")), (SIZE, SIZE)) for kind in (Maps, Mask)]
    assert [(backbone.number, backbone.spec.grid, backbone.spec.width) for backbone in found] == [
        (1, (8, 8), 16),  # the last map of an encoder
        (0, (32, 32), 3),  # the full mask
    ]


def test_maps_with_channels_last_are_read_so():
    class Last(Net):
        def forward(self, x):
            return self.last(self.stem(x)).movedim(1, -1)

    backbone = backbones.find(made(Last), (SIZE, SIZE))
    assert (backbone.spec.grid, backbone.spec.width, backbone.channels_last) == ((8, 8), 16, True)
    expected = backbone.encoder(images()).flatten(1, 2)
    assert torch.equal(backbone.encode(images()).tokens, expected)


def test_a_map_of_one_cell_is_a_vector():
    backbone = backbones.find(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)), (SIZE, SIZE))
    assert backbone.spec.capabilities == frozenset()
    features = backbone.encode(images())
    assert torch.equal(features.pooled("mean"), backbone.encoder(images())[..., 0, 0])


def test_pooled_features_are_the_means_of_what_the_network_gives():
    network = made().eval()
    assert torch.equal(backbones.find(network, (SIZE, SIZE)).encode(images()).pooled("mean"), network(images()))
    model = swin().eval()
    expected = model(images()).last_hidden_state.mean(1)
    assert torch.equal(backbones.find(model, (SIZE, SIZE)).encode(images()).pooled("mean"), expected)


def test_known_backbones_come_first_unless_features_are_named():
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = timm.create_model("test_vit", img_size=SIZE, num_classes=0)
            self.head = nn.Linear(64, 2)

        def forward(self, x):
            return self.head(self.encoder(x))

    assert backbones.find(Classifier(), (SIZE, SIZE)).spec.family == "timm_vit"
    whole = backbones.find(Classifier(), (SIZE, SIZE), features="")
    assert (whole.spec.family, whole.spec.width) == ("plain", 2)
    assert backbones.find(Classifier(), (SIZE, SIZE), features="encoder").spec.width == 64


def test_the_task_follows_what_the_backbone_can_do():
    def natural(network, **options):
        return natural_pretext(backbones.find(network, (64, 64), **options).spec)

    assert natural(timm.create_model("test_vit", img_size=64)) == "mae"
    resnet = timm.create_model("test_resnet")
    assert natural(resnet) == "simmim"
    assert natural(resnet, features="layer3") == "restoration"  # steps of 16 pixels
    assert natural(resnet, features="layer4") == "byol"  # of 32
    assert natural(resnet, features="") == "byol"


# One module's output


def test_what_comes_after_the_features_is_listed_and_left_alone():
    model = made()
    before, wanted = state(model), trainable(model)
    record = medtpp.tpp(model, images(), features="last", **BRIEF)
    assert record.untouched == ("head.weight", "head.bias")
    assert changed(before, model) == set(record.trained) == wanted - set(record.untouched)


def test_the_network_runs_no_further_than_the_features():
    class Unfinished(Net):
        def forward(self, x):
            self.last(self.stem(x))
            raise NotImplementedError

    assert medtpp.tpp(made(Unfinished), images(), features="last", **BRIEF).trained
    assert not any(module._forward_hooks for module in made(Unfinished).modules())


def test_names_of_features_may_leave_out_what_libraries_put_before_them():
    model = peft.get_peft_model(made(), peft.LoraConfig(target_modules=["last.0"], r=2, modules_to_save=["head"]))
    record = medtpp.tpp(model, images(), features="last", **BRIEF)
    assert all("lora_" in name for name in record.trained)
    assert all("modules_to_save" in name for name in record.untouched)


@pytest.mark.parametrize("pretext", ["byol", "restoration"])
def test_peft_of_convolutions(pretext):
    model = peft.get_peft_model(made(Mask), peft.LoraConfig(target_modules=["stem.0", "last.0"], r=2))
    before = state(model)
    record = medtpp.tpp(model, images(), pretext, **BRIEF)
    assert changed(before, model) == trainable(model) == set(record.trained)
    assert len(record.trained) == 4


def test_lora_in_the_encoder_of_a_network_of_monai():
    """The encoder gives five maps; the last one depends on all layers of attention."""
    network = SwinUNETR(1, 2, feature_size=12, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=4)
    lora = peft.LoraConfig(target_modules=r".*\.attn\.(qkv|proj)", r=2, modules_to_save=["out.conv"])
    model = peft.get_peft_model(network, lora)
    before, wanted = state(model), trainable(model)
    record = medtpp.tpp(model, images(3, 1, sides=32, count=2), "byol", features="swinViT", **BRIEF | {"batch_size": 2})
    assert len(record.trained) == 4 * 2 * 2
    assert all("out.conv" in name for name in record.untouched)
    assert changed(before, model) == set(record.trained) == wanted - set(record.untouched)


def test_a_network_of_timm_that_no_family_knows():
    model = timm.create_model("test_efficientnet", num_classes=2).requires_grad_(False)
    model.blocks[-1].requires_grad_(True)
    model.classifier.requires_grad_(True)
    before = state(model)
    record = medtpp.tpp(model, images(sides=64), features="blocks", **BRIEF)
    assert record.untouched == ("classifier.weight", "classifier.bias")
    assert changed(before, model) == set(record.trained)
