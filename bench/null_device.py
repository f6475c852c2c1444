"""A device for the CUDA executor that does nothing: what is left is the host's own work in a step."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ridgeline.backends.cuda.executor import CudaExecutor
from ridgeline.core.formats import BF16, F32
from ridgeline.core.types import SAMPLING_DTYPE, Batch
from ridgeline.graph.plan import compile
from ridgeline.graph.target import cuda_target
from ridgeline.models import llama
from ridgeline.weights.tensor import WeightTensor

CONFIG = llama.LlamaConfig(160, 128, 192, 2, 4, 2, 32, 512, 1e-5, 10000.0, True)


class NullHostBuffer:
    """Bytes that nothing copies."""

    def __init__(self, nbytes: int) -> None:
        self._bytes = np.zeros(nbytes, np.uint8)

    def write(self) -> Any:
        """The bytes."""
        return self._bytes

    read = write


class NullStream:
    """Takes everything and does nothing."""

    def _nothing(self, *args: Any) -> Any:
        return self

    launch = copy_in = copy_out = copy = record = wait = capture = replay = synchronize = _nothing


class NullDevice:
    """Memory of the host, streams that run nothing."""

    arch, ranges = "sm_90", None

    def memory(self, nbytes: int, zeros: bool = False) -> torch.Tensor:
        """Zeros."""
        return torch.zeros(nbytes, dtype=torch.uint8)

    def free(self, memory: torch.Tensor) -> None:
        """Nothing."""

    def host(self, nbytes: int) -> NullHostBuffer:
        """Zeros."""
        return NullHostBuffer(nbytes)

    def stream(self) -> Any:
        """One more."""
        return NullStream()

    def free_memory(self) -> int:
        """Plenty."""
        return 1 << 40

    def ready(self, variants: Any) -> None:
        """Nothing."""


class ZeroWeight:
    """A weight of zeros."""

    row_order = None

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._values = np.zeros(shape, np.float32)
        self.tensor = WeightTensor("zeros", shape, BF16, np.zeros(0, np.uint8))

    def values(self) -> Any:
        """Zeros."""
        return self._values


@dataclass(frozen=True)
class HostWork:
    """Median microseconds of ``launch`` and ``finish`` of a decode step.

    Attributes:
        steady: every step's requests are those of the step before.
        changing: every step's sampling parameters differ from the last one's, and each request gets a new block.
    """

    steady: float
    changing: float


def host_work(batches: tuple[int, ...] = (1, 32, 256), repetitions: int = 400) -> dict[int, HostWork]:
    """The host's own work in a step, by how many requests decode."""
    entries = llama.weight_entries(CONFIG)
    formats = {n: BF16 if len(e.shape) == 2 else F32 for n, e in entries.items()}
    most = max(batches)
    graph = llama.build(CONFIG, formats, max_tokens=most, max_rows=most, kv_dtype="bf16", block_size=16)
    weights: dict[str, Any] = {n: ZeroWeight(e.shape) for n, e in entries.items()}
    sizes: dict[str, Any] = {"num_slots": most, "num_blocks": [64], "max_blocks_per_slot": 32}
    executor = CudaExecutor(compile(graph, cuda_target("bf16")), weights, NullDevice(), **sizes)
    found = {}
    for size in batches:
        steady, changing = [decode_of(size)], [decode_of(size, 0.5, 1), decode_of(size, 0.7, 1)]
        found[size] = HostWork(*(_median(executor, steps, repetitions) for steps in (steady, changing)))
    return found


def _median(executor: CudaExecutor, batches: list[Batch], repetitions: int) -> float:
    times = []
    for repetition in range(repetitions):
        batch = batches[repetition % len(batches)]
        start = time.perf_counter()
        executor.finish(executor.launch(batch))
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def decode_of(size: int, temperature: float = 0.0, blocks: int = 0) -> Batch:
    """A step in which every request decodes one token, fed back on the device, and has so many new blocks."""
    rows = np.zeros(size, SAMPLING_DTYPE)
    rows["num_logprobs"], rows["top_p"], rows["temperature"] = -1, 1.0, temperature
    index = np.arange(size, dtype=np.int32)
    starts, whole = np.arange(size + 1, dtype=np.int32), np.full(size, 40, np.int32)
    updates = np.stack([index, np.full(size, 2, np.int32), index % 64], 1).astype(np.int32)[: size * blocks]
    return Batch(np.full(size, -1, np.int32), whole, index, starts, whole + 1, index, rows, [updates])
