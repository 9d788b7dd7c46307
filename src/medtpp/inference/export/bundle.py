"""Export to a MONAI bundle: a network, and a configuration that prepares scans, slides windows and writes masks.

The configuration needs torch, monai and the readers' own packages (nibabel, ITK, Pillow), not medtpp. Where MONAI's
transforms compute something else than ours, docs/export.md says by how much.
"""

from __future__ import annotations

import logging
import math
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medtpp.adapter import Adapter
from medtpp.config import Window
from medtpp.data.preprocess import Preprocessing
from medtpp.data.volume_preprocess import LEVELS, VolumePreprocessing
from medtpp.errors import ConfigError
from medtpp.files import atomic, write_json, write_text
from medtpp.inference.export.network import (
    TOLERANCE,
    ExportedNetwork,
    Written,
    channels_of,
    difference,
    example,
    exported_network,
)
from medtpp.inference.export.programs import export_program, save_program
from medtpp.inference.export.statement import fine_tuned, outputs
from medtpp.inference.sliding import SIGMA

log = logging.getLogger(__name__)

Config = dict[str, Any]

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
IMPORTS = (
    "import glob",
    "import itertools",
    "import os",
    "import numpy as np",
    "import torch",
    "from PIL import Image",
    "from PIL import ImageOps",
)
OVERLAP = 0.5
AT_ONCE = 4  # windows, where the network takes batches


def write_bundle(adapter: Adapter, folder: Path) -> Written:
    """configs/, models/ and docs/ as MONAI wants them."""
    name, load, batch, found = _write_network(adapter, folder / "models")
    inference = {
        "imports": [f"${line}" for line in IMPORTS],
        "bundle_root": ".",
        "dataset_dir": ".",
        "pattern": "*.png" if _photographs(adapter.card.preprocessing) else "*.nii.gz",
        "output_dir": "$@bundle_root + '/eval'",
        "device": "$torch.device('cuda' if torch.cuda.is_available() else 'cpu')",
        "network": load,
        "data": "$[{'image': path} for path in sorted(glob.glob(os.path.join(@dataset_dir, @pattern)))]",
        "preprocessing": {"_target_": "Compose", "transforms": preprocessing_transforms(adapter.card.preprocessing)},
        "dataset": {"_target_": "Dataset", "data": "@data", "transform": "@preprocessing"},
        **(_segmentation(adapter, batch) if _dense(adapter) else _classification(adapter)),
    }
    write_json(folder / "configs" / "inference.json", inference)
    write_json(folder / "configs" / "metadata.json", _metadata(adapter))
    write_text(folder / "docs" / "README.md", _readme(adapter))
    files = (f"models/{name}", "configs/inference.json", "configs/metadata.json", "docs/README.md")
    return Written(files, batch, found)


def _write_network(adapter: Adapter, folder: Path) -> tuple[str, str, bool, float]:
    """TorchScript, which MONAI's own tools load; a torch.export program where tracing does not give the same network.

    Returns:
        The file's name; the expression that loads it; whether it takes batches of any size; the largest difference.
    """
    network = exported_network(adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that become constants, and of TorchScript's age
        for count in (2, 1):  # where the code counted the batch, a trace works with the size it saw alone
            try:
                traced = torch.jit.trace(network, (example(adapter, count),), check_trace=False)
                found = difference(adapter, traced, batch=count > 1)
            except RuntimeError as error:
                log.debug("no trace of batches of %d: %s", count, error)
                continue
            if found <= TOLERANCE:
                with atomic(folder / "model.ts") as temporary:
                    torch.jit.save(traced, temporary)
                load = "$torch.jit.load(@bundle_root + '/models/model.ts', map_location=@device)"
                return "model.ts", load, count > 1, found
    return _write_program(adapter, network, folder)


def _write_program(adapter: Adapter, network: ExportedNetwork, folder: Path) -> tuple[str, str, bool, float]:
    program, batch = export_program(adapter, network)
    save_program(program, folder / "model.pt2")
    load = "$torch.export.load(@bundle_root + '/models/model.pt2').module().to(@device)"
    return "model.pt2", load, batch, difference(adapter, program.module(), batch=batch)


def _dense(adapter: Adapter) -> bool:
    return adapter.task is not None and adapter.task.dense


def _photographs(preprocessing: Preprocessing | VolumePreprocessing) -> bool:
    """Whether images are PNG, JPEG and the like: two axes, grey levels."""
    if isinstance(preprocessing, Preprocessing):
        return True
    return preprocessing.dims == 2 and set(preprocessing.windows) == {LEVELS}


def preprocessing_transforms(preprocessing: Preprocessing | VolumePreprocessing) -> list[Config]:
    """From a path to (C, *spatial) in [0, 1], each side at least the patch's; arrays as ours, (D, H, W) or (H, W)."""
    load: Config = {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True}
    if _photographs(preprocessing):
        load |= {"reader": "PILReader", "converter": _converter(preprocessing)}
    transforms = [load, {"_target_": "EnsureTyped", "keys": "image", "dtype": "$torch.float32"}]
    if isinstance(preprocessing, Preprocessing):
        transforms.append({"_target_": "Transposed", "keys": "image", "indices": [0, 2, 1]})
        transforms.append(_range(0, 255))
    else:
        transforms += _scan_transforms(preprocessing)
    pad = "edge" if isinstance(preprocessing, VolumePreprocessing) and preprocessing.border == "edge" else "constant"
    sides = list(preprocessing.patch)
    return [*transforms, {"_target_": "SpatialPadd", "keys": "image", "spatial_size": sides, "mode": pad}]


def _converter(preprocessing: Preprocessing | VolumePreprocessing) -> str:
    """What is done to a PIL image: orientation, colour, and the size where one is wanted, by Pillow itself."""
    mode = "L" if channels_of(preprocessing) == 1 else "RGB"
    image = f"ImageOps.exif_transpose(i).convert('{mode}')"
    if isinstance(preprocessing, Preprocessing):
        size = preprocessing.patch[::-1]
        bicubic = "Image.Resampling.BICUBIC"
        stretched = preprocessing.fit == "stretch"
        image = f"{image}.resize({size}, {bicubic})" if stretched else f"ImageOps.contain({image}, {size}, {bicubic})"
    return f"$lambda i: {image}"


def _range(low: float, high: float) -> Config:
    scale = {"a_min": low, "a_max": high, "b_min": 0, "b_max": 1, "clip": True}
    return {"_target_": "ScaleIntensityRanged", "keys": "image", **scale}


def _scan_transforms(preprocessing: VolumePreprocessing) -> list[Config]:
    transforms: list[Config] = []
    if preprocessing.dims == 3:
        transforms.append({"_target_": "Orientationd", "keys": "image", "axcodes": "SAR"})
    else:
        transforms.append({"_target_": "Transposed", "keys": "image", "indices": [0, 2, 1]})
    if preprocessing.crop:
        steps = preprocessing.spacing or (1.0,) * preprocessing.dims
        axes = tuple(range(1, preprocessing.dims + 1))
        above = f"x.amin({axes}, keepdim=True)" if preprocessing.air is None else repr(preprocessing.air)
        crop = {"select_fn": f"$lambda x: x > {above}", "margin": [math.ceil(preprocessing.margin / s) for s in steps]}
        transforms.append(
            {"_target_": "CropForegroundd", "keys": "image", "source_key": "image", "allow_smaller": True, **crop}
        )
    transforms.append(_intensities(preprocessing))
    if preprocessing.size:
        resize = {
            "spatial_size": list(preprocessing.size),
            "mode": "bilinear" if preprocessing.dims == 2 else "trilinear",
        }
        transforms.append({"_target_": "Resized", "keys": "image", "anti_aliasing": True, **resize})
    elif preprocessing.spacing:
        spacing = {"pixdim": list(preprocessing.spacing), "mode": "bilinear", "padding_mode": "border"}
        transforms.append(
            {"_target_": "Spacingd", "keys": "image", "scale_extent": True, "align_corners": True, **spacing}
        )
    return transforms + _center_crop(preprocessing)


def _center_crop(preprocessing: VolumePreprocessing) -> list[Config]:
    """MONAI's crop counts voxels, so that it comes after the spacing, where they have one size.

    Raises:
        ConfigError: There is no such spacing.
    """
    if preprocessing.center_crop is None:
        return []
    if preprocessing.spacing is None:
        raise ConfigError(
            "This adapter keeps the middle of scans in mm (data.volume.center_crop) at whatever spacing they have, "
            "which transforms of MONAI cannot say. Export it --to torch or onnx, or use medtpp predict."
        )
    pairs = zip(preprocessing.center_crop, preprocessing.spacing, strict=True)
    roi = [max(1, round(extent / step)) for extent, step in pairs]
    return [{"_target_": "CenterSpatialCropd", "keys": "image", "roi_size": roi}]


def _intensities(preprocessing: VolumePreprocessing) -> Config:
    """MONAI's own transform where one window serves all channels; else, for it knows no content, an expression."""
    window = preprocessing.windows[0]
    if window.kind == "fixed" and len(set(preprocessing.windows)) == 1:
        return _range(window.low, window.high)
    above = "c.min()" if preprocessing.air is None else repr(preprocessing.air)
    content = f"(c[c > {above}] if (c > {above}).any() else c)"
    bounds = ", ".join(_bounds(one, content) for one in preprocessing.windows)
    scaled = "((c - low) / ((high - low) or 1)).clip(0, 1)"
    each = f"{scaled} for c, bounds in zip(x, [{bounds}]) for low, high in [bounds(c)]"
    # Content of one value has no range of its own: the whole scan's.
    ranges = "for low, high in [(low, high) if low < high else (c.min().item(), c.max().item())]"
    return {"_target_": "Lambdad", "keys": "image", "func": f"$lambda x: torch.stack([{each} {ranges}])"}


def _bounds(window: Window, content: str) -> str:
    """What becomes 0 and 1 of a channel `c`, whose content is an expression."""
    if window.kind == "fixed":
        return f"lambda c: ({window.low}, {window.high})"
    if window.kind == "percentiles":
        return f"lambda c: np.percentile({content}.cpu().numpy(), ({window.low}, {window.high})).tolist()"
    ends = [f"v.mean().item() + ({end}) * v.std(correction=0).item()" for end in (window.low, window.high)]
    return f"lambda c: [({', '.join(ends)}) for v in [{content}.double()]][0]"


def _segmentation(adapter: Adapter, batch: bool) -> Config:
    task = fine_tuned(adapter)
    decide = {"threshold": 0.5} if task.multilabel else {"argmax": True}
    steps: list[Config] = [
        {
            "_target_": "Invertd",
            "keys": "pred",
            "transform": "@preprocessing",
            "orig_keys": "image",
            "nearest_interp": False,
        },
        {"_target_": "AsDiscreted", "keys": "pred", **decide},
    ]
    numbers, values = [*range(1, len(task.classes) + 1)], [structure.value for structure in task.structures]
    if not task.multilabel and values != numbers:
        labels = {"orig_labels": numbers, "target_labels": values}
        steps.append({"_target_": "MapLabelValued", "keys": "pred", **labels})
    suffix = ".png" if _photographs(adapter.card.preprocessing) else ".nii.gz"
    save = {"output_dir": "@output_dir", "output_ext": suffix, "output_postfix": "seg", "separate_folder": False}
    dtype = "$np.uint16" if not task.multilabel and max(values) > np.iinfo(np.uint8).max else "$np.uint8"
    steps.append({"_target_": "SaveImaged", "keys": "pred", "resample": False, "output_dtype": dtype, **save})
    patch = list(adapter.card.preprocessing.patch)
    windows = {"roi_size": patch, "sw_batch_size": AT_ONCE if batch else 1, "overlap": OVERLAP}
    return {
        "inferer": {"_target_": "SlidingWindowInferer", **windows, "mode": "gaussian", "sigma_scale": SIGMA},
        "postprocessing": {"_target_": "Compose", "transforms": steps},
        "predict": "$lambda item: {**item, 'pred': @inferer(item['image'][None].to(@device), @network)[0].cpu()}",
        "run": ["$[None for item in @dataset if @postprocessing(@predict(item)) is None]"],
    }


def _classification(adapter: Adapter) -> Config:
    """Windows as few as possible, spread evenly; the mean of their logits."""
    patch = list(adapter.card.preprocessing.patch)
    starts = "[round(i * (n - p) / max(-(-n // p) - 1, 1)) for i in range(-(-n // p))]"
    slices = f"[[slice(s, s + p) for s in {starts}] for n, p in zip(image.shape[2:], {patch})]"
    windows = f"itertools.product([slice(None)], [slice(None)], *{slices})"
    logits, back = ("logit()", "sigmoid()") if fine_tuned(adapter).multilabel else ("log()", "softmax(dim=-1)")
    mean = f"torch.stack([network(image[w]).{logits} for w in {windows}]).mean(dim=0).{back}"
    return {
        "inferer": f"$lambda image, network: {mean}",
        "classes": outputs(adapter),
        "predict": "$lambda item: @inferer(item['image'][None].as_tensor().to(@device), @network)[0].cpu()",
        "run": [
            "$print('file', *@classes, sep=',')",
            "$[print(item['image'].meta['filename_or_obj'], *@predict(item).tolist(), sep=',') for item in @dataset]",
        ],
    }


def _metadata(adapter: Adapter) -> Config:
    card, names = adapter.card, outputs(adapter)
    kind = "segmentation" if _dense(adapter) else "classification"
    channels, patch = channels_of(card.preprocessing), list(card.preprocessing.patch)
    common = {
        "dtype": "float32",
        "value_range": [0, 1],
        "is_patch_data": not isinstance(card.preprocessing, Preprocessing),
    }
    made = version("medtpp")
    inputs = {"type": "image", "format": "magnitude", "modality": card.modality, "num_channels": channels}
    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"exported by medtpp {made}"},
        "monai_version": version("monai"),
        "pytorch_version": version("torch"),
        "numpy_version": version("numpy"),
        "required_packages_version": {"nibabel": version("nibabel"), "pillow": version("pillow")},
        "name": f"{kind}: {', '.join(fine_tuned(adapter).classes)}",
        "task": kind,
        "description": f"{card.backbone.architecture} with {card.tuner['name']}, by Target Parameter Pre-training",
        "authors": f"exported by medtpp {made}",
        "copyright": "of the weights' and the data's owners",
        "intended_use": "research; not a medical device",
        "network_data_format": {
            "inputs": {
                "image": {
                    **inputs,
                    **common,
                    "spatial_shape": patch,
                    "channel_def": {str(number): "image" for number in range(channels)},
                }
            },
            "outputs": {
                "pred": {
                    "type": "probabilities",
                    "format": kind,
                    "num_channels": len(names),
                    **common,
                    "spatial_shape": patch if _dense(adapter) else [],
                    "channel_def": {str(number): name for number, name in enumerate(names)},
                }
            },
        },
    }


def _readme(adapter: Adapter) -> str:
    written = "writes a mask for each into `eval/`" if _dense(adapter) else "prints their probabilities as CSV"
    return "\n".join(
        [
            f"# {', '.join(fine_tuned(adapter).classes)}",
            "",
            "    pip install torch monai fire nibabel pillow",
            "    python -m monai.bundle run --config_file configs/inference.json --bundle_root . --dataset_dir SCANS",
            "",
            f"reads the files in SCANS that `pattern` matches and {written}. `preprocessing.json` states in words what",
            "the configuration does. Research use; not a medical device.",
            "",
            *_channels(adapter.card.preprocessing),
        ]
    )


def _channels(preprocessing: Preprocessing | VolumePreprocessing) -> list[str]:
    """How scans of several channels are given; nothing for others."""
    count = channels_of(preprocessing)
    if _photographs(preprocessing) or count == 1:
        return []
    lists = f"[{{'image': [p.replace('_0000.', f'_{{c:04d}}.') for c in range({count})]}} "
    lists += "for p in sorted(glob.glob(os.path.join(@dataset_dir, @pattern)))]"
    return [
        f"A scan has {count} channels, in the order of training: in one file of four axes, or each in a file, called",
        "as by nnU-Net (`a_0000.nii.gz`, `a_0001.nii.gz`, ...). Files of one channel are given together, by adding",
        "",
        f'    --pattern "*_0000.nii.gz" --data "\\${lists}"',
        "",
    ]
