"""MONAI's networks of volumes: tuners, masks, channels, networks in memory, a run from the command line."""

import copy
import warnings

import nibabel
import numpy as np
import peft
import pytest
import torch
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.swin_unetr import SwinUNETR
from monai.networks.nets.unetr import UNETR
from monai.networks.nets.vit import ViT

import matrix
import runs
from medtpp import api, backbones, tuners
from medtpp.adapter import AdapterCard, BackboneCard, load_adapter, save_adapter
from medtpp.config import PRETEXTS, TUNERS, BackboneOptions, TPPOptions, Window
from medtpp.data.phantom import generate
from medtpp.data.volume_preprocess import VolumePreprocessing
from medtpp.errors import ConfigError
from medtpp.files import read_json
from medtpp.pretext.simmim import SimMIM
from medtpp.seeds import Seeds
from medtpp.training.tpp import resolve_tpp
from monai_networks import NAMES, SIZES, file_of, load, make, moved_off_its_start
from pictures import pictures


def tokens(backbone, images, **options):
    with torch.no_grad():
        return backbone.encode(images, **options).tokens


# Tuners


def test_the_kinds_that_are_listed_have_what_is_said():
    assert load("segresnet").spec.capabilities == backbones.kinds()["SegResNet"]
    assert load("swin").spec.capabilities == load("swin_v2").spec.capabilities == backbones.kinds()["Swin"]
    assert load("vit").spec.capabilities == backbones.kinds()["ViT"]


CELLS = [(tuner, kind) for tuner in TUNERS.names() for kind in ("swin", "segresnet")]
FAST = (
    "adapter",
    "adaptformer",
    "apla",
    "full",
    "lora",
    "lora+bitfit",
    "oft",
    "ssf",
)  # one of each way to change a layer
FITTING = {
    kind: [tuner for tuner in TUNERS.names() if TUNERS.get(tuner).needs <= capabilities]
    for kind, capabilities in (("swin", backbones.kinds()["Swin"]), ("segresnet", backbones.kinds()["SegResNet"]))
}


def test_convolutions_of_volumes_are_for_some_methods():
    assert FITTING["segresnet"] == [
        "bitfit", "conv_adapter", "dora", "full", "ia3", "last_blocks", "linear", "ln_tuning", "lora",
        "lora+bitfit", "lora+last_blocks", "rslora", "ssf",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("tuner", "kind"),
    [
        pytest.param(tuner, kind, marks=() if kind == "segresnet" or tuner in FAST else pytest.mark.slow)
        for tuner, kind in CELLS
        if tuner in FITTING[kind]
    ],
)
def test_tuners_on_volumes(tuner, kind, tmp_path):
    """What the matrix asks of tuners, once over, on volumes."""
    images, plain = pictures(SIZES[kind], 2), load(kind)
    before = {name: value.clone() for name, value in plain.source_state().items()}
    tuned = tuners.attach(load(kind), tuner)
    state = {name: value.clone() for name, value in tuned.state_dict().items()}
    head = matrix.make_pretext("simmim" if kind == "swin" else "restoration", tuned)
    trained = [*tuned.targets.values(), *head.parameters()]
    matrix.descend(lambda: head.loss(tuned, images, matrix.draws(2))[0], trained, 2, 1e-3)
    changed = {name for name, value in tuned.state_dict().items() if not torch.equal(value, state[name])}
    assert changed == tuned.targets.keys()
    assert tuned.source_hash() == plain.spec.sha256
    assert all(torch.equal(value, before[name]) for name, value in tuned.source_state().items())
    matrix.perturb(tuned)
    active = tokens(tuned, images)
    with tuned.disabled():
        assert torch.equal(tokens(tuned, images), tokens(plain, images))
    assert torch.equal(active, tokens(plain, images)) == (tuner == "linear")
    assert torch.equal(tokens(copy.deepcopy(tuned), images), active)
    if TUNERS.get(tuner).merges:
        merged = tokens(tuned.merged(), images)
        assert (merged - active).abs().max() <= 1e-5 * active.abs().max()
    save_adapter(tmp_path, tuned, card(kind, tuner))
    assert torch.equal(tokens(load_adapter(tmp_path).backbone, images), active)


def card(kind, tuner):
    """An adapter's card, as the stages write it."""
    spec = load(kind).spec
    options = BackboneOptions(name=NAMES[kind], weights=file_of(kind), dims=3)
    return AdapterCard(
        backbone=BackboneCard(
            options=options, architecture=spec.architecture, image_size=SIZES[kind], sha256=spec.sha256
        ),
        tuner=TUNERS.get(tuner).Options().model_dump(mode="json"),
        preprocessing=VolumePreprocessing(
            patch=SIZES[kind], spacing=None, size=None, air=None, crop=False, dtype="float16",
            windows=(Window(kind="fixed", low=-175, high=250),),
        ),
        modality="ct",
        seed=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "pretext", [name for name in PRETEXTS.names() if matrix.needs(name) <= backbones.kinds()["Swin"]]
)
def test_pretext_tasks_on_a_swin_of_volumes(pretext):
    """The other kinds of networks of volumes go through the matrix; a whole row of it takes too long here."""
    tuned, images = tuners.attach(load("swin"), "ssf"), pictures(SIZES["swin"], 2)
    head, draws = matrix.make_pretext(pretext, tuned), matrix.draws(2)
    state = {name: value.clone() for name, value in tuned.state_dict().items()}
    trained = [*tuned.targets.values(), *head.parameters()]
    losses = matrix.descend(lambda: head.loss(tuned, images, draws)[0], trained, 3, 1e-3)
    assert losses[-1] < losses[0]
    assert {name for name, value in tuned.state_dict().items() if not torch.equal(value, state[name])} == (
        tuned.targets.keys()
    )


@pytest.mark.parametrize("kind", ["swin", "segresnet"])
def test_peft_reads_the_adapter_into_monais_own_network(kind, tmp_path):
    tuned, images = tuners.attach(load(kind), "dora"), pictures(SIZES[kind], 2)
    matrix.perturb(tuned)
    save_adapter(tmp_path, tuned, card(kind, "dora"))
    model = peft.PeftModel.from_pretrained(make(kind), str(tmp_path)).eval()
    with torch.no_grad():
        turned = images.transpose(2, 4)
        network = model.base_model.model
        last = network(turned)[-1] if kind == "swin" else network.encode(turned)[0]
    expected = last.transpose(2, 4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens(tuned, images), expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize(("tuner", "kind"), [cell for cell in CELLS if cell[0] not in FITTING[cell[1]]])
def test_what_does_not_fit_is_refused_with_the_reason(tuner, kind):
    with pytest.raises(ConfigError, match=rf"The tuner {tuner} does not fit {NAMES[kind]}: it needs [a-z]"):
        tuners.attach(load(kind), tuner)


@pytest.mark.parametrize("kind", ["swin", "swin_v2", "segresnet"])
def test_a_masked_patch_is_not_seen(kind):
    backbone, images = load(kind), pictures(SIZES[kind], 2)
    patch, grid = backbone.spec.patch, backbone.spec.grid
    mask = torch.zeros(2, *grid, dtype=torch.bool)
    mask[:, 0, 1, 0] = True
    other = images.clone()
    other[:, :, : patch[0], patch[1] : 2 * patch[1], : patch[2]] = 0.9
    token = torch.randn(backbone.spec.mask_width)
    hidden = {"mask": mask.flatten(1), "mask_token": token}
    assert not torch.equal(tokens(backbone, images), tokens(backbone, other))
    assert torch.equal(tokens(backbone, images, **hidden), tokens(backbone, other, **hidden))
    assert not torch.equal(tokens(backbone, images, **hidden), tokens(backbone, images, mask=hidden["mask"]))


@pytest.mark.parametrize(
    ("kind", "layer"),
    [("swin", "patch_embed.proj"), ("segresnet", "convInit.conv"), ("vit", "patch_embed.proj")],
)
def test_channels_that_the_weights_were_not_made_for(kind, layer):
    """As in an inflated network, the first layer's weight is then a target of its own group."""
    more = {"patch_size": (4, 8, 8)} if kind == "vit" else {}
    plain, several, grey = load(kind, **more), load(kind, channels=4, **more), pictures(SIZES[kind])
    assert several.spec.channels == 4
    same = tokens(several, grey.expand(-1, 4, -1, -1, -1))
    torch.testing.assert_close(same, tokens(plain, grey), atol=1e-5, rtol=1e-4)
    mixed = torch.cat([grey, 1 - grey, grey, grey], dim=1)
    assert not torch.allclose(tokens(several, mixed), same, atol=1e-4)
    assert several.spec.sha256 == several.source_hash() == plain.spec.sha256
    tuned = tuners.attach(several, "lora")
    (parameter,) = tuned.embed.values()
    assert parameter is tuned.encoder.get_submodule(layer).weight
    with torch.no_grad():
        parameter.add_(0.1)
    with tuned.disabled():
        assert torch.equal(tokens(tuned, mixed), tokens(load(kind, channels=4, **more), mixed))
    assert tuned.source_hash() == plain.spec.sha256


# Networks in memory


def whole(kind):
    """A user's network with its decoder."""
    if kind == "swin":
        small = {"depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 2}
        return SwinUNETR(in_channels=1, out_channels=2, feature_size=12, **small), "swinViT.layers2.0.blocks.0.attn.qkv"
    if kind == "segresnet":
        return SegResNet(init_filters=8), "down_layers.1.1.conv1.conv"
    return (
        UNETR(1, 2, img_size=(16, 32, 16), feature_size=4, hidden_size=64, mlp_dim=64, num_heads=4),
        "vit.blocks.1.attn.qkv",
    )


@pytest.mark.parametrize("kind", ["swin", "segresnet", "vit"])
def test_a_peft_model_of_a_whole_network_is_primed_in_place(kind):
    size = {"swin": (32, 64, 32), "segresnet": (8, 16, 16), "vit": (16, 32, 16)}[kind]
    network, layer = whole(kind)
    model = peft.get_peft_model(moved_off_its_start(network), peft.LoraConfig(target_modules=[layer])).eval()
    images, wanted = pictures(size), {name: p for name, p in model.named_parameters() if p.requires_grad}
    before, state = model(images), {name: value.clone() for name, value in model.state_dict().items()}
    backbone = backbones.find(model, size)
    encoded = {
        "swin": lambda: network.swinViT(images)[-1].flatten(2).transpose(1, 2),
        "segresnet": lambda: network.encode(images)[0].flatten(2).transpose(1, 2),
        "vit": lambda: network.vit(images)[0],
    }[kind]
    with torch.no_grad():
        torch.testing.assert_close(backbone.encode(images).tokens, encoded())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    record = api.tpp(model, images, steps=2, batch_size=2, head_warmup=1, precision="32")
    assert record.card.pretext["name"] == ("mae" if kind == "vit" else "simmim")
    assert set(record.trained) == wanted.keys()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
    assert changed == wanted.keys()
    assert not torch.equal(model(images), before)


def test_networks_in_memory_that_do_not_fit():
    with pytest.raises(ConfigError, match="not a multiple of the patch size 8"):
        backbones.find(SegResNet(init_filters=8), (12, 16, 16))
    vit = ViT(img_size=16, patch_size=8, in_channels=1, hidden_size=64, mlp_dim=64, num_heads=1, num_layers=1)
    with pytest.raises(ConfigError, match="has 8 patches"):
        backbones.find(vit, (24, 16, 16))
    perceptron = ViT(1, 16, 8, 64, 64, 1, 1, proj_type="perceptron")
    with pytest.raises(ConfigError, match="proj_type='conv'"):
        backbones.find(perceptron, (16, 16, 16))


# Runs


def test_batches_of_pyramids_are_measured_in_pixels():
    spec = backbones.load("monai:swin_unetr_12", weights="random", image_size=(64, 64, 64)).spec
    assert (spec.grid, spec.effort) == ((2, 2, 2), 1024)
    chosen = resolve_tpp(TPPOptions(), images=100, learning_rate=1e-3, spec=spec, trained_head=False)
    assert chosen.batch_size == 12
    assert load("vit", patch_size=(4, 8, 8)).spec.effort == 12


def test_one_patch_cannot_be_hidden_and_seen():
    spec = backbones.load("monai:segresnet_8", weights="random", image_size=8).spec
    with pytest.raises(ConfigError, match=r"8x8x8 is one patch for .* pretext=restoration"):
        SimMIM(SimMIM.Options(), spec, Seeds(0))


def test_a_run_on_volumes(tmp_path):
    """No patch size is asked for, and volumes are cut into patches of the network's own stride."""
    phantoms, rows = generate(18, 20, 0, dims=3), ["image,mask,patient"]
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for number, (image, mask) in enumerate(zip(phantoms.images, phantoms.masks, strict=True)):
        name = f"{number:02}.nii.gz"
        for folder, array in (("images", image.astype(np.int16)), ("masks", (image > 60).astype(np.uint8))):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / "data" / folder / name)
        rows.append(f"images/{name},masks/{name},{phantoms.patients[number]}")
        assert mask.shape == image.shape
    (tmp_path / "data" / "manifest.csv").write_text("\n".join(rows) + "\n")
    settings = [
        "backbone.name=monai:segresnet_8", "backbone.weights=random", "pretext=restoration", "tuner=conv_adapter",
        "task=segmentation", "task.feature_size=4", "tpp.steps=2", "tpp.head_warmup=1", "tpp.batch_size=4",
        "finetune.steps=2", "finetune.batch_size=2", "hardware.precision=32", "logging.tensorboard=false",
    ]  # fmt: skip
    out = tmp_path / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs.done("run", tmp_path / "data", "--out", out, *[part for item in settings for part in ("--set", item)])
    made = read_json(out / "finetune" / "adapter" / "medtpp.json")
    assert made["backbone"]["options"]["patch_size"] is None
    assert made["backbone"]["image_size"] == 24
    assert read_json(out / "evaluation" / "evaluation.json")
    runs.done("predict", out / "finetune" / "adapter", tmp_path / "data" / "images", "-o", tmp_path / "masks")
    mask = nibabel.load(tmp_path / "masks" / "03.nii.gz")
    assert mask.shape == (20, 20, 20)
