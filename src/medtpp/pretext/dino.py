"""DINO (Caron et al., arXiv 2104.14294) with iBOT's masked patches (Zhou et al., arXiv 2111.07832)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from medtpp.backbones import Backbone, Spec, gather_tokens
from medtpp.config import PRETEXTS, MethodOptions
from medtpp.pretext._heads import mlp
from medtpp.pretext._teacher import Teacher
from medtpp.pretext._views import two_views
from medtpp.pretext.base import Pretext
from medtpp.seeds import Draws, Seeds

STUDENT, TEACHER = 0.1, 0.05  # temperatures


class DINOOptions(MethodOptions):
    """Options of DINO."""

    name: Literal["dino"] = "dino"
    prototypes: int = Field(256, ge=2, description="classes that student and teacher agree on")
    mask_ratio: float = Field(0.3, ge=0, lt=1, description="share of patches hidden from the student; 0: DINO alone")
    momentum: float = Field(0.99, ge=0, lt=1, description="of the teacher's average, at first")


class _Head(nn.Module):
    """Features (..., D) to logits (..., K): cosines with prototypes."""

    def __init__(self, inputs: int, prototypes: int, bottleneck: int = 256) -> None:
        super().__init__()
        self.project = mlp(inputs, 2 * bottleneck, bottleneck)
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck) / math.sqrt(bottleneck))

    def forward(self, values: Tensor) -> Tensor:
        projected = self.project(values)
        with torch.autocast(values.device.type, enabled=False):  # over a temperature, rounded cosines are other classes
            return F.normalize(projected.float(), dim=-1) @ F.normalize(self.prototypes.float(), dim=-1).T


@PRETEXTS.register("dino")
class DINO(Pretext):
    """Self-distillation: the student gives each view the class that the teacher gives the other one.

    With masked patches it also gives them the classes that the teacher, who sees them, gives. Assignments are balanced
    over the batch by Sinkhorn-Knopp, as in SwAV and DINOv2, so that nothing is averaged over earlier batches.
    """

    Options: ClassVar[type[MethodOptions]] = DINOOptions
    summary: ClassVar[str] = "agree with an averaged teacher on classes of views and patches (arXiv 2111.07832)"
    needs = frozenset({"dense", "masks"})
    couples_images = True

    def __init__(self, options: DINOOptions, spec: Spec, seeds: Seeds) -> None:
        nn.Module.__init__(self)
        self.pooling = spec.pooling
        self.num_patches = math.prod(spec.grid)
        self.num_hidden = round(self.num_patches * options.mask_ratio)
        with seeds.scope("pretext", "dino"):
            self.mask_token = nn.Parameter(torch.randn(spec.mask_width) * 0.02) if self.num_hidden else None
            self.head = _Head(spec.width, options.prototypes)
        self.teacher = Teacher(options.momentum)

    def begin(self, backbone: Backbone) -> None:
        """See `Pretext.begin`."""
        self.teacher.begin(backbone, self.head)

    def after_step(self, backbone: Backbone, step: int, total: int) -> None:
        """See `Pretext.after_step`."""
        self.teacher.update(backbone, self.head, step, total)

    def loss(self, backbone: Backbone, images: Tensor, draws: Draws) -> tuple[Tensor, dict[str, Tensor]]:
        """Divergence of whole views crosswise, and with masked patches the mean of it and theirs."""
        whole, patches = [], []
        views = two_views(images, draws)
        taught = [self.teacher.encode(backbone, view) for view in views]
        for own, view in enumerate(views):
            ids_hidden = draws.permutation(f"mask {own}", self.num_patches)[:, : self.num_hidden]  # (B, H)
            mask = torch.zeros(len(images), self.num_patches, dtype=torch.bool, device=images.device)
            mask.scatter_(1, ids_hidden, True)
            features = backbone.encode(view, mask=mask if self.num_hidden else None, mask_token=self.mask_token)
            target = self.teacher.project(self.head, taught[1 - own].pooled(self.pooling))
            whole.append(_agreement(self.head(features.pooled(self.pooling)), target))
            if self.num_hidden:
                target = self.teacher.project(self.head, gather_tokens(taught[own].patches, ids_hidden).flatten(0, 1))
                hidden = gather_tokens(features.patches, ids_hidden).flatten(0, 1)  # (B * H, D)
                patches.append(_agreement(self.head(hidden), target))
        loss = torch.stack(whole).mean()
        logs = {"whole_views": loss.detach()}
        if patches:
            of_patches = torch.stack(patches).mean()
            loss, logs = (loss + of_patches) / 2, {**logs, "patches": of_patches.detach()}
        return loss, logs


def _agreement(student: Tensor, teacher: Tensor) -> Tensor:
    """Divergence of the student's classes from the teacher's balanced ones; logits (n, K).

    The gradient is that of the cross-entropy, but 0 says that they agree.
    """
    return F.kl_div(F.log_softmax(student / STUDENT, dim=-1), balanced(teacher), reduction="batchmean")


@torch.no_grad()
def balanced(logits: Tensor, rounds: int = 3) -> Tensor:
    """Sinkhorn-Knopp: (n, K) probabilities near softmax(logits / temperature) that use all K classes alike."""
    assigned = ((logits - logits.max()) / TEACHER).exp()
    for _ in range(rounds):
        assigned = assigned / assigned.sum(dim=0, keepdim=True).clamp(min=1e-12) / assigned.shape[1]
        assigned = assigned / assigned.sum(dim=1, keepdim=True).clamp(min=1e-12)
    return assigned
