"""Scans made for the tests of preprocessing, store and patches."""

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from medtpp.data.case import Case, Structure
from medtpp.data.geometry import Geometry, Volume, plain_geometry
from medtpp.data.volume_scan import Reader
from medtpp.errors import DataError
from medtpp.files import digest

STRUCTURES = (Structure("organ", (1,)), Structure("lesion", (2,)))


def geometry(shape, spacing=(1.0, 1.0, 1.0), seed=None):
    """Along the coordinates for no seed; else in a random direction, oblique for odd seeds."""
    directions = np.eye(3)[::-1]
    if seed is not None:
        rng = np.random.default_rng(seed)
        directions = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)
        if seed % 2:
            directions = directions @ Rotation.random(random_state=seed).as_matrix()
    return Geometry(tuple(shape), tuple(spacing), (-5.0, 7.0, 11.0), tuple(map(tuple, directions.tolist())))


def blobs(shape, seed=0, scale=3.0):
    """Labels 0, 1, 2 in round pieces of about `scale` voxels."""
    field = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), scale)
    return np.digitize(field / field.std(), (0.7, 1.5)).astype(np.uint8)


def write_case(folder, name, array, labels=None, **known):
    """A case in a file that `READER` reads."""
    where = known.get("geometry") or plain_geometry(array.shape[1:])
    image, mask = folder / f"{name}.scan", None
    with image.open("wb") as stream:  # np.savez would add a suffix
        np.savez(
            stream,
            array=array,
            spacing=where.spacing,
            origin=where.origin,
            directions=where.directions,
            known=where.known,
            units=known.get("units", "none"),
        )
    if labels is not None:
        mask = folder / f"{name}_mask.npy"
        np.save(mask, labels)
    return Case(id=name, image=image, mask=mask)


def read_volume(case):
    try:
        with np.load(case.image) as file:
            array = file["array"]
            directions = tuple(map(tuple, file["directions"].tolist()))
            where = (tuple(file["spacing"].tolist()), tuple(file["origin"].tolist()), directions, bool(file["known"]))
            return Volume(array, Geometry(array.shape[1:], *where), str(file["units"]))
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise DataError("is no scan.") from error


def read_mask(path, where):
    values = np.load(path)
    if values.shape != where.shape:
        raise DataError("has another shape than its scan.")
    return values


READER = Reader(read_volume, read_mask, lambda volume: digest(str(volume.array.shape), volume.array.tobytes())[:32])
