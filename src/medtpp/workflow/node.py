"""Jobs on a machine of a cluster: a chain of them is one submission. What it imports every submission waits for."""

from __future__ import annotations

import functools
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from medtpp.files import atomic, digest
from medtpp.workflow.pool import Job, Outcome, run_jobs


@dataclass(frozen=True)
class Place:
    """Where chains work, and how.

    Attributes:
        folder: Absolute; holds what goes between this machine and the nodes.
        current: The current folder of the command, which relative paths of jobs belong to.
        reads: Files and folders that the jobs need beside.
        processes, threads, gpus: Of one submission, as `run_jobs` takes them.
        driver: Process that the chain ends with, or None.
    """

    folder: Path
    current: Path
    reads: tuple[Path, ...]
    processes: int
    threads: int
    gpus: int
    driver: int | None = None


@dataclass(frozen=True)
class Chain:
    """Jobs that one submission does, with those that they need before them.

    A submission that is begun again, after the node was taken away or its time was over, goes on with what is left.

    Attributes:
        jobs: In the order of preference; each `after` is among them or in `ended`.
        place: Where.
        ended: Jobs that ended before, and why they did not end well, if so.
    """

    jobs: tuple[Job, ...]
    place: Place
    ended: Mapping[str, str | None]

    def __call__(self) -> str | None:
        """Do the jobs; their outcomes are written as they end. Gives what the node lacks, or None."""
        place = self.place
        for path in (place.current, *place.reads):
            if not path.exists():
                return f"The node {socket.gethostname()} does not see {path}"
        os.chdir(place.current)
        if place.driver is not None:
            threading.Thread(target=_end_with, args=(place.driver,), daemon=True).start()
        before = read_outcomes(place.folder, self.jobs)
        ended = {**self.ended, **{outcome.job.name: outcome.error for outcome in before}}
        left = [job for job in self.jobs if job.name not in ended]
        # No copies: what SLURM signals to all processes would end the one that is copied.
        found = run_jobs(
            left, processes=place.processes, threads=place.threads, gpus=place.gpus, copies=False, ended=ended
        )
        for outcome in found:
            with atomic(outcome_file(place.folder, outcome.job)) as temporary:
                temporary.write_bytes(pickle.dumps((outcome.value, outcome.error, outcome.seconds)))
        return None

    def checkpoint(self) -> Any:
        """What to submit in the place of this when the node is taken away: the same, for it knows what is done."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def outcome_file(folder: Path, job: Job) -> Path:
    """Where a chain tells how a job ended."""
    return folder / "outcomes" / f"{digest(job.name)[:24]}.pkl"


def read_outcomes(folder: Path, jobs: Iterable[Job]) -> list[Outcome]:
    """Those that are there."""
    folder = folder / "outcomes"
    with suppress(OSError):  # of somebody else
        folder.chmod(folder.stat().st_mode)  # a network file system then asks anew what is there
    there = {path.name for path in folder.iterdir()}
    found = [(job, path) for job in jobs if (path := outcome_file(folder.parent, job)).name in there]
    return [Outcome(job, *pickle.loads(path.read_bytes())) for job, path in found]


def store_calls(path: Path, jobs: Sequence[Job]) -> list[Job]:
    """Write what the jobs carry to one file, and give the jobs without it.

    Cells of a comparison share their data, hundreds of bytes for each image: together they are written once.
    """
    with atomic(path) as temporary:
        temporary.write_bytes(pickle.dumps([job.call for job in jobs]))
    return [
        Job(job.name, functools.partial(_call, path, number), job.log.absolute(), job.after)
        for number, job in enumerate(jobs)
    ]


def _call(path: Path, number: int) -> Any:
    return _calls(path)[number]()


@functools.cache
def _calls(path: Path) -> list[Callable[[], Any]]:
    calls: list[Callable[[], Any]] = pickle.loads(path.read_bytes())
    return calls


def _end_with(process: int) -> None:
    while psutil.pid_exists(process):
        time.sleep(0.5)
    os._exit(1)  # the workers end with this process
