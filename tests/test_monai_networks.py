"""Encoders of MONAI's networks: features as MONAI gives them, files of published codes, what does not fit."""

import math

import pytest
import torch
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.swin_unetr import SwinTransformer
from monai.networks.nets.vit import ViT
from torch import nn

from medtpp import backbones
from medtpp.backbones.monai_kinds import EARLY_NEIGHBOURS, NEIGHBOURS, VolumeMerging
from medtpp.config import BackboneOptions
from medtpp.errors import ConfigError, WeightsError
from medtpp.seeds import Seeds
from monai_networks import NAMES, SIZES, SWIN, VIT, file_of, load, make, moved_off_its_start
from pictures import pictures

# Features


def turned(x):
    """Volumes or maps with MONAI's axes, (x, y, z), or back."""
    return x.transpose(2, 4).contiguous() if x.ndim == 5 else x


def assert_same(features, maps):
    maps = [turned(x) for x in maps]
    torch.testing.assert_close(features.tokens, maps[-1].flatten(2).transpose(1, 2), atol=5e-5, rtol=1e-4)
    assert len(features.maps) == len(maps)
    for found, expected in zip(features.maps, maps, strict=True):
        torch.testing.assert_close(found, expected, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["swin", "swin_v2"])
@torch.no_grad()
def test_maps_are_those_that_swin_unetr_decodes(kind):
    backbone, images = load(kind), pictures(SIZES[kind])
    spec = backbone.spec
    assert_same(backbone.encode(images, taps=range(spec.depth)), make(kind)(turned(images), normalize=True))
    assert [stage.stride for stage in spec.stages] == [(2**i,) * 3 for i in range(5)]
    assert [stage.width for stage in spec.stages] == [32 * 2**i for i in range(5)]
    assert (spec.grid, spec.prefix, spec.pooling, spec.channels) == ((1, 2, 1), 0, "mean", 1)
    assert (spec.mean, spec.std, spec.dims) == ((0.0,), (1.0,), 3)


@torch.no_grad()
def test_maps_are_those_that_segresnet_encodes():
    backbone, images = load("segresnet"), pictures(SIZES["segresnet"])
    last, maps = make("segresnet").encode(turned(images))
    assert last is maps[-1]
    assert_same(backbone.encode(images, taps=range(4)), maps)
    assert [stage.stride for stage in backbone.spec.stages] == [(2**i,) * 3 for i in range(4)]


@torch.no_grad()
def test_images_of_two_dimensions(tmp_path):
    swin = moved_off_its_start(SwinTransformer(**{**SWIN, "window_size": (4, 4), "patch_size": (2, 2)}, spatial_dims=2))
    segresnet = moved_off_its_start(SegResNet(spatial_dims=2, init_filters=8, in_channels=3))
    images = torch.rand(2, 3, 32, 64)
    for name, network in (("monai:swin_unetr", swin), ("monai:segresnet", segresnet)):
        torch.save(network.state_dict(), tmp_path / "weights.pt")
        options = BackboneOptions(name=name, weights=str(tmp_path / "weights.pt"), dims=2)
        backbone = backbones.load(options, image_size=(32, 64))
        seen = images if network is segresnet else backbones.match_channels(images, 1)
        maps = network(seen) if network is swin else network.encode(seen)[1]
        assert_same(backbone.encode(images, taps=range(backbone.spec.depth)), maps)
    assert backbone.spec.capabilities == backbones.kinds()["ResNet"]


@pytest.mark.parametrize("neighbours", [EARLY_NEIGHBOURS, NEIGHBOURS])
def test_neighbours_are_merged_as_monai_did_and_does(neighbours):
    merging = VolumeMerging(1, norm_layer=lambda width: nn.Identity(), neighbours=neighbours)
    nn.init.zeros_(merging.reduction.weight)
    cube = torch.arange(8.0).reshape(1, 2, 2, 2, 1)  # 4 * depth + 2 * row + column
    seen = []
    for index in range(8):
        with torch.no_grad():
            merging.reduction.weight.zero_()
            merging.reduction.weight[0, index] = 1
        seen.append(int(merging(cube).flatten()[0]))
    # MONAI before 1.5: x[1::2, 0::2, 1::2] as the fifth, then what the third and the fourth were.
    assert seen == ([0, 4, 2, 1, 5, 2, 1, 7] if neighbours is EARLY_NEIGHBOURS else [0, 4, 2, 1, 6, 5, 3, 7])


def test_the_name_tells_by_which_monai_a_swin_unetr_was_trained():
    noise = torch.rand(2, 1, *SIZES["swin"], generator=Seeds(1).generator("noise"))  # neighbours that differ
    early = backbones.load("monai:swin_unetr", weights=file_of("swin"), image_size=SIZES["swin"])
    maps = early.encode(noise, taps=(0, 1)).maps
    now = load("swin").encode(noise, taps=(0, 1)).maps
    assert torch.equal(maps[0], now[0])
    assert not torch.allclose(maps[1], now[1], atol=0.1)


@pytest.mark.parametrize(
    ("dims", "proj_type", "classification", "qkv_bias"),
    [(3, "conv", False, False), (3, "conv", True, True), (3, "perceptron", False, True), (2, "conv", True, False)],
)
@torch.no_grad()
def test_features_are_those_of_monais_vit(dims, proj_type, classification, qkv_bias, tmp_path):
    size, patch = ((8, 24, 16), (4, 8, 8)) if dims == 3 else ((16, 24), (8, 4))
    own = {"img_size": size, "patch_size": patch} if dims == 2 else {"img_size": size[::-1], "patch_size": patch[::-1]}
    shape = {**own, "spatial_dims": dims, "proj_type": proj_type}
    network = moved_off_its_start(ViT(**shape, classification=classification, qkv_bias=qkv_bias, **VIT))
    state = {f"net.vit.{name}": value for name, value in network.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "weights.pt")
    options = BackboneOptions(name="monai:vit_128", weights=str(tmp_path / "weights.pt"), dims=dims, patch_size=patch)
    backbone, images = backbones.load(options, image_size=size), pictures(size)
    network.classification_head = nn.Identity()  # the head takes the first token alone
    hidden = network(turned(images))[1]

    def as_map(sequence):
        grid = [side // step for side, step in zip(own["img_size"], own["patch_size"], strict=True)]
        return turned(sequence[:, int(classification) :].transpose(1, 2).unflatten(2, grid))

    features = backbone.encode(images, taps=(0, 1))
    for found, expected in zip(features.maps, hidden, strict=True):
        torch.testing.assert_close(found, as_map(expected))
    last = network.norm(hidden[-1])
    torch.testing.assert_close(features.patches, as_map(last).flatten(2).transpose(1, 2))
    if classification:
        torch.testing.assert_close(features.tokens[:, 0], last[:, 0])
    assert backbone.spec.prefix == int(classification)
    assert backbone.spec.capabilities == backbones.kinds()["ViT"]
    order = torch.rand(len(images), math.prod(backbone.spec.grid)).argsort(dim=1)
    shuffled = backbone.encode(images, keep=order).patches
    expected = features.patches.gather(1, order[..., None].expand_as(shuffled))
    torch.testing.assert_close(shuffled, expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_positions_of_volumes_are_resampled(tmp_path):
    network = ViT(img_size=16, patch_size=8, in_channels=1, hidden_size=64, mlp_dim=64, num_heads=1, num_layers=1)
    network.patch_embedding.position_embeddings.copy_(torch.arange(8.0)[None, :, None] // 4)  # by x alone
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    options = BackboneOptions(name="monai:vit", weights=str(tmp_path / "weights.pt"))
    own, larger = backbones.load(options), backbones.load(options, image_size=(24, 8, 32))
    assert (own.spec.image_size, own.spec.patch) == ((16,) * 3, (8,) * 3)
    positions = larger.encoder.pos_embed[0, :, 0].reshape(larger.spec.grid)
    assert positions[0, 0].tolist() == [0.0, 0.25, 0.75, 1.0]
    assert (positions == positions[:1, :1]).all()
    assert larger.spec.sha256 == own.spec.sha256 == own.source_hash()
    assert larger.encode(torch.rand(1, 1, 24, 8, 32)).patches.shape == (1, 12, 64)


# Files


def _prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


HEADS = {"norm.weight": torch.ones(512), "rotation_head.weight": torch.ones(4, 512), "convTrans3d.bias": torch.ones(1)}


def ssl(state):
    """SwinUNETR-SSL's model_swinvit.pt."""
    renamed = {name.replace("linear1", "fc1").replace("linear2", "fc2"): value for name, value in state.items()}
    return {"epoch": 3, "state_dict": _prefixed({**renamed, **HEADS}, "module.")}


def ssl_code(state):
    """What the pretext code of SwinUNETR-SSL writes."""
    return {"state_dict": {**_prefixed(state, "module.swinViT."), **_prefixed(HEADS, "module.")}, "optimizer": {}}


def autoencoders(state):
    """MONAI's ssl_pretrained_weights.pth (Disruptive Autoencoders)."""
    staged = {f"encoder.{name.replace('.0.', '.0.0.', 1)}" if name.startswith("layers") else f"encoder.{name}": value
              for name, value in state.items()}  # fmt: skip
    return {"model": {**staged, "encoder.mask_token": torch.ones(1, 1, 32), "encoder.norm.weight": torch.ones(512)}}


def swin_unetr(state):
    """A whole SwinUNETR, such as MONAI's for BTCV; VoComni."""
    return {"state_dict": {**_prefixed(state, "swinViT."), "encoder1.layer.conv1.conv.weight": torch.ones(3)}}


def voco(state):
    """VoCo's head."""
    return {**_prefixed(state, "backbone.swinViT."), "backbone.encoder1.layer.conv1.conv.weight": torch.ones(3),
            "student.layer1.0.weight": torch.ones(3)}  # fmt: skip


def suprem(state):
    """SuPreM's SwinUNETR."""
    net = {**_prefixed(state, "module.backbone.swinViT."), "module.organ_embedding": torch.ones(3)}
    return {"net": net, "optimizer": {"state": {}, "param_groups": []}, "epoch": 800}


def suprem_segresnet(state):
    """SuPreM's SegResNet."""
    return {"net": _prefixed(state, "module."), "epoch": 800}


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("swin", ssl), ("swin", ssl_code), ("swin", autoencoders), ("swin", swin_unetr), ("swin", suprem),
     ("swin_v2", voco), ("segresnet", suprem_segresnet)],
)  # fmt: skip
def test_files_of_published_codes(kind, layout, tmp_path):
    state = make(kind).state_dict()
    torch.save(layout(state), tmp_path / "weights.pth")
    options = BackboneOptions(name=NAMES[kind].replace("_v2", ""), weights=str(tmp_path / "weights.pth"))
    loaded = backbones.load(options, image_size=SIZES[kind])
    own = loaded.encoder.state_dict()
    assert own.keys() <= state.keys()
    assert all(torch.equal(own[name], state[name]) for name in own)
    assert loaded.spec.sha256 == load(kind).spec.sha256
    assert loaded.spec.source == str(tmp_path / "weights.pth")


def test_what_a_file_lacks_or_has_too_much_is_an_error(tmp_path):
    state, path = make("swin").state_dict(), tmp_path / "weights.pt"

    def message(changed, name=NAMES["swin"], error=WeightsError, **options):
        torch.save(changed, path)
        with pytest.raises(error) as caught:
            backbones.load(BackboneOptions(name=name, weights=str(path), **options), image_size=SIZES["swin"])
        return str(caught.value)

    lacking = {name: value for name, value in state.items() if name != "layers3.0.blocks.0.norm2.bias"}
    assert "missing: layers3.0.blocks.0.norm2.bias" in message(lacking)
    more = {**state, "layers2.0.blocks.0.gate": torch.ones(1)}
    assert "unexpected: layers2.0.blocks.0.gate" in message(more)
    assert "holds no encoder for monai:segresnet: it lacks 'convInit" in message(state, "monai:segresnet")
    assert "holds no ViT of MONAI" in message(state, "monai:vit")
    assert "it lacks 'layers1.0.blocks" in message({"patch_embed.proj.weight": state["patch_embed.proj.weight"]})
    assert "embed_dim: 32 in the file, 48 by the name" in message(state, "monai:swin_unetr_48", ConfigError)
    assert "use_v2: False in the file, True by the name" in message(state, "monai:swin_unetr_v2", ConfigError)
    assert "3 in the file, 2 by backbone.dims" in message(state, error=ConfigError, dims=2)


def test_names_and_sizes_that_do_not_fit():
    def message(error=ConfigError, image_size=None, **options):
        with pytest.raises(error) as caught:
            backbones.load(BackboneOptions(weights=options.pop("weights", "random"), **options), image_size=image_size)
        return str(caught.value)

    assert "Known: monai:swin_unetr, monai:swin_unetr_v2" in message(name="monai:unet")
    assert "There is no network monai:segresnet_v2" in message(name="monai:segresnet_v2")
    assert "give --set backbone.weights=FILE" in message(WeightsError, name="monai:segresnet", weights="pretrained")
    assert "48x40x48 is not a multiple of the patch size 32" in message(
        name="monai:swin_unetr_12", image_size=(48, 40, 48)
    )
    assert "backbone.patch_size is for vision transformers" in message(name="monai:segresnet_8", patch_size=8)
    assert "MONAI cannot make monai:segresnet_4" in message(name="monai:segresnet_4")
    assert "has 2 dimensions; backbone.dims is 3" in message(name="monai:segresnet_8", dims=3, image_size=(16, 16))


def test_sizes_where_nothing_says_others():
    for dims, side in ((3, 96), (2, 224)):
        spec = backbones.load(BackboneOptions(name="monai:segresnet_8", weights="random", dims=dims)).spec
        assert (spec.image_size, spec.patch, spec.architecture) == ((side,) * dims, (8,) * dims, "segresnet_8")
    assert backbones.load("monai:vit_64", weights="random").spec.grid == (6, 6, 6)
    assert backbones.own_dims("monai:segresnet") == 3
    assert backbones.own_dims("vit_tiny_patch16_224") == backbones.own_dims("nonsense") == 2
