"""What a backbone is: a frozen encoder of images, with a specification and named access points."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from medtpp.config import BackboneOptions
from medtpp.errors import ConfigError, DataError

# What a backbone may be or have, in the words of refusals: "it needs a backbone with ...".
CAPABILITIES = {
    "dense": "a grid of features",
    "masks": "places for masked patches",
    "drops_tokens": "tokens that can be dropped (a plain vision transformer)",
    "sequence": "one sequence of tokens through all blocks (a plain vision transformer)",
    "attention": "attention (a transformer)",
    "linear": "linear layers in the blocks",
    "convolutions": "convolutions in the blocks",
    "flat_layers": "linear layers, or convolutions of images and not of volumes, in the blocks",
}
PLAIN_VIT = frozenset({"dense", "masks", "drops_tokens", "sequence", "attention", "linear", "flat_layers"})


def describe_lacking(needs: frozenset[str], capabilities: frozenset[str]) -> str:
    """What a method needs that a backbone has not, in words; empty if nothing is lacking."""
    return " and ".join(words for name, words in CAPABILITIES.items() if name in needs - capabilities)


@dataclass(frozen=True)
class Stage:
    """What a tap gives: the channels of its feature map and pixels per step of it along each spatial dimension."""

    width: int
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Spec:
    """What is known of a backbone.

    Attributes:
        name: The name it was asked for by.
        family: The registered family that built it.
        architecture: The family's name of the network, such as "vit_small_patch16_224".
        dims: 2 or 3 spatial dimensions.
        channels: Input channels of the encoder; grey and colour images are matched to it by `encode`.
        mean, std: Normalisation, per channel, of images in [0, 1].
        image_size: Spatial size of the input in pixels.
        patch: Spatial size of a patch in pixels; of a pyramid, pixels per step of its last map.
        width: Channels of a token.
        depth: Number of blocks, of a pyramid number of stages: what can be tapped.
        prefix: Class and register tokens before the patch tokens.
        pooling: What the network was trained with: "mean" or "cls".
        objective: What it was pre-trained for: "pixels" (MAE), "features" (DINO), "language" (CLIP), "supervised" or
            "unknown".
        capabilities: Of `CAPABILITIES`.
        source: Where the weights come from.
        sha256: Hash of the weights before any resampling of positions or patches.
        pyramid: The stages of a pyramid; empty where all blocks have one width and one grid.
        mask_width: Channels of the token that takes the place of masked patches.
    """

    name: str
    family: str
    architecture: str
    dims: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, ...]
    patch: tuple[int, ...]
    width: int
    depth: int
    prefix: int
    pooling: str
    objective: str
    capabilities: frozenset[str]
    source: str
    sha256: str
    pyramid: tuple[Stage, ...] = ()
    mask_width: int = 0

    def __post_init__(self) -> None:
        if not self.mask_width:
            object.__setattr__(self, "mask_width", self.width)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What each tap gives."""
        return self.pyramid or (Stage(self.width, self.patch),) * self.depth

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches along each spatial dimension."""
        return tuple(size // patch for size, patch in zip(self.image_size, self.patch, strict=True))

    @property
    def effort(self) -> int:
        """Tokens of an image; where a network has no blocks of tokens, patches of 256 pixels count as such."""
        if self.depth and not self.pyramid:
            return math.prod(self.grid)
        return math.ceil(math.prod(self.image_size) / 256)


@dataclass(frozen=True)
class Branch:
    """A part of a block that is added to the tokens: after = before + factor * what its last layer gives.

    Attributes:
        start: Path of the norm that is given `before`.
        end: Path of the norm that is given `after`, or of the block that gives it.
        factor: Name of the encoder's parameter (D,) that is the factor, as in LayerScale; None for one.
    """

    start: str
    end: str
    factor: str | None


@dataclass(frozen=True)
class Layout:
    """Where things are in the encoder: tuners ask for roles, never for module names.

    Attributes:
        blocks: Paths of the blocks, in order.
        roles: Paths of modules by role. In blocks: "attention.qkv", "attention.projection", "mlp.in", "mlp.out",
            "norm.attention", "norm.mlp", of ConvNets "conv" (in one group, not dilated), "conv.depthwise" and
            "norm.conv". Outside: "embed.patch", "norm.embed", "downsample" and "norm.downsample" between stages,
            "norm.final".
        widths: Channels that each block gives, where they are not all the same.
        branches: What is known of how blocks add up, by the path of the last layer of each branch.
        kept: Paths of layers whose output autograd is known to keep as it is, for what comes next.
    """

    blocks: tuple[str, ...]
    roles: Mapping[str, tuple[str, ...]]
    widths: tuple[int, ...] = ()
    branches: Mapping[str, Branch] = field(default_factory=dict)
    kept: frozenset[str] = frozenset()

    def paths(self, *roles: str) -> tuple[str, ...]:
        """The paths of all modules with one of these roles."""
        return tuple(path for role in roles for path in self.roles.get(role, ()))


@dataclass(frozen=True)
class Features:
    """What a backbone makes of a batch.

    Attributes:
        images: (B, C, *spatial) as given, in [0, 1].
        tokens: (B, P + N, D) after the final norm: P prefix tokens, then N patch tokens in the order of `keep`.
        prefix: P.
        grid: Patches along each spatial dimension of the whole image.
        maps: One feature map for each tap, (B, D, *grid), of a pyramid of its stage's channels and grid.
        strides: Pixels per step of each map.
    """

    images: Tensor
    tokens: Tensor
    prefix: int
    grid: tuple[int, ...]
    maps: tuple[Tensor, ...] = ()
    strides: tuple[tuple[int, ...], ...] = field(default=())

    @property
    def patches(self) -> Tensor:
        """(B, N, D) patch tokens."""
        return self.tokens[:, self.prefix :]

    def pooled(self, how: str) -> Tensor:
        """(B, D): the class token for "cls", the mean of the patch tokens for "mean".

        Raises:
            ConfigError: The backbone has no class token.
        """
        if how == "cls" and not self.prefix:
            raise ConfigError("The backbone has no class token. Use mean pooling.")
        return self.tokens[:, 0] if how == "cls" else self.patches.mean(dim=1)


@dataclass(frozen=True)
class Inflation:
    """What inflation to volumes changed in an encoder of images.

    Attributes:
        parameters: Names of the encoder's new parameters. They are target parameters beside those of any tuner.
        originals: The source's weights that were resampled or replaced, as they were, by name.
    """

    parameters: tuple[str, ...] = ()
    originals: Mapping[str, Tensor] = field(default_factory=dict)


class Backbone(nn.Module, ABC):
    """A pre-trained encoder. Its own parameters are frozen; `train()` leaves them in evaluation mode.

    Attributes:
        spec: What it is.
        layout: Where its parts are.
        encoder: The bare network, which `peft` and other libraries know.
        inflation: What is new in the encoder, where it was made for images and encodes volumes; else empty.
        pretext_heads: State of pretext heads that came with the weights, by name of the pretext task.
        options: What it was loaded by; None for a network that was wrapped in memory.
        taken: Whether a tuner was attached to it.
        advice: What a refusal of a pretext task adds; of networks of one's own.
    """

    spec: Spec
    layout: Layout
    encoder: nn.Module
    inflation: Inflation
    pretext_heads: Mapping[str, Mapping[str, Tensor]]
    options: BackboneOptions | None
    taken: bool
    advice: str = ""
    mean: Tensor
    std: Tensor

    def __init__(self, encoder: nn.Module, spec: Spec, layout: Layout, inflation: Inflation | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.spec = spec
        self.layout = layout
        self.inflation = inflation or Inflation()
        self.pretext_heads = {}
        self.options = None
        self.taken = False
        self.register_buffer("mean", torch.tensor(spec.mean).view(-1, *[1] * spec.dims), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(-1, *[1] * spec.dims), persistent=False)
        new = set(self.inflation.parameters) - self.inflation.originals.keys()
        self._source_names = tuple(name for name in encoder.state_dict() if name not in new)
        self.encoder.requires_grad_(False)
        self.train(False)

    @abstractmethod
    def encode(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        taps: Sequence[int] = (),
    ) -> Features:
        """Encode images.

        Args:
            images: (B, C, *spatial) in [0, 1]; C is 1, 3 or the encoder's own.
            keep: (B, K) indices of the visible patches; the others are dropped before the blocks.
            mask: (B, N) true where a patch is replaced by `mask_token`.
            mask_token: (`spec.mask_width`,), zeros by default.
            taps: Blocks, of a pyramid stages, whose output is wanted as a feature map, in their order; needs all
                patches.

        Raises:
            ConfigError: There is no such tap, or patches cannot be dropped or masked.
        """

    def forward(self, images: Tensor) -> Features:
        """`encode` without options."""
        return self.encode(images)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Inside this context, the backbone computes as its source alone would; a plain one does so anyway."""
        yield

    def normalise(self, images: Tensor) -> Tensor:
        """Match grey and colour to the encoder's channels and normalise: (B, C, *spatial) to the encoder's input.

        Raises:
            DataError: The size or the number of channels does not fit.
        """
        self._check_size(images)
        return self._standardise(images)

    def check_taps(self, keep: Tensor | None, taps: Sequence[int]) -> None:
        """What `encode` asks of its arguments.

        Raises:
            ConfigError: Maps are wanted of some patches alone, or of blocks that do not exist.
        """
        if taps and keep is not None:
            raise ConfigError("Feature maps need all patches: taps and keep exclude each other.")
        if not all(0 <= tap < self.spec.depth for tap in taps):
            kind = "stages" if self.spec.pyramid else "blocks"
            raise ConfigError(f"There are {kind} 0 to {self.spec.depth - 1}; maps were asked of {list(taps)}.")

    def take_normalised(self, low: float = 0.0, high: float = 1.0) -> None:
        """From now on, images are what the network itself takes, with values from low to high brought to [0, 1].

        `encode` gives the network the values that they had. By default nothing is done to them.
        """
        channels, width = self.spec.channels, high - low
        self.spec = replace(self.spec, mean=(-low / width,) * channels, std=(1 / width,) * channels)
        self.mean.fill_(-low / width)
        self.std.fill_(1 / width)

    def _check_size(self, images: Tensor) -> None:
        expected = self.spec.image_size
        if tuple(images.shape[2:]) != expected:
            size, want = "x".join(map(str, images.shape[2:])), "x".join(map(str, expected))
            raise DataError(
                f"Images are {size} pixels; the backbone {self.spec.name} was loaded for {want}. Resize them, or load "
                "it with their image_size."
            )

    def _standardise(self, images: Tensor) -> Tensor:
        return (match_channels(images, self.spec.channels) - self.mean) / self.std

    def train(self, mode: bool = True) -> Backbone:
        """Dropout, DropPath and batch norm of the encoder stay in evaluation mode, whatever `mode` is."""
        super().train(mode)
        self.encoder.train(False)
        return self

    def source_state(self) -> dict[str, Tensor]:
        """Weights and buffers of the encoder as it was before any tuner or inflation, by their original names."""
        current = {name.replace(".base_layer.", "."): value for name, value in self.encoder.state_dict().items()}
        return {name: self.inflation.originals.get(name, current[name]) for name in self._source_names}

    def settle(self) -> None:
        """Take what inflation made for weights of the source: what it was made from is no longer known."""
        new = (name for name in self.inflation.parameters if name not in self._source_names)
        self._source_names = (*self._source_names, *new)
        self.inflation = Inflation()

    def source_hash(self) -> str:
        """The sha256 of `source_state()`: names, shapes, types and bits."""
        return hash_state(self.source_state())


def other_dims(name: str, own: int, wanted: int) -> ConfigError:
    """The error for a backbone that is asked to encode images of a number of dimensions that it cannot."""
    return ConfigError(
        f"{name} encodes {own}D images alone, and backbone.dims is {wanted}. "
        "medtpp_vit_tiny, folders of `medtpp pretrain`, timm's vision transformers and MONAI's networks encode volumes."
    )


def per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Means or deviations for a number of channels: as given where they are as many, else the mean of them for each."""
    if len(values) == channels:
        return tuple(float(value) for value in values)
    return (sum(values) / len(values),) * channels


def hash_state(state: Mapping[str, Tensor]) -> str:
    """The sha256 over names, types, shapes and bits of tensors, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        total.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def match_channels(images: Tensor, channels: int) -> Tensor:
    """(B, C, *spatial) to (B, channels, *spatial): grey into colour by repetition, colour into grey by BT.601 luma.

    Raises:
        DataError: Neither applies.
    """
    given = images.shape[1]
    if given == channels:
        return images
    if given == 1:
        return images.expand(-1, channels, *images.shape[2:])
    if given == 3 and channels == 1:
        weights = images.new_tensor([0.299, 0.587, 0.114]).view(3, *[1] * (images.ndim - 2))
        return (images * weights).sum(dim=1, keepdim=True)
    raise DataError(f"Images have {given} channels; the backbone takes {channels} (or 1, or 3 for grey).")


def mask_tokens(x: Tensor, mask: Tensor | None, token: Tensor | None) -> Tensor:
    """Embeddings (B, N, D), or (B, *grid, D), with a token (D,), zeros by default, where the mask (B, N) is true."""
    if mask is None:
        return x
    filled = x.new_zeros(x.shape[-1]) if token is None else token.to(x.dtype)
    return torch.where(mask.reshape(*x.shape[:-1], 1), filled, x)


def patch_map(x: Tensor, prefix: int, grid: tuple[int, ...]) -> Tensor:
    """(B, P + N, D) to the patches' map (B, D, *grid); tokens that a tuner put after them are left out."""
    patches = x[:, prefix : prefix + math.prod(grid)].transpose(1, 2)
    return patches.reshape(x.shape[0], -1, *grid)  # len(x) is a number, which would fix the batch size of an export


def gather_tokens(tokens: Tensor, keep: Tensor) -> Tensor:
    """(B, N, D) and (B, K) indices to (B, K, D)."""
    return tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))
