"""Hierarchical networks of timm as backbones: what they compute, where masks go, which weights and sizes they take."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import matrix
import runs
from medtpp import backbones, tuners
from medtpp.backbones.timm_pyramid import TimmPyramidFamily
from medtpp.config import BACKBONES, PRETEXTS, TUNERS, BackboneOptions
from medtpp.data.phantom import write_folder
from medtpp.errors import ConfigError, DataError, WeightsError
from medtpp.files import read_json
from medtpp.seeds import Seeds
from medtpp.tasks.segmentation import Segmentation, SegmentationOptions
from medtpp.training.tpp import make_pretext

PYRAMIDS = [variant for variant in matrix.VARIANTS if "sequence" not in matrix.capabilities(variant)]
REAL = ("convnext_atto", "convnextv2_atto", "resnet10t", "resnet18", "densenet121", "swin_tiny_patch4_window7_224")


@pytest.mark.parametrize("name", REAL)
def test_tokens_are_what_timm_gives(name):
    backbone = backbones.load(name, weights="random", image_size=64)
    images = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        expected = backbone.encoder.forward_features(backbone.normalise(images))
        tokens = backbone.encode(images).tokens
    expected = expected.flatten(1, 2) if backbone.anatomy.channels_last else expected.flatten(2).transpose(1, 2)
    torch.testing.assert_close(tokens, expected)
    spec = backbone.spec
    assert (spec.patch, spec.grid, spec.prefix, spec.pooling) == ((32, 32), (2, 2), 0, "mean")
    assert spec.width == backbone.encoder.num_features
    assert [stage.stride[0] for stage in spec.stages] == [4, 8, 16, 32]
    assert backbone.spec.sha256 == backbones.load(name, weights="random", image_size=96).spec.sha256


@pytest.mark.parametrize("variant", PYRAMIDS)
def test_a_masked_patch_is_not_seen(variant):
    """Whatever stands in a masked patch, the tokens are the same; the token that replaces it counts."""
    backbone = matrix.load(variant)
    images, mask = matrix.images(2), torch.zeros(2, matrix.PATCHES, dtype=torch.bool)
    mask[:, 6] = True  # the second row, the third patch
    other = images.clone()
    other[:, :, 8:16, 16:24] = 0.9
    token = torch.randn(backbone.spec.mask_width)

    def tokens(pictures, **options):
        with torch.no_grad():
            return backbone.encode(pictures, **options).tokens

    assert not torch.equal(tokens(images), tokens(other))
    assert torch.equal(tokens(images, mask=mask, mask_token=token), tokens(other, mask=mask, mask_token=token))
    assert not torch.equal(tokens(images, mask=mask, mask_token=token), tokens(images, mask=mask))
    assert torch.equal(tokens(images, mask=mask & False, mask_token=token), tokens(images))


@pytest.mark.parametrize("variant", PYRAMIDS)
def test_the_kinds_that_are_listed_have_what_is_said(variant):
    name = {"swin_v2": "Swin", "swin": "Swin", "convnext": "ConvNeXt", "resnet": "ResNet", "densenet": "ResNet"}
    assert matrix.capabilities(variant) == backbones.kinds()[name[variant.removeprefix("medtpp_test_")]]


def test_plain_transformers_have_what_is_said():
    assert matrix.capabilities("medtpp_test_rotary") == backbones.kinds()["ViT"]


@pytest.mark.parametrize(
    ("tuner", "variant"),
    [(tuner, variant) for tuner in TUNERS.names() for variant in PYRAMIDS if (tuner, variant) not in matrix.TUNED],
)
def test_what_does_not_fit_is_refused_with_the_reason(tuner, variant):
    with pytest.raises(ConfigError, match=rf"{tuner} does not fit {variant}: it needs [a-z]"):
        tuners.attach(matrix.load(variant), tuner)


@pytest.mark.parametrize("pretext", ["mae", "features", "sum"])
def test_tasks_that_drop_patches_are_refused(pretext):
    with pytest.raises(ConfigError, match=r"it needs tokens that can be dropped .*medtpp list matrix"):
        make_pretext(PRETEXTS.get(pretext).Options(), matrix.load("medtpp_test_swin"), Seeds(0))


@pytest.mark.parametrize("start", ["pissa", "olora", "eva", "lora_ga"])
def test_starts_from_weights_need_linear_layers(start):
    options = TUNERS.get("lora").Options(start=start)
    tuners.attach(matrix.load("medtpp_test_convnext"), options, images=matrix.images(4))
    with pytest.raises(ConfigError, match=rf"tuner\.start={start} is for linear layers"):
        tuners.attach(matrix.load("medtpp_test_resnet"), options, images=matrix.images(4))


@pytest.mark.parametrize("variant", PYRAMIDS)
@pytest.mark.parametrize("head", ["unetr", "light"])
def test_masks_have_the_size_of_the_image(variant, head):
    backbone = matrix.load(variant)
    task = Segmentation(SegmentationOptions(head=head, feature_size=4), backbone.spec, ("lung",), False, Seeds(0))
    logits = task(backbone.encode(matrix.images(2), taps=task.taps))
    assert logits.shape == (2, 2, matrix.SIZE, matrix.SIZE)
    task.loss(logits, torch.ones(2, matrix.SIZE, matrix.SIZE, dtype=torch.int64)).backward()
    silent = [name for name, weights in task.named_parameters() if weights.grad is None or not weights.grad.any()]
    assert not silent
    if head == "unetr":  # the stages of half and quarter resolution, where there are such
        assert [backbone.spec.stages[tap].stride for tap in task.taps] in ([(2, 2), (4, 4)], [(4, 4)])


@pytest.mark.parametrize("variant", PYRAMIDS)
def test_a_peft_model_in_a_script_is_primed_in_place(variant):
    import peft

    from medtpp import api

    network = timm.create_model(variant, num_classes=2)
    # Random ones have zeros, at the end of residual branches, that keep gradients back.
    network.load_state_dict(load_file(matrix.backbone_folder(variant) / "model.safetensors"), strict=False)
    chosen = [
        name for name, _ in network.named_modules() if name.endswith(("fc1", "attn.proj", "1.0.conv2", "r1.conv2"))
    ]
    model = peft.get_peft_model(network, peft.LoraConfig(target_modules=chosen))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    record = api.tpp(model, torch.randn(8, 3, matrix.SIZE, matrix.SIZE), "simmim", steps=2, batch_size=4, head_warmup=1)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert set(record.trained) == changed


def test_a_file_of_weights_loads_by_name(tmp_path):
    network = timm.create_model("resnet10t", num_classes=5)
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": {f"module.{name}": value for name, value in network.state_dict().items()}}, path)
    backbone = backbones.load("resnet10t", weights=str(path), image_size=64)
    assert torch.equal(backbone.encoder.layer1[0].conv1.weight, network.layer1[0].conv1.weight)
    assert backbone.spec.source == str(path)
    lacking = {name: value for name, value in network.state_dict().items() if "layer3" not in name}
    save_file(lacking, tmp_path / "lacking.safetensors")
    with pytest.raises(WeightsError, match="do not fit this architecture") as error:
        backbones.load("resnet10t", weights=str(tmp_path / "lacking.safetensors"), image_size=64)
    assert "missing: layer3.0.bn1.bias" in str(error.value)


@pytest.mark.parametrize(
    ("name", "larger"),
    [("resnet18", "resnet34"), ("convnext_tiny", "convnext_small"), ("densenet121", "densenet169"),
     ("swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224")],
)  # fmt: skip
def test_a_larger_network_is_not_cut_to_size(name, larger, tmp_path):
    """All the weights that are wanted are there, and more: the file is of another network."""
    path = tmp_path / "larger.pth"
    with torch.device("meta"):
        network = timm.create_model(larger)
    torch.save({key: torch.zeros(value.shape, dtype=value.dtype) for key, value in network.state_dict().items()}, path)
    with pytest.raises(WeightsError, match="do not fit this architecture"):
        backbones.load(name, weights=str(path), image_size=64)


def test_sizes_and_volumes_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"80.*32"):
        backbones.load("resnet18", weights="random", image_size=80)
    with pytest.raises(ConfigError, match="encodes 2D images alone"):
        backbones.load(BackboneOptions(name="resnet18", weights="random", dims=3, patch_size=(4, 8, 8)))
    with pytest.raises(ConfigError, match=r"backbone\.patch_size .* are for vision transformers"):
        backbones.load(BackboneOptions(name="resnet18", weights="random", patch_size=8))
    with pytest.raises(DataError, match="Images are 96x96 pixels"):
        backbones.load("convnext_atto", weights="random", image_size=64).encode(torch.rand(1, 1, 96, 96))
    with pytest.raises(ConfigError, match="has no weights"):
        backbones.load("resnet18.nonsense")


def test_every_example_is_known_to_timm_and_to_one_family():
    for name in TimmPyramidFamily.examples:
        if timm.is_model(name.split(".")[0]):
            assert name in timm.list_pretrained()
            assert next(family for family in BACKBONES.values() if family.recognises(name)) is TimmPyramidFamily


def test_a_run_from_the_command_line(tmp_path):
    write_folder(tmp_path / "data", 48, 64, 0)
    settings = [
        "backbone.name=convnext_atto", "backbone.weights=random", "data.image_size=64", "pretext=simmim",
        "tuner=conv_adapter", "tpp.steps=2", "tpp.head_warmup=1", "tpp.batch_size=8", "finetune.steps=2",
        "finetune.batch_size=8",
        "hardware.precision=32", "logging.tensorboard=false",
    ]  # fmt: skip
    out = tmp_path / "out"
    runs.done("run", tmp_path / "data", "--out", out, *[part for item in settings for part in ("--set", item)])
    assert read_json(out / "evaluation" / "evaluation.json")
    told = runs.done("predict", out / "finetune" / "adapter", tmp_path / "data" / "images", "-o", tmp_path / "p.csv")
    assert told.status == 0
    message = runs.refused("run", tmp_path / "data", "--out", tmp_path / "no", "--set", "backbone.name=convnext_atto",
                           "--set", "backbone.weights=random", "--set", "data.image_size=64",
                           "--set", "pretext=mae")  # fmt: skip
    assert "The pretext task mae does not fit convnext_atto" in message
