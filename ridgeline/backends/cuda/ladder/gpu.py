"""Rung 4: kernels timed on a GPU, beside PyTorch's. The only source of GPU timings; without a GPU it gives none."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch

from ridgeline.backends.cuda.ladder.card import DEVICES
from ridgeline.backends.cuda.ladder.table import KERNELS
from ridgeline.backends.cuda.launch import ARCHS, CardShape, Launch, describe_in_torchs_memory
from ridgeline.core.errors import ConfigError
from ridgeline.core.hardware import DATASHEET

FLUSH_BYTES = 256 << 20  # read between repetitions, so that inputs come from memory and not from the L2 cache
REPETITIONS = 20


@dataclass(frozen=True)
class Timing:
    """One shape of one kernel on this GPU.

    Attributes:
        microseconds: median of the repetitions, by events, inputs not cached.
        roofline_share: the datasheet's time over that.
        library: microseconds of PyTorch's operation on the same tensors; None where it has none.
    """

    kernel: str
    shape: str
    microseconds: float
    teraflops: float
    gigabytes: float
    roofline_share: float
    library: float | None


def device_arch() -> str:
    """The architecture of this machine's GPU; raises ConfigError where there is none, or one of another kind."""
    if not torch.cuda.is_available():
        raise ConfigError("no GPU here: nothing is timed, and nothing else is shown in its place")
    major, minor = torch.cuda.get_device_capability()
    arch = f"sm_{major}{minor}"
    if arch not in ARCHS:
        raise ConfigError(f"this GPU is {arch}: kernels are written for {', '.join(ARCHS)}")
    return arch


def on_device(launch: Launch, device: str, seed: int = 0) -> Launch:
    """A launch over shapes as one over tensors: random numbers; integers, which are indices, 0."""
    generator = torch.Generator(device).manual_seed(seed)
    made: dict[int, Any] = {}

    def place(arg: Any) -> Any:
        if type(arg).__name__ == "TensorDescriptor":
            return replace(arg, base=place(arg.base))
        if not isinstance(arg, torch.Tensor) or arg.device.type != "meta":
            return arg
        if id(arg) not in made:
            extent = 1 + sum((n - 1) * s for n, s in zip(arg.shape, arg.stride(), strict=True))
            if arg.dtype.is_floating_point:
                flat = torch.randn(extent, device=device, generator=generator).to(arg.dtype)
            else:
                flat = torch.zeros(extent, dtype=arg.dtype, device=device)
            made[id(arg)] = flat.as_strided(arg.shape, arg.stride())
        return made[id(arg)]

    return replace(launch, args={name: place(arg) for name, arg in launch.args.items()})


def run(launches: list[Launch]) -> None:
    """Launches kernels on the current stream."""
    describe_in_torchs_memory()
    for launch in launches:
        c = launch.config
        launch.kernel[launch.grid](
            **launch.args, **c.meta, num_warps=c.num_warps, num_stages=c.num_stages, enable_fp_fusion=c.fuse
        )


def measure(task: Callable[[], None]) -> float:
    """Median microseconds of a task, with the L2 cache flushed before each repetition."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    task()
    times: list[float] = []
    for _ in range(REPETITIONS):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        task()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def timings(ops: list[str]) -> list[Timing]:
    """Every card shape of some operators, timed."""
    arch = device_arch()
    found = []
    for op in ops:
        module = import_module(f"{KERNELS}.{op}")
        for shape in module.card_shapes(arch):
            found.append(_time(op, module, shape, arch))
            torch.cuda.empty_cache()
    return found


def _time(op: str, module: Any, shape: CardShape, arch: str) -> Timing:
    launches = [on_device(launch, "cuda") for launch in shape.launches]
    micros = measure(lambda: run(launches))
    library = getattr(module, "library", None)
    other = library(launches) if library else None
    peaks = DATASHEET[DEVICES[arch].peaks]
    peak = getattr(peaks, getattr(module, "KIND", "bf16"))
    roofline = max(shape.bytes_moved / peaks.bandwidth, shape.operations / peak)
    return Timing(
        op,
        shape.name,
        micros,
        shape.operations / micros / 1e6,
        shape.bytes_moved / micros / 1e3,
        roofline / micros * 1e6,
        measure(other) if other else None,
    )


def render(rows: list[Timing], device: str) -> str:
    """The table of DeepGEMM's kind: us | TFLOPS | GB/s | % of roofline | x library."""
    lines = [
        f"{device}",
        "",
        "| kernel | shape | us | TFLOPS | GB/s | of roofline | x PyTorch |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = f"{row.library / row.microseconds:.2f}" if row.library else "-"
        lines.append(
            f"| {row.kernel} | {row.shape} | {row.microseconds:.1f} | {row.teraflops:.1f} | {row.gigabytes:.0f} | "
            f"{row.roofline_share:.0%} | {times} |"
        )
    return "\n".join(lines) + "\n"
