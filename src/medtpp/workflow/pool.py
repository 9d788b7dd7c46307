"""Jobs on several processes. One that fails or is killed does not stop the others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medtpp.config import BACKBONES, PRETEXTS, TASKS, TUNERS
from medtpp.errors import MedtppError

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext


def process_context(*, copies: bool) -> SpawnContext | ForkServerContext:
    """How processes start: anew, importing everything, or on Linux as copies of one that has imported it all.

    A copy takes no time. Where there are GPUs there are no copies: their drivers do not survive it.
    """
    if not copies or sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    methods = (entry for registry in (BACKBONES, TUNERS, PRETEXTS, TASKS) for entry in registry.values())
    names = ("medtpp.workflow.bench", "medtpp.workflow.compare.work", "peft", *(one.__module__ for one in methods))
    context.set_forkserver_preload(list(dict.fromkeys(names)))
    return context


@dataclass(frozen=True)
class Job:
    """Work for one process.

    Attributes:
        name: Unlike any other's.
        call: The work; it and what it gives are pickled.
        log: File that gets what the work prints.
        after: Name of a job that has to end well first.
        seconds: What it will take, where that is known.
    """

    name: str
    call: Callable[[], Any]
    log: Path
    after: str | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        job: Which.
        value: What it gave, if it ended well.
        error: Why it did not, or None.
        seconds: How long it took.
    """

    job: Job
    value: Any = None
    error: str | None = None
    seconds: float = 0.0


def run_jobs(
    jobs: Sequence[Job],
    *,
    processes: int,
    threads: int,
    gpus: int = 0,
    copies: bool = True,
    ended: Mapping[str, str | None] | None = None,
) -> Iterator[Outcome]:
    """Do all jobs, the first ones first; gives each as it ends.

    Processes live for many jobs. They end with this one, whatever ends it.

    Args:
        jobs: In the order of preference.
        processes: How many at once.
        threads: CPU threads of each.
        gpus: Where there are GPUs, each process sees one of them.
        copies: Processes may be copies of one that has imported everything, and lives as long as this one.
        ended: Jobs that ended before, and why they did not end well, if so.
    """
    waiting = list(jobs)
    ended = dict(ended or {})
    workers = [_Worker(number, threads, gpus, copies and not gpus) for number in range(min(processes, len(waiting)))]
    try:
        while waiting or any(worker.job for worker in workers):
            for outcome in _blocked(waiting, ended):
                ended[outcome.job.name] = outcome.error
                yield outcome
            for worker in workers:
                job = next((job for job in waiting if _ready(job, ended)), None) if worker.job is None else None
                if job is not None:
                    waiting.remove(job)
                    worker.begin(job)
            for outcome in _finished(workers):
                ended[outcome.job.name] = outcome.error
                yield outcome
    finally:
        for worker in workers:
            worker.stop()


def _ready(job: Job, ended: dict[str, str | None]) -> bool:
    return job.after is None or (job.after in ended and ended[job.after] is None)


def _blocked(waiting: list[Job], ended: dict[str, str | None]) -> list[Outcome]:
    """Jobs that can never begin, taken off the list."""
    hopeless = [job for job in waiting if job.after is not None and ended.get(job.after) is not None]
    for job in hopeless:
        waiting.remove(job)
    return [Outcome(job, error=f"{job.after} failed") for job in hopeless]


def _finished(workers: list[_Worker]) -> list[Outcome]:
    busy = [worker for worker in workers if worker.job]
    if not busy:
        return []
    signs: dict[Any, _Worker] = {}
    for worker in busy:
        signs |= {worker.connection: worker, worker.process.sentinel: worker}
    ready = {id(signs[sign]): signs[sign] for sign in wait(list(signs))}
    return [worker.collect() for worker in ready.values()]


@dataclass
class _Worker:
    number: int
    threads: int
    gpus: int
    copies: bool
    job: Job | None = None
    began: float = 0.0
    process: BaseProcess = field(init=False)
    connection: Connection = field(init=False)

    def __post_init__(self) -> None:
        self._start()

    def _start(self) -> None:
        values = {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads)}
        if self.gpus:
            values["CUDA_VISIBLE_DEVICES"] = _visible_gpu(self.number % self.gpus)
        context = process_context(copies=self.copies)
        self.connection, theirs = context.Pipe()
        arguments = (theirs, {**os.environ, **values})
        self.process = context.Process(target=_serve, args=arguments, name=f"medtpp-{self.number}", daemon=False)
        with _environment(values):  # libraries of a new process read it when they are imported
            self.process.start()
        theirs.close()

    def _restart(self) -> None:
        self.connection.close()
        self.process.join()
        self._start()

    def begin(self, job: Job) -> None:
        self.job, self.began = job, time.perf_counter()
        try:
            self.connection.send(job)
        except OSError:  # it died while it had nothing to do
            self._restart()
            self.connection.send(job)

    def collect(self) -> Outcome:
        assert self.job is not None
        job, self.job = self.job, None
        seconds = time.perf_counter() - self.began
        try:
            value, error = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            error = _how_it_died(self.process.exitcode)
            self._restart()
            return Outcome(job, error=error, seconds=seconds)
        return Outcome(job, value, error, seconds)

    def stop(self) -> None:
        self.connection.close()
        if self.job is not None:
            self.process.kill()
        self.process.join()


def _visible_gpu(number: int) -> str:
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return allowed.split(",")[number].strip() if allowed else str(number)


def _how_it_died(code: int | None) -> str:
    if code == -9:  # SIGKILL, a name that Windows lacks
        return (
            "the process was killed, as systems do that run out of memory. Fewer at once need less (--jobs 1); on a "
            "cluster, ask for more (mem_gb)"
        )
    return f"the process ended with status {code}"


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(connection: Connection, environment: dict[str, str]) -> None:
    """A worker's life: jobs, one by one, until the other end closes."""
    # A copy has the environment of the process that was copied.
    os.environ.clear()
    os.environ.update(environment)
    # Ctrl+C, and what a cluster sends before it takes a machine away, are for the parent, which ends its workers.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        if number := getattr(signal, name, None):
            signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    while True:
        try:
            job: Job = connection.recv()
        except (EOFError, ConnectionError):
            return
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        value, error = None, None
        try:
            value = job.call()
        except MedtppError as mistake:
            error = str(mistake)
        except Exception as mistake:  # noqa: BLE001  (whatever it is, the other jobs go on)
            traceback.print_exc()
            error = f"{type(mistake).__name__}: {mistake}"
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send((value, error))


def end_with_parent() -> None:
    """Let this process end when the one that began it does, whatever ends that one."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
