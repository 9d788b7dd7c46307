"""Phantoms: made-up grey radiographs and volumes, with and without a lesion, for tests, examples and trials.

They hold what makes real radiographs hard: a different body, position, exposure and noise each time, ribs and vessels
that look like small lesions, and bright markers outside the lungs, in both classes alike. Everything is drawn from the
seed and the patient's number, so that the first ten of a hundred phantoms are the same as ten phantoms.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medtpp.errors import DataError
from medtpp.files import atomic

Grid = NDArray[np.floating[Any]]

_SECOND_IMAGE = 0.15  # share of patients with two images


@dataclass(frozen=True)
class Phantoms:
    """Phantoms and what is in them.

    Attributes:
        images: (n, size, size) or (n, size, size, size) uint8.
        masks: The same shape, uint8; 1 is lesion.
        labels: (n,) int64; 1 where there is a lesion.
        patients: One name per image; a patient's second image shows the same anatomy in another position and exposure.
    """

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    labels: NDArray[np.int64]
    patients: list[str]


def generate(n: int, size: int = 128, seed: int = 0, *, dims: Literal[2, 3] = 2) -> Phantoms:
    """Draw phantoms, about half of them with one lesion.

    Lesions are plain to see in most radiographs, and yet logistic regression on the pixels of 400 of them (reduced to
    32 x 32) has a test AUC between 0.52 and 0.8: it takes a model that finds a blob wherever it lies.

    Args:
        n: Number of images.
        size: Side in pixels or voxels.
        seed: Any non-negative number.
        dims: 2 for chest radiographs, 3 for volumes with the axes (depth, row, column).
    """
    paint = _radiograph if dims == 2 else _volume
    images = np.zeros((n, *[size] * dims), dtype=np.uint8)
    masks = np.zeros_like(images)
    labels = np.zeros(n, dtype=np.int64)
    patients: list[str] = []
    patient = 0
    while len(patients) < n:
        # Patients come in pairs of which one has a lesion, so that small sets hold both classes.
        with_lesion = int(_rng(seed, "pair", patient // 2).integers(2)) == patient % 2
        views = 2 if _rng(seed, "views", patient).random() < _SECOND_IMAGE else 1
        for view in range(min(views, n - len(patients))):
            row = len(patients)
            film, mask = paint(_rng(seed, "anatomy", patient), _rng(seed, f"view {view}", patient), size, with_lesion)
            images[row], masks[row], labels[row] = film, mask, with_lesion
            patients.append(f"p{patient:05d}")
        patient += 1
    return Phantoms(images, masks, labels, patients)


def write_folder(
    folder: Path, n: int, size: int = 128, seed: int = 0, layout: Literal["manifest", "folders"] = "manifest"
) -> None:
    """Write radiographs as PNG files.

    Args:
        folder: Where to write; made if need be.
        n: Number of images.
        size: Side in pixels.
        seed: Any non-negative number.
        layout: "manifest" for images/ and a manifest.csv with the columns image, label, patient; "folders" for the
            class folders normal/ and lesion/, which say nothing of patients.

    Raises:
        DataError: The layout is unknown.
        OutputError: A file cannot be written.
    """
    from PIL import Image

    if layout not in ("manifest", "folders"):
        raise DataError(f"Phantoms are not written as {layout!r}. Choose manifest or folders.")
    phantoms = generate(n, size, seed)
    rows = [("image", "label", "patient")]
    for number, (image, label, patient) in enumerate(
        zip(phantoms.images, phantoms.labels, phantoms.patients, strict=True)
    ):
        name = "lesion" if label else "normal"
        file = f"{'images' if layout == 'manifest' else name}/{number:05d}.png"
        with atomic(folder / file) as temporary:
            Image.fromarray(image).save(temporary)
        rows.append((file, name, patient))
    if layout == "manifest":
        with atomic(folder / "manifest.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, lineterminator="\n").writerows(rows)


def _rng(seed: int, purpose: str, patient: int) -> np.random.Generator:
    return np.random.default_rng([seed, patient, *purpose.encode()])


# Radiographs. x and y run from -1 to 1 over the film, x to the right, y downwards; densities add up along the ray.


@dataclass(frozen=True)
class _Thorax:
    """Where the lung fields end, for one patient."""

    width: float
    top: float
    bases: tuple[float, float]  # height of the dome of each half of the diaphragm: left and right in the image
    dome: float
    medial: float
    heart_x: float
    heart_y: float
    heart_rx: float
    heart_ry: float

    @classmethod
    def draw(cls, rng: np.random.Generator) -> _Thorax:
        base = rng.uniform(0.42, 0.66)
        return cls(
            width=rng.uniform(0.68, 0.80),
            top=rng.uniform(-0.86, -0.74),
            bases=(base - rng.uniform(0.0, 0.08), base),
            dome=rng.uniform(0.9, 1.9),
            medial=rng.uniform(0.13, 0.19),
            heart_x=rng.uniform(0.06, 0.14),
            heart_y=base - rng.uniform(0.06, 0.16),
            heart_rx=rng.uniform(0.28, 0.40),
            heart_ry=rng.uniform(0.26, 0.36),
        )

    def heart(self, x: Grid, y: Grid) -> Grid:
        """1 inside the heart, with a soft border; (H, W)."""
        along, across = 0.9 * (x - self.heart_x) + 0.44 * (y - self.heart_y), -0.44 * x + 0.9 * (y - self.heart_y)
        return _step(1 - np.hypot(along / self.heart_rx, across / self.heart_ry), 0.05)

    def lungs(self, x: Grid, y: Grid) -> Grid:
        """1 inside the lung fields, with a soft border; (H, W)."""
        side = np.abs(x)
        t = np.clip((y - self.top) / (self.bases[1] - self.top), 0, 1.2)
        lateral = self.width * (0.62 + 0.38 * np.sin(np.pi / 2 * np.clip(1.25 * t, 0, 1)))
        medial = self.medial * (1.0 - 0.35 * np.exp(-(((t - 0.25) / 0.2) ** 2)))
        middle = 0.55 * (lateral + medial) - 0.03
        apex = self.top + 1.9 * (side - 0.36) ** 2 + 0.6 * np.clip(side - 0.5, 0, 1)
        base = np.where(x < 0, *self.bases) + self.dome * (side - middle) ** 2
        inside = np.minimum.reduce([lateral - side, side - medial, y - apex, base - y])
        return _step(inside, 0.014) * (1 - 0.9 * self.heart(x, y))


def _radiograph(
    anatomy: np.random.Generator, view: np.random.Generator, size: int, with_lesion: bool
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Film and lesion mask, (size, size) each."""
    thorax = _Thorax.draw(anatomy)
    x, y = _position(view, size)
    side = np.abs(x)
    lungs, heart = thorax.lungs(x, y), thorax.heart(x, y)
    outline = anatomy.uniform(0.92, 1.06) * (0.59 + 0.36 * np.tanh((y + anatomy.uniform(0.78, 0.86)) / 0.15))
    body = _step(outline - side, 0.03)
    arch = anatomy.uniform(0.04, 0.09) * np.exp(-(((y + 0.32) / 0.1) ** 2)) * (x > 0)
    middle = np.exp(-((side / (0.15 + arch)) ** 4))

    density = body * (0.95 + 0.06 * _cloud(anatomy, size, 2.0))
    density -= 0.74 * lungs
    density += 0.45 * body * np.maximum.reduce([heart, middle, _step(y - np.where(x < 0, *thorax.bases) - 0.05, 0.1)])
    density += body * 0.05 * np.exp(-((side / 0.09) ** 4)) * np.sin(28 * y)  # vertebrae
    density -= 0.18 * np.exp(-((x / 0.035) ** 2)) * _step(-0.25 - y, 0.05)  # trachea
    density += _bones(anatomy, x, y, thorax) * body
    density += lungs * (_vessels(anatomy, x, y) + 0.035 * _cloud(anatomy, size, 1.2))
    markings, mask = _nodules(anatomy, x, y, thorax, with_lesion)
    density += markings + _markers(anatomy, view, x, y, lungs)
    return _expose(density, view, size), mask


def _position(view: np.random.Generator, size: int) -> tuple[Grid, Grid]:
    """The patient's coordinates at each pixel of the film: turned, shifted, nearer or farther; (size, size) each."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1
    v, u = np.meshgrid(axis, axis, indexing="ij")
    angle = view.normal(0, 0.045)
    zoom = view.uniform(0.84, 0.98)
    du, dv = view.normal(0, 0.045, size=2)
    cos, sin = np.cos(angle), np.sin(angle)
    x = zoom * (cos * (u - du) - sin * (v - dv))
    y = zoom * (sin * (u - du) + cos * (v - dv))
    return x.astype(np.float32), y.astype(np.float32)


def _bones(rng: np.random.Generator, x: Grid, y: Grid, thorax: _Thorax) -> Grid:
    """Ribs behind, ribs in front, clavicles; (H, W)."""
    side = np.abs(x)
    spacing, thick = rng.uniform(0.155, 0.185), rng.uniform(0.026, 0.034)
    strength = rng.uniform(0.10, 0.20)
    behind = y - (0.62 * side**2 - 0.30 * side + 0.25 * side**4)
    front = y - 0.75 * np.clip(thorax.width - side, 0, None) ** 1.1
    bones = np.zeros_like(x)
    first = thorax.top + rng.uniform(0.06, 0.12)
    for k in range(10):
        level = first + k * spacing + rng.normal(0, 0.006)
        bones += (
            strength * _bar(behind - level, thick) * _step(side - 0.08, 0.02) * _step(thorax.width + 0.06 - side, 0.02)
        )
        if 1 <= k <= 6:
            bones += 0.6 * strength * _bar(front - level - 0.08, 1.2 * thick) * _step(side - 0.36, 0.06)
    tilt, height = rng.uniform(0.05, 0.25), thorax.top + rng.uniform(0.10, 0.2)
    collar = y - height + tilt * (side - 0.1) - 0.05 * np.sin(6 * side)
    bones += 1.2 * strength * _bar(collar, 0.03) * _step(side - 0.08, 0.02) * _step(0.8 - side, 0.03)
    return bones


def _bar(distance: Grid, half_width: float) -> Grid:
    """A rib's profile: flat, with denser borders."""
    r = (distance / half_width) ** 2
    profile: Grid = np.exp(-(r**2)) * (0.7 + 0.5 * np.minimum(r, 1.2))
    return profile


def _vessels(rng: np.random.Generator, x: Grid, y: Grid) -> Grid:
    """Branches that leave each hilum and thin out; (H, W)."""
    vessels = np.zeros_like(x)
    for hilum in (-0.17, 0.17):
        centre = rng.uniform(-0.12, 0.02)
        vessels += rng.uniform(0.08, 0.2) * np.exp(-(((x - hilum) / 0.10) ** 2) - ((y - centre) / 0.17) ** 2)
        for angle in np.linspace(-1.25, 1.35, 9) + rng.normal(0, 0.1, 9):
            bend, reach, width = rng.normal(0, 0.5), rng.uniform(0.25, 0.55), rng.uniform(0.010, 0.018)
            dx, dy = np.sign(hilum) * (x - hilum), y - centre
            along = np.cos(angle) * dx + np.sin(angle) * dy
            across = -np.sin(angle) * dx + np.cos(angle) * dy - bend * along**2
            thin = width * np.clip(1.1 - along / reach, 0.25, 1.1)
            vessels += (
                0.20 * np.exp(-((across / thin) ** 2)) * _step(along - 0.09, 0.04) * np.clip(1 - along / reach, 0, 1)
            )
    return vessels


def _nodules(
    rng: np.random.Generator, x: Grid, y: Grid, thorax: _Thorax, with_lesion: bool
) -> tuple[Grid, NDArray[np.uint8]]:
    """Vessels seen end-on, in every patient, and the lesion; density and lesion mask, (H, W) each."""
    density = np.zeros_like(x)
    for _ in range(rng.integers(2, 7)):
        radius = rng.uniform(0.012, 0.024)
        cx, cy = _place(rng, thorax, spread=0.3)
        density += rng.uniform(0.15, 0.35) * np.exp(-(((x - cx) ** 2 + (y - cy) ** 2) / radius**2))
    if not with_lesion:
        return density, np.zeros(x.shape, np.uint8)
    # Radius 3 to 8 % of the film's width, which is 2 in these coordinates.
    radius = rng.uniform(0.06, 0.16)
    cx, cy = _place(rng, thorax, spread=1.0)
    dx, dy, turn = x - cx, y - cy, np.arctan2(y - cy, x - cx)
    lobes = 1 + sum(rng.normal(0, 0.10 / k) * np.cos(k * turn + rng.uniform(0, 6.28)) for k in (2, 3, 5))
    r = np.hypot(dx, dy) / (radius * lobes)
    contrast = rng.uniform(0.3, 0.6)
    density += contrast * _step(1 - r, rng.uniform(0.12, 0.3))
    return density, (r < 1).astype(np.uint8)


def _place(rng: np.random.Generator, thorax: _Thorax, spread: float) -> tuple[float, float]:
    """A point well inside a lung, most often in the right upper lobe, as lung cancer is; or near a hilum."""
    around = 0.06 * np.array([[0, 1, -1, 0, 0], [0, 0, 0, 1, -1]])
    for _ in range(200):
        cx = (1 if rng.random() < 0.2 else -1) * (0.2 + spread * rng.uniform(0, 0.55))
        cy = -0.1 + spread * rng.triangular(-0.6, -0.35, 0.5)
        if thorax.lungs(cx + around[0], cy + around[1]).min() > 0.8:
            return cx, cy
    return -0.4, -0.2


def _markers(anatomy: np.random.Generator, view: np.random.Generator, x: Grid, y: Grid, lungs: Grid) -> Grid:
    """Calcified spots outside the lungs, and the side marker that the radiographer puts on the film; (H, W)."""
    spots = np.zeros_like(x)
    for _ in range(anatomy.integers(0, 4)):
        cx, cy, radius = anatomy.uniform(-0.9, 0.9), anatomy.uniform(-0.9, 0.95), anatomy.uniform(0.012, 0.04)
        spots += anatomy.uniform(0.3, 0.7) * _step(1 - np.hypot(x - cx, y - cy) / radius, 0.15)
    spots *= 1 - np.clip(1.5 * lungs, 0, 1)
    if view.random() < 0.6:
        cx, cy = view.uniform(0.68, 0.76), view.uniform(-0.8, -0.7)
        letter = np.maximum(_box(x - cx, y - cy, 0.012, 0.06), _box(x - cx - 0.03, y - cy - 0.05, 0.035, 0.012))
        spots += 1.5 * letter
    return spots


def _expose(density: Grid, view: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """From density to an 8-bit film: scatter, exposure, contrast, noise; (size, size)."""
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    tilt = view.normal(0, 0.03, size=2)
    light = 1 - np.exp(-view.uniform(0.9, 1.5) * np.clip(density, 0, None))
    light = light + tilt[0] * axis[:, None] + tilt[1] * axis[None, :] + 0.02 * _cloud(view, size, 2.5)
    low, high = np.quantile(light, [view.uniform(0.005, 0.06), view.uniform(0.96, 0.999)])
    light = np.clip((light - low) / (high - low), 0, 1) ** view.uniform(0.85, 1.2)
    grain = view.normal(size=(size, size)).astype(np.float32) + 0.8 * _cloud(view, size, 0.6)
    light = light + view.uniform(0.015, 0.035) * grain * (0.6 + 0.6 * np.sqrt(light))
    dark, bright = view.uniform(0.0, 0.06), view.uniform(0.85, 1.0)
    return _bytes(dark + (bright - dark) * light)


# Volumes. z, y, x run from -1 to 1; values are brightness, as in a CT slice in a lung window.


def _volume(
    anatomy: np.random.Generator, view: np.random.Generator, size: int, with_lesion: bool
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A chest of ellipsoids with vessels and perhaps a lesion; volume and mask, (size, size, size) each."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) * 2 / size - 1
    shift = view.normal(0, 0.03, size=3)
    z, y, x = np.meshgrid(*(axis - offset for offset in shift), indexing="ij")
    volume = 0.6 * _ellipsoid(z, y, x, (0, 0, 0), (1.6, anatomy.uniform(0.65, 0.8), anatomy.uniform(0.85, 0.95)))
    spine = (0, anatomy.uniform(0.4, 0.5), 0)
    volume += 0.3 * _ellipsoid(z, y, x, spine, (5.0, 0.12, 0.12))
    radii = anatomy.uniform([0.75, 0.42, 0.27], [0.9, 0.52, 0.33])
    for centre in (-0.42, 0.42):
        volume -= 0.5 * _ellipsoid(z, y, x, (0, -0.02, centre), tuple(radii))
    for _ in range(anatomy.integers(20, 40)):
        volume += anatomy.uniform(0.1, 0.4) * _ellipsoid(
            z, y, x, _in_lung(anatomy, radii), anatomy.uniform(0.03, 0.12, 3)
        )
    mask = np.zeros(volume.shape, np.uint8)
    if with_lesion:
        lesion = _ellipsoid(
            z, y, x, _in_lung(anatomy, radii), anatomy.uniform(0.13, 0.22) * anatomy.uniform(0.85, 1.15, 3)
        )
        volume += anatomy.uniform(0.25, 0.4) * lesion
        mask = (lesion > 0.5).astype(np.uint8)
    volume += view.uniform(0.03, 0.06) * view.normal(size=volume.shape)
    volume = view.uniform(0.02, 0.1) + view.uniform(0.8, 1.0) * np.clip(volume, 0, 1) ** view.uniform(0.8, 1.25)
    return _bytes(volume), mask


def _in_lung(rng: np.random.Generator, radii: NDArray[np.float64]) -> tuple[float, float, float]:
    direction = rng.normal(size=3)
    z, y, x = direction / np.linalg.norm(direction) * radii * 0.65 * rng.random() ** (1 / 3)
    return z, y - 0.02, x + rng.choice([-0.42, 0.42])


# Shapes and textures.


def _bytes(light: Grid) -> NDArray[np.uint8]:
    return np.rint(255 * np.clip(light, 0, 1)).astype(np.uint8)


def _step(distance: Grid, softness: float) -> Grid:
    """From 0 to 1 where a distance changes its sign."""
    step: Grid = 0.5 + 0.5 * np.tanh(distance / softness)
    return step


def _box(dx: Grid, dy: Grid, half_x: float, half_y: float) -> Grid:
    return _step(np.minimum(half_x - np.abs(dx), half_y - np.abs(dy)), 0.006)


def _ellipsoid(
    z: Grid, y: Grid, x: Grid, centre: tuple[float, float, float], radii: Sequence[float] | NDArray[np.float64]
) -> Grid:
    r2 = ((z - centre[0]) / radii[0]) ** 2 + ((y - centre[1]) / radii[1]) ** 2 + ((x - centre[2]) / radii[2]) ** 2
    return _step(1 - np.sqrt(r2), 0.12)


def _cloud(rng: np.random.Generator, size: int, power: float) -> Grid:
    """Noise whose amplitude falls with frequency to the given power; standard deviation 1, (size, size)."""
    # A generator of its own: what is drawn later must not depend on the size of the film.
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None, :]
    spectrum = np.fft.rfft2(rng.spawn(1)[0].normal(size=(size, size))) / np.maximum(np.hypot(fy, fx), 1 / size) ** power
    spectrum[0, 0] = 0
    cloud = np.fft.irfft2(spectrum, s=(size, size)).astype(np.float32)
    scaled: Grid = cloud / cloud.std()
    return scaled
