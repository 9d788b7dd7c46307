"""Small encoders of MONAI, in files as its networks save them."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.swin_unetr import SwinTransformer
from monai.networks.nets.vit import ViT

from medtpp import backbones
from medtpp.config import BackboneOptions
from medtpp.seeds import Seeds

_FOLDER = TemporaryDirectory(prefix="medtpp-monai-")
SIZES = {"swin": (16, 32, 16), "swin_v2": (16, 32, 16), "segresnet": (8, 16, 24), "vit": (8, 24, 16)}
NAMES = {
    "swin": "monai:swin_unetr_since1.5",
    "swin_v2": "monai:swin_unetr_v2_since1.5",
    "segresnet": "monai:segresnet",
    "vit": "monai:vit",
}
# Patches, windows and depths that are in the file alone.
SWIN = {"in_chans": 1, "embed_dim": 32, "window_size": (2, 2, 2), "patch_size": (1, 1, 1), "depths": (1, 1, 1, 2),
         "num_heads": (1, 2, 4, 8), "drop_path_rate": 0.3, "drop_rate": 0.2}  # fmt: skip
VIT = {"in_channels": 1, "hidden_size": 128, "mlp_dim": 192, "num_heads": 2, "num_layers": 2, "dropout_rate": 0.2}


def moved_off_its_start(network):
    """Weights none of which is zero or one, so that every one of them matters."""
    with Seeds(0).scope("monai"), torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return network.eval()


def make(kind):
    """MONAI's own network; the same bits each time."""
    with Seeds(0).scope("network", kind):
        if kind.startswith("swin"):
            network = SwinTransformer(**SWIN, use_v2=kind == "swin_v2")
        elif kind == "segresnet":
            network = SegResNet(init_filters=8, blocks_down=(1, 1, 1, 2), dropout_prob=0.2)
        else:
            network = ViT(img_size=SIZES["vit"][::-1], patch_size=(8, 8, 4), qkv_bias=True, classification=True, **VIT)
    return moved_off_its_start(network)


@cache
def file_of(kind):
    path = Path(_FOLDER.name) / f"{kind}.pt"
    torch.save(make(kind).state_dict(), path)
    return str(path)


def load(kind, **options):
    chosen = BackboneOptions(name=NAMES[kind], weights=file_of(kind), **options)
    return backbones.load(chosen, image_size=SIZES[kind])
