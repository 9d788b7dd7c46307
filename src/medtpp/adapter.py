"""The adapter folder: what was trained, and all that is needed to use it again. Written whole, read strictly.

adapter_config.json, adapter_model.safetensors   # peft's own where peft has the method
embed.safetensors                                # a patch embedding made for volumes
decoder.safetensors, head.safetensors            # after fine-tuning
medtpp.json                                      # backbone, tuner, task, preprocessing, thresholds, what TPP did
README.md                                        # a model card
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medtpp import backbones, tuners
from medtpp.config import TASKS, TUNERS, BackboneOptions, Modality, Options
from medtpp.data.case import MASK_VALUES, Structure
from medtpp.data.fingerprints import Fingerprints
from medtpp.data.preprocess import Preprocessing
from medtpp.data.volume_preprocess import VolumePreprocessing
from medtpp.errors import ConfigError, LeakageError, WeightsError
from medtpp.files import atomic, read_json, write_json, write_text
from medtpp.seeds import Seeds
from medtpp.tasks.base import Task
from medtpp.tuners.base import TunedBackbone, check_keys

CARD = "medtpp.json"


class BackboneCard(Options):
    """Which backbone an adapter belongs to."""

    options: BackboneOptions
    architecture: str
    image_size: int | tuple[int, ...]
    sha256: str


class MonitorCard(Options):
    """What a probe on training labels chose in the pretext stage.

    Attributes:
        cases: Labelled training cases that it was fitted and scored on.
        score: Its macro AUC across patients at the step that was kept, the best of all.
        step: The step that was kept.
        scores: How many steps were scored.
        without: The score of the features without target parameters.
        candidates: The best score with each pretext task among which it chose, too; empty where there was one.
    """

    cases: int
    score: float
    step: int
    scores: int
    without: float
    candidates: dict[str, float] = Field(default_factory=dict)


class TPPCard(Options):
    """What the pretext stage did. With a monitor, `steps` are those after which it ended."""

    pretext: dict[str, Any]
    steps: int
    head_warmup: int
    batch_size: int
    learning_rate: float
    seed: int
    images: int
    transductive: bool
    decoder: dict[str, Any] | None = None
    monitor: MonitorCard | None = None
    fingerprints: Fingerprints


class RandomDirectionCard(TPPCard):
    """A control for TPP: parameters moved as far as TPP moved them, in a random direction. They have learnt nothing.

    The other fields are those of that TPP.
    """

    control: Literal["random_direction"]


MaskValue = Annotated[int, Field(gt=0, lt=MASK_VALUES)]


class TaskCard(Options):
    """What the head predicts.

    `classes` are the names of the structures in segmentation, `mask_values` the values that each has in masks.
    """

    options: dict[str, Any]
    classes: tuple[str, ...]
    multilabel: bool
    mask_values: tuple[tuple[MaskValue, ...], ...] = ()
    positive: str | None = None
    thresholds: dict[str, float] = Field(default_factory=dict)
    threshold_notes: tuple[str, ...] = ()

    @property
    def structures(self) -> tuple[Structure, ...]:
        """What masks show; () in classification."""
        return tuple(map(Structure, self.classes, self.mask_values))

    @property
    def described(self) -> str:
        """The classes; structures with their values in masks, such as "organ = 1; lesion = 2, 3"."""
        named = (f"{one.name} = {', '.join(map(str, one.values))}" for one in self.structures)
        return "; ".join(named) if self.structures else ", ".join(self.classes)


class AdapterCard(Options):
    """The content of medtpp.json."""

    schema_version: Literal[1] = 1
    backbone: BackboneCard
    tuner: dict[str, Any]
    preprocessing: Preprocessing | VolumePreprocessing
    modality: Modality
    seed: int
    tuner_seed: int | None = None  # of the tuner's random parts, some of which are drawn again; None: `seed`
    tpp: TPPCard | RandomDirectionCard | None = None
    task: TaskCard | None = None
    trained_on: Fingerprints = Fingerprints()
    versions: dict[str, str] = Field(default_factory=lambda: package_versions())


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory.

    Attributes:
        card: The content of medtpp.json.
        backbone: Tuned.
        task: With its head, after fine-tuning.
        decoder: The state of a decoder that TPP pre-trained, before fine-tuning.
    """

    card: AdapterCard
    backbone: TunedBackbone
    task: Task | None
    decoder: dict[str, Tensor] | None = None


def new_card(
    backbone: TunedBackbone, preprocessing: Preprocessing | VolumePreprocessing, modality: Modality, seed: int
) -> AdapterCard:
    """The card of a tuned backbone that has learnt nothing yet.

    Raises:
        WeightsError: The backbone was wrapped in memory, so nobody else could load it.
    """
    if backbone.options is None:
        raise WeightsError("An adapter needs a backbone that was loaded by name: use medtpp.load.")
    spec = backbone.spec
    return AdapterCard(
        backbone=BackboneCard(
            options=backbone.options,
            architecture=spec.architecture,
            image_size=spec.image_size[0] if len(set(spec.image_size)) == 1 else spec.image_size,
            sha256=spec.sha256,
        ),
        tuner=backbone.tuner.model_dump(mode="json"),
        preprocessing=preprocessing,
        modality=modality,
        seed=seed,
        tuner_seed=None if backbone.start_seed == seed else backbone.start_seed,
    )


def package_versions() -> dict[str, str]:
    """Versions of what an adapter depends on."""
    names = ("medtpp", "torch", "timm", "transformers", "peft")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def save_adapter(
    folder: Path,
    backbone: TunedBackbone,
    card: AdapterCard,
    task: Task | None = None,
    decoder: nn.Module | None = None,
) -> None:
    """Write an adapter folder; medtpp.json comes last, so that a folder that has it is whole.

    Args:
        folder: Where to.
        backbone: Tuned.
        card: The content of medtpp.json.
        task: With its head, after fine-tuning.
        decoder: Pre-trained by TPP, before fine-tuning.

    Raises:
        OutputError: The folder cannot be written.
    """
    write_json(folder / "adapter_config.json", backbone.adapter_config())
    _write_tensors(folder / "adapter_model.safetensors", backbone.adapter_state())
    if embed := backbone.embed_state():
        _write_tensors(folder / "embed.safetensors", embed)
    for group, state in _task_states(task).items():
        _write_tensors(folder / f"{group}.safetensors", state)
    if decoder is not None:
        _write_tensors(folder / "decoder.safetensors", decoder.state_dict())
    write_text(folder / "README.md", _model_card(card, backbone))
    write_json(folder / CARD, card.model_dump(mode="json"))


def read_card(folder: Path) -> AdapterCard:
    """Read medtpp.json.

    Raises:
        WeightsError: The folder is no adapter folder, is incomplete, or of another schema.
    """
    path = folder / CARD
    if not path.is_file():
        raise WeightsError(
            f"{folder} is no adapter folder: it has no {CARD}. `medtpp run` writes one as RUN/finetune/adapter."
        )
    try:
        return AdapterCard.model_validate(read_json(path))
    except (ValidationError, ValueError) as error:
        raise WeightsError(f"{path} cannot be read by this medtpp ({version('medtpp')}): {error}") from error


def load_adapter(folder: str | Path, *, backbone: str | BackboneOptions | None = None) -> Adapter:
    """Load a backbone, its tuner and its head, strictly.

    Args:
        folder: An adapter folder.
        backbone: Where the backbone lies now, if it moved, or all its options; its hash must still be the same.

    Raises:
        WeightsError: A file is missing or broken, a key is missing or unexpected, or the backbone is another one.
    """
    folder = Path(folder)
    card = read_card(folder)
    options = card.backbone.options
    if isinstance(backbone, str):
        field = "weights" if Path(backbone).is_file() else "name"
        options = options.model_copy(update={field: backbone})
    elif backbone is not None:
        options = backbone
    try:
        source = backbones.load(options, image_size=card.backbone.image_size)
    except (ConfigError, WeightsError) as error:
        raise WeightsError(
            f"The backbone of {folder} cannot be loaded. {error} Say where it is with --backbone."
        ) from error
    if source.spec.sha256 != card.backbone.sha256:
        raise WeightsError(
            f"The adapter {folder} belongs to the backbone {card.backbone.architecture} with sha256 "
            f"{card.backbone.sha256[:16]}…; {options.name} has {source.spec.sha256[:16]}…. "
            "Use the backbone it was made with."
        )
    try:
        tuner = TUNERS.get(card.tuner["name"]).Options.model_validate(card.tuner)
        seed = card.seed if card.tuner_seed is None else card.tuner_seed
        tuned = tuners.attach(source, tuner, seed=seed, loading=True)
        task = make_task(card.task, tuned, Seeds(card.seed)) if card.task else None
    except (ValidationError, KeyError) as error:
        raise WeightsError(f"{folder / CARD} has options that this medtpp does not know: {error}") from error
    try:
        tuned.load_adapter_state(_read_tensors(folder / "adapter_model.safetensors"))
        if tuned.embed_state():
            tuned.load_embed_state(_read_tensors(folder / "embed.safetensors"))
        if task is not None:
            state: dict[str, Tensor] = {}
            for group in _task_states(task):
                state |= _read_tensors(folder / f"{group}.safetensors")
            check_keys(state, task.state_dict())
            task.load_state_dict(state)
            task.eval()
        pretrained = task is None and card.tpp is not None and card.tpp.decoder is not None
        decoder = _read_tensors(folder / "decoder.safetensors") if pretrained else None
    except WeightsError as error:
        raise WeightsError(f"{folder}: {error.message}", error.problems) from error
    found = card.backbone.model_copy(update={"options": options})
    return Adapter(card.model_copy(update={"backbone": found}), tuned, task, decoder)


def make_task(card: TaskCard, backbone: backbones.Backbone, seeds: Seeds) -> Task:
    """The task of a card, with a new head."""
    method = TASKS.get(card.options["name"])
    options = method.Options.model_validate(card.options)
    task: Task = method(options, backbone.spec, card.classes, card.multilabel, seeds)
    return task


def _task_states(task: Task | None) -> dict[str, dict[str, Tensor]]:
    """A task's state by the files that hold it: "decoder" and "head"; the decoder's names begin with its own."""
    states: dict[str, dict[str, Tensor]] = {}
    for name, value in task.state_dict().items() if task is not None else ():
        states.setdefault("decoder" if name.startswith("decoder.") else "head", {})[name] = value
    return states


def refuse_overlap(what: str, cases: list[str], kind: str = "test") -> None:
    """Raise LeakageError if there are cases that were seen before."""
    if cases:
        shown = ", ".join(cases[:5]) + (f" and {len(cases) - 5} more" if len(cases) > 5 else "")
        raise LeakageError(
            f"{what} saw {len(cases)} of the {kind} cases (same pixels or same patient): {shown}. A test on them would "
            "flatter. Leave them out of the test, or train without them."
        )


def _write_tensors(path: Path, state: dict[str, Tensor]) -> None:
    with atomic(path) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, temporary)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(path))
    except FileNotFoundError as error:
        raise WeightsError(f"{path} is missing. Copy the adapter folder again, whole.") from error
    except Exception as error:
        raise WeightsError(f"{path} is broken ({type(error).__name__}). Copy the adapter folder again.") from error


def _model_card(card: AdapterCard, backbone: TunedBackbone) -> str:
    count = sum(parameter.numel() for parameter in [*backbone.targets.values(), *backbone.embed.values()])
    size = backbone.spec.image_size
    volumes = len(size) == 3
    sides = "x".join(map(str, size if volumes or len(set(size)) > 1 else size[:1]))
    lines = [
        "---",
        "library_name: medtpp",
        f"base_model: {card.backbone.architecture}",
        "---",
        "",
        f"# A `{card.tuner['name']}` adapter for `{card.backbone.architecture}`",
        "",
        f"{count:,} target parameters, made by medtpp {card.versions['medtpp']} at {sides} "
        f"{'voxels' if volumes else 'pixels'}.",
        "",
    ]
    if isinstance(card.tpp, RandomDirectionCard):
        lines += [
            f"A control for Target Parameter Pre-training, seed {card.tpp.seed}: from its own start, each parameter "
            "tensor was moved as far as TPP moved it, in a random direction.",
            "",
        ]
    elif card.tpp:
        selects = TUNERS.get(card.tuner["name"]).selects
        lines += [
            f"Target Parameter Pre-training: `{card.tpp.pretext['name']}`, {card.tpp.steps} steps of "
            f"{card.tpp.batch_size} on {card.tpp.images} images without labels, seed {card.tpp.seed}.",
            *(["This was continued pre-training of a subset of the backbone's own weights."] if selects else []),
            *([_told(card.tpp.monitor)] if card.tpp.monitor else []),
            *(["**Transductive**: it saw validation and test images."] if card.tpp.transductive else []),
            "",
        ]
    if card.task:
        what = "Segments (structure = values in masks)" if card.task.structures else "Predicts"
        output = "masks/" if card.task.structures else "predictions.csv"
        lines += [f"{what}: {card.task.described}. Research use; not a medical device.", ""]
        lines += [f"    medtpp predict THIS_FOLDER IMAGES -o {output}", ""]
    else:
        lines += ["No head yet:", "", "    medtpp finetune EXPERIMENT --adapter THIS_FOLDER --out runs/finetuned", ""]
    return "\n".join(lines)


def _told(monitor: MonitorCard) -> str:
    tried = ", ".join(f"`{name}` {score:.3f}" for name, score in monitor.candidates.items())
    return (
        f"**Labels chose the step**: of {monitor.scores} that were scored, step {monitor.step} was kept, at which a "
        f"linear probe on {monitor.cases} labelled training cases was best (AUC {monitor.score:.3f}; "
        f"{monitor.without:.3f} without target parameters)."
        + (f" They chose the pretext task, too, by the best AUC of each: {tried}." if tried else "")
    )
