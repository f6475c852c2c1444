"""What the executor asks of a device: memory, streams, events, graphs. A GPU's through torch; ``emulated.py`` another.

The executor's own code is the same over both, so that what is tested without a GPU is what runs on one.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ridgeline.backends.cuda.launch import Key, Launch, describe_in_torchs_memory, in_ranges
from ridgeline.core.errors import ConfigError
from ridgeline.core.ranges import Ranges

Bytes = npt.NDArray[np.uint8]


class HostBuffer(Protocol):
    """Page-locked memory of the host, which copies to and from the device may be under way on."""

    def write(self) -> Bytes:
        """Its bytes, to be written: nothing queued may still read or write them."""
        ...

    def read(self) -> Bytes:
        """Its bytes, to be read: whatever writes them has been waited for."""
        ...


class Event(Protocol):
    """A place in a stream."""

    def synchronize(self) -> None:
        """Waits until all that was queued before it is done."""
        ...


class Graph(Protocol):
    """Launches captured once, to be queued as one."""


class Stream(Protocol):
    """A queue of work: done in order within, in any order with other streams' but for events."""

    def launch(self, launches: Sequence[Launch]) -> None:
        """Queues kernels."""
        ...

    def copy_in(self, to: torch.Tensor, source: HostBuffer, offset: int = 0) -> None:
        """Queues a copy of ``to.nbytes`` bytes of the host, from ``offset``, into a contiguous tensor."""
        ...

    def copy_out(self, to: HostBuffer, source: torch.Tensor, offset: int = 0) -> None:
        """Queues a copy of a contiguous tensor into the host's bytes from ``offset``."""
        ...

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Queues a copy within the device."""
        ...

    def record(self) -> Event:
        """A new event, here."""
        ...

    def wait(self, event: Event) -> None:
        """What is queued from now on starts after an event of another stream."""
        ...

    def capture(self, launches: Sequence[Launch]) -> Graph:
        """A graph of kernels; nothing runs."""
        ...

    def replay(self, graph: Graph) -> None:
        """Queues a graph."""
        ...

    def time(self, graph: Graph, repetitions: int) -> float:
        """Seconds of the device that a graph takes, the mean of replays one after another, by two events.

        Raises ConfigError on a device without time.
        """
        ...


class Device(Protocol):
    """A device.

    Attributes:
        arch: what kernels are compiled for.
        ranges: where launches and captures from here on say which layer and operator they are; None: nowhere.
    """

    arch: str
    ranges: Ranges | None

    def memory(self, nbytes: int, zeros: bool = False) -> torch.Tensor:
        """Bytes of the device's memory: uint8 [nbytes], aligned to 256; ``zeros``: cleared.

        Raises ConfigError when there are not so many.
        """
        ...

    def free(self, memory: torch.Tensor) -> None:
        """Gives memory back: nothing queued or captured may use it any more."""
        ...

    def host(self, nbytes: int) -> HostBuffer:
        """Page-locked memory of the host."""
        ...

    def stream(self) -> Stream:
        """A new stream."""
        ...

    def free_memory(self) -> int:
        """Bytes of the device's memory that are free now."""
        ...

    def ready(self, variants: Set[Key]) -> None:
        """From here on no other kernel variant than these is launched: none would be compiled yet."""
        ...

    def collect(self, on: bool) -> None:
        """Tells a profiler that waits for it (Nsight Compute) to record what is launched from here on, or no more."""
        ...

    def name(self) -> str:
        """The device's, as its maker calls it."""
        ...


def launch_now(launches: Sequence[Launch], ranges: Ranges | None) -> None:
    """Launches kernels on torch's current stream, by Triton, in the ranges that they name."""
    describe_in_torchs_memory()
    for launch in launches if ranges is None else in_ranges(ranges, launches):
        c = launch.config
        options = {"num_warps": c.num_warps, "num_stages": c.num_stages, "enable_fp_fusion": c.fuse}
        launch.kernel[launch.grid](**launch.args, **c.meta, **options)


class CudaHostBuffer:
    """Pinned memory; the caller keeps the rules of ``HostBuffer``, which the emulated device checks."""

    def __init__(self, nbytes: int) -> None:
        self.tensor = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self._bytes: Bytes = self.tensor.numpy()

    def write(self) -> Bytes:
        """See ``HostBuffer``."""
        return self._bytes

    def read(self) -> Bytes:
        """See ``HostBuffer``."""
        return self._bytes


class CudaStream:
    """A CUDA stream through torch."""

    def __init__(self, device: CudaDevice) -> None:
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._device = device

    def launch(self, launches: Sequence[Launch]) -> None:
        """See ``Stream``."""
        with torch.cuda.stream(self.stream):
            launch_now(launches, self._device.ranges)

    def copy_in(self, to: torch.Tensor, source: Any, offset: int = 0) -> None:
        """See ``Stream``."""
        with torch.cuda.stream(self.stream):
            part = source.tensor[offset : offset + to.nbytes]
            to.view(torch.uint8).view(-1).copy_(part, non_blocking=True)

    def copy_out(self, to: Any, source: torch.Tensor, offset: int = 0) -> None:
        """See ``Stream``."""
        with torch.cuda.stream(self.stream):
            part = to.tensor[offset : offset + source.nbytes]
            part.copy_(source.view(torch.uint8).view(-1), non_blocking=True)

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """See ``Stream``."""
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)

    def record(self) -> torch.cuda.Event:
        """See ``Stream``."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return event

    def wait(self, event: Any) -> None:
        """See ``Stream``."""
        self.stream.wait_event(event)

    def capture(self, launches: Sequence[Launch]) -> torch.cuda.CUDAGraph:
        """See ``Stream``."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            launch_now(launches, self._device.ranges)
        return graph

    def replay(self, graph: Any) -> None:
        """See ``Stream``."""
        with torch.cuda.stream(self.stream):
            graph.replay()

    def time(self, graph: Any, repetitions: int) -> float:
        """See ``Stream``."""
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self.stream):
            graph.replay()
            first.record(self.stream)
            for _ in range(repetitions):
                graph.replay()
            last.record(self.stream)
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3 / repetitions


class CudaDevice:
    """This machine's GPU. Raises ConfigError where there is none, or one that kernels are not written for.

    Attributes:
        late_compiles: kernels compiled after ``ready``: each held up a step, and none should be.
    """

    def __init__(self) -> None:
        from ridgeline.backends.cuda.ladder.gpu import device_arch

        if not torch.cuda.is_available():
            raise ConfigError(
                "no GPU here: leave out backend 'cuda', or give device 'emulated' to have its kernels interpreted"
            )
        self.arch = device_arch()
        self.ranges: Ranges | None = None
        self.late_compiles = 0

    def memory(self, nbytes: int, zeros: bool = False) -> torch.Tensor:
        """See ``Device``."""
        make = torch.zeros if zeros else torch.empty
        try:
            return make(nbytes, dtype=torch.uint8, device="cuda")
        except torch.cuda.OutOfMemoryError:
            free, total = torch.cuda.mem_get_info()
            raise ConfigError(
                f"the GPU has {free:,} bytes free of {total:,}, not the {nbytes:,} asked for: lower num_kv_blocks, "
                "kv_cache_bytes or max_num_batched_tokens"
            ) from None

    def free(self, memory: torch.Tensor) -> None:
        """See ``Device``: torch frees what nobody holds."""

    def host(self, nbytes: int) -> CudaHostBuffer:
        """See ``Device``."""
        return CudaHostBuffer(nbytes)

    def stream(self) -> CudaStream:
        """See ``Device``."""
        return CudaStream(self)

    def ready(self, variants: Set[Key]) -> None:
        """See ``Device``: what is compiled all the same counts in ``late_compiles``."""
        import triton

        def count(*args: Any, **more: Any) -> None:
            self.late_compiles += 1

        triton.knobs.compilation.listener = count

    def collect(self, on: bool) -> None:
        """See ``Device``."""
        torch.cuda.profiler.start() if on else torch.cuda.profiler.stop()  # type: ignore[no-untyped-call]

    def name(self) -> str:
        """See ``Device``."""
        return str(torch.cuda.get_device_name())

    def free_memory(self) -> int:
        """See ``Device``."""
        return int(torch.cuda.mem_get_info()[0])
