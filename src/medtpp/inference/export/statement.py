"""preprocessing.json: what an exported network takes and gives, for whoever feeds it without medtpp."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from medtpp.adapter import Adapter, TaskCard
from medtpp.config import TUNERS, Window
from medtpp.data.preprocess import WINDOW, Preprocessing
from medtpp.data.restore import ANISOTROPY
from medtpp.data.volume_preprocess import LEVELS, VolumePreprocessing
from medtpp.inference.export.network import IMAGES, PROBABILITIES, Written, channels_of

STATEMENT = "preprocessing.json"


def statement(adapter: Adapter, target: str, written: Written) -> dict[str, Any]:
    """The content of preprocessing.json."""
    card = adapter.card
    task = fine_tuned(adapter)
    dense = adapter.task is not None and adapter.task.dense
    patch = list(card.preprocessing.patch)
    axes = ["depth", "height", "width"][-len(patch) :]
    names = outputs(adapter)
    return {
        "schema": 1,
        "target": target,
        "made_by": f"medtpp {version('medtpp')}",
        "merged": TUNERS.get(card.tuner["name"]).merges,
        "tuner": card.tuner["name"],
        "difference": written.difference,
        **written.about,
        "input": {
            "name": IMAGES,
            "shape": ["batch" if written.batch else 1, channels_of(card.preprocessing), *patch],
            "axes": ["batch", "channel", *axes],
            "dtype": "float32",
            "range": [0, 1],
        },
        "output": {
            "name": PROBABILITIES,
            "shape": ["batch" if written.batch else 1, len(names), *(patch if dense else [])],
            "axes": ["batch", "class", *(axes if dense else [])],
            "dtype": "float32",
            "sums_to_one": not task.multilabel,
        },
        "outputs": names,
        "classes": list(task.classes),
        "structures": [{"name": one.name, "values": list(one.values)} for one in task.structures],
        "multilabel": task.multilabel,
        "positive": task.positive,
        "thresholds": task.thresholds,
        "modality": card.modality,
        "preprocessing": card.preprocessing.model_dump(mode="json"),
        "how": [*_steps(card.preprocessing), *_after(adapter)],
    }


def fine_tuned(adapter: Adapter) -> TaskCard:
    """The task's card of an adapter that has a head."""
    if adapter.card.task is None:
        raise ValueError("the adapter has no head")
    return adapter.card.task


def outputs(adapter: Adapter) -> list[str]:
    """What each output channel is the probability of."""
    task = fine_tuned(adapter)
    dense = adapter.task is not None and adapter.task.dense
    return [*(["background"] if dense and not task.multilabel else []), *task.classes]


def _steps(preprocessing: Preprocessing | VolumePreprocessing) -> list[str]:
    """How a file becomes the network's input, in words."""
    return _photograph(preprocessing) if isinstance(preprocessing, Preprocessing) else _scan(preprocessing)


def _photograph(preprocessing: Preprocessing) -> list[str]:
    side = preprocessing.image_size
    fit = (
        f"Resize to {side} x {side} pixels, whatever the shape was, by Pillow's bicubic filter."
        if preprocessing.fit == "stretch"
        else f"Resize by Pillow's bicubic filter so that the longer side has {side} pixels; pad the other with zeros, "
        "evenly on both sides, the odd pixel behind."
    )
    colour = (
        "Colour becomes grey: 0.299 red + 0.587 green + 0.114 blue."
        if preprocessing.channels == 1
        else "Grey is repeated in three channels: red, green, blue."
    )
    return [
        "Turn the image as its EXIF orientation says.",
        f"16 bits become 8: the pixels' {100 * WINDOW[0]:g} and {100 * WINDOW[1]:g} percentiles become 0 and 255.",
        colour,
        fit,
        "Divide by 255. The network normalises further by itself.",
    ]


def _scan(preprocessing: VolumePreprocessing) -> list[str]:
    dims = preprocessing.dims
    order = "(depth, height, width)" if dims == 3 else "(height, width)"
    steps = []
    if dims == 3:
        steps.append(
            "Reorder and flip the axes so that depth runs to the head, height to the front and width to the right."
        )
    if preprocessing.crop:
        above = "each channel's least value" if preprocessing.air is None else f"{preprocessing.air:g}"
        steps.append(f"Crop to the box of what lies above {above}, with {preprocessing.margin:g} mm on every side.")
    if preprocessing.center_crop:
        steps.append(
            f"Keep the middle {list(preprocessing.center_crop)} mm, {order}, or what there is of them; round to voxels "
            "so that as many are left out on both sides."
        )
    windows = [_window(window, preprocessing) for window in preprocessing.windows]
    each = [f"channel {number}: {text}" for number, text in enumerate(windows)]
    steps.append(f"Scale intensities; {windows[0] if len(set(windows)) == 1 else '; '.join(each)}. Cut off the rest.")
    if preprocessing.size or preprocessing.spacing:
        target = preprocessing.size or preprocessing.spacing
        steps.append(
            f"Resample to {list(target or ())} {'voxels' if preprocessing.size else 'mm'}, {order}, keeping the outer "
            f"faces, by {preprocessing.interpolation} interpolation. Axes that become coarser by a factor f are "
            "smoothed before by a Gaussian of variance (f^2 - 1) / (8 ln 2) of their voxels. Slices more than "
            f"{ANISOTROPY:g} times as thick as their pixels are repeated or dropped, never mixed."
        )
    pad = "zeros" if preprocessing.border == "zero" else "the values of the border"
    steps.append(f"Pad with {pad}, evenly on both sides, to at least {list(preprocessing.patch)} voxels.")
    return steps


def _window(window: Window, preprocessing: VolumePreprocessing) -> str:
    if window == LEVELS:
        return "grey levels 0 to 255 become 0 to 1"
    if window.kind == "fixed":
        return f"{window.low:g} to {window.high:g} become 0 to 1"
    content = "the least one" if preprocessing.air is None else f"{preprocessing.air:g}"
    if window.kind == "percentiles":
        return f"the {window.low:g} and {window.high:g} percentiles of the values above {content} become 0 and 1"
    return (
        f"the mean of the values above {content}, {window.low:+g} and {window.high:+g} times their standard deviation, "
        "becomes 0 and 1"
    )


def _after(adapter: Adapter) -> list[str]:
    """What is done with the output, in words."""
    task = fine_tuned(adapter)
    whole = isinstance(adapter.card.preprocessing, Preprocessing)
    if adapter.task is not None and adapter.task.dense:
        decide = (
            "A voxel belongs to every structure whose probability is above 0.5."
            if task.multilabel
            else "A voxel belongs to the most probable output; 0 is the background."
        )
        return [
            "Scans larger than the input: slide a window of the input's shape over them, neighbours overlapping by at "
            "least half, and average probabilities by a Gaussian weight, with a standard deviation of an eighth of a "
            "side.",
            f"Bring the probabilities back to the scan's grid, the same steps in reverse. {decide}",
        ]
    decide = "the most probable one" if not task.multilabel else "every one at or above its threshold"
    steps = [] if whole else [_pooling(task)]
    return [*steps, f"The classes of an image: {decide}; for two classes, positive at or above the threshold."]


def _pooling(task: TaskCard) -> str:
    logits = "log(p / (1 - p))" if task.multilabel else "log(p)"
    back = "a sigmoid" if task.multilabel else "a softmax"
    return (
        "Scans larger than the input: cover them by windows of the input's shape, as few as possible, spread evenly. "
        f"Average {logits} over the windows; {back} of it is the scan's probability."
    )
