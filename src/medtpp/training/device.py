"""Where and how precisely to compute: devices, precision, threads, loggers."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from lightning.fabric import Fabric
from lightning_utilities.core import rank_zero

from medtpp.config import HardwareOptions, LoggingOptions
from medtpp.errors import ConfigError


def choose_accelerator(wanted: str) -> str:
    """The accelerator: the one asked for, or CUDA, Apple's MPS, the CPU, in this order.

    Raises:
        ConfigError: It is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(name for name, available in there.items() if available)
    if not there[wanted]:
        raise ConfigError(f"hardware.accelerator is {wanted}, but torch sees none here. Use auto or cpu.")
    return wanted


def choose_precision(wanted: str, accelerator: str) -> tuple[str, str]:
    """Precision ("32", "bf16" or "16") and the reason for it.

    bfloat16 matrix products are several times faster than float32 where the processor has instructions for them, and
    slower where they are emulated, so `auto` looks.
    """
    if wanted == "16" and accelerator != "cuda":
        raise ConfigError("hardware.precision=16 needs a CUDA GPU. Use bf16, 32 or auto.")
    if wanted != "auto":
        return wanted, "as asked for"
    if accelerator == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16", "the GPU computes in bfloat16"
        return "16", "the GPU has no bfloat16"
    if accelerator == "mps":
        return "32", "the safe choice on Apple GPUs"
    flag = next((flag for flag in ("amx_bf16", "avx512_bf16") if flag in _cpu_flags()), None)
    return ("bf16", f"the CPU has {flag}") if flag else ("32", "the CPU has no bfloat16 instructions")


def close_loggers(fabric: Fabric, status: str) -> None:
    """End the runs of all loggers, so that the next stage begins runs of its own."""
    for logger in fabric.loggers:
        logger.finalize(status)
        if type(logger).__name__ == "WandbLogger":
            logger.experiment.finish()


def mixed(precision: str) -> Any:
    """Fabric's name for a precision: weights stay in float32."""
    return {"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[precision]


def describe_machine(accelerator: str, packages: Iterable[str]) -> dict[str, Any]:
    """What a reader needs to judge measurements of speed and memory, as plain values."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": torch.cuda.get_device_name() if accelerator == "cuda" else accelerator,
        "threads": torch.get_num_threads(),
        "load_average": [round(value, 2) for value in psutil.getloadavg()],
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor())


def _cpu_flags() -> frozenset[str]:
    cpuinfo = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not cpuinfo.is_file():
        return frozenset()
    lines = (line for line in cpuinfo.read_text().splitlines() if line.startswith("flags"))
    return frozenset(next(lines, "").split())


def make_fabric(hardware: HardwareOptions, log_to: LoggingOptions, folder: Path | None = None) -> Fabric:
    """A fabric with its loggers writing to `folder`. Several devices start by `ddp_spawn`.

    Raises:
        ConfigError: The accelerator or a logger's package is missing.
    """
    accelerator = choose_accelerator(hardware.accelerator)
    precision, _ = choose_precision(hardware.precision, accelerator)
    if accelerator == "cuda" and hardware.devices > torch.cuda.device_count():
        raise ConfigError(f"hardware.devices is {hardware.devices}; there are {torch.cuda.device_count()} GPUs here.")
    if hardware.threads != "auto":
        torch.set_num_threads(hardware.threads)
        os.environ["OMP_NUM_THREADS"] = str(hardware.threads)  # what the processes of several devices go by
    return quiet_fabric(
        accelerator=accelerator,
        devices=hardware.devices,
        strategy="ddp_spawn" if hardware.devices > 1 else "auto",
        precision=mixed(precision),
        loggers=_loggers(log_to, folder) if folder else [],
    )


def quiet_fabric(**arguments: Any) -> Fabric:
    """A fabric that does not announce its precision; `medtpp doctor` tells it to whoever wants to know."""
    level = rank_zero.log.level  # of the logger that lightning's packages share
    rank_zero.log.setLevel(logging.WARNING)
    try:
        return Fabric(**arguments)
    finally:
        rank_zero.log.setLevel(level)


def _loggers(options: LoggingOptions, folder: Path) -> list[Any]:
    loggers: list[Any] = []
    if options.tensorboard:
        from lightning.fabric.loggers import TensorBoardLogger

        loggers.append(TensorBoardLogger(folder, name="", version="tensorboard"))
    try:
        if options.mlflow:
            from lightning.pytorch.loggers import MLFlowLogger

            uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder.resolve()}/mlflow.db"
            loggers.append(MLFlowLogger(experiment_name="medtpp", run_name=folder.name, tracking_uri=uri))
        if options.wandb:
            from lightning.pytorch.loggers import WandbLogger

            loggers.append(WandbLogger(project="medtpp", name=folder.name, save_dir=folder))
    except ModuleNotFoundError as error:
        name = "mlflow" if options.mlflow and "mlflow" in str(error).lower() else "wandb"
        raise ConfigError(f"logging.{name} needs its package: pip install 'medtpp[{name}]'.") from error
    return loggers
