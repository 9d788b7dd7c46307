"""Two tuners at once, on parameters of their own: a method of peft and a selection of the backbone's weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from medtpp.backbones import Backbone
from medtpp.config import TUNERS, MethodOptions
from medtpp.errors import WeightsError
from medtpp.seeds import Seeds
from medtpp.tuners._selected import SelectedBackbone
from medtpp.tuners.base import TunedBackbone, Tuner
from medtpp.tuners.lora import LoRA, PlainLoRAOptions
from medtpp.tuners.selection import BitFit, BitFitOptions, LastBlocks, LastBlocksOptions


class CombinedBackbone(TunedBackbone):
    """A backbone with a selection of trained weights, and around it a method that leaves those weights alone.

    Args:
        source: The backbone.
        selection: Selects weights; attached first.
        method: Adds parameters; gets no layer whose weight was selected.
        seeds: Decide the initialisation.
    """

    def __init__(self, source: Backbone, selection: Tuner[Any], method: Tuner[Any], seeds: Seeds) -> None:
        selected = selection.attach(source, seeds)
        if not isinstance(selected, SelectedBackbone):
            raise TypeError(f"{selection.options.name} does not select weights of the backbone")
        chosen = set(selected.names)
        roles = {
            role: tuple(path for path in paths if f"{path}.weight" not in chosen)
            for role, paths in selected.layout.roles.items()
        }
        whole = selected.layout
        selected.layout = replace(whole, roles=roles)
        added = method.attach(selected, seeds)
        selected.layout = added.layout = whole
        super().__init__(added)
        self.parts: dict[str, TunedBackbone] = {method.options.name: added, selection.options.name: selected}
        rate = method.learning_rate
        trained = {id(p): part for part in (added, selected) for p in part.targets.values()}
        self._own({**added.targets, **{f"selected.{name}": p for name, p in selected.targets.items()}})
        slower = selection.learning_rate / rate
        self.relative_rates = {name: slower for name, p in self.targets.items() if trained[id(p)] is selected}

    @contextmanager
    def bypass(self) -> Iterator[None]:
        """See `TunedBackbone.bypass`."""
        with ExitStack() as stack:
            for part in self.parts.values():
                stack.enter_context(part.bypass())
            yield

    def fold(self) -> Backbone:
        """See `TunedBackbone.fold`."""
        backbone: Backbone = copy.deepcopy(self).source
        while isinstance(backbone, TunedBackbone):
            backbone = backbone.fold()
        return backbone

    def adapter_config(self) -> dict[str, Any]:
        """See `TunedBackbone.adapter_config`."""
        return {"medtpp_type": "COMBINED", "parts": {name: part.adapter_config() for name, part in self.parts.items()}}

    def adapter_state(self) -> dict[str, Tensor]:
        """The state of each part after its name."""
        return {
            f"{name}/{key}": value for name, part in self.parts.items() for key, value in part.adapter_state().items()
        }

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """See `TunedBackbone.load_adapter_state`."""
        unknown = [f"unexpected: {key}" for key in state if key.partition("/")[0] not in self.parts]
        if unknown:
            raise WeightsError("The adapter does not fit this backbone and tuner.", unknown)
        for name, part in self.parts.items():
            own = {key.partition("/")[2]: value for key, value in state.items() if key.partition("/")[0] == name}
            part.load_adapter_state(own)


class LoRABitFitOptions(MethodOptions):
    """Options of LoRA with BitFit."""

    name: Literal["lora+bitfit"] = "lora+bitfit"
    lora: PlainLoRAOptions = PlainLoRAOptions()
    bitfit: BitFitOptions = BitFitOptions()


@TUNERS.register("lora+bitfit")
class LoRABitFit(Tuner[LoRABitFitOptions]):
    """LoRA, and the backbone's biases."""

    Options: ClassVar[type[MethodOptions]] = LoRABitFitOptions
    summary: ClassVar[str] = "LoRA and all biases (arXiv 2106.09685, arXiv 2106.10199)"
    learning_rate: ClassVar[float] = LoRA.learning_rate

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:  # noqa: ARG002
        """See `Tuner.attach`."""
        return CombinedBackbone(backbone, BitFit(self.options.bitfit), LoRA(self.options.lora), seeds)


class LastBlockOptions(LastBlocksOptions):
    """Options of last blocks, of which one is the default here."""

    blocks: int = Field(1, ge=1, description="how many")


class LoRALastBlocksOptions(MethodOptions):
    """Options of LoRA with last blocks."""

    name: Literal["lora+last_blocks"] = "lora+last_blocks"
    lora: PlainLoRAOptions = PlainLoRAOptions()
    last_blocks: LastBlockOptions = LastBlockOptions()


@TUNERS.register("lora+last_blocks")
class LoRALastBlocks(Tuner[LoRALastBlocksOptions]):
    """All parameters of the last block, LoRA in the others; in the pretext stage this is ExPLoRA (Khanna et al.)."""

    Options: ClassVar[type[MethodOptions]] = LoRALastBlocksOptions
    summary: ClassVar[str] = "the last block, and LoRA in the others; with TPP, ExPLoRA (arXiv 2406.10973)"
    learning_rate: ClassVar[float] = LoRA.learning_rate

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:  # noqa: ARG002
        """See `Tuner.attach`."""
        return CombinedBackbone(backbone, LastBlocks(self.options.last_blocks), LoRA(self.options.lora), seeds)
