"""Export to timm: the merged encoder in timm's own names, the head beside it, and the lines that load both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from medtpp.adapter import Adapter, AdapterCard
from medtpp.backbones import Features, match_channels
from medtpp.config import TUNERS
from medtpp.errors import ConfigError
from medtpp.files import atomic, write_json, write_text
from medtpp.inference.export.network import ExportedNetwork, Written, channels_of, difference, exported_network
from medtpp.inference.export.statement import outputs
from medtpp.tasks.base import Task
from medtpp.tasks.classification import Classification
from medtpp.tasks.segmentation import LightHead, Segmentation

WEIGHTS, HEAD = "model.safetensors", "head.safetensors"


def no_timm_network(card: AdapterCard) -> list[str]:
    """Why an adapter's encoder is no network of timm; empty where it is one."""
    problems = []
    tuner = card.tuner["name"]
    if not TUNERS.get(tuner).merges:
        problems.append(f"the tuner {tuner} cannot be folded into the weights. Export it to onnx or torch")
    if len(card.preprocessing.patch) == 3:
        problems.append("it encodes volumes, and timm's networks encode images. Export it to onnx, torch, monai-bundle")
    architecture = card.backbone.architecture
    if not architecture.startswith(("hf-hub:", "hf_hub:")) and not timm.is_model(architecture):
        problems.append(f"timm has no architecture {architecture}. Export it to onnx or torch")
    return problems


def write_timm(adapter: Adapter, folder: Path) -> Written:
    """config.json and model.safetensors as timm's `local-dir:` reads them, head.safetensors, README.md.

    Raises:
        ConfigError: The merged weights do not fit timm's architecture.
    """
    network = exported_network(adapter)
    encoder: Any = network.backbone.encoder
    spec = network.backbone.spec
    architecture = (getattr(encoder, "pretrained_cfg", None) or {}).get("architecture") or spec.architecture
    arguments = _arguments(network)
    state = {name: value.detach().contiguous() for name, value in encoder.state_dict().items()}
    plain = timm.create_model(architecture, num_classes=0, **arguments)
    # What pools and classifies in timm is not part of the features; medtpp took it away.
    rest = {name: value for name, value in plain.state_dict().items() if name.startswith(("fc_norm.", "attn_pool."))}
    state = {**rest, **state}
    wrong = sorted(state.keys() ^ plain.state_dict().keys())
    if wrong:
        raise ConfigError(
            f"The merged weights do not fit timm's {architecture}. Export them to onnx or torch.",
            [f"{name}: {'only in the adapter' if name in state else 'only in timm'}" for name in wrong],
        )
    with atomic(folder / WEIGHTS) as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    head = {name: value.detach().contiguous() for name, value in network.task.state_dict().items()}
    with atomic(folder / HEAD) as temporary:
        save_file(head, temporary)
    write_json(
        folder / "config.json",
        {
            "architecture": architecture,
            "num_classes": 0,
            "num_features": spec.width,
            "model_args": arguments,
            "pretrained_cfg": {
                "input_size": [spec.channels, *spec.image_size],
                "fixed_input_size": True,
                "interpolation": "bicubic",
                "crop_pct": 1.0,
                "mean": spec.mean,
                "std": spec.std,
                "num_classes": 0,
                "pool_size": None,
                "first_conv": "patch_embed.proj",
                "classifier": "head",
            },
        },
    )
    write_text(folder / "README.md", _readme(adapter, network, architecture, arguments))
    loaded = timm.create_model(architecture, num_classes=0, checkpoint_path=str(folder / WEIGHTS), **arguments).eval()
    task = copy.deepcopy(network.task)
    task.load_state_dict(load_file(folder / HEAD))
    found = difference(adapter, _rebuilt(network, loaded, task), batch=True)
    return Written((WEIGHTS, HEAD, "config.json", "README.md"), True, found, {"architecture": architecture})


def _arguments(network: ExportedNetwork) -> dict[str, Any]:
    """What `timm.create_model` needs beside the architecture's name."""
    spec, state = network.backbone.spec, network.backbone.encoder.state_dict()
    arguments: dict[str, Any] = {"img_size": list(spec.image_size), "patch_size": spec.patch[0]}
    if spec.channels != 3:
        arguments["in_chans"] = spec.channels
    if "blocks.0.ls1.gamma" in state:
        arguments["init_values"] = 1e-5  # so that there is a layer scale; its values are loaded
    return arguments


def _rebuilt(network: ExportedNetwork, encoder: Any, task: Task) -> Callable[[Tensor], Tensor]:
    """The function that README.md builds, of timm's own network and a head."""
    spec = network.backbone.spec
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (spec.mean, spec.std))

    def run(images: Tensor) -> Tensor:
        x = (match_channels(images, spec.channels) - mean) / std
        maps: Sequence[Tensor] = ()
        if task.taps:
            tokens, maps = encoder.forward_intermediates(x, indices=list(task.taps))
        else:
            tokens = encoder.forward_features(x)
        return task.probabilities(task(Features(images, tokens, spec.prefix, spec.grid, tuple(maps))))

    return run


def _readme(adapter: Adapter, network: ExportedNetwork, architecture: str, arguments: Mapping[str, Any]) -> str:
    card, spec = adapter.card, network.backbone.spec
    size = list(card.preprocessing.patch)
    named = "".join(f", {name}={value!r}" for name, value in arguments.items())
    known = "medtpp's decoder" if _decoder(network.task) else "plain torch"
    lines = [
        f"# `{architecture}` of timm with the weights of a medtpp adapter",
        "",
        f"The tuner `{card.tuner['name']}` is merged into `{WEIGHTS}`; `{HEAD}` is the head, used here by {known}.",
        f"`images` are (B, {channels_of(card.preprocessing)}, {size[0]}, {size[1]}) in [0, 1], prepared as",
        f"`preprocessing.json` says; the outputs are {', '.join(outputs(adapter))}.",
        "",
        "```python",
        *_imports(network.task),
        "",
        f"model = timm.create_model({architecture!r}, num_classes=0{named}, checkpoint_path={WEIGHTS!r}).eval()",
        f"head = load_file({HEAD!r})",
        f"mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ({list(spec.mean)}, {list(spec.std)}))",
        f"x = ({_matched(channels_of(card.preprocessing), spec.channels)} - mean) / std",
        *_head_lines(network),
        "```",
        "",
        f'`timm.create_model("local-dir:FOLDER", pretrained=True, img_size={list(spec.image_size)})` works, too.',
        "",
    ]
    return "\n".join(lines)


def _decoder(task: Task) -> bool:
    return isinstance(task, Segmentation) and task.decoder is not None


def _imports(task: Task) -> list[str]:
    lines = ["import timm", "import torch", "from safetensors.torch import load_file"]
    if not _decoder(task):
        return [*lines, "from torch.nn import functional as F"]
    standard = ["from dataclasses import replace", "from pathlib import Path"]
    medtpp = ["from medtpp.adapter import make_task, read_card"]
    return [*standard, *lines, *medtpp, "from medtpp.backbones import find", "from medtpp.seeds import Seeds"]


def _matched(given: int, channels: int) -> str:
    """`match_channels` in plain torch."""
    if given == channels:
        return "images"
    if channels == 1:
        return "(images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)"
    return f"images.expand(-1, {channels}, -1, -1)"


def _head_lines(network: ExportedNetwork) -> list[str]:
    """From `x` and `head` to `probabilities`."""
    task, spec = network.task, network.backbone.spec
    if isinstance(task, Classification):
        pooled = "[:, 0]" if task.pooling == "cls" else f"[:, {spec.prefix} :].mean(dim=1)"
        return [
            f"pooled = model.forward_features(x){pooled}",
            f"pooled = F.layer_norm(pooled, ({spec.width},), head['norm.weight'], head['norm.bias'])",
            "logits = F.linear(pooled, head['linear.weight'], head['linear.bias'])",
            f"probabilities = logits.{_activation(task)}",
        ]
    if isinstance(task, Segmentation) and isinstance(task.head, LightHead):
        return [
            f"tokens = model.forward_features(x)[:, {spec.prefix} :]",
            f"tokens = F.layer_norm(tokens, ({spec.width},), head['head.norm.weight'], head['head.norm.bias'])",
            "parts = F.linear(tokens, head['head.linear.weight'], head['head.linear.bias'])",
            f"parts = F.pixel_shuffle(parts.transpose(1, 2).unflatten(2, {spec.grid}), {task.head.parts})",
            f"logits = F.interpolate(parts, {spec.image_size}, mode='bilinear')",
            f"probabilities = logits.{_activation(task)}",
        ]
    return [
        f"backbone = find(model, {spec.image_size})",
        "task = make_task(read_card(Path()).task, backbone, Seeds(0)).eval()",
        "task.load_state_dict(head)",
        "features = replace(backbone.encode(x, taps=task.taps), images=images)",
        "probabilities = task.probabilities(task(features))",
    ]


def _activation(task: Task) -> str:
    return "sigmoid()" if task.multilabel else "softmax(dim=1)"
