"""OFT, BOFT and HRA, through peft: weights that are rotated, so that angles between neurons stay."""

from __future__ import annotations

from typing import ClassVar, Literal

from peft import BOFTConfig, HRAConfig, OFTConfig, PeftConfig
from peft.tuners.boft import layer as boft_layer
from pydantic import Field
from torch import Tensor

from medtpp.backbones import Backbone
from medtpp.config import TUNERS, MethodOptions
from medtpp.seeds import Seeds
from medtpp.tuners._peft import PeftOptions, PeftTuner


class OFTOptions(PeftOptions):
    """Options of OFT."""

    name: Literal["oft"] = "oft"
    block_size: int = Field(32, ge=2, description="inputs that are rotated together; where it fits not, the next size")


@TUNERS.register("oft")
class OFT(PeftTuner[OFTOptions]):
    """W R, with R made of orthogonal blocks by Cayley's transform; R starts as the identity (Qiu et al.)."""

    Options: ClassVar[type[MethodOptions]] = OFTOptions
    summary: ClassVar[str] = "rotations of linear layers' inputs, through peft (arXiv 2306.07280)"
    learning_rate: ClassVar[float] = 1e-3
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})  # peft takes the maps of a ConvNet for images

    def configure(self, backbone: Backbone, targets: str, seeds: Seeds) -> PeftConfig:  # noqa: ARG002
        """See `PeftTuner.configure`. The transform is exact: its series would leave R not quite orthogonal."""
        return OFTConfig(
            oft_block_size=self.options.block_size, target_modules=targets, bias="none", use_cayley_neumann=False
        )


class _BlockDiagonal:
    """What peft has as a CUDA extension, in plain torch: matrices with given blocks on the diagonal.

    Peft compiles its extension when a layer is made, and where there is no CUDA compiler it leaves out all butterfly
    factors but the first: an adapter would have other shapes on another machine.
    """

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        """(N, D, H, H) to (N, D * H, D * H)."""
        count, number, side, _ = blocks.shape
        whole = blocks.new_zeros(count, number, side, number, side)
        whole.diagonal(dim1=1, dim2=3).copy_(blocks.permute(0, 2, 3, 1))
        return [whole.reshape(count, number * side, number * side)]

    @staticmethod
    def backward(gradient: Tensor, blocks: Tensor) -> list[Tensor]:
        """The blocks of (N, D * H, D * H)."""
        count, number, side, _ = blocks.shape
        parts = gradient.reshape(count, number, side, number, side)
        return [parts.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()]


class BOFTOptions(PeftOptions):
    """Options of BOFT."""

    name: Literal["boft"] = "boft"
    block_size: int = Field(8, ge=2, description="inputs that one factor rotates together; divides the layers' widths")
    factors: int = Field(2, ge=1, description="butterfly factors")


@TUNERS.register("boft")
class BOFT(PeftTuner[BOFTOptions]):
    """OFT with R a product of butterfly factors, each of which rotates other inputs together (Liu et al.)."""

    Options: ClassVar[type[MethodOptions]] = BOFTOptions
    summary: ClassVar[str] = "rotations by butterfly factors, through peft (arXiv 2311.06243)"
    learning_rate: ClassVar[float] = 1e-3
    needs: ClassVar[frozenset[str]] = frozenset({"linear"})

    def configure(self, backbone: Backbone, targets: str, seeds: Seeds) -> PeftConfig:  # noqa: ARG002
        """See `PeftTuner.configure`."""
        boft_layer._FBD_CUDA = _BlockDiagonal()
        return BOFTConfig(
            boft_block_size=self.options.block_size,
            boft_n_butterfly_factor=self.options.factors,
            target_modules=targets,
            bias="none",
        )


class HRAOptions(PeftOptions):
    """Options of HRA."""

    name: Literal["hra"] = "hra"
    rank: int = Field(8, ge=2, multiple_of=2, description="reflections; they start in pairs that undo each other")


@TUNERS.register("hra")
class HRA(PeftTuner[HRAOptions]):
    """W H_1 ... H_r, with Householder reflections H_i = I - 2 u_i u_i' / |u_i|^2 (Yuan et al.)."""

    Options: ClassVar[type[MethodOptions]] = HRAOptions
    summary: ClassVar[str] = "Householder reflections of linear layers' inputs, through peft (arXiv 2405.17484)"
    learning_rate: ClassVar[float] = 1e-3
    needs: ClassVar[frozenset[str]] = frozenset({"linear"})

    def configure(self, backbone: Backbone, targets: str, seeds: Seeds) -> PeftConfig:  # noqa: ARG002
        """See `PeftTuner.configure`."""
        return HRAConfig(r=self.options.rank, target_modules=targets, bias="none")
