"""`medtpp.tpp` on networks that medtpp does not know."""

import random

import numpy as np
import peft
import pytest
import timm
import torch
from monai.data import DataLoader as MonaiLoader
from monai.data import Dataset as MonaiDataset
from monai.data import MetaTensor
from torch import nn
from torch.utils.data import DataLoader
from transformers import SwinConfig, SwinModel

import medtpp
from medtpp import backbones
from medtpp.api_data import check_range, find_images, first_images, scaled
from medtpp.backbones.plain import PlainBackbone
from medtpp.config import PRETEXTS, TPPOptions
from medtpp.errors import ConfigError, DataError
from medtpp.seeds import Seeds
from medtpp.training.tpp import make_pretext, natural_pretext, resolve_tpp

SIZE, DEEP = 32, 16
BRIEF = {"steps": 3, "batch_size": 4, "head_warmup": 1, "precision": "32"}


def images(dims=2, channels=3, count=8):
    """Normalised, (count, channels, *sides)."""
    sides = [SIZE if dims == 2 else DEEP] * dims
    return torch.randn(count, channels, *sides, generator=Seeds(0).generator("images"))


class Net(nn.Module):
    """A convolutional network with everything that moves in training mode, and a counter that always does."""

    def __init__(self, dims=2, classes=3):
        super().__init__()
        conv, norm, drop = {
            2: (nn.Conv2d, nn.BatchNorm2d, nn.Dropout2d),
            3: (nn.Conv3d, nn.BatchNorm3d, nn.Dropout3d),
        }[dims]
        self.stem = nn.Sequential(conv(3, 8, 3, 2, 1), norm(8), nn.GELU(), drop(0.5))
        self.last = nn.Sequential(conv(8, 16, 3, 2, 1), norm(16), nn.GELU())
        self.head = nn.Linear(16, classes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.head(self.last(self.stem(x)).flatten(2).mean(2))


class Maps(Net):
    """Its encoder's maps, from fine to coarse."""

    def forward(self, x):
        fine = self.stem(x)
        return {"maps": [fine, self.last(fine)], "size": torch.tensor(x.shape)}


class Mask(Net):
    """A segmentation network: the full mask first, then a coarser one."""

    def forward(self, x):
        coarse = self.head(self.last(self.stem(x)).movedim(1, -1)).movedim(-1, 1)  # (B, classes, *sides / 4)
        up = "bilinear" if x.ndim == 4 else "trilinear"
        return nn.functional.interpolate(coarse, scale_factor=4, mode=up), coarse


def made(kind=Net, *arguments, trained=("last", "head")):
    """A network in training mode of which some parts require gradients."""
    with Seeds(0).scope("net"):
        network = kind(*arguments).train()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    return network


def swin(**options):
    """A network of transformers of which medtpp knows nothing: tokens in a ModelOutput."""
    with Seeds(0).scope("swin"):
        config = SwinConfig(image_size=SIZE, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
        return peft.get_peft_model(SwinModel(config), peft.LoraConfig(target_modules=["q_proj", "v_proj"], **options))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def modes(model):
    return [module.training for module in model.modules()]


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


# Values


class Watching(Net):
    """It remembers the values that it was given."""

    def forward(self, x):
        self.seen = torch.cat([getattr(self, "seen", x[:0]), x.detach()])
        return super().forward(x)


def test_a_network_sees_values_as_they_were_given():
    backbone = backbones.find(made(), (SIZE, SIZE))
    given = images() * 3 - 1
    low, high = check_range(given, unit=False)
    backbone.take_normalised(low, high)
    torch.testing.assert_close(backbone.normalise(scaled(given, low, high)), given, atol=1e-5, rtol=0)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: DataLoader(x, batch_size=4)], ids=["tensor", "loader"])
def test_views_keep_to_the_range_of_the_images(wrap):
    """Pretext tasks change images in [0, 1]: without a mapping, all that is below 0 would be cut off."""
    smooth = torch.linspace(-2.0, 2.5, SIZE).expand(8, 3, SIZE, SIZE).contiguous()
    model = made(Watching)
    medtpp.tpp(model, wrap(smooth), "byol", **BRIEF)
    assert model.seen.amin() < -1.5
    assert model.seen.amax() > 2
    assert -2.001 <= float(model.seen.amin()) <= float(model.seen.amax()) <= 2.501


def test_images_in_the_unit_range_are_not_touched():
    unit = torch.rand(4, 3, SIZE, SIZE) * 0.5
    assert check_range(unit, unit=False) == (0.0, 1.0)
    assert scaled(unit, 0.0, 1.0) is unit
    assert check_range(torch.full((2, 1, 4, 4), 7.0), unit=False)[0] == 7.0


# Data


def test_loaders_of_monai_and_of_transformers():
    volumes = [{"label": torch.ones(1, DEEP, DEEP, DEEP), "image": MetaTensor(x)} for x in images(3)]
    record = medtpp.tpp(made(Net, 3), MonaiLoader(MonaiDataset(volumes), batch_size=4), **BRIEF)
    assert (record.card.images, record.card.batch_size) == (8, 4)
    pictures = [{"labels": torch.tensor(1), "mask": torch.ones(1, SIZE, SIZE), "pixel_values": x} for x in images()]
    for data in (pictures, DataLoader(pictures, batch_size=4)):
        assert medtpp.tpp(made(), data, **BRIEF).card.images == 8


def test_of_dicts_what_is_called_image_is_taken():
    mask, image = torch.ones(1, 8, 8), torch.zeros(3, 8, 8)
    for name in ("pixel_values", "image", "images"):
        found = find_images({"mask": mask, "path": "a.nii", name: MetaTensor(image)}, (3, 4))
        assert type(found) is torch.Tensor
        assert found.shape == image.shape
    assert find_images({"mask": mask, "scan": image}, (3, 4)) is not image
    assert find_images((torch.ones(4), {"scan": image}), (3, 4)).shape == image.shape


def test_a_few_images_from_all_of_a_data_set_tell_its_range():
    data = [torch.full((1, 4, 4), float(index)) for index in range(100)]
    assert first_images(data).amax() == 99
    assert len(first_images(data)) == len(first_images(DataLoader(data, batch_size=3))) == 8
    assert len(first_images(data[:2])) == 2


def test_batches_of_volumes_are_small():
    def batch(network, sides):
        spec = backbones.find(network, sides).spec
        return resolve_tpp(TPPOptions(), images=1000, learning_rate=1e-3, spec=spec, trained_head=False).batch_size

    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    pool3 = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 4))
    assert batch(pool, (224, 224)) == batch(nn.Conv2d(3, 1, 1), (224, 224)) == 64
    assert batch(pool, (512, 512)) == 12
    assert batch(pool3, (96, 96, 96)) == batch(nn.Conv3d(3, 1, 1), (96, 96, 96)) == 8


# What is as it was


class Broken(list):
    """Its last image cannot be read in the second pass."""

    reads = 0

    def __getitem__(self, index):
        self.reads += 1
        if self.reads > len(self) + 4:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


@pytest.mark.parametrize("features", [None, "last"])
def test_after_an_exception_all_is_as_it_was(features):
    model = made(trained=("last", "head"))
    model.stem.eval()
    before, wanted, were = state(model), trainable(model), modes(model)
    randomness = torch.get_rng_state(), random.getstate()
    with pytest.raises(OSError, match="the disk is gone"):
        medtpp.tpp(model, Broken(images()), features=features, **BRIEF)
    assert changed(before, model) == set()
    assert (trainable(model), modes(model)) == (wanted, were)
    assert torch.equal(torch.get_rng_state(), randomness[0])
    assert random.getstate() == randomness[1]
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", [Net, Mask])
def test_the_same_seed_gives_the_same_bits(kind):
    def primed(seed):
        torch.rand(1)
        model = made(kind)
        medtpp.tpp(model, images(), seed=seed, **BRIEF)
        return state(model)

    first, second, other = primed(0), primed(0), primed(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


# What is refused


class Flat(Net):
    def forward(self, x):
        return x.flatten().sum()


class Whole(Net):
    def forward(self, x):
        return self.stem(x).unflatten(1, (2, 4))


@pytest.mark.parametrize(
    ("network", "options", "words"),
    [
        (made, {"pretext": "mae"}, ["mae does not fit Net", "tokens that can be dropped", "byol, moco_v3, simclr",
                                    "Its output is (B, 3) for images of 32x32 pixels", "features=NAME"]),
        (made, {"pretext": "restoration"}, ["needs a grid of features", "Choose of byol, moco_v3, simclr"]),
        (made, {"pretext": "dino"}, ["needs a grid of features and places for masked patches"]),
        (made, {"pretext": "simmim"}, ["places for masked patches"]),
        (made, {"pretext": "features"}, ["tokens that can be dropped"]),
        (made, {"pretext": {"name": "sum", "parts": {"byol": {}, "restoration": {}}}}, ["sum does not fit", "a grid"]),
        (lambda: made(Mask), {"pretext": "simmim"}, ["places for masked patches", "restoration"]),
        (lambda: nn.Conv2d(3, 4, 3), {"pretext": "restoration"}, ["(B, 4, 30, 30)", "sides divide the image's"]),
        (made, {"features": "layer4"}, ["names no module of this Net", "- last"]),
        (lambda: nn.ModuleDict({"a": made(), "b": made()}), {"features": "last"}, ["several modules", "a.last"]),
        (lambda: made(Maps, trained="last"), {"features": "head"}, ["Maps does not call head"]),
        (lambda: made(Net, 3), {}, ["Net cannot be run on images (2, 3, 32, 32)", "groups=1"]),
        (lambda: made(Flat), {}, ["gives no tensor", "for each of the 2 images"]),
        (lambda: made(Whole), {}, ["output of Whole is (B, 2, 4, 16, 16)", "(B, D, *sides)"]),
        (lambda: made(trained="head"), {"features": "last"}, ["takes part in the pretext task", 'features=""']),
        (made, {"pretext": "simclr"}, ["batches of at least 32"]),
        (made, {"pretext": "byul"}, ["no pretext called 'byul'", "byol"]),
        (made, {"pretext": {"width": -1}}, ["width"]),
    ],
)  # fmt: skip
def test_what_does_not_go_is_refused(network, options, words):
    model = network()
    before, wanted, were = state(model), trainable(model), modes(model)
    with pytest.raises(ConfigError) as caught:
        medtpp.tpp(model, images(), **options, **BRIEF)
    assert [word for word in words if word not in str(caught.value)] == [], caught.value
    assert changed(before, model) == set()
    assert (trainable(model), modes(model)) == (wanted, were)


def test_images_of_another_size_than_the_first_are_refused():
    pictures = [*images(), torch.zeros(3, 16, 16)]
    with pytest.raises(DataError, match="Images are 16x16 pixels; the backbone Net was loaded for 32x32"):
        medtpp.tpp(made(), DataLoader(pictures, batch_size=1), "byol", **BRIEF | {"steps": 9})


def test_a_backbone_of_medtpp_has_its_own_features():
    model = medtpp.attach(backbones.load("vit_tiny_patch16_224", weights="random", image_size=SIZE))
    with pytest.raises(ConfigError, match="a medtpp backbone has its features"):
        medtpp.tpp(model, images(channels=1).sigmoid(), features="norm", **BRIEF)


def test_patches_of_a_plain_backbone_are_neither_dropped_nor_masked_nor_tapped():
    backbone = backbones.find(made(Mask), (SIZE, SIZE))
    assert isinstance(backbone, PlainBackbone)
    for option in ({"keep": torch.zeros(8, 1, dtype=torch.int64)}, {"mask": torch.zeros(8, 1024) > 0}, {"taps": (0,)}):
        with pytest.raises(ConfigError, match="Mask is run as it is"):
            backbone.encode(images(), **option)


def test_a_refused_task_makes_no_head_for_the_whole_image():
    """Of a vector, restoration would predict all voxels: 7 million by 512 numbers."""

    class Vector(nn.Module):
        def forward(self, x):
            return x.mean((2, 3, 4))[:, :1].expand(-1, 512)

    backbone = backbones.find(Vector(), (192, 192, 192), channels=1)
    for name in ("restoration", "simmim"):
        with pytest.raises(ConfigError, match="does not fit Vector"):
            make_pretext(PRETEXTS.get(name).Options(), backbone, Seeds(0))


def test_tuners_that_need_to_know_layers_say_so():
    with pytest.raises(ConfigError, match="convpass does not fit Net: it needs one sequence of tokens"):
        medtpp.attach(backbones.find(made(), (SIZE, SIZE)), "convpass")
    with pytest.raises(ConfigError, match="Net has no modules with the roles"):
        medtpp.attach(backbones.find(made(), (SIZE, SIZE)), "lora")


def test_batches_of_one_volume(recwarn):
    assert medtpp.tpp(made(Net, 3), DataLoader(images(3), batch_size=1), "byol", **BRIEF).steps == 3
    assert not [warning for warning in recwarn if "degrees of freedom" in str(warning.message)]
