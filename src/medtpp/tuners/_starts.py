"""LoRA's other starts: from the weights (PiSSA, OLoRA), the images (EVA) or the task's gradients (LoRA-GA)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from medtpp.backbones import Backbone
from medtpp.seeds import Seeds
from medtpp.tuners._peft import PeftBackbone
from medtpp.tuners.base import check_keys

Start = Literal["standard", "pissa", "olora", "eva", "lora_ga"]
BATCH = 32  # images at a time
GAMMA = 16.0  # LoRA-GA's, as in its paper


class StartedLoRA(PeftBackbone):
    """LoRA whose start (alpha / r) B0 A0 is not zero, and taken off the weight, so that the function starts unchanged.

    The source's own weights are kept beside. The adapter's file is plain LoRA of twice the rank, [B, -B0] [A; A0],
    which peft reads as it is.
    """

    def __init__(self, source: Backbone, config: PeftConfig, start: Start, seeds: Seeds) -> None:
        super().__init__(source, config, seeds)
        self._layers = _layers(self)
        self._originals = {path: layer.base_layer.weight for path, layer in self._layers.items()}
        self._first: dict[str, tuple[Tensor, Tensor]] = {}
        make = {"pissa": principal, "olora": orthonormal, "lora_ga": none_yet}[start]
        self._waits = start == "lora_ga"
        for path, layer in self._layers.items():
            a, b = make(self._originals[path].detach().float(), layer.r["default"], layer.scaling["default"])
            self._start(path, a, b)

    def start_from(self, losses: Iterator[Tensor], mean: Callable[[Tensor], Tensor]) -> None:
        """See `TunedBackbone.start_from`: LoRA-GA."""
        if not self._waits:
            return
        gradients: dict[str, Tensor] = {}
        weights = {path: layer.base_layer.weight.requires_grad_() for path, layer in self._layers.items()}
        for loss in losses:
            for path, gradient in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                gradients[path] = gradients.get(path, 0) + gradient.float()
        for path, layer in self._layers.items():
            self._start(path, *along_gradient(mean(gradients[path]), layer.r["default"]))
        self._waits = False

    def _start(self, path: str, a: Tensor, b: Tensor) -> None:
        """Start at A (r, inputs) and B (outputs, r)."""
        layer = self._layers[path]
        self._begin(path, a, b)
        layer.lora_A["default"].weight.data.copy_(a)
        layer.lora_B["default"].weight.data.copy_(b)

    def _begin(self, path: str, a: Tensor, b: Tensor) -> None:
        """Take a start off a layer's weight."""
        layer, original = self._layers[path], self._originals[path]
        self._first[path] = a.to(original.device), b.to(original.device)
        rest = original - layer.scaling["default"] * (b @ a).to(original)
        layer.base_layer.weight = nn.Parameter(rest, requires_grad=False)

    def source_state(self) -> dict[str, Tensor]:
        """See `Backbone.source_state`."""
        known = {f"{path}.weight": value.detach() for path, value in self._originals.items()}
        return {name: known.get(name, value) for name, value in super().source_state().items()}

    @contextmanager
    def bypass(self) -> Iterator[None]:
        """See `TunedBackbone.bypass`."""
        rest = {path: layer.base_layer.weight for path, layer in self._layers.items()}
        for path, layer in self._layers.items():
            layer.base_layer.weight = nn.Parameter(self._originals[path].to(rest[path].device), requires_grad=False)
        try:
            with super().bypass():
                yield
        finally:
            for path, layer in self._layers.items():
                layer.base_layer.weight = rest[path]

    def adapter_config(self) -> dict[str, Any]:
        """Peft's configuration of the plain LoRA."""
        config = super().adapter_config()
        return {**config, "r": 2 * config["r"], "lora_alpha": 2 * config["lora_alpha"]}

    def adapter_state(self) -> dict[str, Tensor]:
        """Peft's state of the plain LoRA."""
        state = super().adapter_state()
        for path, (a, b) in self._first.items():
            name_a, name_b = _names(path)
            state[name_a] = torch.cat([state[name_a], a.to(state[name_a])])
            state[name_b] = torch.cat([state[name_b], -b.to(state[name_b])], dim=1)
        return state

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """See `TunedBackbone.load_adapter_state`. The start is the file's: an SVD may differ by the machine."""
        check_keys(state, self.adapter_state())
        self._waits = False
        for path, layer in self._layers.items():
            (a, a0), (b, b0) = (state[_names(path)[0]].chunk(2), state[_names(path)[1]].chunk(2, dim=1))
            self._begin(path, a0, -b0)
            layer.lora_A["default"].weight.data.copy_(a)
            layer.lora_B["default"].weight.data.copy_(b)


def principal(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """PiSSA (Meng et al., arXiv 2404.02948): A (r, inputs), B (outputs, r); scaling B A is the best of its rank."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    root = (values[:rank] / scaling).sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def orthonormal(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001  (as the others)
    """OLoRA (Büyükakyüz, arXiv 2406.01775): A (r, inputs), B (outputs, r) from the weight's QR decomposition."""
    columns, rows = torch.linalg.qr(weight)
    return rows[:rank], columns[:, :rank]


def none_yet(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001  (as the others)
    """A and B of zeros, until there are gradients."""
    return weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(weight.shape[0], rank)


def along_gradient(gradient: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """LoRA-GA (Wang et al., arXiv 2407.05000): the first step goes where full fine-tuning would go.

    With the gradient's singular vectors, A is made of the first right ones and B of the next left ones, both scaled by
    outputs^(1/4) / gamma^(1/2).

    Args:
        gradient: (outputs, inputs), of the weight.
        rank: r; where the gradient has less than 2 r singular vectors, B takes the last r.
    """
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    last = min(2 * rank, left.shape[1])
    scale = len(gradient) ** 0.25 / GAMMA**0.5
    return scale * right[:rank], scale * left[:, last - rank : last]


@torch.no_grad()
def start_from_images(tuned: PeftBackbone, images: Tensor) -> None:
    """EVA (Paischer et al., arXiv 2410.07170): rows of A become the main directions of what each layer gets.

    Ranks are the same for all layers (rho = 1), and B stays zero.

    Args:
        tuned: With LoRA.
        images: (n, C, *spatial) in [0, 1], on the backbone's device.
    """
    layers = _layers(tuned)
    moments: dict[str, Tensor] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:  # noqa: ARG001  (torch's signature)
            tokens = inputs[0].flatten(0, -2).float()  # (n, inputs)
            moments[path] = moments.get(path, 0) + tokens.T @ tokens

        return hook

    hooks = [layer.register_forward_pre_hook(note(path)) for path, layer in layers.items()]
    try:
        for first in range(0, len(images), BATCH):
            tuned.encode(images[first : first + BATCH])
    finally:
        for hook in hooks:
            hook.remove()
    for path, layer in layers.items():
        directions = torch.linalg.eigh(moments[path]).eigenvectors.flip(1)  # (inputs, inputs), the main ones first
        weight = layer.lora_A["default"].weight
        weight.copy_(directions[:, : len(weight)].T)


def _layers(tuned: PeftBackbone) -> dict[str, Any]:
    """The changed layers by their paths in the encoder."""
    return {path: module for path, module in tuned.encoder.named_modules() if isinstance(module, LoraLayer)}


def _names(path: str) -> tuple[str, str]:
    """Peft's names of A and B."""
    return f"base_model.model.{path}.lora_A.weight", f"base_model.model.{path}.lora_B.weight"
