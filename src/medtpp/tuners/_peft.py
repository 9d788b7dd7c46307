"""What methods of Hugging Face peft have in common. Adapters are in peft's own file format."""

from __future__ import annotations

import copy
import re
import warnings
from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar, get_args

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from torch import Tensor

from medtpp.backbones import Backbone
from medtpp.config import MethodOptions
from medtpp.errors import ConfigError
from medtpp.seeds import Seeds
from medtpp.tuners.base import TunedBackbone, Tuner, check_keys

Role = Literal["attention.qkv", "attention.projection", "mlp.in", "mlp.out", "conv"]


class PeftOptions(MethodOptions):
    """Options that all methods of peft have."""

    roles: tuple[Role, ...] = Field(
        get_args(Role), min_length=1, description="which layers get an update, of those that the backbone has"
    )


P = TypeVar("P", bound=PeftOptions)


class PeftBackbone(TunedBackbone):
    """A backbone whose encoder a `peft` method has changed in place.

    Args:
        source: The backbone.
        config: The peft configuration.
        seeds: Decide the initialisation.
    """

    def __init__(self, source: Backbone, config: PeftConfig, seeds: Seeds) -> None:
        super().__init__(source)
        try:
            with seeds.scope("tuner"), warnings.catch_warnings():
                # Of transformers, on what peft asks of its networks.
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
                peft_model: PeftModel = get_peft_model(source.encoder, config)
        except ValueError as error:
            raise ConfigError(f"This tuner does not fit {source.spec.name}: {error}") from error
        for layer in peft_model.modules():
            if isinstance(layer, BaseTunerLayer):
                # Autocast chooses the types already; peft would cast each input to float32 and back. DoRA needs that:
                # it takes the norms of its weights in the type of its input, and bfloat16's would move the start.
                layer.cast_input_dtype_enabled = getattr(config, "use_dora", False)
        # The PeftModel holds the same encoder: not a submodule of its own, or every weight would be named twice.
        self._peft = [peft_model]
        self._own({name: p for name, p in peft_model.named_parameters() if p.requires_grad})
        self.train(False)

    @property
    def peft_model(self) -> PeftModel:
        """The encoder as peft sees it."""
        return self._peft[0]

    def bypass(self) -> AbstractContextManager[None]:
        """See `TunedBackbone.bypass`."""
        context: AbstractContextManager[None] = self.peft_model.disable_adapter()
        return context

    def fold(self) -> Backbone:
        """See `TunedBackbone.fold`."""
        twin = copy.deepcopy(self)
        root = twin.source
        while isinstance(root, TunedBackbone):  # another tuner, which is folded in next
            root = root.source
        root.encoder = twin.peft_model.merge_and_unload(safe_merge=True)
        return twin.source

    def adapter_config(self) -> dict[str, Any]:
        """Peft's configuration as plain values."""
        config = self.peft_model.peft_config["default"]
        values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
        return {**values, "base_model_name_or_path": self.spec.architecture, "inference_mode": True}

    def adapter_state(self) -> dict[str, Tensor]:
        """Peft's state with peft's names; matrices that layers share are in it once, under the shortest."""
        # By default, peft asks the hub whether a network of transformers has other embeddings of words there.
        state: dict[str, Tensor] = get_peft_model_state_dict(self.peft_model, save_embedding_layers=False)
        first: dict[int, str] = {}
        for name in sorted(state, key=len):
            first.setdefault(state[name].data_ptr(), name)
        return {name: value for name, value in state.items() if first[value.data_ptr()] == name}

    def load_adapter_state(self, state: Mapping[str, Tensor]) -> None:
        """See `TunedBackbone.load_adapter_state`."""
        check_keys(state, self.adapter_state())
        set_peft_model_state_dict(self.peft_model, dict(state))


def target_pattern(backbone: Backbone, roles: tuple[str, ...]) -> str:
    """An anchored pattern of module paths: peft matches bare names anywhere (`proj` is in `patch_embed.proj` too).

    Block numbers are folded, so that the pattern stays readable in adapter_config.json, if all blocks take part.

    Raises:
        ConfigError: The backbone has no module with one of these roles.
    """
    paths = backbone.layout.paths(*roles)
    if not paths:
        raise ConfigError(f"{backbone.spec.name} has no modules with the roles {', '.join(roles)}.")
    folded = dict.fromkeys(re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", re.escape(path)) for path in paths)
    pattern = f"^(?:{'|'.join(folded)})$"
    if {path for path, _ in backbone.encoder.named_modules() if re.match(pattern, path)} == set(paths):
        return pattern
    return f"^(?:{'|'.join(map(re.escape, paths))})$"


class PeftTuner(Tuner[P]):
    """A method of peft; subclasses configure it."""

    @abstractmethod
    def configure(self, backbone: Backbone, targets: str, seeds: Seeds) -> PeftConfig:
        """Peft's configuration.

        Args:
            backbone: What it is for.
            targets: Pattern of the paths of the layers to change.
            seeds: For methods that keep a seed of their own.

        Raises:
            ConfigError: The method does not fit this backbone.
        """

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:  # noqa: ARG002
        """See `Tuner.attach`."""
        return PeftBackbone(backbone, self.configure(backbone, self.pattern(backbone), seeds), seeds)

    def pattern(self, backbone: Backbone) -> str:
        """The pattern of the layers to change."""
        return target_pattern(backbone, self.options.roles)
