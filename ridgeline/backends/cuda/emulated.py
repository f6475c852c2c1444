"""A device without a GPU: kernels interpreted exactly, streams that run late, and every misuse of them an error.

Work is queued with what it reads and writes. It runs when the host waits for it, or now and then before, in an order
drawn from a seed among those that streams and events allow. Whatever the order, three things are checked from the
edges alone, so that a missing one is found even when the order drawn happens to hide it:

- two pieces of work of which one writes what the other touches are ordered by streams and events;
- the host writes a buffer only when nothing queued uses it, and reads one only after it has waited for its writer;
- nothing, captured in a graph or not, touches memory that has been given back.

New memory holds garbage: NaN as floats, -1 as integers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from ridgeline.backends.cuda.device import Bytes
from ridgeline.backends.cuda.ladder import interpret
from ridgeline.backends.cuda.launch import Key, Launch, in_ranges
from ridgeline.backends.cuda.variants import key
from ridgeline.core.errors import ConfigError
from ridgeline.core.ranges import Ranges

Span = tuple[int, int]
"""First address and the one past the last."""
Clock = dict[int, int]
"""By stream, how many of its pieces of work have surely been done."""


NO_TIME = "the emulated device has no time to measure: profile on a GPU, or the cpu backend"


class DeviceFault(AssertionError):
    """Work that could go wrong on a real device, in some order of things."""


@dataclass(eq=False)
class Work:
    """Something queued.

    Attributes:
        name: for messages.
        run: does it.
        stream, number: where it is queued, counted from 1.
        after: what has surely been done when it starts.
    """

    name: str
    run: Callable[[], None]
    reads: tuple[Span, ...]
    writes: tuple[Span, ...]
    stream: int
    number: int
    after: Clock

    def before(self, clock: Clock) -> bool:
        """Whether ``clock`` knows it as done."""
        return clock.get(self.stream, 0) >= self.number


@dataclass(eq=False)
class EmulatedEvent:
    """A place in a stream, and all that lies before it."""

    device: EmulatedDevice
    clock: Clock

    def synchronize(self) -> None:
        """See ``device.Event``."""
        self.device.run_until(self.clock)
        merge(self.device.host_clock, self.clock)


@dataclass(frozen=True, eq=False)
class EmulatedGraph:
    """Captured launches, and the allocations they lie in."""

    launches: tuple[Launch, ...]
    allocations: frozenset[int]


@dataclass(eq=False)
class EmulatedHostBuffer:
    """See ``device.HostBuffer``."""

    device: EmulatedDevice
    array: Bytes

    @property
    def span(self) -> Span:
        """Its addresses."""
        start = self.array.ctypes.data
        return start, start + self.array.nbytes

    def write(self) -> Bytes:
        """Raises DeviceFault if queued work still uses it."""
        self.device.check_host(self.span, writing=True)
        return self.array

    def read(self) -> Bytes:
        """Raises DeviceFault if what writes it has not been waited for."""
        self.device.check_host(self.span, writing=False)
        return self.array


@dataclass(eq=False)
class EmulatedStream:
    """See ``device.Stream``."""

    device: EmulatedDevice
    index: int
    clock: Clock = field(default_factory=dict)
    count: int = 0
    queue: deque[Work] = field(default_factory=deque)

    def launch(self, launches: Sequence[Launch]) -> None:
        """See ``device.Stream``."""
        ranges = self.device.ranges
        self._launch(launches if ranges is None else in_ranges(ranges, launches))

    def _launch(self, launches: Iterable[Launch]) -> None:
        for launch in launches:
            self.device.check_compiled(launch)
            self._queue(launch.kernel.fn.__name__, partial(_interpret, launch), *touched(launch))

    def copy_in(self, to: torch.Tensor, source: Any, offset: int = 0) -> None:
        """See ``device.Stream``."""
        part = source.array[offset : offset + to.nbytes]
        before = part.copy()

        def run() -> None:
            if not np.array_equal(before, part):
                raise DeviceFault("the host wrote a buffer while a copy that reads it was under way")
            to.view(torch.uint8).view(-1).copy_(torch.from_numpy(part))

        self._queue("copy to the device", run, (host_span(part),), (span_of(to),))

    def copy_out(self, to: Any, source: torch.Tensor, offset: int = 0) -> None:
        """See ``device.Stream``."""
        part = to.array[offset : offset + source.nbytes]
        if not self.device.reads_later(host_span(part)):
            part[:] = 0xA5  # what a reader that does not wait would get

        def run() -> None:
            torch.from_numpy(part).copy_(source.view(torch.uint8).view(-1))

        self._queue("copy from the device", run, (span_of(source),), (host_span(part),))

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """See ``device.Stream``."""
        self._queue("copy", partial(_copy, to, source), (span_of(source),), (span_of(to),))

    def record(self) -> EmulatedEvent:
        """See ``device.Stream``."""
        return EmulatedEvent(self.device, {**self.clock, self.index: self.count})

    def wait(self, event: Any) -> None:
        """See ``device.Stream``."""
        merge(self.clock, event.clock)

    def capture(self, launches: Sequence[Launch]) -> EmulatedGraph:
        """See ``device.Stream``."""
        ranges = self.device.ranges
        labelled = launches if ranges is None else in_ranges(ranges, launches)  # as a GPU's capture has them
        spans = [span for launch in labelled for part in touched(launch) for span in part]
        return EmulatedGraph(tuple(launches), frozenset(self.device.allocation(span) for span in spans))

    def replay(self, graph: Any) -> None:
        """Raises DeviceFault if memory that the graph uses has been given back since it was captured."""
        gone = graph.allocations - self.device.live.keys()
        if gone:
            raise DeviceFault("a captured graph uses memory that has been given back")
        self._launch(graph.launches)

    def time(self, graph: Any, repetitions: int) -> float:
        """Raises ConfigError: nothing takes time here."""
        raise ConfigError(NO_TIME)

    def _queue(self, name: str, run: Callable[[], None], reads: Sequence[Span], writes: Sequence[Span]) -> None:
        self.count += 1
        after = {**self.clock, self.index: self.count - 1}
        merge(after, self.device.host_clock)  # nothing starts before the host has queued it
        work = Work(name, run, tuple(reads), tuple(writes), self.index, self.count, after)
        self.device.check_order(work)
        self.queue.append(work)
        self.device.now_and_then()


class EmulatedDevice:
    """See ``device.Device``.

    Attributes:
        arch: whose kernels are interpreted.
        host_clock: what the host has waited for.
        live: sizes of allocations by their address.
    """

    def __init__(self, arch: str = "sm_90", seed: int = 0, memory_bytes: int = 1 << 30) -> None:
        """``memory_bytes``: what the device is said to have."""
        self.arch = arch
        self.ranges: Ranges | None = None
        self.host_clock: Clock = {}
        self.live: dict[int, int] = {}
        self._memory_bytes = memory_bytes
        self._rng = np.random.default_rng(seed)
        self._streams: list[EmulatedStream] = []
        self._history: list[Work] = []
        self._host_buffers: list[EmulatedHostBuffer] = []
        self._kept: dict[int, torch.Tensor] = {}
        self._retired: list[torch.Tensor] = []
        self._known: Set[Key] | None = None

    def memory(self, nbytes: int, zeros: bool = False) -> torch.Tensor:
        """See ``device.Device``."""
        whole = torch.full((nbytes + 256,), 0 if zeros else 0xFF, dtype=torch.uint8)
        skip = -whole.data_ptr() % 256
        memory = whole[skip : skip + nbytes]
        self.live[memory.data_ptr()] = nbytes
        self._kept[memory.data_ptr()] = memory
        return memory

    def free(self, memory: torch.Tensor) -> None:
        """See ``device.Device``; the bytes are kept aside, so that no later allocation has their addresses."""
        del self.live[memory.data_ptr()]
        self._retired.append(self._kept.pop(memory.data_ptr()))

    def host(self, nbytes: int) -> EmulatedHostBuffer:
        """See ``device.Device``."""
        buffer = EmulatedHostBuffer(self, np.full(nbytes, 0xA5, np.uint8))
        self._host_buffers.append(buffer)
        return buffer

    def stream(self) -> EmulatedStream:
        """See ``device.Device``."""
        self._streams.append(EmulatedStream(self, len(self._streams)))
        return self._streams[-1]

    def free_memory(self) -> int:
        """See ``device.Device``."""
        return self._memory_bytes - sum(self.live.values())

    def ready(self, variants: Set[Key]) -> None:
        """See ``device.Device``: another variant is an error from here on."""
        self._known = variants

    def collect(self, on: bool) -> None:
        """See ``device.Device``: no profiler looks at it."""

    def name(self) -> str:
        """See ``device.Device``."""
        return f"emulated {self.arch}"

    def check_compiled(self, launch: Launch) -> None:
        """Raises DeviceFault for a kernel variant that is not among those known when the device got ready."""
        if self._known is not None and key(launch) not in self._known:
            raise DeviceFault(f"{launch.kernel.fn.__name__} would be compiled after ready: {key(launch)}")

    def allocation(self, span: Span) -> int:
        """The address of the live allocation that holds a span; raises DeviceFault if none does."""
        for start, size in self.live.items():
            if start <= span[0] and span[1] <= start + size:
                return start
        raise DeviceFault("work touches memory that is not allocated, or has been given back")

    def check_order(self, work: Work) -> None:
        """Raises DeviceFault if other work that touches the same bytes is not ordered with this."""
        hosts = {buffer.span for buffer in self._host_buffers}
        for span in (*work.reads, *work.writes):
            if not any(h[0] <= span[0] and span[1] <= h[1] for h in hosts):
                self.allocation(span)
        for other in self._history:
            if other.before(work.after):
                continue
            if clash(work.writes, other.reads + other.writes) or clash(work.reads, other.writes):
                raise DeviceFault(f"{work.name} and {other.name} touch the same bytes, and no event orders them")
        self._history.append(work)
        if len(self._history) > 512:  # what the host has waited for is ordered before anything queued from now on
            self._history = [w for w in self._history if not w.before(self.host_clock)]

    def reads_later(self, span: Span) -> bool:
        """Whether work that has not run yet reads these bytes."""
        return any(clash((span,), work.reads) for stream in self._streams for work in stream.queue)

    def check_host(self, span: Span, writing: bool) -> None:
        """Raises DeviceFault if the host may not touch these bytes of its own now."""
        for work in self._history:
            if work.before(self.host_clock):
                continue
            if clash((span,), work.writes):
                raise DeviceFault(f"the host touches a buffer without having waited for what writes it: {work.name}")
            if writing and clash((span,), work.reads):
                raise DeviceFault(f"the host writes a buffer that queued work still reads: {work.name}")

    def now_and_then(self) -> None:
        """Sometimes runs a piece of work that could run."""
        if self._rng.random() < 0.2:
            self._step()

    def run_until(self, clock: Clock) -> None:
        """Runs queued work, in some order, until all that ``clock`` names is done."""
        while any(s.queue and s.queue[0].number <= clock.get(s.index, 0) for s in self._streams):
            self._step()

    def _step(self) -> None:
        ready = [s for s in self._streams if s.queue and self._may_run(s.queue[0])]
        if not ready:
            if any(s.queue for s in self._streams):
                raise DeviceFault("streams wait for each other: nothing can run")
            return
        ready[int(self._rng.integers(len(ready)))].queue.popleft().run()

    def _may_run(self, work: Work) -> bool:
        done = {s.index: s.queue[0].number - 1 if s.queue else s.count for s in self._streams}
        return all(done[stream] >= number for stream, number in work.after.items())


def _interpret(launch: Launch) -> None:
    interpret.run([launch])


def _copy(to: torch.Tensor, source: torch.Tensor) -> None:
    to.copy_(source)


def merge(clock: Clock, other: Clock) -> None:
    """What ``clock`` knows, and what ``other`` does."""
    for stream, number in other.items():
        clock[stream] = max(clock.get(stream, 0), number)


def clash(some: Sequence[Span], others: Sequence[Span]) -> bool:
    """Whether two sets of spans overlap."""
    return any(a[0] < b[1] and b[0] < a[1] for a in some for b in others)


def span_of(tensor: torch.Tensor) -> Span:
    """The addresses between a tensor's first and last element."""
    start = tensor.data_ptr()
    if tensor.numel() == 0:
        return start, start
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size()


def host_span(part: Bytes) -> Span:
    """The addresses of some bytes of the host."""
    return part.ctypes.data, part.ctypes.data + part.nbytes


def touched(launch: Launch) -> tuple[tuple[Span, ...], tuple[Span, ...]]:
    """What a launch reads and writes."""
    reads: list[Span] = []
    writes: list[Span] = []
    for name, arg in launch.args.items():
        tensor: Any = interpret.base_of(arg)
        if not isinstance(tensor, torch.Tensor) or tensor.numel() == 0:
            continue
        written = name in launch.writes or name in launch.updates
        (writes if written else reads).append(span_of(tensor))
    return tuple(reads), tuple(writes)
