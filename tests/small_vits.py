"""Small vision transformers and images, for the tests of the library calls."""

import random

import numpy as np
import peft
import timm
import torch

import medtpp
from medtpp.seeds import Seeds
from runs import SIZE, backbone_folder

BRIEF = {"steps": 3, "batch_size": 4, "head_warmup": 1, "precision": "32"}


def normalised(count=8, size=SIZE):
    """(count, 3, size, size) as a timm model's own forward takes them."""
    return torch.randn(count, 3, size, size, generator=Seeds(0).generator("images"))


def unit(count=8):
    """(count, 1, SIZE, SIZE) in [0, 1]."""
    return torch.rand(count, 1, SIZE, SIZE, generator=Seeds(0).generator("images"))


def vit(classes=0, **options):
    with Seeds(0).scope("vit"):
        return timm.create_model("test_vit", img_size=SIZE, num_classes=classes, **options)


def lora(classes=0, **config):
    """What a user of peft has: a timm ViT with LoRA, in training mode."""
    with Seeds(0).scope("lora"):
        return peft.get_peft_model(vit(classes), peft.LoraConfig(target_modules=["qkv"], r=4, **config)).train()


def attached(tuner="lora", seed=0):
    return medtpp.attach(medtpp.load(str(backbone_folder()), image_size=SIZE), tuner, seed=seed)


def random_states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
