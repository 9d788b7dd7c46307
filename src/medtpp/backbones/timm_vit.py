"""Plain vision transformers of timm: ViT, DeiT, DINOv2 (registers), BEiT, DINOv3 and other Eva models (rotary)."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as convert_eva
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as convert_vit
from torch import Tensor, nn

from medtpp.backbones.attention import training_attention
from medtpp.backbones.base import (
    PLAIN_VIT,
    Backbone,
    Features,
    Inflation,
    Spec,
    gather_tokens,
    hash_state,
    mask_tokens,
    patch_map,
    per_channel,
)
from medtpp.backbones.beit import arguments_of, convert_beit, run_block
from medtpp.backbones.checkpoints import load_strict, read_checkpoint, strip_prefix
from medtpp.backbones.inflate import VolumeEmbed, add_positions, inflate, require_whole, sides
from medtpp.backbones.timm_layout import vit_layout
from medtpp.backbones.timm_names import (
    check_weights,
    create_network,
    model_module,
    objective_of,
    pretrained,
    readable,
    warn_without_tag,
)
from medtpp.config import BACKBONES, BackboneOptions
from medtpp.errors import ConfigError

log = logging.getLogger(__name__)

_HUB = ("hf-hub:", "hf_hub:")
_BEIT = "timm.models.beit"
_PLAIN = ("timm.models.vision_transformer", "timm.models.deit", "timm.models.eva", _BEIT)


class TimmViT(Backbone):
    """A timm `VisionTransformer`, `Eva` or `Beit`, run by blocks so that tokens can be dropped, masked and tapped."""

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
        self.check_taps(keep, taps)
        prefix, grid = self.spec.prefix, self.spec.grid
        x: Any = self._embed(images, keep)  # (B, N, D), or (B, *grid, D) at dynamic image sizes
        x, rope = add_positions(self.encoder, mask_tokens(x, mask, mask_token), prefix)  # (B, P + N, D)
        if keep is not None:
            x = torch.cat([x[:, :prefix], gather_tokens(x[:, prefix:], keep)], dim=1)  # (B, P + K, D)
            if rope is not None:  # (N, R) to (B, 1, K, R), the head dimension being 1
                rope = rope[keep][:, None]
        if not isinstance(self.encoder, Beit):
            x = self.encoder.norm_pre(x)
        maps = []
        with training_attention(x):
            for index, block in enumerate(self.encoder.blocks):
                if isinstance(self.encoder, Beit):
                    x = run_block(self.encoder, block, x, keep, math.prod(grid))
                else:
                    x = block(x) if rope is None else block(x, rope=rope)
                if index in taps:
                    maps.append(patch_map(x, prefix, grid))
        return Features(images, self.encoder.norm(x), prefix, grid, tuple(maps), (self.spec.patch,) * len(maps))

    def _embed(self, images: Tensor, keep: Tensor | None) -> Tensor:
        """Patch embeddings; the hidden patches, which are dropped after positions are added, stay zeros."""
        embed = self.encoder.patch_embed
        if keep is None:
            x: Tensor = embed(self.normalise(images))
            return x
        self._check_size(images)
        grid, dims = self.spec.grid, self.spec.dims
        axes = [side for pair in zip(grid, self.spec.patch, strict=True) for side in pair]
        patches = images.reshape(len(images), -1, *axes)  # (B, C, g1, p1, g2, p2, ...)
        patches = patches.permute(0, *range(2, 2 * dims + 2, 2), 1, *range(3, 2 * dims + 2, 2))
        cases = torch.arange(len(keep), device=keep.device)[:, None]
        visible = patches[cases, *torch.unravel_index(keep, grid)]  # (B, K, C, *patch)
        tokens = embed.proj(self._standardise(visible.flatten(0, 1)))  # each an image of one patch: (B*K, D, 1, 1)
        tokens = embed.norm(tokens.flatten(1).unflatten(0, keep.shape))  # (B, K, D)
        index = keep[..., None].expand_as(tokens)
        x = tokens.new_zeros(len(keep), math.prod(grid), tokens.shape[-1]).scatter(1, index, tokens)
        return x if embed.flatten else x.reshape(len(x), *grid, -1)


@BACKBONES.register("timm_vit")
class TimmViTFamily:
    """Builds `TimmViT` backbones by timm name, from the hub, or around a network that exists."""

    summary: ClassVar[str] = "plain vision transformers of timm: ViT, DeiT, BEiT, DINOv2, DINOv3, EVA-02, any by name"
    kinds: ClassVar[dict[str, frozenset[str]]] = {"ViT": PLAIN_VIT}
    examples: ClassVar[tuple[str, ...]] = (
        "vit_small_patch16_224.dino",
        "vit_base_patch16_224.mae",
        "deit3_small_patch16_224.fb_in22k_ft_in1k",
        "vit_small_patch14_dinov2.lvd142m",
        "vit_small_patch14_reg4_dinov2.lvd142m",
        "vit_small_patch16_dinov3.lvd1689m",
        "beitv2_base_patch16_224.in1k_ft_in22k",
    )

    @staticmethod
    def recognises(name: str) -> bool:
        """Whether the name is a timm model (`build` tells whether it fits), with or without `timm/`, or on the hub."""
        return name.startswith(_HUB) or model_module(name.removeprefix("timm/")) != ""

    @staticmethod
    def build(options: BackboneOptions, image_size: int | tuple[int, ...] | None) -> Backbone:
        """Make the network at its native size, load its weights, then resample (and inflate) positions and patches.

        Weights in a file or in a hub repository decide the native image and patch size, the channels and whether there
        is a layer scale; each of them must find its place.

        Raises:
            ConfigError: The architecture is not a plain ViT, or cannot take this size.
            WeightsError: Weights cannot be downloaded, read or matched.
        """
        name = options.name.removeprefix("timm/")
        hub = name.startswith(_HUB)
        if not hub:
            check_name(name)
        if hub and options.revision:
            name = f"{name}@{options.revision}"
        beit = model_module(name) == _BEIT
        arguments: dict[str, Any] = {"num_classes": 0} | ({} if beit else {"dynamic_img_size": False})
        state, source, objective = None, f"timm:{name}", objective_of(name)
        if options.weights == "random":
            source, objective = "random", "unknown"
        elif options.weights != "pretrained":
            source = options.weights
            state = strip_prefix(read_checkpoint(Path(source).expanduser()))
            if "decoder_embed.weight" in state:  # MAE; timm would take its mask token for DINOv2's or EVA's
                objective = "pixels"
                state.pop("mask_token", None)
            if beit:
                arguments |= arguments_of(state)
        elif hub:
            source = name
            with readable(name):
                state = strip_prefix(timm.models.load_state_dict_from_hf(name.partition(":")[2], weights_only=True))
        else:
            own, source = pretrained(name, options.revision)
            arguments |= own
        encoder = _check_plain(create_network(name, arguments | _shape(state or {})), name)
        if state is not None:
            fill(encoder, state, source)
        if options.weights == "pretrained":
            objective = objective_of(f"{name}.{encoder.pretrained_cfg.get('tag')}")
        elif state is not None and not hub:
            warn_without_tag(name, encoder.pretrained_cfg)
        sha256 = hash_state(encoder.state_dict())
        drop_unused(encoder)
        inflation = fit_to(encoder, options, image_size)
        return wrap_vit(encoder, options.name, name, source, sha256, objective=objective, inflation=inflation)

    @staticmethod
    def around(network: nn.Module, image_size: tuple[int, ...]) -> Backbone | None:
        """A backbone around an existing timm ViT that takes normalised images; None for another network.

        Raises:
            ConfigError: The image size does not fit, or it is a tower of open_clip's own.
        """
        if type(network).__module__ == "open_clip.transformer" and type(network).__name__ == "VisionTransformer":
            raise ConfigError(
                "open_clip's own vision transformer has its attention inside torch, where tuners find no layers. Load "
                "its weights into timm's: torch.save(model.state_dict(), FILE), then medtpp.load(NAME, weights=FILE) "
                "with a name such as vit_base_patch16_clip_224.laion2b (of OpenAI, vit_base_patch16_clip_quickgelu_224"
                ".openai). Towers that open_clip takes from timm are used as they are."
            )
        if not isinstance(network, VisionTransformer | Eva | Beit):
            return None
        name = type(network).__name__
        size = image_size if getattr(network, "dynamic_img_size", False) else None
        backbone = wrap_vit(network, name, name, "in memory", "", image_size=size)
        if any(side % patch for side, patch in zip(backbone.spec.image_size, backbone.spec.patch, strict=True)):
            raise ConfigError(f"Images of {image_size} pixels are not made of whole patches of {backbone.spec.patch}.")
        backbone.take_normalised()
        return backbone


def fill(encoder: Any, state: dict[str, Tensor], source: str) -> None:
    """Put a state, of timm or of a code that timm can convert, into a network; each weight must find its place.

    Raises:
        WeightsError: One does not.
    """
    if isinstance(encoder, Beit):
        adapted = convert_beit(state, encoder)
    else:
        adapted = convert_eva(state, encoder) if isinstance(encoder, Eva) else convert_vit(state, encoder, True)
    log.info("%s: %s", source, load_strict(encoder, adapted, source))


def drop_unused(encoder: Any) -> None:
    """Take away what pools and classifies: `encode` does not call it, so that `full` could not train it."""
    encoder.attn_pool = None
    encoder.fc_norm = nn.Identity()


def wrap_vit(
    encoder: nn.Module,
    name: str,
    architecture: str,
    source: str,
    sha256: str,
    *,
    family: str = "timm_vit",
    objective: str = "unknown",
    image_size: tuple[int, ...] | None = None,
    inflation: Inflation | None = None,
) -> TimmViT:
    """A timm network as a backbone, with its specification read off it.

    Raises:
        ConfigError: The network is not a plain ViT with a square grid of tokens.
    """
    vit = _check_plain(encoder, architecture)
    for block in vit.blocks:
        # Eva adds the query and value biases inside F.linear on the bare weight, which would pass LoRA by.
        if getattr(block.attn, "qkv_bias_separate", None) is False:
            block.attn.qkv_bias_separate = True
    # A network that was made by its class, not by timm's factory, has no configuration.
    cfg: dict[str, Any] = getattr(vit, "pretrained_cfg", None) or {}
    patch = tuple(vit.patch_embed.patch_size)
    size = image_size or tuple(n * p for n, p in zip(vit.patch_embed.grid_size, patch, strict=True))
    channels = vit.patch_embed.proj.in_channels
    spec = Spec(
        name=name,
        family=family,
        architecture=architecture,
        dims=len(patch),
        channels=channels,
        mean=per_channel(cfg.get("mean", (0.5,)), channels),
        std=per_channel(cfg.get("std", (0.5,)), channels),
        image_size=size,
        patch=patch,
        width=vit.embed_dim,
        depth=len(vit.blocks),
        prefix=vit.num_prefix_tokens,
        pooling="mean" if objective == "pixels" or vit.cls_token is None or vit.global_pool == "avg" else "cls",
        objective=objective,
        capabilities=PLAIN_VIT,
        source=source,
        sha256=sha256,
    )
    return TimmViT(vit, spec, vit_layout(vit), inflation)


def fit_to(encoder: Any, options: BackboneOptions, image_size: int | tuple[int, ...] | None) -> Inflation | None:
    """Fit a network to the images or volumes that it is to encode, in place."""
    if options.dims == 3:
        return inflate(encoder, image_size, options.patch_size, options.channels)
    if options.channels not in (None, encoder.patch_embed.proj.in_channels):
        raise ConfigError(
            f"backbone.channels is {options.channels}: for volumes alone. {options.name} takes images of "
            f"{encoder.patch_embed.proj.in_channels} channels (grey and colour are matched to it)."
        )
    resample(encoder, image_size, options.patch_size)
    return None


def resample(encoder: Any, image_size: int | tuple[int, ...] | None, patch_size: int | tuple[int, ...] | None) -> None:
    """Resample positions to another image size and the patch embedding to another patch size, in place."""
    own = encoder.patch_embed
    patch = sides(patch_size, 2) or own.patch_size
    size = sides(image_size, 2) or tuple(n * p for n, p in zip(own.grid_size, own.patch_size, strict=True))
    require_whole(size, patch)
    if (size, patch) != (own.img_size, own.patch_size):
        encoder.set_input_size(img_size=size, patch_size=patch if patch_size else None)


def check_name(name: str) -> None:
    """Raise ConfigError for a timm model of another kind or an unknown tag, before anything is downloaded."""
    if (module := model_module(name)).startswith("timm.") and module not in _PLAIN:
        raise ConfigError(
            f"{name} is a timm model of another kind ({module.rpartition('.')[2]}), neither a plain "
            "vision transformer nor a pyramid. See `medtpp list backbones`."
        )
    check_weights(name)


def _check_plain(encoder: nn.Module, architecture: str) -> Any:
    """The network, if it runs as patch embedding, positions, then blocks of one attention and one MLP each.

    Raises:
        ConfigError: It does not.
    """
    vit: Any = encoder
    known = isinstance(encoder, VisionTransformer | Eva | Beit)
    if not known or not isinstance(vit.patch_embed, PatchEmbed | VolumeEmbed):
        raise ConfigError(f"{architecture} is a {type(encoder).__name__}, not a plain vision transformer.")
    if getattr(vit, "rope_mixed", False):
        raise ConfigError(f"{architecture} learns rotary positions per layer, which cannot follow dropped tokens.")
    if not all(hasattr(block, "attn") and hasattr(block, "mlp") for block in vit.blocks):
        raise ConfigError(f"{architecture} runs attention and MLP side by side, where tuners find no layers of theirs.")
    return vit


def _shape(state: dict[str, Tensor]) -> dict[str, Any]:
    """What a state tells of the network it was trained in; other things come from the architecture's name."""
    patches, positions = state.get("patch_embed.proj.weight"), state.get("pos_embed")
    if patches is None or patches.ndim != 4:
        return {}
    shape: dict[str, Any] = {"in_chans": patches.shape[1], "patch_size": patches.shape[-1]}
    if "blocks.0.ls1.gamma" in state:
        shape["init_values"] = 1e-5
    if positions is not None:
        for prefix in (0, 1, 2, 5):  # none in the positions, class, class and distillation, class and registers
            side = math.isqrt(positions.shape[1] - prefix)
            if side * side == positions.shape[1] - prefix and side > 1:
                return shape | {"img_size": side * patches.shape[-1]}
    return shape
