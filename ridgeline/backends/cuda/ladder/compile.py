"""Rung 2, first half: launches compiled for sm_80 and sm_90 with no driver, through the JIT's own warm-up path.

Lives in a process of its own: Triton decides when a kernel is decorated whether it will be interpreted or compiled,
so ``in_process`` starts a Python without TRITON_INTERPRET for each worker.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from ridgeline.backends.cuda.launch import ARCHS, Launch
from ridgeline.core.errors import RidgelineError

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Binary:
    """One compiled kernel.

    Attributes:
        name, arch, num_warps: of the kernel.
        sass, ptx: its machine code and intermediate code.
        registers: of a thread.
        local_bytes: of a thread's local memory: spilled registers, mostly.
        shared_bytes: of a program.
    """

    name: str
    arch: str
    num_warps: int
    sass: str
    ptx: str
    registers: int
    local_bytes: int
    shared_bytes: int


class StandInDriver:
    """What Triton asks a driver while it compiles. Devices 0 and 1 are sm_80 and sm_90."""

    def __init__(self, arch: str) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        """The architecture to compile for."""
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", int(self.arch.removeprefix("sm_")), 32)

    def get_current_device(self) -> int:
        """Compiled kernels are cached by device."""
        return ARCHS.index(self.arch)

    def get_current_stream(self, device: int) -> int:
        """There is none."""
        return 0


def compile_launch(launch: Launch, arch: str) -> Binary:
    """Compiles the kernel of a launch; its tensors may be on any device.

    Raises:
        RidgelineError: it does not compile.
    """
    kernel, local = compile_kernel(launch, arch)
    registers = _resources(kernel.asm["cubin"])[0]
    meta, sass = kernel.metadata, _cuobjdump(kernel.asm["cubin"], "-sass")
    return Binary(meta.name, arch, meta.num_warps, sass, kernel.asm["ptx"], registers, local, meta.shared)


def compile_kernel(launch: Launch, arch: str) -> tuple[Any, int]:
    """Triton's compiled kernel of a launch, and the bytes of local memory of a thread.

    Raises:
        RidgelineError: it does not compile.
    """
    import triton

    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise RidgelineError("this process interprets kernels: compile in another, see in_process")
    triton.runtime.driver.set_active(StandInDriver(arch))
    config = launch.config
    try:
        kernel = launch.kernel.warmup(
            **launch.args,
            **config.meta,
            grid=launch.grid,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            enable_fp_fusion=config.fuse,
        )
    except Exception as error:  # Triton's compiler raises whatever its passes raise
        name = launch.kernel.fn.__name__
        first: BaseException = error
        while first.__cause__ is not None:  # an error is wrapped once for every function it passes
            first = first.__cause__
        raise RidgelineError(f"{name} does not compile for {arch} with {dict(config.meta)}: {first}") from error
    return kernel, _resources(kernel.asm["cubin"])[1]


def _cuobjdump(cubin: bytes, what: str) -> str:
    """What Triton's own cuobjdump says. (Its ``asm["sass"]`` ends after 4,096 instructions.)"""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, what, file.name], capture_output=True, text=True, check=True).stdout


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of local memory, of a thread."""
    text = _cuobjdump(cubin, "-res-usage")
    usage = dict(field.split(":", 1) for field in text.split() if ":" in field and field.split(":", 1)[1].isdigit())
    return int(usage["REG"]), max(int(usage.get("STACK", 0)), int(usage.get("LOCAL", 0)))


def in_process(task: Callable[[T], R], items: Iterable[T], workers: int = 2) -> Iterator[R]:
    """``task`` of every item, in order, in processes that compile; ``task`` and its results must pickle."""
    before = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            yield from pool.map(task, items)
    finally:
        if before is not None:
            os.environ["TRITON_INTERPRET"] = before
