"""What this machine can do: peaks measured with the instructions that the kernels use."""

from __future__ import annotations

import os
import time
from dataclasses import astuple, replace

from ridgeline.core.errors import ConfigError
from ridgeline.core.hardware import Peaks, datasheet_of
from ridgeline.engine.load import Runtime

BUFFER_BYTES = 96 << 20  # larger than the caches of the machines we know, as large as a small model


def measure_bandwidth(threads: int | None = None, isa: str | None = None, seconds: float = 0.3) -> float:
    """Bytes per second read from a buffer of 96 MiB by the best of several kernels; arguments as ``measure_peaks``."""
    import ridgeline.backends.cpu._native as native

    return float(native.measure_bandwidth(BUFFER_BYTES, threads or 0, seconds, isa or "")) * 1e9


def measure_peaks(threads: int | None = None, isa: str | None = None, seconds: float = 0.3) -> Peaks:
    """Read bandwidth (bytes/s, the best of several kernels over 96 MiB) and dot-product peaks (operations/s).

    Args:
        threads: None takes as many as affinity and cgroup allow.
        isa: instruction set whose kernels are used; None takes the best here.
        seconds: how long to look for the bandwidth.
    """
    import ridgeline.backends.cpu._native as native

    rates = native.measure_peaks(threads or 0, isa or "")
    return Peaks(measure_bandwidth(threads, isa, seconds), rates["int8"] * 1e9, rates["bf16"] * 1e9, rates["f32"] * 1e9)


def peaks_of(runtime: Runtime, seconds: float = 0.3) -> Peaks:
    """Peaks of what a loaded model runs on: of a GPU by its datasheet, of a CPU measured.

    Raises ConfigError for the emulated device, which has no speed, and for a GPU whose datasheet is not known.
    """
    config = runtime.config
    if config.backend == "cuda":
        if config.device == "emulated":
            raise ConfigError("the emulated device has no speed to measure: take a GPU, or the cpu backend")
        return datasheet_of(runtime.executor.device.name())  # type: ignore[attr-defined]
    return measure_peaks(config.threads, config.isa, seconds)


def peaks_now(runtime: Runtime, peaks: Peaks, seconds: float = 0.03) -> Peaks:
    """``peaks`` with a CPU's bandwidth of this moment: memory shared with others is twice as fast in some as in others.

    Args:
        runtime: what it runs on, threads and instruction set included; a GPU's peaks are its datasheet's and stay.
        peaks: of that, measured at any time.
        seconds: how long to look.
    """
    config = runtime.config
    if config.backend == "cuda":
        return peaks
    return replace(peaks, bandwidth=measure_bandwidth(config.threads, config.isa, seconds))


def usable_threads() -> int:
    """Threads that affinity and cgroup allow."""
    import ridgeline.backends.cpu._native as native

    return int(native.available_threads())


def better(a: Peaks, b: Peaks) -> Peaks:
    """The best of two measurements: what others take from the machine can only lower one."""
    return Peaks(*(max(x, y) for x, y in zip(astuple(a), astuple(b), strict=True)))


class Neighbours:
    """How many cores others keep busy from here on: what disturbs a measurement."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds by the clock, of all cores' work (stolen time included), and of this process and its children."""
        own = sum(os.times()[:4])
        try:
            with open("/proc/stat") as stat:
                ticks = [int(word) for word in stat.readline().split()[1:9]]
        except (OSError, ValueError):
            return time.perf_counter(), own, own
        user, nice, system, _idle, _iowait, irq, soft, steal = ticks
        return time.perf_counter(), (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK"), own

    def cores(self) -> float:
        """The mean since the start; 0 where the system does not tell."""
        passed, work, own = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return max(0.0, (work - own) / passed) if passed > 0 else 0.0
