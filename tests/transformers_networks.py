"""Small networks of Hugging Face transformers with random weights, as its `save_pretrained` writes them."""

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers as T

from medtpp import backbones
from medtpp.config import BackboneOptions

WIDTH, DEPTH, SIZE = 64, 2, 32
_BARE = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 8,
}
SMALL = {**_BARE, "intermediate_size": 128}
TEXT = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MAE = {**SMALL, "mask_ratio": 0.75, "norm_pix_loss": True, "decoder_hidden_size": 64, "decoder_num_attention_heads": 2,
       "decoder_num_hidden_layers": 2, "decoder_intermediate_size": 256, "layer_norm_eps": 1e-6}  # fmt: skip
# Published weights of each: Phikon; ViTs that classify; MAE; Rad-DINO and Phikon-v2; DINOv2's giant; registers; DINOv3;
# MedSigLIP; CLIP. The two last have a tower of text in the same file.
KINDS = {
    "vit": lambda: T.ViTModel(T.ViTConfig(**SMALL), add_pooling_layer=False),
    "classifier": lambda: T.ViTForImageClassification(T.ViTConfig(**SMALL)),
    "mae": lambda: T.ViTMAEForPreTraining(T.ViTMAEConfig(**MAE)),
    "dinov2": lambda: T.Dinov2Model(T.Dinov2Config(**{**_BARE, "patch_size": 14, "image_size": 56})),
    "giant": lambda: T.Dinov2Model(T.Dinov2Config(**_BARE, use_swiglu_ffn=True)),
    "registers": lambda: T.Dinov2WithRegistersModel(T.Dinov2WithRegistersConfig(**_BARE)),
    "dinov3": lambda: T.DINOv3ViTModel(T.DINOv3ViTConfig(**SMALL, num_register_tokens=2)),
    "siglip": lambda: T.SiglipModel(T.SiglipConfig(vision_config=SMALL, text_config=TEXT)),
    "clip": lambda: T.CLIPModel(T.CLIPConfig(vision_config=SMALL, text_config=TEXT)),
}
MEAN, DEVIATION = [0.1, 0.2, 0.3], [0.5, 1.0, 2.0]


_FOLDERS = TemporaryDirectory(prefix="medtpp-transformers-")  # goes when the process ends


@cache
def folder_of(kind):
    """A folder with weights none of which is zero or one, so that every one of them matters."""
    torch.manual_seed(1)
    network = KINDS[kind]()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    if kind == "mae":  # fixed sines and cosines
        network.vit.embeddings.initialize_weights()
        network.decoder.initialize_weights(network.vit.embeddings.patch_embeddings.num_patches)
    folder = Path(_FOLDERS.name) / kind
    network.save_pretrained(folder)
    write(folder / "preprocessor_config.json", {"image_mean": MEAN, "image_std": DEVIATION})
    return folder


def write(path, values):
    """Write a JSON file."""
    path.write_text(json.dumps(values), encoding="utf-8")


def load(folder, image_size=None, **options):
    """The backbone in a folder, or of a name on the hub."""
    return backbones.load(BackboneOptions(name=f"transformers:{folder}", **options), image_size=image_size)


def whole(kind):
    """The network as transformers loads it, heads and text tower included."""
    folder = folder_of(kind)
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    return getattr(T, name).from_pretrained(folder).eval()


def encoder_of(network):
    """The encoder of images inside."""
    return getattr(network, "vit", getattr(network, "vision_model", network))


def run(kind, network, pixels, **kwargs):
    """What the library's own forward gives, after the last norm."""
    if kind == "mae":  # nothing hidden, and the patches in their order
        network.config.mask_ratio = 0.0
        kwargs["noise"] = torch.arange((pixels.shape[2] // 8) * (pixels.shape[3] // 8)).float().expand(len(pixels), -1)
    if kind not in ("dinov2", "giant", "registers", "dinov3"):
        kwargs["interpolate_pos_encoding"] = True
    given = network(pixels, **kwargs).last_hidden_state
    return network.post_layernorm(given) if kind == "clip" else given
