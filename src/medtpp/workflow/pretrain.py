"""Pre-training a backbone as a step over a folder of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from medtpp.config import PRETEXTS, AugmentOptions, HardwareOptions, LoggingOptions, MethodOptions, Modality
from medtpp.data.augment import resolve as resolve_augment
from medtpp.data.cache import build
from medtpp.data.decode import probe_colour
from medtpp.data.fingerprints import Fingerprints
from medtpp.data.preprocess import Preprocessing
from medtpp.data.read import read_unlabelled
from medtpp.errors import DataError
from medtpp.files import MARKER, prepare_folder, read_json
from medtpp.training.pretrain import PretrainInputs, PretrainOptions, resolve_pretrain, run_pretrain
from medtpp.training.stage import StageData
from medtpp.workflow.experiment import apply_settings, validate
from medtpp.workflow.steps import refuse_folder, step


class PretrainJob(PretrainOptions):
    """All options of `medtpp pretrain`."""

    images: list[Path]
    modality: Modality = "unknown"
    image_size: int = Field(128, gt=0)
    channels: Literal["auto", 1, 3] = "auto"
    seed: int = Field(0, ge=0)
    description: str = Field("", description="what the images are, for the model card")
    pretext: dict[str, Any] = Field(default_factory=lambda: {"name": "mae"})
    augment: AugmentOptions = AugmentOptions(crop_min=0.4)
    hardware: HardwareOptions = HardwareOptions()
    logging: LoggingOptions = LoggingOptions()

    def pretext_options(self) -> MethodOptions:
        """Options of the pretext task.

        Raises:
            ConfigError: There is no such task, or it has no such options.
        """
        values = {"name": "mae", **self.pretext}
        options: MethodOptions = validate(PRETEXTS.get(values["name"]).Options, values, "the settings of pretext")
        return options


def load_job(images: Sequence[Path], settings: Sequence[str], **fields: Any) -> PretrainJob:
    """A job from the command line.

    Raises:
        ConfigError: All mistakes in the settings.
    """
    values = apply_settings({"images": [str(path) for path in images], **fields}, settings)
    return validate(PretrainJob, values, "the settings")


def pretrain_backbone(
    job: PretrainJob,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Any], int]:
    """Train a backbone into a folder. Gives what the stage told, and how many images could not be read.

    Raises:
        OutputError: The folder is not empty.
        DataError: No image can be read.
        ConfigError: The settings of the pretext task are not valid.
    """
    pretext = job.pretext_options()
    refuse_folder(out, job.images, resume=resume, overwrite=overwrite)
    cases = read_unlabelled(job.images)
    channels = (3 if probe_colour([case.image for case in cases]) else 1) if job.channels == "auto" else job.channels
    preprocessing = Preprocessing.model_validate({"image_size": job.image_size, "channels": channels})
    cache = build(cases, preprocessing, progress=progress)
    records = {record.case: record for record in cache.records}
    readable = tuple(case for case in cases if records[case.id].error is None)
    if not readable:
        raise DataError(
            f"None of the {len(cases)} images can be read.", [f"{r.case}: {r.error}" for r in cache.records[:5]]
        )
    if overwrite:
        prepare_folder(out, overwrite=True)
    options = resolve_pretrain(
        PretrainOptions.model_validate({name: getattr(job, name) for name in PretrainOptions.model_fields}),
        len(readable),
    )
    augment = resolve_augment(job.augment, job.modality)
    fingerprints = Fingerprints.of(readable, records)
    inputs = PretrainInputs(
        options=options,
        pretext=pretext,
        data=StageData(cache, readable),
        fingerprints=fingerprints,
        modality=job.modality,
        augment=augment,
        hardware=job.hardware,
        logging=job.logging,
        description=job.description or ", ".join(path.resolve().name for path in job.images),
        seed=job.seed,
    )
    key = {
        "options": options.model_dump(mode="json"),
        "pretext": pretext.model_dump(mode="json"),
        "augment": augment.model_dump(mode="json"),
        "preprocessing": preprocessing.model_dump(mode="json"),
        "seed": job.seed,
        "images": list(fingerprints.images),
    }
    step(out, key, lambda: run_pretrain(inputs, out))
    return read_json(out / MARKER), len(cases) - len(readable)
