"""AdaLoRA: ranks that go to the layers where they are worth most (Zhang et al., arXiv 2303.10512), in peft's layers."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from peft import AdaLoraConfig, PeftConfig
from pydantic import Field
from torch import Tensor

from medtpp.backbones import Backbone
from medtpp.config import TUNERS, MethodOptions
from medtpp.seeds import Seeds
from medtpp.tuners._peft import PeftBackbone, PeftOptions, PeftTuner
from medtpp.tuners.base import TunedBackbone

FIRST, LAST = 0.1, 0.7  # shares of the steps between which ranks are lowered
EVERY = 10  # steps between two choices
SMOOTHING = 0.85  # of sensitivity and of uncertainty, both
ORTHOGONALITY = 0.1  # weight of the penalty


class AdaLoRABackbone(PeftBackbone):
    """A backbone with updates B E A of linear layers, E diagonal, some of whose entries fine-tuning sets to zero."""

    def __init__(self, source: Backbone, config: PeftConfig, rank: int, seeds: Seeds) -> None:
        super().__init__(source, config, seeds)
        self.rank = rank
        # By the name of a target without "lora_A" and the like, a triple of names.
        self._triples = [
            tuple(name.replace(".lora_E.", f".lora_{part}.") for part in "AEB")
            for name in self.targets
            if ".lora_E." in name
        ]
        for index, names in enumerate(self._triples):
            for part, name in zip("AEB", names, strict=True):
                for kind in ("sensitivity", "uncertainty"):
                    self.register_buffer(
                        f"{kind}_{index}_{part}", torch.zeros_like(self.targets[name]), persistent=False
                    )
            kept = torch.ones_like(self.targets[names[1]], dtype=torch.bool)
            self.register_buffer(f"kept_{index}", kept, persistent=False)

    def penalty(self) -> Tensor:
        """How far the directions of A and B are from being orthogonal (equation 4), mean over the layers."""
        gaps = []
        for name_a, _, name_b in self._triples:
            a, b = self.targets[name_a].float(), self.targets[name_b].float()  # (r, inputs), (outputs, r)
            one = torch.eye(len(a), device=a.device)
            gaps += [torch.linalg.matrix_norm(a @ a.T - one), torch.linalg.matrix_norm(b.T @ b - one)]
        return ORTHOGONALITY * torch.stack(gaps).mean()

    def after_step_buffers(self) -> dict[str, Tensor]:
        """See `TunedBackbone.after_step_buffers`."""
        kinds = ("sensitivity_", "uncertainty_", "kept_")
        return {f"adalora.{name}": value for name, value in self.named_buffers() if name.startswith(kinds)}

    @torch.no_grad()
    def after_step(self, step: int, total: int) -> None:
        """Learn what each direction is worth and keep the best: ever fewer, by the paper's cubic schedule."""
        first, last = round(FIRST * total), round(LAST * total)
        if step <= last:
            worth = [self._worth(index) for index in range(len(self._triples))]  # (r,) for each layer
            if step == last or (step > first and step % EVERY == 0):
                share = 1 - (step - first) / max(1, last - first)
                every, final = sum(map(len, worth)), self.rank * len(worth)
                budget = round(final + (every - final) * share**3)
                least = torch.cat(worth).topk(budget).values[-1]
                for index, values in enumerate(worth):
                    self.get_buffer(f"kept_{index}").copy_((values >= least)[:, None])
        for index, (_, name, _) in enumerate(self._triples):
            if step % EVERY == 0 or step >= last:  # in between they may come back, so that their worth is seen
                self.targets[name].mul_(self.get_buffer(f"kept_{index}"))

    def _worth(self, index: int) -> Tensor:
        """(r,): sensitivity times uncertainty of each direction (equations 8 to 11), both smoothed over the steps."""
        scores = []
        for part, name in zip("AEB", self._triples[index], strict=True):
            parameter = self.targets[name]
            now = torch.zeros_like(parameter) if parameter.grad is None else (parameter * parameter.grad).abs()
            now = now.nan_to_num(0.0, 0.0, 0.0)  # of a step that a gradient scaler leaves out
            sensitivity = self.get_buffer(f"sensitivity_{index}_{part}")
            uncertainty = self.get_buffer(f"uncertainty_{index}_{part}")
            sensitivity.lerp_(now, 1 - SMOOTHING)
            uncertainty.lerp_((now - sensitivity).abs(), 1 - SMOOTHING)
            scores.append(sensitivity * uncertainty)
        a, e, b = scores  # (r, inputs), (r, 1), (outputs, r)
        return e[:, 0] + a.mean(dim=1) + b.mean(dim=0)


class AdaLoRAOptions(PeftOptions):
    """Options of AdaLoRA."""

    name: Literal["adalora"] = "adalora"
    rank: int = Field(8, ge=1, description="mean rank of the updates in the end")
    initial_rank: int = Field(12, ge=1, description="rank of each update at first, and all through TPP")
    alpha: float = Field(16.0, gt=0, description="the update is scaled by alpha / initial_rank")


@TUNERS.register("adalora")
class AdaLoRA(PeftTuner[AdaLoRAOptions]):
    """LoRA as B E A with E diagonal; directions that are worth little to the loss are switched off on the way.

    Ranks are lowered in fine-tuning alone: what a pretext task has no use for, the labels may.
    """

    Options: ClassVar[type[MethodOptions]] = AdaLoRAOptions
    summary: ClassVar[str] = "LoRA whose ranks go where they are worth most, through peft (arXiv 2303.10512)"
    learning_rate: ClassVar[float] = 3e-3
    needs: ClassVar[frozenset[str]] = frozenset({"linear"})

    def configure(self, backbone: Backbone, targets: str, seeds: Seeds) -> PeftConfig:  # noqa: ARG002
        """See `PeftTuner.configure`. Peft's own schedule, which wants `total_step`, is not used."""
        return AdaLoraConfig(
            init_r=self.options.initial_rank,
            target_r=self.options.rank,
            lora_alpha=self.options.alpha,
            target_modules=targets,
            total_step=1,
            bias="none",
        )

    def attach(self, backbone: Backbone, seeds: Seeds, images: Tensor | None = None) -> TunedBackbone:  # noqa: ARG002
        """See `Tuner.attach`."""
        config = self.configure(backbone, self.pattern(backbone), seeds)
        return AdaLoRABackbone(backbone, config, self.options.rank, seeds)
