"""How fast medtpp trains and starts, against its own supervised step and against transformers' Trainer.

A  a TPP step against the supervised step of the same tuner
B  MAE on LoRA's parameters against transformers, peft and Trainer: computing alone, memory, from JPEG files
C  share of the time spent waiting for data, from the second epoch on
D  start-up

All ratios are medians over repetitions in which the two sides take turns.
B needs `pip install transformers accelerate`.

python benchmarks/throughput.py --out results/throughput_MACHINE.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from _common import (
    PACKAGES,
    SKIPPED,
    Clock,
    Sizes,
    interleaved,
    make_radiographs,
    peak_growth,
    quick,
    ratios,
    steady_rate,
    summary,
)
from _sides import Medtpp, Transformers, check_work
from medtpp.data.batches import BatchStream
from medtpp.training.device import choose_accelerator, choose_precision, describe_machine

PARTS = "ABCD"
WORKERS = min(os.cpu_count() or 1, 8)  # of the other side's DataLoader


@dataclass
class Figure:
    """One line of the table.

    Attributes:
        part: "A" to "D".
        name: What was measured, with its unit.
        medtpp, other: Medians of both sides.
        ratio: Median of the ratios within repetitions, medtpp to other.
        goal: Such as ">= 1.3", for the ratio where there is one.
        samples: All values.
    """

    part: str
    name: str
    medtpp: float
    other: float | None
    ratio: float | None
    goal: str
    samples: dict[str, list[float]]

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None without one."""
        if not self.goal:
            return None
        sign, bound = self.goal.split()
        value = self.medtpp if self.ratio is None else self.ratio
        return value >= float(bound) if sign == ">=" else value <= float(bound)


def compare(part: str, name: str, samples: dict[str, list[float]], goal: str) -> Figure:
    """A figure of two arms, medtpp's first."""
    ours, theirs = samples
    ratio = summary(ratios(samples, ours, theirs))
    return Figure(part, name, summary(samples[ours]), summary(samples[theirs]), ratio, goal, samples)


def steps_compared(sizes: Sizes, steps: int, repeats: int) -> list[Figure]:
    """A: both stages' own modules, augmentation included."""
    tpp, supervised = Medtpp(sizes, augment=True), Medtpp(sizes, supervised=True, augment=True)
    arms = {
        "tpp": lambda: steady_rate(tpp.train, sizes, steps),
        "supervised": lambda: steady_rate(supervised.train, sizes, steps),
    }
    return [compare("A", "TPP / supervised step, images/s", interleaved(arms, repeats), ">= 2.8")]


def computing(sizes: Sizes, steps: int, repeats: int) -> list[Figure]:
    """B: from one fixed batch in memory."""
    ours, theirs = Medtpp(sizes), Transformers(sizes)
    arms = {
        "medtpp": lambda: steady_rate(ours.train, sizes, steps),
        "transformers": lambda: steady_rate(theirs.train, sizes, steps),
    }
    return [compare("B", "computing alone, images/s", interleaved(arms, repeats), ">= 1.0")]


def memory(sizes: Sizes, repeats: int) -> list[Figure]:
    """B: each measurement in a process of its own."""
    arms = {side.__name__.lower(): lambda side=side: _in_new_process(side, sizes) for side in (Medtpp, Transformers)}
    return [compare("B", "peak memory of training, MiB", interleaved(arms, repeats), "<= 1.0")]


def _in_new_process(side: type[Medtpp | Transformers], sizes: Sizes) -> float:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_memory, side, sizes, torch.get_num_threads()).result()


def _peak_memory(side: type[Medtpp | Transformers], sizes: Sizes, threads: int) -> float:
    torch.set_num_threads(threads)
    trained = side(sizes)
    return peak_growth(lambda: trained.train(SKIPPED + 2, Clock([], sizes.device)), sizes.device)


def from_files(sizes: Sizes, epochs: int, repeats: int, parts: str) -> list[Figure]:
    """B and C: epochs over JPEG files; medtpp's first epoch holds the making of its cache."""
    each = sizes.files // sizes.batch
    ends = [each * (epoch + 1) for epoch in range(epochs)]
    took: dict[str, list[list[float]]] = {"medtpp": [], "transformers": []}
    waiting = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = make_radiographs(folder, sizes.files, sizes.file_size)
        ours = Medtpp(sizes, augment=True)

        def run_medtpp() -> None:
            cache = folder / f"cache{len(took['medtpp'])}"
            clock, began = Clock(ends, sizes.device), time.perf_counter()
            stream = ours.from_files(files, cache)
            waited = Waited(stream, clock)
            ours.train(ends[-1], waited, stream)
            took["medtpp"].append([end - began for end in clock.times])
            waiting.append((waited.seconds[-1] - waited.seconds[0]) / (clock.times[-1] - clock.times[0]))
            shutil.rmtree(cache)

        def run_transformers() -> None:
            clock, began = Clock(ends, sizes.device), time.perf_counter()
            theirs.train(ends[-1], clock, theirs.from_files(files), WORKERS)
            took["transformers"].append([end - began for end in clock.times])

        runs = [run_medtpp]
        if "B" in parts:
            theirs = Transformers(sizes)
            runs.append(run_transformers)
        for repeat in range(repeats):
            for run in runs[:: -1 if repeat % 2 else 1]:
                run()
    figures = []
    if "B" in parts:
        rates: dict[str, tuple[str, Callable[[list[float]], float]]] = {
            "first epoch": ("", lambda t: sizes.files / t[0]),
            "later epochs": ("", lambda t: sizes.files * (epochs - 1) / (t[-1] - t[0])),
            f"{epochs} epochs": (">= 1.3", lambda t: sizes.files * epochs / t[-1]),
        }
        for what, (goal, rate) in rates.items():
            samples = {side: [rate(times) for times in runs] for side, runs in took.items()}
            figures.append(compare("B", f"from JPEG files, {what}, images/s", samples, goal))
    if "C" in parts:
        samples = {"medtpp": waiting}
        figures.append(Figure("C", "waiting for data, later epochs", summary(waiting), None, None, "<= 0.05", samples))
    return figures


class Waited(Clock):
    """A clock that notes beside the time what the stream has waited."""

    def __init__(self, stream: BatchStream, clock: Clock) -> None:
        self.stream = stream
        self.clock = clock
        self.seconds: list[float] = []

    def step(self, done: int) -> None:
        """Call after each step."""
        self.clock.step(done)
        if done in self.clock.at:
            self.seconds.append(self.stream.waited)


def starting(repeats: int) -> list[Figure]:
    """D: whole processes, the interpreter's own start included."""
    commands = {
        "`medtpp --help`, s": ([str(Path(sys.executable).with_name("medtpp")), "--help"], "<= 0.7"),
        "`import medtpp`, s": ([sys.executable, "-c", "import medtpp"], "<= 0.3"),
    }
    figures = []
    for name, (command, goal) in commands.items():
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - began)
        figures.append(Figure("D", name, summary(seconds), None, None, goal, {"medtpp": seconds}))
    return figures


def table(figures: list[Figure]) -> str:
    """80 columns."""
    lines = [f"{'':3}{'':38}{'medtpp':>8}{'other':>9}{'ratio':>7}{'goal':>8}{'met':>5}"]
    for f in figures:
        other = "" if f.other is None else f"{f.other:.4g}"
        ratio = "" if f.ratio is None else f"{f.ratio:.2f}"
        met = {True: "yes", False: "no", None: ""}[f.met]
        lines.append(f"{f.part:3}{f.name:38}{f.medtpp:>8.4g}{other:>9}{ratio:>7}{f.goal:>8}{met:>5}")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script; the numbers mean nothing")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--precision", choices=["auto", "32", "bf16", "16"], default="auto")
    parser.add_argument("--threads", type=int, help="CPU threads of both sides; torch's own choice by default")
    parser.add_argument("--steps", type=int, default=10, help="timed steps in a repetition of A and B")
    parser.add_argument("--repeats", type=int, default=5, help="repetitions; from files and for memory at most 3")
    parser.add_argument("--epochs", type=int, default=3, help="over the JPEG files")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, such as A,D")
    parser.add_argument("--out", type=Path, help="write all numbers as JSON")
    args = parser.parse_args()
    parts = args.only.upper().replace(",", "")
    if not parts or set(parts) - set(PARTS):
        parser.error(f"--only takes some of {', '.join(PARTS)}; {args.only!r} was given")
    if "B" in parts and not importlib.util.find_spec("transformers"):
        parser.error("part B compares with transformers: pip install transformers accelerate, or leave B out by --only")
    if args.epochs < 2:
        parser.error("--epochs must be at least 2: the first epoch is told apart")

    if args.threads:
        torch.set_num_threads(args.threads)
    device = choose_accelerator(args.device)
    precision, reason = choose_precision(args.precision, device)
    sizes = (quick if args.quick else Sizes)(device, precision)
    computer = describe_machine(device, PACKAGES)
    print(f"{computer['processor']}, {device}, {computer['threads']} threads, precision {precision}: {reason}")
    print(f"load average {computer['load_average'][0]} before the start")
    work = check_work(sizes) if "B" in parts else None
    if work:
        print(f"\n{'work of one step':41}{'medtpp':>14}{'transformers':>14}")
        for name, count in work["medtpp"].items():
            print(f"{name:41}{count:>14,}{work['transformers'][name]:>14,}")

    few = min(args.repeats, 3)
    figures: list[Figure] = []
    if "A" in parts:
        figures += steps_compared(sizes, args.steps, args.repeats)
    if "B" in parts:
        figures += computing(sizes, args.steps, args.repeats)
        figures += memory(sizes, few)
    if set("BC") & set(parts):
        figures += from_files(sizes, args.epochs, few, parts)
    if "D" in parts:
        figures += starting(5)
    print(f"\n{table(figures)}")
    if args.out:
        settings = {"quick": args.quick, "steps": args.steps, "repeats": args.repeats, "epochs": args.epochs}
        report = {
            "machine": computer,
            "settings": {**settings, **asdict(sizes)},
            "work": work,
            "figures": [{**asdict(figure), "met": figure.met} for figure in figures],
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
