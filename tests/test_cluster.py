import os
import pickle
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

import slurm
import test_pool
from medtpp.errors import ConfigError, OutputError
from medtpp.workflow.cluster import ClusterOptions, chains, load_cluster, run_on_cluster
from medtpp.workflow.compare.opening import share_machine
from medtpp.workflow.experiment import load_experiment
from medtpp.workflow.node import read_outcomes, store_calls
from medtpp.workflow.pool import Job
from runs import data_folder, refused

LOCAL = ClusterOptions(executor="local", at_once=2)
SLURM = ClusterOptions(partition="gpu", at_once=3)
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """The nodes find the functions of these tests."""
    before = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *([before] if before else [])]))


@pytest.fixture
def fake(tmp_path, monkeypatch):
    return slurm.install(tmp_path / "slurm", monkeypatch)


def wait_for(path, seconds=60):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def job(folder, name, call, after=None, seconds=1.0):
    return Job(name, call, folder / f"{name}.log", after, seconds)


def outcomes(folder, *jobs, options=LOCAL, **more):
    return {found.job.name: found for found in run_on_cluster(jobs, options, folder / "cluster", **more)}


def test_chains_keep_families_together_and_last_long_enough():
    jobs = [
        *(job(Path(), f"plain {number}", None, seconds=200.0) for number in range(9)),
        job(Path(), "start", None, seconds=900.0),
        *(job(Path(), f"cell {number}", None, after="start", seconds=200.0) for number in range(3)),
        job(Path(), "moved", None, after="start", seconds=1.0),
        job(Path(), "of moved", None, after="moved", seconds=10.0),
        job(Path(), "unknown", None, seconds=None),
    ]
    found = [[job.name for job in chain] for chain in chains(jobs, ClusterOptions(at_once=100))]
    family = ["start", "cell 0", "cell 1", "cell 2", "moved", "of moved"]
    assert found == [[f"plain {number}" for number in range(first, first + 3)] for first in (0, 3, 6)] + [
        family,
        ["unknown"],
    ]
    found = [[job.name for job in chain] for chain in chains(jobs, ClusterOptions(at_once=1))]
    assert found == [[job.name for job in jobs[:-1]], ["unknown"]]
    found = chains(jobs[:9], ClusterOptions(at_once=1, minutes=15))  # 70% of them
    assert [len(chain) for chain in found] == [3, 3, 3]
    found = chains(jobs[:9], ClusterOptions(at_once=100, gpus_per_node=2))
    assert [len(chain) for chain in found] == [6, 3]


def test_one_failure_does_not_stop_the_others(tmp_path):
    found = outcomes(
        tmp_path,
        job(tmp_path, "bad", partial(test_pool.fail, "no such thing")),
        job(tmp_path, "after bad", partial(test_pool.add, 1, 1), after="bad"),
        job(tmp_path, "killed", test_pool.die),
        job(tmp_path, "good", partial(test_pool.add, 1, 1), seconds=None),
        job(tmp_path, "after good", partial(test_pool.add, 2, 2), after="good"),
        job(tmp_path, "threads", partial(test_pool.environment, "OMP_NUM_THREADS"), seconds=None),
        options=LOCAL.model_copy(update={"cpus_per_task": 3}),
    )
    assert found["bad"].error == "no such thing"
    assert found["after bad"].error == "bad failed"
    assert "mem_gb" in found["killed"].error
    assert (found["good"].value, found["after good"].value, found["threads"].value) == (2, 4, "3")
    assert (tmp_path / "good.log").read_text() == "adding 1 1\n"
    assert not list((tmp_path / "cluster").rglob("*.pkl"))


def test_a_killed_submission_tells_what_to_read(tmp_path):
    jobs = [
        job(tmp_path, "first", partial(test_pool.add, 1, 1)),
        job(tmp_path, "killer", slurm.kill_submission),
        job(tmp_path, "last", partial(test_pool.add, 1, 1)),
    ]
    found = outcomes(tmp_path, *jobs)
    assert found["first"].value == 2
    for name in ("killer", "last"):
        reason, _, log = found[name].error.rpartition("See ")
        assert "its process was killed" in reason
        assert Path(log).is_file()
    found = outcomes(tmp_path, *jobs[2:])
    assert found["last"].value == 2


def test_what_the_node_does_not_see_is_told_once(tmp_path):
    jobs = [job(tmp_path, f"job {number}", partial(test_pool.add, 1, 1)) for number in range(2)]
    with pytest.raises(OutputError, match=r"does not see .*gone.pixels.*MEDTPP_CACHE"):
        outcomes(tmp_path, *jobs, reads=[tmp_path / "gone.pixels"])
    assert not (tmp_path / "job 0.log").exists()


def test_slurm_is_asked_for_what_the_file_says(tmp_path, fake):
    (tmp_path / "cluster.yaml").write_text(
        "partition: gpu\naccount: radiology\nqos: long\nconstraint: a100\nminutes: 90\ngpus_per_node: 2\n"
        "cpus_per_task: 6\nmem_gb: 24\nat_once: 2\nsetup:\n  - export MODULE_LOADED=cuda/12\n"
    )
    options = load_cluster(tmp_path / "cluster.yaml")
    names = ("MODULE_LOADED", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
    jobs = [job(tmp_path, name, partial(test_pool.environment, name), seconds=None) for name in names]
    found = outcomes(tmp_path, *jobs, options=options)
    assert found["MODULE_LOADED"].value == "cuda/12"
    assert found["OMP_NUM_THREADS"].value == "3"
    assert found["CUDA_VISIBLE_DEVICES"].value == "0"
    script = (fake / "101.sh").read_text()
    for option in (
        "partition=gpu", "account=radiology", "qos=long", "constraint=a100", "time=90", "gpus-per-node=2",
        "cpus-per-task=6", "mem=24GB", "array=0-2%2",
    ):  # fmt: skip
        assert f"#SBATCH --{option}\n" in script
    assert script.index("MODULE_LOADED") < script.index("srun") < script.index("--cpus-per-task=6 ")


def test_without_gpus_none_are_asked_for(tmp_path, fake):
    outcomes(tmp_path, job(tmp_path, "job", partial(test_pool.add, 1, 1)), options=ClusterOptions())
    script = (fake / "101.sh").read_text()
    assert "--gpus" not in script
    assert "--partition" not in script


def test_a_submission_that_slurm_ends_is_told(tmp_path, fake, monkeypatch):
    monkeypatch.setattr("medtpp.workflow.cluster._LATE", 0.1)
    (fake / "hold").touch()
    waiting = run_on_cluster(
        [job(tmp_path, "job", partial(test_pool.add, 1, 1))], SLURM, tmp_path / "cluster", reads=[]
    )
    ends = subprocess.Popen(
        f"until [ -e {fake}/101.state ]; do sleep 0.1; done; echo TIMEOUT > {fake}/101.state", shell=True
    )
    (outcome,) = waiting
    ends.wait()
    assert "TIMEOUT: give it more minutes" in outcome.error
    assert f"left no log in {tmp_path / 'cluster'}" in outcome.error


def test_what_is_left_early_is_cancelled(tmp_path, fake, monkeypatch):
    """And begun again by the next command, when it has surely ended."""
    monkeypatch.setattr("medtpp.workflow.cluster._LATE", 0.5)
    jobs = [
        job(tmp_path, "quick", partial(test_pool.add, 1, 1)),
        job(tmp_path, "slow", partial(test_pool.touch_slowly, tmp_path / "slow", 30)),
        job(tmp_path, "lonely", partial(test_pool.touch_slowly, tmp_path / "lonely", 30), seconds=None),
    ]
    found = run_on_cluster(jobs, SLURM, tmp_path / "cluster")
    assert next(found).job.name == "quick"
    wait_for(tmp_path / "lonely.begun")
    found.close()
    assert "scancel 101_0 101_1\n" in (fake / "calls").read_text()
    assert not [process for process in psutil.process_iter(["cmdline"]) if str(tmp_path / "cluster") in
                " ".join(process.info["cmdline"] or [])]  # fmt: skip
    found = outcomes(tmp_path, *jobs[:1], job(tmp_path, "slow", partial(test_pool.add, 2, 2)), options=SLURM)
    assert (found["quick"].value, found["slow"].value) == (2, 4)


def test_a_command_that_was_killed_is_followed(tmp_path, fake, monkeypatch):
    """Its submissions go on; the next command waits for them, and submits what they do not do."""
    first = [
        job(tmp_path, "quick", partial(test_pool.add, 1, 1)),
        job(tmp_path, "slow", partial(test_pool.touch_slowly, tmp_path / "slow", 2)),
    ]
    with monkeypatch.context() as killed:
        killed.setattr("medtpp.workflow.cluster._Cluster.cancel", lambda *_: None)  # a killed process cancels nothing
        command = run_on_cluster(first, SLURM, tmp_path / "cluster")
        next(command)
        command.close()
    jobs = [
        job(tmp_path, "slow", partial(test_pool.fail, "begun again")),
        job(tmp_path, "after slow", partial(test_pool.add, 1, 1), after="slow"),
        job(tmp_path, "other", partial(test_pool.add, 1, 1)),
    ]
    found = outcomes(tmp_path, *jobs, options=SLURM)
    assert found["slow"].error is None
    assert found["after slow"].value == found["other"].value == 2
    assert (fake / "calls").read_text().count("sbatch") == 3


def test_a_node_that_is_taken_away_is_made_up_for(tmp_path):
    """submitit begins a preempted submission again; what is done is not done twice."""
    jobs = [
        job(tmp_path, "first", partial(test_pool.add, 1, 1)),
        job(tmp_path, "second", partial(test_pool.touch_slowly, tmp_path / "second", 2.0), after="first"),
    ]
    found = []
    for outcome in run_on_cluster(jobs, LOCAL.model_copy(update={"minutes": 60}), tmp_path / "cluster"):
        found.append(outcome)
        if outcome.job.name == "first":
            wait_for(tmp_path / "second.begun")
            mine = [
                process for process in psutil.Process().children(recursive=True)
                if "submitit.core._submit" in " ".join(process.cmdline())
            ]  # fmt: skip
            (tmp_path / "second.begun").unlink()
            mine[0].send_signal(signal.SIGUSR2)
    assert [outcome.job.name for outcome in found] == ["first", "second"]
    assert not [outcome.error for outcome in found if outcome.error]
    assert (tmp_path / "first.log").read_text() == "adding 1 1\n"
    assert (tmp_path / "second.begun").exists()


def test_what_jobs_share_is_written_once(tmp_path):
    shared = list(range(10_000))
    jobs = [job(tmp_path, str(number), partial(test_pool.add, shared, [number])) for number in range(50)]
    light = store_calls(tmp_path / "jobs.pkl", jobs)
    assert (tmp_path / "jobs.pkl").stat().st_size < 2 * len(pickle.dumps(shared))
    assert len(pickle.dumps(light)) < 20_000
    assert light[7].call()[-1] == 7
    assert light[7].call()[:-1] == shared


def test_mistakes_of_the_file_are_told_together(tmp_path, monkeypatch):
    path = tmp_path / "cluster.yaml"
    path.write_text("partitoin: gpu\nminutes: 0\ngpus_per_node: many\nexecutor: pbs\n")
    text = refused("compare", data_folder(), "--dry-run", "--cluster", path)
    for part in (
        "line 1",
        "did you mean partition",
        "line 2, minutes",
        "line 3, gpus_per_node",
        "slurm",
        str(path.name),
    ):
        assert part in text
    path.write_text("[1]")
    assert "partition:" in refused("compare", data_folder(), "--dry-run", "--cluster", path)
    assert "no cluster file" in refused("compare", data_folder(), "--dry-run", "--cluster", tmp_path / "no.yaml")
    path.write_text("partition: gpu\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "executor: local" in refused("compare", data_folder(), "--dry-run", "--cluster", path)
    path.write_text("executor: local\n")
    with pytest.raises(ConfigError, match="at_once"):
        share_machine(load_experiment(Path("data")), 4, jobs=2, cluster=load_cluster(path))


def test_submitit_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    (tmp_path / "cluster.yaml").write_text("executor: local\n")
    with pytest.raises(ConfigError, match=r"pip install 'medtpp\[cluster\]'"):
        load_cluster(tmp_path / "cluster.yaml")


def test_what_slurm_says_is_passed_on(tmp_path, fake):
    (fake / "sacct").write_text("#!/bin/bash\necho 'accounting storage is disabled' >&2\nexit 1\n")
    (tmp_path / "cluster.yaml").write_text("partition: gpu\n")
    with pytest.raises(ConfigError, match="storage is disabled"):
        load_cluster(tmp_path / "cluster.yaml")
    (fake / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1\n")
    with pytest.raises(ConfigError, match="invalid partition"):
        outcomes(tmp_path, job(tmp_path, "job", partial(test_pool.add, 1, 1)), options=SLURM)


def test_all_nodes_compute_alike():
    experiment = load_experiment(Path("data"))
    gpu = ClusterOptions(gpus_per_node=1)
    with pytest.raises(ConfigError, match=r"hardware\.precision=bf16"):
        gpu.placed(experiment)
    hardware = gpu.placed(load_experiment(Path("data"), ["hardware.precision=bf16"])).hardware
    assert (hardware.accelerator, hardware.precision) == ("cuda", "bf16")
    assert LOCAL.placed(experiment).hardware.accelerator == "cpu"
    with pytest.raises(ConfigError, match=r"hardware\.accelerator is cuda"):
        LOCAL.placed(load_experiment(Path("data"), ["hardware.accelerator=cuda"]))


def test_the_page_has_every_field():
    lines = (HERE.parent / "docs" / "cluster.md").read_text().splitlines()
    table = " ".join(line.split(" | ")[0] for line in lines if line.startswith("| `"))
    assert [name for name in ClusterOptions.model_fields if f"`{name}`" not in table] == []


def test_outcomes_that_are_not_there_are_not_told(tmp_path):
    (tmp_path / "outcomes").mkdir()
    assert read_outcomes(tmp_path, [job(tmp_path, "job", None)]) == []
