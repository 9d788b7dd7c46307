"""`medtpp bench`: tuners measured in processes of their own. The figures themselves depend on the machine."""

import mmap
import os
import platform
import subprocess
import sys

import pytest
import torch

from medtpp.errors import ConfigError
from medtpp.files import read_json
from medtpp.training.memory import PeakMemory
from medtpp.workflow import bench
from runs import cli, done, refused

TINY = ("--backbone", "medtpp_vit_tiny", "--image-size", 32, "--batch-size", 4)


def nothing(setup, trainee):
    return 100.0


def troubled(setup, trainee):
    """In a process of its own: what happens to some tuners."""
    name = trainee.tuned.tuner.name
    if name == "apla":
        os._exit(1)
    if name == "bitfit":
        raise MemoryError("nothing left")
    if name == "ssf":
        raise ConfigError("This does not fit.")
    return 7.0


def rows(text):
    """Cells of the table by tuner."""
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}


def test_what_is_measured(tmp_path):
    result = done("bench", *TINY, "--tuner", "convpass,linear", "--repeats", 1, "--out", tmp_path / "costs.json")
    table = [line for line in result.out.splitlines() if not line.startswith("numbers")]  # and a path of any length
    assert max(map(len, table)) <= 80
    shown, found = rows(result.out), read_json(tmp_path / "costs.json")
    assert shown["linear"][:3] == ["0", "-", "-"]
    assert shown["convpass"][0] == "92,544"
    assert found["tuners"].keys() == {"convpass", "linear"}
    assert found["settings"]["image_size"] == 32
    assert found["machine"]["packages"]["torch"] == torch.__version__.partition("+")[0]
    convpass = found["tuners"]["convpass"]
    assert (convpass["tpp"]["pretext"], convpass["finetune"]["pretext"]) == ("simmim", None)
    assert found["tuners"]["linear"].keys() == {"finetune"}
    for stage in (*convpass.values(), *found["tuners"]["linear"].values()):
        assert stage["error"] is None
        assert stage["rates"] == [stage["images_per_second"]]
        assert stage["memory_mib"] > 0
    assert f"{convpass['tpp']['images_per_second']:.1f}" in shown["convpass"]


def test_one_that_fails_or_is_killed_stops_no_other(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "_memory", nothing)
    monkeypatch.setattr(bench, "_rate", troubled)
    result = cli("bench", *TINY, "--tuner", "apla,bitfit,ssf,linear", "--repeats", 2, "--out", tmp_path / "costs.json")
    assert result.status == 1
    shown, found = rows(result.out), read_json(tmp_path / "costs.json")["tuners"]
    assert shown["linear"] == ["0", "-", "-", "7.0", "100"]
    assert all(shown[name][1:] == ["failed"] * 4 for name in ("apla", "bitfit", "ssf"))
    assert found["linear"]["finetune"]["rates"] == [7.0, 7.0]
    reasons = {name: stages["tpp"]["error"] for name, stages in found.items() if name != "linear"}
    assert "killed" in reasons["apla"]
    assert (reasons["bitfit"], reasons["ssf"]) == ("MemoryError: nothing left", "This does not fit.")
    assert "apla, TPP: the process was killed" in result.text
    assert "bitfit, fine-tuning: MemoryError: nothing left" in result.text
    assert "Traceback" not in result.text


def test_mistakes_are_told_before_anything_is_measured():
    assert "no tuner called 'lroa'" in refused("bench", "--tuner", "lroa")
    assert "No backbone is called 'vit_smal'" in refused("bench", "--backbone", "vit_smal")
    assert "not a multiple of the patch size 16" in refused("bench", *TINY[:2], "--image-size", 33)
    assert "needs a CUDA GPU" in refused("bench", "--device", "cpu", "--precision", 16)
    assert "is not one of" in refused("bench", "--device", "gpu")


def test_a_rate_is_the_median():
    assert bench.Cost(rates=[1.0, 9.0, 2.0]).rate == 2.0
    assert bench.Cost(rates=[1.0], error="killed").rate is None


def test_rounds_go_there_and_back(monkeypatch):
    seen = []

    def note(cost, figure, setup, name, stage):
        seen.append((name, stage))
        if name == "bitfit":
            cost.error = "broken"

    monkeypatch.setattr(bench, "_note", note)
    found = bench.measure(bench.Setup("x", 32, 4, "cpu", "32"), ["bitfit", "linear", "lora"], 2, lambda *_: None)
    both = [("linear", "finetune"), ("lora", "tpp"), ("lora", "finetune")]
    assert seen == [("bitfit", "tpp"), ("bitfit", "finetune"), *both, *both[::-1], *both]
    assert found.errors == [("bitfit", "tpp", "broken"), ("bitfit", "finetune", "broken")]


# A process that does many jobs: 100 MB in small blocks, then 500 MB between blocks that stay, then the same 100 MB.
_JOBS = """
import torch
from medtpp.training.memory import PeakMemory
def blocks(count): return [torch.ones(25_000) for _ in range(count)]
def job():
    memory = PeakMemory(torch.device("cpu"))
    kept = blocks(1000)
    return memory.mib()
first = job()
many, pins = [], []
for _ in range(100):
    many += blocks(50)
    pins.append(torch.ones(10))
del many
print(first, job())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="others cannot give it back")
def test_the_peak_does_not_depend_on_what_was_done_before():
    said = subprocess.run([sys.executable, "-c", _JOBS], capture_output=True, text=True, check=True).stdout
    first, second = map(float, said.split())
    assert abs(second - first) < 30


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the peak is that of the process so far")
def test_memory_that_comes_and_goes_is_counted():
    memory = PeakMemory(torch.device("cpu"))
    assert memory.added_mib() < 30
    with mmap.mmap(-1, 2**26) as pages:  # not a tensor, which may lie where earlier tests left room in the heap
        for start in range(0, 2**26, mmap.PAGESIZE):
            pages[start] = 1
    assert 60 < memory.added_mib() < 100
