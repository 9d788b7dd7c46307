import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from medtpp.errors import DataError
from medtpp.workflow.pool import Job, run_jobs


def add(first, second):
    print("adding", first, second)
    return first + second


def fail(text):
    raise DataError(text)


def stumble():
    return 1 / 0


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def signal_self(*names):
    for name in names:
        os.kill(os.getpid(), getattr(signal, name))
    return "still here"


def environment(name):
    return os.environ.get(name)


def meet(folder, name, guests):
    """The GPU that this process sees, when all the others are there too."""
    (folder / f"{name}.there").touch()
    while len(list(folder.glob("*.there"))) < guests:
        time.sleep(0.01)
    return os.environ["CUDA_VISIBLE_DEVICES"]


def touch_slowly(path, seconds):
    path.with_suffix(".begun").touch()
    time.sleep(seconds)
    path.touch()


def outcomes(folder, *jobs, processes=2, **options):
    made = [Job(name, call, folder / f"{name}.log", after) for name, call, after in jobs]
    return {found.job.name: found for found in run_jobs(made, processes=processes, threads=1, **options)}


def test_one_failure_does_not_stop_the_others(tmp_path):
    found = outcomes(
        tmp_path,
        ("bad", partial(fail, "no such thing"), None),
        ("after bad", partial(add, 1, 1), "bad"),
        ("after that", partial(add, 1, 1), "after bad"),
        ("killed", die, None),
        ("stumbled", stumble, None),
        *((f"good {number}", partial(add, number, 1), None) for number in range(5)),
        ("after good", partial(add, 2, 2), "good 3"),
    )
    assert {name: outcome.value for name, outcome in found.items() if outcome.error is None} == {
        **{f"good {number}": number + 1 for number in range(5)},
        "after good": 4,
    }
    assert found["bad"].error == "no such thing"
    assert found["after bad"].error == "bad failed"
    assert found["after that"].error == "after bad failed"
    assert "out of memory" in found["killed"].error
    assert found["stumbled"].error == "ZeroDivisionError: division by zero"
    assert "Traceback" in (tmp_path / "stumbled.log").read_text()
    assert (tmp_path / "good 2.log").read_text() == "adding 2 1\n"
    assert not (tmp_path / "after bad.log").exists()


def test_a_job_begins_after_the_one_it_needs(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    found = list(
        run_jobs(
            [
                Job("second", partial(touch_slowly, second, 0), tmp_path / "2.log", after="first"),
                Job("first", partial(touch_slowly, first, 0.5), tmp_path / "1.log"),
            ],
            processes=2,
            threads=1,
        )
    )
    assert [outcome.job.name for outcome in found] == ["first", "second"]
    assert second.with_suffix(".begun").stat().st_mtime_ns >= first.stat().st_mtime_ns


def test_a_process_that_dies_idle_is_replaced(tmp_path):
    jobs = [
        Job("first", os.getpid, tmp_path / "log"),
        Job("slow", partial(touch_slowly, tmp_path / "slow", 1.5), tmp_path / "log"),
        Job("last", partial(add, 1, 1), tmp_path / "log", after="slow"),
    ]
    found = {}
    for outcome in run_jobs(jobs, processes=2, threads=1):
        found[outcome.job.name] = outcome
        if outcome.job.name == "first":
            os.kill(outcome.value, signal.SIGKILL)
    assert found["last"].value == 2


def test_processes_get_their_share_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    jobs = [
        Job(f"{name} {copy}", partial(environment, name), tmp_path / "log")
        for name in ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
        for copy in range(2)
    ]
    found = {outcome.job.name: outcome.value for outcome in run_jobs(jobs, processes=2, threads=3, gpus=2)}
    assert found["OMP_NUM_THREADS 0"] == found["OMP_NUM_THREADS 1"] == "3"
    assert {found[f"CUDA_VISIBLE_DEVICES {copy}"] for copy in range(2)} <= {"4", "7"}
    assert os.environ["OMP_NUM_THREADS"] == "16"


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        ("4,7", ["4", "4", "7", "7"]),
        (None, ["0", "0", "1", "1"]),
        ("MIG-8a1f/3/0, GPU-5ce2", ["GPU-5ce2", "GPU-5ce2", "MIG-8a1f/3/0", "MIG-8a1f/3/0"]),
    ],
)
def test_processes_take_turns_at_the_gpus(tmp_path, monkeypatch, allowed, expected):
    """Each sees one, whatever it is called; those that are allowed are shared evenly."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if allowed:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", allowed)
    jobs = [Job(str(name), partial(meet, tmp_path, name, 4), tmp_path / "log") for name in range(4)]
    found = [outcome.value for outcome in run_jobs(jobs, processes=4, threads=1, gpus=2)]
    assert sorted(found) == expected


def test_what_a_cluster_sends_before_the_end_is_for_the_parent(tmp_path):
    jobs = [Job("job", partial(signal_self, "SIGTERM", "SIGUSR2"), tmp_path / "log")]
    assert [outcome.value for outcome in run_jobs(jobs, processes=1, threads=1)] == ["still here"]


def test_a_job_may_need_one_that_ended_before(tmp_path):
    jobs = [
        Job("after good", partial(add, 1, 1), tmp_path / "log", after="good"),
        Job("after bad", partial(add, 1, 1), tmp_path / "log", after="bad"),
    ]
    found = run_jobs(jobs, processes=1, threads=1, ended={"good": None, "bad": "no such thing"})
    assert {outcome.job.name: outcome.value or outcome.error for outcome in found} == {
        "after good": 2,
        "after bad": "bad failed",
    }


def test_processes_end_with_the_one_that_began_them(tmp_path):
    """A killed comparison leaves nobody behind who would write into its folder."""
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
from functools import partial
from pathlib import Path
import test_pool
from medtpp.workflow.pool import Job, run_jobs
folder = Path({str(tmp_path)!r})
if __name__ == "__main__":
    list(run_jobs([Job("slow", partial(test_pool.touch_slowly, folder / "slow", 3), folder / "log")],
                  processes=1, threads=1))
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script)])
    deadline = time.monotonic() + 60
    while not (tmp_path / "slow.begun").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    time.sleep(4)
    assert not (tmp_path / "slow").exists()
