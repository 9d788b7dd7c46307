"""Peak memory of a stage: what decides whether it fits on a machine."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import platform
from pathlib import Path

import psutil
import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MMAP_THRESHOLD = -3  # of glibc's mallopt


class PeakMemory:
    """Counts from its making on: memory allocated on a CUDA device, else resident memory of the process.

    What earlier work of the process has freed is given back to the system first, where the C library is glibc, so that
    it is not counted. Where the system cannot start the count anew (all but Linux), the peak is that of the process so
    far.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type != "cuda":
            _give_back()
        self.before = psutil.Process().memory_info().rss / 2**20
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            with contextlib.suppress(OSError):  # not Linux, or a container that does not allow it
                _CLEAR.write_text("5")  # VmHWM counts from here on

    def mib(self) -> float:
        """The peak in MiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        if _STATUS.is_file():
            peak = next(line.split()[1] for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
            return int(peak) / 2**10
        if platform.system() == "Windows":
            return float(psutil.Process().memory_info()._asdict()["peak_wset"]) / 2**20
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts in bytes

    def added_mib(self) -> float:
        """The peak on a CUDA device; else what the process had at the peak beyond what it had when counting began."""
        return self.mib() if self.device.type == "cuda" else self.mib() - self.before


def _give_back() -> None:
    """Free what nothing holds any more; what glibc keeps of it in its heap goes back to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def give_back_at_once() -> None:
    """From here on, the memory of freed tensors goes back to the system, where the C library is glibc.

    Otherwise it keeps freed memory in a heap, in which gaps that fit nothing take up to half as much again, by chance.
    So a measurement becomes what tensors need. Training becomes slower.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, 1 << 17)
