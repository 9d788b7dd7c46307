"""Data sets of empty files, where names alone count."""

from medtpp.config import DataOptions
from medtpp.data.read import read_dataset


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def read(path, **options):
    return read_dataset(DataOptions(path=path, **options))
