"""What a GPU kernel call is, before anything runs it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ridgeline.core.ranges import Ranges

ARCHS = ("sm_80", "sm_90")
"""What kernels are written for: Ampere (A100) and Hopper (H100)."""


TORCH: dict[str, torch.dtype] = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "i32": torch.int32,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
"""The graph's names of dtypes."""


Key = tuple[Any, ...]
"""What a compiled kernel is looked up by (``variants.key``)."""


@dataclass(frozen=True)
class Config:
    """One way to compile a kernel.

    Attributes:
        meta: constexpr parameters by name.
        num_warps, num_stages: as Triton takes them.
        fuse: whether the compiler may contract a product and a sum; not where the CPU's bits are wanted.
    """

    meta: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    fuse: bool = True


@dataclass(frozen=True)
class Launch:
    """One call of one Triton kernel.

    Attributes:
        kernel: the ``@triton.jit`` function.
        grid: programs along each axis, one to three.
        args: run-time arguments by name: tensors, tensor descriptors, ints, floats.
        config: how it is compiled.
        writes: names of tensors of which every element is written and none is read before that.
        updates: names of tensors that are read and written in place, in part or whole: caches, counters.
        label: ranges that it is in, the outermost first: ("layer 3", "linear q+k+v").
    """

    kernel: Any
    grid: tuple[int, ...]
    args: Mapping[str, Any]
    config: Config
    writes: tuple[str, ...]
    updates: tuple[str, ...] = field(default=())
    label: tuple[str, ...] = field(default=())


def in_ranges(ranges: Ranges, launches: Iterable[Launch]) -> Iterator[Launch]:
    """The launches, each handed out while the ranges that its label names are open."""
    now: tuple[str, ...] = ()
    try:
        for launch in launches:
            same = 0
            while same < min(len(now), len(launch.label)) and now[same] == launch.label[same]:
                same += 1
            for _ in now[same:]:
                ranges.pop()
            now = now[:same]
            for name in launch.label[same:]:
                ranges.push(name)
            now = launch.label
            yield launch
    finally:
        for _ in now:
            ranges.pop()


@dataclass(frozen=True)
class CardShape:
    """One shape of a kernel that its card reports.

    Attributes:
        name: "M=1", "M=64", ...
        launches: over tensors on torch's meta device: nothing is allocated.
        operations: multiplies and adds that the operator needs.
        bytes_moved: bytes that must be read and written at least once.
        traffic: bytes that the loads and stores of all programs ask for, re-reads included; None: ``bytes_moved``.
        padded: operations that the tensor cores do, with the rows and columns that fill up tiles; None: ``operations``.
    """

    name: str
    launches: list[Launch]
    operations: float
    bytes_moved: float
    traffic: float | None = None
    padded: float | None = None


def describe_in_torchs_memory() -> None:
    """Gives Triton torch's memory for the descriptors that programs make, a few hundred bytes each.

    In this thread only (Triton asks a context variable), so it belongs before every launch. Torch keeps the order of a
    stream, and a captured graph its own memory.
    """
    import triton

    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))


def cdiv(a: int, b: int) -> int:
    """The least integer not under a / b."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two not under n; 1 for n < 1."""
    return 1 << max(0, n - 1).bit_length()
