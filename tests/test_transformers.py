"""Networks of Hugging Face transformers: what they encode, and networks in memory."""

import peft
import pytest
import torch
from torch import nn

import medtpp
from medtpp import backbones, tuners
from medtpp.backbones.base import hash_state
from medtpp.errors import ConfigError
from transformers_networks import DEPTH, DEVIATION, KINDS, MEAN, SIZE, WIDTH, encoder_of, folder_of, load, run, whole


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


# Encoding


@pytest.mark.parametrize("grid", [None, (5, 5), (4, 6)])
@torch.no_grad()
def test_encode_equals_transformers(kind, grid):
    patch = 14 if kind == "dinov2" else 8
    backbone = load(folder_of(kind), grid and tuple(side * patch for side in grid))
    assert backbone.spec.grid == (grid or (4, 4))
    images = torch.rand(2, 3, *backbone.spec.image_size)
    features = backbone(images)
    expected = run(kind, encoder_of(whole(kind)), backbone.normalise(images))
    torch.testing.assert_close(features.tokens, expected, atol=1e-5, rtol=1e-5)
    assert features.tokens.shape[1] == backbone.spec.prefix + features.patches.shape[1]


@torch.no_grad()
def test_taps_are_what_the_blocks_give(kind):
    backbone = load(folder_of(kind))
    images = torch.rand(2, 3, *backbone.spec.image_size)
    network, states = encoder_of(whole(kind)), []
    for path in backbone.layout.blocks:
        network.get_submodule(path).register_forward_hook(lambda module, args, output: states.append(output))
    run(kind, network, backbone.normalise(images))
    features = backbone.encode(images, taps=(0, 1))
    for found, state in zip(features.maps, states, strict=True):
        patches = state[:, backbone.spec.prefix :]
        torch.testing.assert_close(found.flatten(2).transpose(1, 2), patches, atol=1e-5, rtol=1e-5)
    assert features.strides == (backbone.spec.patch,) * 2
    with pytest.raises(ConfigError, match="blocks 0 to 1"):
        backbone.encode(images, taps=(2,))
    with pytest.raises(ConfigError, match="exclude each other"):
        backbone.encode(images, keep=torch.zeros(2, 4, dtype=torch.long), taps=(1,))


@torch.no_grad()
def test_some_of_the_patches(kind):
    backbone = load(folder_of(kind))
    images = torch.rand(2, 3, *backbone.spec.image_size)
    everything, prefix = backbone(images), backbone.spec.prefix
    order = torch.rand(2, 16).argsort(dim=1)
    shuffled = backbone.encode(images, keep=order)
    index = order[..., None].expand(-1, -1, WIDTH)
    torch.testing.assert_close(shuffled.patches, everything.patches.gather(1, index), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shuffled.tokens[:, :prefix], everything.tokens[:, :prefix], atol=1e-4, rtol=1e-4)
    # What is hidden leaves no trace: as if the blocks had got the others alone.
    keep, changed = torch.arange(1, 16).expand(2, -1), images.clone()
    changed[..., : backbone.spec.patch[0], : backbone.spec.patch[1]] = 0
    assert torch.equal(backbone.encode(images, keep=keep).tokens, backbone.encode(changed, keep=keep).tokens)
    assert not torch.equal(everything.tokens, backbone(changed).tokens)
    sizes = []
    first = backbone.encoder.get_submodule(backbone.layout.blocks[0])
    first.register_forward_pre_hook(lambda module, args: sizes.append(args[0].shape[1]))
    backbone.encode(images, keep=keep[:, :5])
    assert sizes == [prefix + 5]


@pytest.mark.parametrize("token", [None, torch.linspace(-1, 1, WIDTH)])
@torch.no_grad()
def test_a_mask_replaces_the_patch_embedding(kind, token):
    backbone = load(folder_of(kind))
    images = torch.rand(2, 3, *backbone.spec.image_size)
    mask = torch.rand(2, 16) < 0.5
    ours = backbone.encode(images, mask=mask, mask_token=token).tokens
    network, value = encoder_of(whole(kind)), torch.zeros(WIDTH) if token is None else token
    (path,) = backbone.layout.paths("embed.patch")
    network.get_submodule(path).register_forward_hook(
        lambda module, args, out: torch.where(mask.view(2, 1, 4, 4), value.view(1, -1, 1, 1), out)
    )
    expected = run(kind, network, backbone.normalise(images))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_what_is_read_off_a_network(kind):
    spec = load(folder_of(kind)).spec
    expected = {
        "vit": (1, "cls", "unknown"),
        "classifier": (1, "cls", "unknown"),
        "mae": (1, "mean", "pixels"),
        "dinov2": (1, "cls", "features"),
        "giant": (1, "cls", "features"),
        "registers": (5, "cls", "features"),
        "dinov3": (3, "cls", "features"),
        "siglip": (0, "mean", "language"),
        "clip": (1, "cls", "language"),
    }
    assert (spec.prefix, spec.pooling, spec.objective) == expected[kind]
    assert (spec.width, spec.depth, spec.channels, spec.dims) == (WIDTH, DEPTH, 3, 2)
    assert (spec.mean, spec.std) == (tuple(MEAN), tuple(DEVIATION))
    assert spec.source == f"transformers:{folder_of(kind)}"
    assert spec.architecture == type(encoder_of(whole(kind))).__name__, "and no path of this machine"


def test_the_layout_names_every_layer(kind):
    backbone = load(folder_of(kind))
    modules = dict(backbone.encoder.named_modules())
    linears = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    assert set(backbone.layout.paths("attention.qkv", "attention.projection", "mlp.in", "mlp.out")) == linears
    norms = {name for name, module in modules.items() if isinstance(module, nn.LayerNorm)}
    assert set(backbone.layout.paths("norm.attention", "norm.mlp", "norm.final")) == norms - {"pre_layrnorm"}
    assert len(backbone.layout.paths("attention.qkv")) == 3 * DEPTH
    assert len(backbone.layout.paths("norm.attention")) == len(backbone.layout.blocks) == DEPTH


def test_only_what_is_encoded_with_is_kept(kind):
    """All parameters are reached, so that `full` can train them; where a head came along makes no other hash."""
    backbone = load(folder_of(kind))
    backbone.encoder.requires_grad_(True)
    backbone(torch.rand(1, 3, *backbone.spec.image_size)).tokens.square().sum().backward()
    assert {name for name, value in backbone.encoder.named_parameters() if value.grad is None} == set()
    assert backbone.spec.sha256 == hash_state(backbone.encoder.state_dict())


def test_prompts_are_not_rotated_and_patches_are():
    tuned = tuners.attach(load(folder_of("dinov3")), "vpt_deep")
    images, order = torch.rand(2, 3, SIZE, SIZE), torch.rand(2, 16).argsort(dim=1)
    with torch.no_grad():
        everything, shuffled = tuned.encode(images), tuned.encode(images, keep=order)
    expected = everything.patches.gather(1, order[..., None].expand(-1, -1, WIDTH))
    torch.testing.assert_close(shuffled.patches, expected, atol=1e-4, rtol=1e-4)


# Convpass hooks whole attentions, of which SigLIP's is called by keywords and DINOv3's gives a pair.
@pytest.mark.parametrize("tuner", ["lora", "convpass", "adaptformer", "ladder", "ssf"])
@pytest.mark.parametrize("kind", ["dinov3", "siglip", "clip"])
def test_tuners_fit_the_kinds_that_the_matrix_has_not(kind, tuner):
    tuned, plain = tuners.attach(load(folder_of(kind)), tuner), load(folder_of(kind))
    images = torch.rand(2, 3, SIZE, SIZE)
    with torch.no_grad():
        for parameter in tuned.targets.values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        assert not torch.allclose(tuned(images).tokens, plain(images).tokens)
        with tuned.disabled():
            assert torch.equal(tuned(images).tokens, plain(images).tokens)


# Networks in memory


@torch.no_grad()
def test_find_wraps_without_copying_and_does_not_normalise(kind):
    network = whole(kind)
    encoder = encoder_of(network)
    side = 70 if kind == "dinov2" else 40
    backbone = backbones.find(nn.ModuleDict({"inside": network}), (side, side))
    assert backbone.encoder is encoder
    pixels = torch.randn(2, 3, side, side)
    torch.testing.assert_close(backbone(pixels).tokens, run(kind, encoder, pixels), atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="not a multiple of the patch size"):
        backbones.find(network, (side + 1, side))


def test_tpp_in_a_script_of_ones_own():
    model = peft.get_peft_model(whole("classifier"), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.rand(8, 3, SIZE, SIZE) * 2 - 1
    record = medtpp.tpp(model, images, steps=3, head_warmup=1, batch_size=4, precision="32")
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(record.losses) == 3
    model(images)  # still the user's own
