"""Networks that medtpp does not know, for the tests of `medtpp.tpp` on any model."""

import peft
import torch
from torch import nn
from transformers import SwinConfig, SwinModel

from medtpp.seeds import Seeds

SIZE, DEEP = 32, 16
BRIEF = {"steps": 3, "batch_size": 4, "head_warmup": 1, "precision": "32"}


def images(dims=2, channels=3, count=8, sides=None):
    """Normalised, (count, channels, *sides)."""
    size = sides or (SIZE if dims == 2 else DEEP)
    return torch.randn(count, channels, *[size] * dims, generator=Seeds(0).generator("images"))


class Net(nn.Module):
    """A convolutional network with everything that moves in training mode, and a counter that always does."""

    def __init__(self, dims=2, classes=3):
        super().__init__()
        conv, norm, drop = {
            2: (nn.Conv2d, nn.BatchNorm2d, nn.Dropout2d),
            3: (nn.Conv3d, nn.BatchNorm3d, nn.Dropout3d),
        }[dims]
        self.stem = nn.Sequential(conv(3, 8, 3, 2, 1), norm(8), nn.GELU(), drop(0.5))
        self.last = nn.Sequential(conv(8, 16, 3, 2, 1), norm(16), nn.GELU())
        self.head = nn.Linear(16, classes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.head(self.last(self.stem(x)).flatten(2).mean(2))


class Maps(Net):
    """Its encoder's maps, from fine to coarse."""

    def forward(self, x):
        fine = self.stem(x)
        return {"maps": [fine, self.last(fine)], "size": torch.tensor(x.shape)}


class Mask(Net):
    """A segmentation network: the full mask first, then a coarser one."""

    def forward(self, x):
        coarse = self.head(self.last(self.stem(x)).movedim(1, -1)).movedim(-1, 1)  # (B, classes, *sides / 4)
        up = "bilinear" if x.ndim == 4 else "trilinear"
        return nn.functional.interpolate(coarse, scale_factor=4, mode=up), coarse


def made(kind=Net, *arguments, trained=("last", "head")):
    """A network in training mode of which some parts require gradients."""
    with Seeds(0).scope("net"):
        network = kind(*arguments).train()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    return network


def swin(**options):
    """A network of transformers of which medtpp knows nothing: tokens in a ModelOutput."""
    with Seeds(0).scope("swin"):
        config = SwinConfig(image_size=SIZE, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
        return peft.get_peft_model(SwinModel(config), peft.LoraConfig(target_modules=["q_proj", "v_proj"], **options))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def modes(model):
    return [module.training for module in model.modules()]
