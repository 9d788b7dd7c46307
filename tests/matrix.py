"""What combinations there are: every tuner x every pretext task x every kind of backbone.

Tuners and pretext tasks come from the registries, so that a new one runs through the contract without an edit here. The
backbones are the smallest networks that have each kind's peculiarities. Those of timm are known to it by name, so that
they load from a folder like any other, and `peft` finds them too; those of transformers load from folders as its
`save_pretrained` writes them. Networks of volumes go through TPP here; what tuners promise on them is asked in
`test_inflate_tuners.py` and `test_monai_tuners.py`. `make test` runs a cover of pairs, `make slow` the rest.
"""

import json
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models import register_model
from timm.models.beit import Beit
from timm.models.convnext import ConvNeXt
from timm.models.densenet import DenseNet
from timm.models.eva import Eva
from timm.models.resnet import BasicBlock, ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers import AutoModel, Dinov2WithRegistersConfig, Dinov2WithRegistersModel, ViTConfig, ViTModel

import monai_networks
from medtpp import backbones, tuners
from medtpp.adapter import AdapterCard, BackboneCard
from medtpp.backbones.folder import save_backbone
from medtpp.config import PRETEXTS, TUNERS, BackboneOptions
from medtpp.data.fingerprints import Fingerprints
from medtpp.data.preprocess import Preprocessing
from medtpp.seeds import Seeds
from medtpp.training.tpp import refusal
from pictures import pictures

SIZE, PATCH, WIDTH, DEPTH = 32, 8, 64, 2
PATCHES = (SIZE // PATCH) ** 2

# The dropout must never be seen: a frozen encoder stays in evaluation mode.
_COMMON = {"patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2, "drop_path_rate": 0.3}
_VIT = partial(VisionTransformer, proj_drop_rate=0.2, **_COMMON)
_EVA = partial(Eva, proj_drop_rate=0.2, **_COMMON)
_KINDS = {
    "medtpp_test_class_token": _VIT,
    "medtpp_test_mean": partial(_VIT, class_token=False, global_pool="avg", fc_norm=False, pre_norm=True),
    # Like DINOv2: registers, LayerScale.
    "medtpp_test_registers": partial(_VIT, reg_tokens=4, no_embed_class=True, init_values=0.3),
    # Like DINOv3: rotary positions alone, registers, no bias of queries and keys.
    "medtpp_test_rotary": partial(
        _EVA, qkv_bias=False, use_abs_pos_emb=False, use_rot_pos_emb=True, rope_type="dinov3", num_reg_tokens=4,
        use_fc_norm=False, init_values=0.3,
    ),
    # Like EVA: biases of queries and values beside a fused layer.
    "medtpp_test_fused_bias": partial(_EVA, use_fc_norm=False),
    # Like EVA-02: queries, keys and values apart, a gated MLP, rotary and absolute positions.
    "medtpp_test_gated": partial(
        _EVA, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True, use_fc_norm=False
    ),
    # Biases by relative position of each block and of all, fused biases of queries and values.
    "medtpp_test_beit": partial(
        Beit, proj_drop_rate=0.2, use_rel_pos_bias=True, use_shared_rel_pos_bias=True, init_values=0.3,
        use_fc_norm=False, **_COMMON,
    ),
}  # fmt: skip
# Hierarchical networks whose last map has the same grid: some last stages do not halve it. Each lies in timm's module
# of its kind, by which it is known.
_SWIN = {"img_size": SIZE, "patch_size": 2, "embed_dim": 32, "depths": (1, 2, 1), "num_heads": (1, 2, 2),
         "window_size": 4, "drop_path_rate": 0.3}  # fmt: skip
_PYRAMIDS = {
    "medtpp_test_swin": partial(SwinTransformer, **_SWIN),
    "medtpp_test_swin_v2": partial(SwinTransformerV2, **_SWIN),
    "medtpp_test_convnext": partial(
        ConvNeXt, depths=(1, 1, 1, 1), dims=(32, 32, 64, 64), patch_size=2, kernel_sizes=3, ls_init_value=0.3,
        output_stride=8, drop_path_rate=0.3,
    ),
    "medtpp_test_resnet": partial(
        ResNet, block=BasicBlock, layers=(1, 1, 1, 1), channels=(8, 16, 32, 64), stem_width=8, output_stride=8
    ),
    "medtpp_test_densenet": partial(DenseNet, growth_rate=8, block_config=(2, 2)),
}  # fmt: skip

_HF = {"image_size": SIZE, "patch_size": PATCH, "hidden_size": WIDTH, "num_hidden_layers": DEPTH,
       "num_attention_heads": 2, "hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}  # fmt: skip
_TRANSFORMERS = {
    # Queries, keys and values apart; blocks that are called with keywords.
    "transformers_vit": lambda: ViTModel(ViTConfig(intermediate_size=4 * WIDTH, **_HF)),
    # Registers, LayerScale and a gated MLP.
    "transformers_dinov2": lambda: Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(use_swiglu_ffn=True, drop_path_rate=0.3, layerscale_value=0.3, **_HF)
    ),
}


def _entry(name, kind, module):
    def build(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
        network = kind(**{"num_classes": 0, **kwargs})
        network.pretrained_cfg = {"mean": [0.5] * 3, "std": [0.25] * 3}
        return network

    build.__name__, build.__module__ = name, module
    return build


for _name, _kind in _KINDS.items():
    register_model(_entry(_name, partial(_kind, img_size=SIZE), __name__))
for _name, _kind in _PYRAMIDS.items():
    register_model(_entry(_name, _kind, _kind.func.__module__))

# `full` moves every weight, and RandLoRA scales its update up: small departures when perturbed.
PERTURBATION = {"full": 0.01, "randlora": 0.005}
_FOLDERS = TemporaryDirectory(prefix="medtpp-matrix-")  # goes when the process ends
TIMM = tuple(_KINDS)
VARIANTS = (*TIMM, *_PYRAMIDS, *_TRANSFORMERS)
VOLUMES = {
    "volumes_inflated": (8, 24, 32),
    **{f"volumes_{kind}": monai_networks.SIZES[kind] for kind in ("vit", "segresnet")},  # a Swin takes minutes
}
_INFLATED, _THIN = "medtpp_test_registers", (4, 8, 8)  # the kind that is inflated; patches


def params(cells: list[tuple[str, ...]]) -> list:
    """Cells of (tuner, variant) or (pretext, tuner, variant) as parameters of a test; those outside the cover are slow.

    In the cover is each pair of pretext and tuner, of pretext and variant, of tuner and variant; where there is no
    pretext, LoRA and SSF with each variant, and each other tuner with two to four.
    """
    if len(cells[0]) == 3:
        covered = pairwise(cells)
    else:
        place = {cell: TUNERS.names().index(cell[0]) + VARIANTS.index(cell[1]) for cell in cells}
        covered = {cell for cell in cells if cell[0] in ("lora", "ssf") or place[cell] % 4 == 0}
    return [pytest.param(*cell, marks=() if cell in covered else pytest.mark.slow) for cell in cells]


def singly(cells: list[tuple[str, ...]]) -> list:
    """Cells as parameters of a test, those slow that hold no tuner, task or variant for the first time."""
    seen: set[tuple[int, str]] = set()
    found = []
    for cell in cells:
        found.append(pytest.param(*cell, marks=pytest.mark.slow if seen.issuperset(enumerate(cell)) else ()))
        seen |= set(enumerate(cell))
    return found


def pairwise(cells: list[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Few of the cells, with all pairs of values that any cell has: greedily, the one with most new pairs first."""
    pairs = {cell: set(combinations(enumerate(cell), 2)) for cell in cells}
    wanted, chosen = set().union(*pairs.values()), set()
    for news in range(len(cells[0]) * (len(cells[0]) - 1) // 2, 0, -1):  # what a cell covers anew only falls
        for cell in cells:
            if len(pairs[cell] & wanted) >= news:
                chosen.add(cell)
                wanted -= pairs[cell]
    return chosen


@cache
def backbone_folder(variant: str) -> Path:
    """A folder with weights none of which is zero or one, so that every one of them matters."""
    with Seeds(0).scope("matrix", variant), torch.no_grad():
        network = _TRANSFORMERS[variant]() if variant in _TRANSFORMERS else timm.create_model(variant)
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, buffer in network.named_buffers():
            if "running_" in name:
                buffer.add_(torch.rand_like(buffer) * 0.2)
    folder = Path(_FOLDERS.name) / variant
    if variant in _TRANSFORMERS:
        network.save_pretrained(folder)
        processor = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor), encoding="utf-8")
        return folder
    card = {"architecture": variant, "image_size": SIZE, "channels": 3, "mean": [0.5] * 3, "std": [0.25] * 3}
    save_backbone(folder, network.state_dict(), {}, {**card, "objective": "unknown"}, Fingerprints())
    return folder


def options(variant: str) -> BackboneOptions:
    """What loads a backbone of this kind: a folder, or a name and a file of weights."""
    folder = backbone_folder(variant)
    if variant in _PYRAMIDS:
        return BackboneOptions(name=variant, weights=str(folder / "model.safetensors"))
    return BackboneOptions(name=f"transformers:{folder}" if variant in _TRANSFORMERS else str(folder))


def load(variant: str) -> backbones.Backbone:
    """A new backbone of this kind; the same bits each time."""
    if variant == "volumes_inflated":
        inflated = options(_INFLATED).model_copy(update={"dims": 3, "patch_size": _THIN})
        return backbones.load(inflated, image_size=VOLUMES[variant])
    if variant in VOLUMES:
        patch = {"patch_size": _THIN} if variant == "volumes_vit" else {}
        return monai_networks.load(variant.removeprefix("volumes_"), **patch)
    return backbones.load(options(variant), image_size=SIZE)


def plain_network(variant: str) -> nn.Module:
    """The network as its own library loads it; `plain_tokens` are what it gives."""
    if variant in _TRANSFORMERS:
        return AutoModel.from_pretrained(backbone_folder(variant))
    network = timm.create_model(variant)
    network.load_state_dict(load_file(backbone_folder(variant) / "model.safetensors"))
    return network


def plain_tokens(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What a network of `plain_network`, or `peft` inside it, makes of images in [0, 1]."""
    images = (images - 0.5) / 0.25
    if not hasattr(network, "forward_features"):
        return network(images)[0]
    features = network.forward_features(images)
    if features.ndim == 3:
        return features
    # A map: of Swin (B, H, W, D), of ConvNets (B, D, H, W).
    return features.flatten(1, 2) if hasattr(network, "patch_embed") else features.flatten(2).transpose(1, 2)


@cache
def capabilities(variant: str) -> frozenset[str]:
    """What a backbone of this kind has."""
    return load(variant).spec.capabilities


@cache
def needs(pretext: str) -> frozenset[str]:
    """What the task needs of a backbone with its default options; of a sum, what its parts need."""
    method = PRETEXTS.get(pretext)
    return method(method.Options(), load(VARIANTS[0]).spec, Seeds(0)).needs


TUNED = [
    (tuner, variant)
    for tuner in TUNERS.names()
    for variant in VARIANTS
    if TUNERS.get(tuner).needs <= capabilities(variant)
]
WITH_TARGETS = [(tuner, variant) for tuner, variant in TUNED if TUNERS.get(tuner).has_targets]
_WITH_PRETEXT = [
    (pretext, tuner, variant)
    for pretext in PRETEXTS.names()
    for tuner in TUNERS.names()
    for variant in (*VARIANTS, *VOLUMES)
    if TUNERS.get(tuner).has_targets and TUNERS.get(tuner).needs | needs(pretext) <= capabilities(variant)
]
PRETRAINED = [cell for cell in _WITH_PRETEXT if refusal(cell[1], needs(cell[0])) is None]
REFUSED = sorted({cell[:2] for cell in _WITH_PRETEXT} - {cell[:2] for cell in PRETRAINED})


def attach(tuner: str, variant: str, seed: int = 0) -> tuners.TunedBackbone:
    """A new backbone with this tuner."""
    return tuners.attach(load(variant), tuner, seed=seed)


def make_pretext(name: str, backbone: backbones.Backbone):
    """The pretext task with its default options, ready to train."""
    method = PRETEXTS.get(name)
    pretext = method(method.Options(), backbone.spec, Seeds(0))
    pretext.begin(backbone)
    return pretext


def card_of(tuner: str, variant: str, **fields) -> AdapterCard:
    """An adapter's card, as the stages write it."""
    sha256 = load(variant).spec.sha256
    return AdapterCard(
        backbone=BackboneCard(options=options(variant), architecture=variant, image_size=SIZE, sha256=sha256),
        tuner=TUNERS.get(tuner).Options().model_dump(mode="json"),
        preprocessing=Preprocessing(image_size=SIZE, channels=1),
        modality="unknown",
        seed=0,
        **fields,
    )


def images(count: int = 8, channels: int = 1, variant: str = "") -> torch.Tensor:
    """(count, channels, SIZE, SIZE), or of the size of this kind of backbone."""
    return pictures(VOLUMES.get(variant, (SIZE, SIZE)), count, channels)


def pretext_of(tuner: str) -> str:
    """The default pretext task, or one that drops no patches for tuners that need all."""
    return "simmim" if TUNERS.get(tuner).needs_grid else "mae"


def draws(count: int = 8, epoch: int = 0):
    """Draws of a batch."""
    return Seeds(2).draws(torch.full((count,), epoch), torch.arange(count))


def perturb(tuned: tuners.TunedBackbone, scale: float | None = None, seed: int = 3) -> None:
    """Move the target parameters at random, as training would; by the tuner's own scale if none is given."""
    scale = PERTURBATION.get(tuned.tuner.name, 0.05) if scale is None else scale
    generator = Seeds(seed).generator("perturb")
    with torch.no_grad():
        for parameter in tuned.targets.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def descent(loss, parameters, steps: int, rate: float):
    """AdamW on `loss()`; yields the loss before each step, and after the last."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    for _ in range(steps):
        value = loss()
        yield float(value.detach())
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    with torch.no_grad():
        yield float(loss())


def descend(*args, **options) -> list[float]:
    """All losses of a descent."""
    return list(descent(*args, **options))
