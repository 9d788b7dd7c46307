"""MedMNIST by name: downloaded from a server in this process, checked, kept; nothing unasked."""

import hashlib
import io
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from medtpp.data.cache import cache_size, clear_cache
from medtpp.data.download import local_path
from medtpp.data.sources import _medmnist_files as medmnist
from medtpp.data.sources._medmnist_classes import CLASSES
from medtpp.workflow.experiment import load_experiment, write_experiment
from runs import done, refused
from test_sources_medmnist import arrays

NAME = "medmnist:pneumoniamnist@64"


class Handler(SimpleHTTPRequestHandler):
    asked: ClassVar[list] = []

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A folder that is served in Zenodo's place; the cache is a folder of its own."""
    folder = tmp_path / "served"
    folder.mkdir()
    Handler.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=folder)) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setattr(medmnist, "ADDRESS", f"http://127.0.0.1:{running.server_address[1]}/")
        monkeypatch.setenv("MEDTPP_CACHE", str(tmp_path / "cache"))
        yield folder
        running.shutdown()
        thread.join()


def serve(folder, monkeypatch, file="pneumoniamnist_64.npz"):
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays(sizes=(20, 8, 8)))
    (folder / file).write_bytes(stream.getvalue())
    sums = list(medmnist.MD5["pneumoniamnist"])
    sums[1] = hashlib.md5(stream.getvalue()).hexdigest()
    monkeypatch.setitem(medmnist.MD5, "pneumoniamnist", tuple(sums))


def test_a_name_is_downloaded_once(server, monkeypatch, tmp_path):
    serve(server, monkeypatch)
    for _ in range(2):
        assert "normal 1" in done("check", NAME, "--modality", "xray").text
    assert Handler.asked == ["/pneumoniamnist_64.npz?download=1"]
    done("init", NAME, "-o", tmp_path / "experiment.yaml", "--set", "backbone={name: test_vit, weights: random}")
    assert f"path: {NAME}" in (tmp_path / "experiment.yaml").read_text()
    assert "cases 36" in done("check", tmp_path / "experiment.yaml").text
    assert len(Handler.asked) == 1
    assert cache_size() > 1000
    clear_cache()
    assert not list((tmp_path / "cache").rglob("*.npz"))


def test_another_content_is_refused_and_not_kept(server, monkeypatch, tmp_path):
    serve(server, monkeypatch)
    data = (server / "pneumoniamnist_64.npz").read_bytes()
    (server / "pneumoniamnist_64.npz").write_bytes(data[:-10])
    said = refused("check", NAME)
    assert "has the MD5 sum" in said
    assert not list((tmp_path / "cache").rglob("*.npz"))
    (server / "pneumoniamnist_64.npz").write_bytes(data)
    done("check", NAME)


def test_without_a_network_it_says_so(server, monkeypatch):
    said = refused("check", NAME)
    assert "cannot be downloaded (File not found)" in said
    monkeypatch.setattr(medmnist, "ADDRESS", "http://127.0.0.1:9/")
    said = refused("check", NAME)
    assert "Connection refused" in said
    assert "give the path of the file" in said


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("medmnist:pneumonia", "Did you mean medmnist:pneumoniamnist?"),
        ("medmnist:", "MedMNIST has no ''"),
        ("medmnist:pneumoniamnist@32", "has no size '32'. Choose @28, @64, @128, @224"),
        ("medmnist:nodulemnist3d@224", "has no size '224'. Choose @28, @64."),
    ],
)
def test_unknown_names_and_sizes(server, name, words):
    assert words in refused("check", name)
    assert Handler.asked == []


def test_files_are_named_as_medmnist_names_them(monkeypatch):
    found = {}
    monkeypatch.setattr("medtpp.data.download._download", lambda file, wanted, target: found.update({file: wanted}))
    for name in ("medmnist:BreastMNIST", "medmnist:breastmnist@28", "medmnist:organmnist3d@64"):
        local_path(Path(name))
    assert found == {
        "breastmnist.npz": "750601b1f35ba3300ea97c75c52ff8f6",
        "organmnist3d_64.npz": "58a2205adf14a9d0a189cb06dc78bf10",
    }


def test_every_data_set_has_classes_and_sums_of_its_own():
    assert medmnist.MD5.keys() == CLASSES.keys()
    sums = [one for several in medmnist.MD5.values() for one in several]
    assert len(set(sums)) == len(sums) == 60
    assert all(len(one) == 32 and int(one, 16) for one in sums)


def test_a_written_experiment_keeps_the_name(tmp_path):
    write_experiment(tmp_path / "e.yaml", load_experiment(Path(NAME)))
    assert load_experiment(tmp_path / "e.yaml").data.path == Path(NAME)
