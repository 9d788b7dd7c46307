"""Jobs on a cluster, by submitit: chains of jobs are submitted, followed and collected."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from medtpp.config import Count, Experiment, Options
from medtpp.errors import ConfigError, OutputError
from medtpp.files import read_json, write_json
from medtpp.workflow.experiment import read_yaml, validate
from medtpp.workflow.node import Chain, Place, outcome_file, read_outcomes, store_calls
from medtpp.workflow.pool import Job, Outcome

_SHORTEST = 600.0  # seconds of work that are worth a submission: waiting in the queue and imports take minutes
_FULL = 0.7  # of a submission's time is given out; estimates err
_LATE = 60.0  # seconds after the end in which files of a node may come, and what was cancelled may still write
_PAUSE = 5.0  # seconds between looks at files that came: hundreds of submissions load a file server
_ARRAY = 1000  # submissions in an array; SLURM itself allows 1001
_SUBMITTED = "submitted.json"
_ADVICE = {"TIMEOUT": "give it more minutes", "OUT_OF_MEMORY": "give it more mem_gb"}


class ClusterOptions(Options):
    """What to ask a cluster for. What SLURM alone knows says nothing to `local`."""

    executor: Literal["slurm", "local"] = Field(
        "slurm", description="local: the same on this machine's CPU, to try a file out"
    )
    partition: str | None = Field(None, description="SLURM's partition; its default if not given, as for the next")
    account: str | None = Field(None, description="who pays")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="features of the nodes, such as a100: all cells on the same kind")
    minutes: Count = Field(240, description="time limit of a submission")
    gpus_per_node: int = Field(0, ge=0, description="GPUs of a submission, a process for each; 0: the CPU")
    cpus_per_task: Count = Field(1, description="cores of a submission")
    mem_gb: float | None = Field(None, gt=0, description="memory of a submission")
    at_once: Count = Field(8, description="most submissions at work at once")
    setup: list[str] = Field([], description="shell commands on the node before the work, such as module load cuda")

    @property
    def gpus(self) -> int:
        """GPUs of a submission."""
        return 0 if self.executor == "local" else self.gpus_per_node

    @property
    def processes(self) -> int:
        """Processes of a submission."""
        return max(1, self.gpus)

    @property
    def threads(self) -> int:
        """CPU threads of each."""
        return max(1, self.cpus_per_task // self.processes)

    def placed(self, experiment: Experiment) -> Experiment:
        """The experiment for the nodes, whatever the machine that submits is.

        Raises:
            ConfigError: It asks for another accelerator than the cluster gives, or leaves to each node what has to be
                the same everywhere.
        """
        accelerator: Literal["cuda", "cpu"] = "cuda" if self.gpus else "cpu"
        wanted = experiment.hardware
        if wanted.accelerator not in ("auto", accelerator):
            raise ConfigError(
                f"hardware.accelerator is {wanted.accelerator}, and submissions of the cluster file compute on "
                f"{accelerator}: gpus_per_node is {self.gpus_per_node}, executor is {self.executor}."
            )
        if wanted.precision == "auto" and self.executor == "slurm":
            raise ConfigError(
                "Nodes of a cluster may differ, and all cells need the same precision. Say which: "
                "--set hardware.precision=bf16 for GPUs since Ampere (A100), 16 for older ones, 32 for the CPU."
            )
        return experiment.model_copy(update={"hardware": wanted.model_copy(update={"accelerator": accelerator})})


def load_cluster(path: Path) -> ClusterOptions:
    """The options in a YAML file.

    Raises:
        ConfigError: All mistakes of the file, with line numbers; or there is no submitit here, or no SLURM.
    """
    options = validate(ClusterOptions, read_yaml(path, "cluster", "partition"), str(path))
    try:
        import submitit  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError("--cluster needs the package submitit: pip install 'medtpp[cluster]'.") from error
    if options.executor == "slurm":
        _require_slurm()
    return options


def _require_slurm() -> None:
    lacking = [name for name in ("sbatch", "srun", "sacct", "scancel") if shutil.which(name) is None]
    if lacking:
        raise ConfigError(
            f"There is no SLURM here ({', '.join(lacking)} not found). Start the command on a node that submits jobs, "
            "or try the file out with executor: local."
        )
    told = subprocess.run(["sacct", "--noheader", "--starttime", "now"], capture_output=True, text=True, check=False)
    if told.returncode:
        raise ConfigError(
            f"SLURM's accounting, which tells how jobs ended, does not answer: sacct says {told.stderr.strip()!r}."
        )


def run_on_cluster(
    jobs: Sequence[Job], options: ClusterOptions, folder: Path, *, reads: Sequence[Path] = ()
) -> Iterator[Outcome]:
    """Do all jobs on a cluster; gives each as it ends.

    Submissions are cancelled when this is left early, as by Ctrl+C. Where the process is killed they go on, and the
    next call with the same folder follows them.

    Args:
        jobs: In the order of preference.
        options: Of the cluster.
        folder: For what goes to the nodes and comes back; they have to see it.
        reads: Files and folders that the jobs need beside.

    Raises:
        ConfigError: The cluster refuses the submission.
        OutputError: A node does not see what the jobs need.
    """
    folder = folder.absolute()
    (folder / "outcomes").mkdir(parents=True, exist_ok=True)
    cluster = _Cluster(options, folder, tuple(path.absolute() for path in reads))
    running = cluster.still_running(jobs)
    waiting = _without(jobs, [job for submission in running for job in submission.left])
    for job in waiting:
        outcome_file(folder, job).unlink(missing_ok=True)
    families, ended = _families(jobs), dict[str, str | None]()
    light = {job.name: job for job in store_calls(folder / f"{uuid.uuid4().hex}.jobs.pkl", jobs)}
    queue: deque[list[Job]] = deque()
    try:
        while waiting or queue or running:
            followed = {families[job.name] for submission in running if submission.found for job in submission.left}
            ready = [job for job in waiting if families[job.name] not in followed]
            waiting = _without(waiting, ready)
            queue.extend(chains(ready, options))
            room = _ARRAY if options.executor == "slurm" else options.at_once - len(running)
            running += cluster.submit([queue.popleft() for _ in range(min(room, len(queue)))], light, ended)
            for outcome in read_outcomes(folder, [job for submission in running for job in submission.left]):
                ended[outcome.job.name] = outcome.error
                yield outcome
            for submission in running:
                submission.left = [job for job in submission.left if job.name not in ended]
            for submission in [found for found in running if cluster.is_over(found)]:
                running.remove(submission)
                if submission.found:
                    waiting += submission.left
                elif submission.left:
                    reason = cluster.reason(submission)
                    for job in submission.left:
                        ended[job.name] = reason
                        yield Outcome(job, error=reason)
            if running:
                time.sleep(cluster.pause)
    finally:
        cluster.cancel(running)
    for path in (*folder.rglob("*.pkl"), *folder.glob(".submission_file_*"), folder / _SUBMITTED):
        path.unlink(missing_ok=True)


def chains(jobs: Sequence[Job], options: ClusterOptions) -> list[list[Job]]:
    """Jobs in a row for each submission: those that need one another together, with work for all submissions at once.

    A chain takes at least ten minutes, as estimated, and less than a submission may. Jobs that nobody could estimate
    are submitted alone, with those that they need.
    """
    families = _families(jobs)
    members: dict[str, list[Job]] = {}
    for job in jobs:
        members.setdefault(families[job.name], []).append(job)
    whole = sum(job.seconds or 0.0 for job in jobs)
    limit = _FULL * 60 * options.minutes * options.processes
    target = min(max(whole / options.at_once, _SHORTEST * options.processes), limit)
    found: list[list[Job]] = []
    room = 0.0
    for family in members.values():
        seconds = [job.seconds for job in family]
        known = sum(value for value in seconds if value is not None) if None not in seconds else target
        if known > room or not found:
            found.append([])
            room = target
        found[-1] += family
        room -= known
    return found


def _families(jobs: Sequence[Job]) -> dict[str, str]:
    """By the name of a job, that of the one that all of its family need first."""
    after = {job.name: job.after for job in jobs}

    def first(name: str) -> str:
        before = after.get(name)
        return name if before is None else first(before)

    return {name: first(name) for name in after}


def _without(jobs: Sequence[Job], others: Sequence[Job]) -> list[Job]:
    names = {job.name for job in others}
    return [job for job in jobs if job.name not in names]


@dataclass
class _Submission:
    """A chain on the cluster.

    Attributes:
        job: submitit's.
        left: What nobody told the outcome of yet.
        found: An earlier command made it.
        over: When it was first seen to have ended.
    """

    job: Any
    left: list[Job]
    found: bool = False
    over: float | None = None


class _Cluster:
    """submitit's executor, and what was submitted."""

    def __init__(self, options: ClusterOptions, folder: Path, reads: tuple[Path, ...]) -> None:
        import submitit

        self.options, self.folder, self.slurm = options, folder, options.executor == "slurm"
        self.pause, self.late = (_PAUSE, _LATE) if self.slurm else (0.1, 0.0)
        driver = None if self.slurm else os.getpid()
        self.place = Place(folder, Path.cwd(), reads, options.processes, options.threads, options.gpus, driver)
        self.executor = submitit.AutoExecutor(folder=folder, cluster=options.executor)
        self.executor.update_parameters(
            name="medtpp",
            timeout_min=options.minutes,
            cpus_per_task=options.cpus_per_task,
            gpus_per_node=options.gpus or None,
            mem_gb=options.mem_gb,
            slurm_partition=options.partition,
            slurm_account=options.account,
            slurm_qos=options.qos,
            slurm_constraint=options.constraint,
            slurm_array_parallelism=options.at_once,
            slurm_setup=options.setup or None,
            # Since SLURM 22.05 the step does not take it over from the submission.
            slurm_srun_args=[f"--cpus-per-task={options.cpus_per_task}"],
        )

    def still_running(self, jobs: Sequence[Job]) -> list[_Submission]:
        """Submissions of an earlier command that did not tell their end, and may be at some of these jobs.

        What was cancelled is among them: SLURM leaves it half a minute to end, and it may write until then.
        """
        from submitit import SlurmJob

        if not self.slurm or not (self.folder / _SUBMITTED).is_file():  # local ones end with their command
            return []
        by_name, record = {job.name: job for job in jobs}, read_json(self.folder / _SUBMITTED)
        made: dict[str, Any] = {number: SlurmJob(self.folder, number) for number in record}
        silent = {number: names for number, names in record.items() if not made[number].paths.result_pickle.exists()}
        write_json(self.folder / _SUBMITTED, silent)
        left = {number: [by_name[name] for name in names if name in by_name] for number, names in silent.items()}
        return [_Submission(made[number], jobs, found=True) for number, jobs in left.items() if jobs]

    def submit(
        self, found: Sequence[list[Job]], light: Mapping[str, Job], ended: Mapping[str, str | None]
    ) -> list[_Submission]:
        """Submit some chains, several as an array."""
        from submitit.core.utils import FailedJobError, FailedSubmissionError
        from submitit.helpers import clean_env

        if not found:
            return []
        before = [
            {name: ended[name] for job in jobs if (name := job.after) is not None and name in ended} for jobs in found
        ]
        calls = [
            Chain(tuple(light[job.name] for job in jobs), self.place, known)
            for jobs, known in zip(found, before, strict=True)
        ]
        try:
            with clean_env():  # the command may be a job of the cluster itself
                submitted = self.executor.submit_array(calls)
        except (FailedJobError, FailedSubmissionError) as error:
            raise ConfigError(f"The cluster refuses the submission: {str(error).strip()}") from error
        made = [_Submission(job, jobs) for job, jobs in zip(submitted, found, strict=True)]
        record = self.folder / _SUBMITTED
        known = read_json(record) if record.is_file() else {}
        known |= {submission.job.job_id: [job.name for job in submission.left] for submission in made}
        write_json(record, known)
        return made

    def is_over(self, submission: _Submission) -> bool:
        """Whether it has ended, and what it wrote has had the time to come here.

        Raises:
            OutputError: The node did not see what the jobs need.
        """
        if not submission.job.done():
            return False
        lacking = _result(submission.job)
        if lacking is not None and lacking[0] == "success" and lacking[1]:
            raise OutputError(
                f"{lacking[1]}, which its jobs need. The output folder, the image cache and the current folder have to "
                "lie on a file system that all nodes share; the environment variable MEDTPP_CACHE says where the cache "
                "lies."
            )
        submission.over = submission.over or time.monotonic()
        return not submission.left or time.monotonic() - submission.over >= self.late

    def reason(self, submission: _Submission) -> str:
        """Why it ended before its jobs were done, and what to read."""
        job, result = submission.job, _result(submission.job)
        state = str(job.state).split()[0]
        if result is not None:
            told = [str(result[1]).strip().splitlines()[-1].split(": ", 1)[-1]]
        else:
            told = [state if self.slurm else "its process was killed"]
        told += [_ADVICE[state]] if state in _ADVICE else []
        text = f"the submission {job.job_id} ended before this was done ({': '.join(told)})"
        if not job.paths.stderr.exists():
            return f"{text} and left no log in {self.folder}. Do the nodes see that folder?"
        return f"{text}. See {job.paths.stderr}"

    def cancel(self, running: Sequence[_Submission]) -> None:
        """Cancel what is at work or waits."""
        if self.slurm and running:
            subprocess.run(["scancel", *(submission.job.job_id for submission in running)], check=False)
        elif running:
            for submission in running:
                submission.job.cancel()
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline and not all(submission.job.done() for submission in running):
                time.sleep(0.1)


def _result(job: Any) -> tuple[str, Any] | None:
    """("success", what a chain gave) or ("error", traceback), if it could tell."""
    from submitit.core.utils import pickle_load

    result: tuple[str, Any] | None = pickle_load(job.paths.result_pickle) if job.paths.result_pickle.exists() else None
    return result
