"""What all tests share: one thread, caches in a folder of their own, phantoms as data."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: the same bits, and the cores are shared

import hypothesis
import pytest

# The same examples each time, so that a change is judged and not the dice;
# `pytest --hypothesis-profile=default` searches on.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    previous = os.environ.get("MEDTPP_CACHE")
    os.environ["MEDTPP_CACHE"] = str(folder)
    yield folder
    if previous is None:
        del os.environ["MEDTPP_CACHE"]
    else:
        os.environ["MEDTPP_CACHE"] = previous


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory):
    """48 small radiographs with a manifest."""
    from medtpp.data.phantom import write_folder

    folder = tmp_path_factory.mktemp("phantoms")
    write_folder(folder, 48, 64, 0)
    return folder
