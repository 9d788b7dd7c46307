"""MedCoSS (Ye et al., CVPR 2024, arXiv 2311.17597): a ViT-B pre-trained on reports, X-rays, CT, MRI and pathology.

Its 2D encoder is timm's ViT with two differences: a layer norm on the sum of patch embedding and position, before the
class token joins, and no norm at the end. Colour images are read as RGB here; the authors' pathology loader kept BGR.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from medtpp.backbones.base import Backbone, hash_state
from medtpp.backbones.checkpoints import load_strict, read_checkpoint, strip_prefix
from medtpp.backbones.timm_vit import resample, wrap_vit
from medtpp.config import BACKBONES, BackboneOptions
from medtpp.errors import WeightsError
from medtpp.seeds import Seeds

log = logging.getLogger(__name__)

NAME = "medcoss_vit_base"
PUBLISHED = "https://github.com/yeerwen/MedCoSS#pre-trained-model"
IMAGE_SIZE = 224  # what it was pre-trained at
HEAD_WIDTH = 64

_PATCHES = "video_embed.embeddings.weight"
_POSITIONS = "video_embed.embeddings_st_pos_2D.{}_pos_embed.weight"
# Of the layout of the authors' file to timm's names.
_NAMES = (
    (r"^fused_encoder\.layers\.", "blocks."),
    (r"^video_embed\.embeddings\.", "patch_embed.proj."),
    (r"^video_embed\.embeddings_norm\.", "norm_embed."),
    (r"\.self_attn\.in_proj_", ".attn.qkv."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.linear([12])\.", r".mlp.fc\1."),
    (r"\.gamma_([12])$", r".ls\1.gamma"),
)


class MedCoSSViT(VisionTransformer):  # type: ignore[misc]  # timm has no types
    """The 2D encoder of MedCoSS as a timm network.

    Args:
        width: Channels of a token; heads have 64 channels.
        hidden: Channels inside an MLP.
        depth: Number of blocks.
        patch: Side of a patch in pixels.
        channels: Input channels.
    """

    def __init__(self, width: int, hidden: int, depth: int, patch: int, channels: int) -> None:
        super().__init__(
            img_size=IMAGE_SIZE,
            patch_size=patch,
            in_chans=channels,
            num_classes=0,
            global_pool="token",
            embed_dim=width,
            depth=depth,
            num_heads=width // HEAD_WIDTH,
            mlp_ratio=hidden / width,
            init_values=1e-3,
            no_embed_class=True,
            final_norm=False,
            norm_layer=partial(nn.LayerNorm, eps=1e-5),
        )
        self.norm_embed = nn.LayerNorm(width, eps=1e-5)
        # Its loaders make tensors in [0, 1] and normalise no further.
        self.pretrained_cfg = {"mean": (0.0,) * channels, "std": (1.0,) * channels}

    def _pos_embed(self, x: Tensor) -> Tensor:
        x = self.norm_embed(x + self.pos_embed)  # (B, N, D)
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)  # (B, 1 + N, D)


@BACKBONES.register("medcoss")
class MedCoSSFamily:
    """The published 2D encoder, from the authors' file."""

    summary: ClassVar[str] = "MedCoSS ViT-B for X-ray, CT, MRI and pathology, from its authors' file (weights: FILE)"
    examples: ClassVar[tuple[str, ...]] = (NAME,)

    @staticmethod
    def recognises(name: str) -> bool:
        """Whether it is this family's only name."""
        return name == NAME

    @staticmethod
    def build(options: BackboneOptions, image_size: int | None) -> Backbone:
        """Make the encoder, load the authors' file, then resample positions and patches.

        Raises:
            ConfigError: The image size is not a multiple of the patch size.
            WeightsError: No file is given, or it is not MedCoSS's.
        """
        if options.weights == "pretrained":
            raise WeightsError(
                f"{NAME} needs its authors' file: download it from {PUBLISHED} and give --set backbone.weights=FILE."
            )
        with Seeds(0).scope("backbone", NAME):
            if options.weights == "random":
                encoder: Any = MedCoSSViT(width=768, hidden=3072, depth=12, patch=16, channels=3)
            else:
                state = strip_prefix(read_checkpoint(Path(options.weights).expanduser()), anchor=_PATCHES)
                encoder = load_medcoss(state, options.weights)
        sha256 = hash_state(encoder.state_dict())
        resample(encoder, image_size, options.patch_size)
        objective = "unknown" if options.weights == "random" else "pixels"
        return wrap_vit(encoder, NAME, NAME, options.weights, sha256, family="medcoss", objective=objective)

    @staticmethod
    def around(network: nn.Module, image_size: tuple[int, ...]) -> None:  # noqa: ARG004  (a family's signature)
        """In memory it is a timm ViT like others."""
        return


def load_medcoss(state: Mapping[str, Tensor], path: str) -> MedCoSSViT:
    """A network of the size that a state in the authors' layout has, with its weights.

    Raises:
        WeightsError: The state has another layout, or weights are missing.
    """
    depth = len({match[1] for key in state if (match := re.match(r"fused_encoder\.layers\.(\d+)\.", key))})
    spatial, temporal = (state.get(_POSITIONS.format(axis)) for axis in ("spatial", "temporal"))
    patches, hidden = state.get(_PATCHES), state.get("fused_encoder.layers.0.linear1.bias")
    if patches is None or hidden is None or spatial is None or temporal is None:
        raise WeightsError(
            f"{path} is no MedCoSS checkpoint: it lacks fused_encoder or video_embed. The authors' file: {PUBLISHED}."
        )
    width, channels, patch = patches.shape[:3]
    network = MedCoSSViT(width, len(hidden), depth, patch, channels)
    converted = {_timm_name(key): value for key, value in state.items()}
    # One row for each patch of a 224-pixel image, row by row; the table has room for larger ones that were not trained.
    converted["pos_embed"] = (spatial[: network.patch_embed.num_patches] + temporal[0])[None]
    log.info("%s: %s", path, load_strict(network, converted, path))
    return network


def _timm_name(key: str) -> str:
    for pattern, replacement in _NAMES:
        key = re.sub(pattern, replacement, key)
    return key
