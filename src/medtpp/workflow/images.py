"""From cases to stored images: photographs decoded into one cache, volumes and images with masks into a store."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from medtpp import backbones
from medtpp.backbones.inflate import sides
from medtpp.config import BackboneOptions, Experiment
from medtpp.data.cache import ImageCache, Progress, build, read_pixels
from medtpp.data.case import Case, Dataset
from medtpp.data.decode import probe_colour
from medtpp.data.listing import PLANE_SUFFIXES, split_suffix
from medtpp.data.npz import ARCHIVE, row_dims
from medtpp.data.preprocess import Preprocessing
from medtpp.data.store import VolumeStore, build_store
from medtpp.data.volume_plan import as_options, fingerprint_of, fit_preprocessing
from medtpp.data.volume_preprocess import VolumePreprocessing
from medtpp.data.volume_scan import Reader, VolumeScan, scan_volumes, structures_in
from medtpp.data.volumes import read_mask, read_volume, volume_fingerprint
from medtpp.errors import ConfigError, DataError

READER = Reader(read_volume, read_mask, volume_fingerprint)
# Patches of volumes, for networks of images: as many voxels as the 16 x 16 pixels that most of them know, twice as fine
# across slices.
VOLUME_PATCH = (4, 8, 8)
SEGMENTED = 256  # pixels of a side up to which whole images are segmented; what is larger loses detail
_TILED = ("pathology", "microscopy")  # too large to be seen whole, and the same everywhere


@dataclass(frozen=True)
class Stored:
    """Images ready to be trained on.

    Attributes:
        experiment: With what the images decide about the backbone and the preprocessing.
        store: The images.
        preprocessing: How they were made.
    """

    experiment: Experiment
    store: ImageCache | VolumeStore
    preprocessing: Preprocessing | VolumePreprocessing


def with_task(experiment: Experiment, dataset: Dataset) -> tuple[Experiment, Dataset]:
    """Choose the task where it is `auto`, and take from the data set what the task learns from.

    Raises:
        ConfigError: The data set has labels and masks, or neither that the task needs.
    """
    masks, labels = any(case.mask for case in dataset.cases), any(case.labelled for case in dataset.cases)
    name = experiment.task.name
    if name == "auto":
        if masks and labels:
            raise ConfigError(
                f"{dataset.root} has labels and masks. Say what to learn: --set task=classification or "
                "--set task=segmentation."
            )
        name = "segmentation" if masks else "classification"
        experiment = type(experiment).model_validate(experiment.model_dump() | {"task": {"name": name}})
    if name == "segmentation":
        if not masks:
            raise ConfigError(f"{dataset.root} has no masks to learn segmentation from.")
        return experiment, dataset.for_segmentation()
    if masks and not labels:
        raise ConfigError(f"{dataset.root} has masks and no labels. Use --set task=segmentation.")
    return experiment, dataset.for_classification()


def are_photographs(experiment: Experiment, cases: Iterable[Case]) -> bool:
    """Whether images can be decoded once into one cache: to be classified, in formats of photographs or MedMNIST's.

    Raises:
        DataError: A file ends in .npz and is no archive of images.
    """
    if experiment.task.name != "classification":
        return False
    cases = list(cases)
    if any(case.files or case.channels for case in cases):
        return False
    return all(_holds_planes(path) for path in {case.image for case in cases})  # many cases may lie in one archive


def _holds_planes(path: Path) -> bool:
    suffix = split_suffix(path.name)[1]
    return suffix in PLANE_SUFFIXES or (suffix == ARCHIVE and row_dims(path) == 2)


def store_photographs(
    experiment: Experiment, dataset: Dataset, unlabelled: Sequence[Case], progress: Progress | None = None
) -> Stored:
    """Decode images that are seen whole.

    Raises:
        ConfigError: The backbone does not take images of this size.
    """
    backbone = experiment.backbone
    if backbone.dims == "auto":
        backbone = backbone.model_copy(update={"dims": 2})
    data = experiment.data
    size = data.image_size if isinstance(data.image_size, int) else None
    channels = data.channels
    if channels == "auto":
        channels = 3 if probe_colour(dataset.cases, read_pixels) else 1
    spec = backbones.load(backbone, image_size=size).spec
    preprocessing = Preprocessing(image_size=spec.image_size[0], channels=channels, fit=data.fit)
    store = build([*dataset.cases, *unlabelled], preprocessing, progress=progress)
    return Stored(experiment.model_copy(update={"backbone": backbone}), store, preprocessing)


def scan(
    experiment: Experiment, dataset: Dataset, unlabelled: Sequence[Case], progress: Progress | None = None
) -> tuple[dict[str, VolumeScan], Dataset]:
    """Read every case once, and find the structures that nobody has named.

    Whatever is wrong with the cases is left to `check`.
    """
    wanted = dataset.structures if experiment.task.name == "segmentation" else None
    scans = scan_volumes([*dataset.cases, *unlabelled], wanted, experiment.data.modality, READER, progress=progress)
    if experiment.task.name == "segmentation" and not dataset.structures:
        dataset = replace(dataset, structures=structures_in(scans.values()))
    return scans, dataset


def store_volumes(
    experiment: Experiment,
    dataset: Dataset,
    scans: Mapping[str, VolumeScan],
    train: Sequence[Case],
    cases: Sequence[Case],
    progress: Progress | None = None,
) -> Stored:
    """Plan the preprocessing from the training cases, and prepare all.

    Args:
        experiment: As written by the user.
        dataset: With its structures named.
        scans: What reading each case told.
        train: The training cases, that the plan is made from.
        cases: What to prepare.
        progress: Called with the numbers of cases done and in all.

    Raises:
        ConfigError: `data.volume` or the backbone does not fit the images.
        DataError: Cases cannot be prepared; all are listed.
    """
    fingerprint = fingerprint_of([scans[case.id] for case in train])
    backbone, data = experiment.backbone, experiment.data
    if backbone.dims == "auto":
        backbone = backbone.model_copy(update={"dims": len(fingerprint.shapes[0])})
    if backbone.dims == 3 and backbone.patch_size is None and backbones.own_dims(backbone.name) == 2:
        backbone = backbone.model_copy(update={"patch_size": VOLUME_PATCH})
    if backbone.dims == 3 and backbone.channels is None and fingerprint.channels > 1:
        backbone = backbone.model_copy(update={"channels": fingerprint.channels})
    if backbone.dims == 2 and fingerprint.channels not in (1, 3):
        raise ConfigError(f"Images of two dimensions have 1 or 3 channels; these have {fingerprint.channels}.")
    patch, own = _patch(backbone)
    preprocessing = fit_preprocessing(
        fingerprint,
        patch,
        data.volume,
        size=_whole(experiment, [scans[case.id].shape for case in train], patch, own),
        channels=None if data.channels == "auto" else data.channels,
        whole=experiment.task.name == "classification",
    )
    store = build_store(cases, preprocessing, dataset.structures, READER, progress=progress)
    problems = [f"{record.case}: {record.error}" for record in store.records if record.error]
    if problems:
        raise DataError("Some cases cannot be prepared. Mend them, or leave them out by data.exclude.", problems)
    structures = {structure.name: list(structure.values) for structure in dataset.structures}
    data = data.model_copy(update={"volume": as_options(preprocessing), "structures": structures})
    return Stored(experiment.model_copy(update={"backbone": backbone, "data": data}), store, preprocessing)


def store_more(
    cases: Sequence[Case], preprocessing: Preprocessing | VolumePreprocessing, progress: Progress | None = None
) -> ImageCache | VolumeStore:
    """Prepare further images, without their masks, as those of a data set were. Records tell which cannot be used."""
    if isinstance(preprocessing, Preprocessing):
        return build(cases, preprocessing, progress=progress)
    return build_store(cases, preprocessing, (), READER, progress=progress)


def _patch(options: BackboneOptions) -> tuple[tuple[int, ...], int]:
    """The backbone's patch, and the side of its own images."""
    if options.dims == 3 and (patch := sides(options.patch_size, 3)):
        return patch, 0
    spec = backbones.load(options).spec
    return spec.patch, spec.image_size[0]


def _whole(
    experiment: Experiment, shapes: Sequence[tuple[int, ...]], patch: tuple[int, ...], own: int
) -> tuple[int, ...] | None:
    """The size of images that are seen whole; None for volumes and tiles, which keep their spacing."""
    data, dense = experiment.data, experiment.task.name == "segmentation"
    if len(patch) == 3:
        if data.image_size != "auto":
            raise ConfigError("data.image_size is for 2D images; volumes have data.volume.patch and data.volume.size.")
        return None
    if isinstance(data.image_size, int):
        return data.image_size, data.image_size
    if dense and data.modality in _TILED:
        return None
    if not dense:
        return own, own
    side = min(SEGMENTED, round(median(max(shape) for shape in shapes)))
    return tuple(-(-side // unit) * unit for unit in patch)
