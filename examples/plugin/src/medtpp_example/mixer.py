"""MLP-Mixers of timm (Tolstikhin et al., arXiv 2105.01601): a grid of patches, none of which can be dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

from medtpp.backbones import Backbone, Features, Layout, Spec, hash_state
from medtpp.config import BACKBONES, BackboneOptions
from medtpp.errors import ConfigError, WeightsError
from medtpp.seeds import Seeds


class Mixer(Backbone):
    """A timm `MlpMixer`, run block by block so that tokens can be masked and tapped."""

    encoder: Any

    def encode(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        taps: Sequence[int] = (),
    ) -> Features:
        """See `Backbone.encode`."""
        if keep is not None:
            raise ConfigError("A Mixer needs all patches: its first layers are as wide as there are patches.")
        x = self.encoder.stem(self.normalise(images))  # (B, N, D)
        if mask is not None:
            token = x.new_zeros(x.shape[-1]) if mask_token is None else mask_token.to(x.dtype)
            x = torch.where(mask[..., None], token, x)
        maps = []
        for index, block in enumerate(self.encoder.blocks):
            x = block(x)
            if index in taps:
                maps.append(x.transpose(1, 2).unflatten(2, self.spec.grid))  # (B, D, *grid)
        return Features(images, self.encoder.norm(x), 0, self.spec.grid, tuple(maps), (self.spec.patch,) * len(maps))


@BACKBONES.register("mixer")
class MixerFamily:
    """Builds `Mixer` backbones by timm name."""

    summary: ClassVar[str] = "MLP-Mixers of timm"
    examples: ClassVar[tuple[str, ...]] = ("mixer_s16_224", "mixer_b16_224.goog_in21k")

    @staticmethod
    def recognises(name: str) -> bool:
        """Whether timm knows a Mixer of this name."""
        plain = name.split(".")[0]
        return timm.is_model(plain) and plain.startswith("mixer")

    @staticmethod
    def build(options: BackboneOptions, image_size: int | tuple[int, ...] | None) -> Backbone:
        """Make the network for this image size, with timm's weights or at random.

        Raises:
            WeightsError: A file of weights is named, or the size differs from the weights'.
        """
        if options.weights not in ("pretrained", "random"):
            raise WeightsError("This family reads no files: backbone.weights is pretrained or random.")
        side = image_size if isinstance(image_size, int) or image_size is None else image_size[0]
        with Seeds(0).scope("backbone", options.name):
            network: Any = timm.create_model(
                options.name, pretrained=options.weights == "pretrained", img_size=side or 224, num_classes=0
            )
        return MixerFamily._wrap(network, options.name, options.weights)

    @staticmethod
    def around(network: nn.Module, image_size: tuple[int, ...]) -> Backbone | None:  # noqa: ARG004
        """A backbone around an existing Mixer; None for another network."""
        return MixerFamily._wrap(network, "MlpMixer", "in memory") if isinstance(network, MlpMixer) else None

    @staticmethod
    def _wrap(network: Any, name: str, source: str) -> Mixer:
        cfg = network.pretrained_cfg or {}
        blocks = tuple(f"blocks.{index}" for index in range(len(network.blocks)))
        roles = {
            "embed.patch": ("stem.proj",),
            "mlp.in": tuple(f"{block}.mlp_channels.fc1" for block in blocks),
            "mlp.out": tuple(f"{block}.mlp_channels.fc2" for block in blocks),
            "norm.attention": tuple(f"{block}.norm1" for block in blocks),
            "norm.mlp": tuple(f"{block}.norm2" for block in blocks),
            "norm.final": ("norm",),
        }
        spec = Spec(
            name=name,
            family="mixer",
            architecture=name,
            dims=2,
            channels=network.stem.proj.in_channels,
            mean=tuple(cfg.get("mean", (0.5,) * 3)),
            std=tuple(cfg.get("std", (0.5,) * 3)),
            image_size=tuple(network.stem.img_size),
            patch=tuple(network.stem.patch_size),
            width=network.num_features,
            depth=len(blocks),
            prefix=0,
            pooling="mean",
            objective="supervised" if source == "pretrained" else "unknown",
            capabilities=frozenset({"dense", "masks", "linear"}),
            source=source,
            sha256=hash_state(network.state_dict()),
        )
        return Mixer(network, spec, Layout(blocks, roles))
