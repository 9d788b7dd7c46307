"""A control for Target Parameter Pre-training: a start as far from the tuner's own as TPP's end, anywhere.

TPP changes the target parameters in two ways at once: it moves them by so much, and it moves them in a direction that a
pretext task found. A start that has the first without the second tells which of them matters to fine-tuning.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from medtpp import backbones, tuners
from medtpp.adapter import RandomDirectionCard, load_adapter, save_adapter
from medtpp.config import Experiment
from medtpp.errors import WeightsError
from medtpp.files import MARKER, write_json
from medtpp.seeds import Seeds
from medtpp.training.dense import make_dense


def run_random_direction(experiment: Experiment, pretrained: Path, folder: Path) -> None:
    """Write `folder/adapter`: the start of a TPP stage, moved as far as that stage moved it, in a random direction.

    Each parameter tensor moves by the norm of its own change: target parameters, an embedding that was made for
    volumes, and a decoder that TPP pre-trained. The directions are drawn from the experiment's seed and the tensors'
    names.

    Args:
        experiment: That TPP was done for, with its seed.
        pretrained: The adapter folder that TPP wrote.
        folder: To be filled.

    Raises:
        WeightsError: The adapter cannot be loaded, or TPP did not make it.
    """
    began = time.perf_counter()
    end, seeds = load_adapter(pretrained, backbone=experiment.backbone), Seeds(experiment.seed)
    if end.card.tpp is None:
        raise WeightsError(f"{pretrained} was not made by TPP, so there is no step to take in another direction.")
    source = backbones.load(experiment.backbone, image_size=end.card.backbone.image_size)
    tuned = tuners.attach(source, experiment.tuner, seed=seeds)
    dense = make_dense(experiment, tuned.spec, seeds)
    ends: dict[str, Tensor] = {**end.backbone.targets, **end.backbone.embed}
    parameters = {**tuned.targets, **tuned.embed}
    if dense is not None:
        ends |= {f"decoder.{name}": value for name, value in (end.decoder or {}).items()}
        parameters |= {f"decoder.{name}": parameter for name, parameter in dense.decoder.named_parameters()}
    for name, parameter in parameters.items():
        parameter.data.add_(
            random_step(ends[name].detach() - parameter.detach(), seeds.child("random direction"), name)
        )
    tpp = RandomDirectionCard(**dict(end.card.tpp), control="random_direction")
    decoder = dense.decoder if dense else None
    save_adapter(folder / "adapter", tuned, end.card.model_copy(update={"tpp": tpp}), decoder=decoder)
    write_json(folder / MARKER, {"seconds": round(time.perf_counter() - began, 2)})


def random_step(change: Tensor, seeds: Seeds, name: str) -> Tensor:
    """A normal draw of the shape and the norm of `change`, on which it depends with the seeds and the name alone."""
    direction = torch.randn(change.shape, generator=seeds.generator(name), dtype=torch.float64)
    length: Tensor = torch.linalg.vector_norm(change.double()) / torch.linalg.vector_norm(direction)
    return (length * direction).to(change.dtype)
