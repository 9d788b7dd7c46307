"""SSF: scale and shift deep features (Lian et al., arXiv 2210.08823)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from timm.layers import LayerNorm2d, RmsNorm, RmsNormFp32
from torch import Tensor, nn

from medtpp.backbones import Backbone, Branch, Features
from medtpp.config import TUNERS, MethodOptions
from medtpp.seeds import Seeds
from medtpp.tuners._scaled import Sum, scale_added, scale_kept, scale_norm, scale_shift, weak_channels, witness
from medtpp.tuners._switched import SwitchedBackbone, unhook
from medtpp.tuners.base import TunedBackbone, Tuner

ROLES = (
    "embed.patch",
    "norm.embed",
    "conv",
    "conv.depthwise",
    "norm.conv",
    "norm.attention",
    "attention.qkv",
    "attention.projection",
    "norm.mlp",
    "mlp.in",
    "mlp.out",
    "downsample",
    "norm.downsample",
    "norm.final",
)
LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, RmsNorm, RmsNormFp32)  # whose output has its channels last


class ScaleShift(nn.Module):
    """gamma * x + beta for each channel of a module's output.

    Args:
        width: Channels.
        channel_dim: Where the channels of the output are: -1 after linear layers and norms, 1 after convolutions.
        generator: Draws the small departures from identity of the paper, N(1, 0.02) and N(0, 0.02).
    """

    def __init__(self, width: int, channel_dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.normal(1.0, 0.02, (width,), generator=generator))
        self.beta = nn.Parameter(torch.normal(0.0, 0.02, (width,), generator=generator))
        self.channel_dim = channel_dim
        self.enabled = True

    def hook(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """A forward hook of the module whose output is scaled."""
        if not self.enabled:
            return output
        y = self.lightly(module, inputs, output) if torch.is_grad_enabled() else None
        return scale_shift(output, self.gamma, self.beta, self.channel_dim) if y is None else y

    def lightly(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:  # noqa: ARG002
        """The output scaled without keeping it for the backward pass; None where it has to be kept."""
        return None

    def fold_into(self, module: Any) -> None:
        """Put scale and shift into the weight and bias of a linear layer, convolution or norm."""
        weight, bias = module.weight.data, module.bias
        module.weight.data = weight * self.gamma.data.view(-1, *[1] * (weight.ndim - 1))
        shift = self.beta.data if bias is None else bias.data * self.gamma.data + self.beta.data
        module.bias = nn.Parameter(shift.clone(), requires_grad=False)


class NormScale(ScaleShift):
    """After a norm."""

    def lightly(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """See `ScaleShift.lightly`."""
        return scale_norm(output, self.gamma, self.beta, module, inputs[0])


class KeptScale(ScaleShift):
    """After a linear layer, where what is scaled is kept by what comes next.

    Attributes:
        weak: Indices of `weak_channels`, known from the beginning of an encoding to the hook.
    """

    factor: Tensor

    def __init__(self, width: int, channel_dim: int, generator: torch.Generator) -> None:
        super().__init__(width, channel_dim, generator)
        self.register_buffer("factor", torch.ones(1), persistent=False)
        self.weak: Tensor | None = None

    def lightly(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:  # noqa: ARG002
        """See `ScaleShift.lightly`."""
        weak, self.weak = self.weak, None
        return None if weak is None else scale_kept(output, self.gamma, self.beta, weak)


class AddedScale(KeptScale):
    """After the linear layer that ends a branch of a block, where what is scaled is added to the tokens."""

    def __init__(self, width: int, channel_dim: int, generator: torch.Generator) -> None:
        super().__init__(width, channel_dim, generator)
        self._before: Tensor | None = None
        self._sum: Sum | None = None

    def watch(self, encoder: nn.Module, branch: Branch, blocks: tuple[str, ...]) -> None:
        """Hook in where the tokens pass before the branch and after it."""
        if branch.factor:
            self.factor = encoder.get_parameter(branch.factor).detach()
        encoder.get_submodule(branch.start).register_forward_pre_hook(self.start_hook)
        end = encoder.get_submodule(branch.end)
        if branch.end in blocks:
            end.register_forward_hook(self.block_hook)
        else:
            end.register_forward_pre_hook(self.norm_hook)

    def start_hook(self, module: nn.Module, inputs: Any) -> None:  # noqa: ARG002  (torch's signature)
        """A hook before the norm that the branch starts with."""
        # Half precision has rounded away too much of what was added.
        if self.weak is not None and inputs[0].dtype.itemsize >= 4:
            self._before = inputs[0]

    def lightly(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:  # noqa: ARG002
        """See `ScaleShift.lightly`."""
        weak, before, self.weak, self._before = self.weak, self._before, None, None
        if weak is None or before is None:
            return None
        self._sum = Sum()
        return scale_added(output, self.gamma, self.beta, weak, before, self.factor, self._sum)

    def norm_hook(self, module: nn.Module, inputs: Any) -> Tensor:  # noqa: ARG002  (torch's signature)
        """A hook before the norm that is given the sum."""
        return self._witnessed(inputs[0])

    def block_hook(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:  # noqa: ARG002
        """A hook of the block that gives the sum."""
        return self._witnessed(output)

    def _witnessed(self, tokens: Tensor) -> Tensor:
        of, self._sum = self._sum, None
        return tokens if of is None else witness(tokens, of)


class SSFBackbone(SwitchedBackbone):
    """A backbone with a `ScaleShift` after each module of some roles."""

    def __init__(self, source: Backbone, seeds: Seeds) -> None:
        super().__init__(source)
        layout = source.layout
        modules: dict[str, Any] = dict(source.encoder.named_modules())
        self.paths = layout.paths(*ROLES)
        scales = []
        for path in self.paths:
            module = modules[path]
            last = isinstance(module, LAST) and not isinstance(module, LayerNorm2d)
            kind = self._kind(path) if last else ScaleShift
            scale = kind(module.weight.shape[0], -1 if last else 1, seeds.generator("tuner", path))
            module.register_forward_hook(scale.hook)
            if isinstance(scale, AddedScale):
                scale.watch(source.encoder, layout.branches[path], layout.blocks)
            scales.append(scale)
        self.scales: Any = nn.ModuleList(scales)
        self._own({f"scales.{name}": parameter for name, parameter in self.scales.named_parameters()})

    def _kind(self, path: str) -> type[ScaleShift]:
        if path in self.layout.paths("norm.attention", "norm.mlp", "norm.final"):
            return NormScale
        if path in self.layout.branches:
            return AddedScale
        return KeptScale if path in self.layout.kept else ScaleShift

    def encode(
        self,
        images: Tensor,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        taps: Sequence[int] = (),
    ) -> Features:
        """See `Backbone.encode`."""
        if torch.is_grad_enabled():
            self._find_weak()
        return super().encode(images, keep, mask, mask_token, taps)

    def _find_weak(self) -> None:
        """Tell scales their weak channels; all at once, since the device has to be waited for."""
        scales = [scale for scale in self.scales if isinstance(scale, KeptScale) and scale.enabled]
        if not scales:
            return
        gammas = [scale.gamma.detach() for scale in scales]
        betas = [scale.beta.detach() for scale in scales]
        factors = [scale.factor.expand_as(gamma) for scale, gamma in zip(scales, gammas, strict=True)]
        weak = weak_channels(torch.cat(gammas), torch.cat(betas), torch.cat(factors)).cpu()
        for scale, own in zip(scales, torch.split(weak, [len(gamma) for gamma in gammas]), strict=True):
            scale.weak = own.nonzero().flatten()

    def parts(self) -> Any:
        """See `SwitchedBackbone.parts`."""
        return self.scales

    def fold(self) -> Backbone:
        """See `TunedBackbone.fold`."""
        twin = copy.deepcopy(self)
        modules = dict(twin.source.encoder.named_modules())
        for path, scale in zip(twin.paths, twin.scales, strict=True):
            for module in modules.values():
                unhook(module, scale)
            scale.fold_into(modules[path])
        return twin.source

    def adapter_config(self) -> dict[str, Any]:
        """See `TunedBackbone.adapter_config`."""
        return {"medtpp_type": "SSF", "modules": list(self.paths)}


class SSFOptions(MethodOptions):
    """SSF has no options."""

    name: Literal["ssf"] = "ssf"


@TUNERS.register("ssf")
class SSF(Tuner[SSFOptions]):
    """Scale and shift after the patch embedding, every linear layer and every norm; folds into the weights exactly."""

    Options: ClassVar[type[MethodOptions]] = SSFOptions
    summary: ClassVar[str] = "scale and shift of features after every operation (arXiv 2210.08823)"
    learning_rate: ClassVar[float] = 3e-3

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:  # noqa: ARG002
        """See `Tuner.attach`."""
        return SSFBackbone(backbone, seeds)
