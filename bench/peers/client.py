"""The parent's side: worker processes, and what CPU everybody else took while one was timed."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")

TICK = os.sysconf("SC_CLK_TCK")
NOISY = 0.15  # cores taken by others above which a sample is taken again, once
ATTEMPTS = 4  # at a sample that means anything


class EngineError(RuntimeError):
    """An engine failed to start or failed a request. Fatal: a hidden error looks like speed."""


class Worker:
    """One engine in one process. Stopped (SIGSTOP) whenever it is not answering.

    Args:
        name: for messages.
        command: what to start; the first line it writes must say that it is ready.
    """

    def __init__(self, name: str, command: Sequence[str], env: dict[str, str] | None = None) -> None:
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env={**os.environ, **(env or {})},
        )

    def read(self) -> dict[str, Any]:
        """The worker's next message; raises EngineError with the end of its stderr when there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            tail = self.errors.read()[-2000:].strip() or "no message"
            raise EngineError(f"{self.name} ended with code {self.process.returncode}:\n{tail}")
        message: dict[str, Any] = json.loads(line)
        return message

    def pause(self) -> None:
        """Stop every thread of the worker until it is asked again."""
        self.process.send_signal(signal.SIGSTOP)

    def generate(self, prompts: list[list[int]], count: int | list[int]) -> tuple[list[list[int]], float]:
        """(tokens, seconds inside the engine); the worker checks that every prompt got its ``count``."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        try:
            self.process.stdin.write(json.dumps({"prompts": prompts, "count": count}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # read() says why
        answer = self.read()
        self.pause()
        return answer["tokens"], answer["seconds"]

    def cpu_seconds(self) -> float:
        """User and system time of the process, all threads."""
        return process_cpu_seconds(self.process.pid)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.send_signal(signal.SIGCONT)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.errors):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    pass


def process_cpu_seconds(pid: int) -> float:
    """User and system seconds of ``pid``, all threads; 0 once it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICK


def machine_cpu_seconds() -> float:
    """Seconds all cores spent on anything, time stolen by the hypervisor included."""
    with open("/proc/stat") as stat:
        user, nice, system, _idle, _wait, irq, softirq, steal, *_ = map(int, stat.readline().split()[1:])
    return (user + nice + system + irq + softirq + steal) / TICK


@dataclass(frozen=True)
class Sample:
    """One timed piece: its value, and the cores others kept busy meanwhile (mean, in cores)."""

    value: float
    foreign: float


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def calmest(once: Callable[[int], Sample], name: str) -> Sample:
    """The sample of ``once(attempt)``; taken once more, and the calmer one kept, if others disturbed it.

    A value that is not positive was disturbed beyond use. Raises EngineError when all attempts were.
    """
    best: Sample | None = None
    for attempt in range(ATTEMPTS):
        sample = once(attempt)
        if sample.value > 0 and (best is None or sample.foreign < best.foreign):
            best = sample
        if best and (best.foreign <= NOISY or attempt):
            return best
    if best is None:
        raise EngineError(f"the machine is too busy to time {name}: try again when it is quiet")
    return best


def wait_quiet(limit: float) -> None:
    """Return once nobody but us uses the machine, or after ``limit`` seconds."""
    deadline = time.monotonic() + limit
    while time.monotonic() < deadline:
        before = machine_cpu_seconds()
        time.sleep(0.2)
        if machine_cpu_seconds() - before <= 0.03:
            return


def observe(piece: Callable[[], T], own_cpu: Callable[[], float]) -> tuple[T, float]:
    """(what ``piece`` returns, cores others kept busy while it ran).

    ``own_cpu`` returns the CPU seconds of the process being timed; this process counts as own too.
    """
    start = time.monotonic()
    machine, own = machine_cpu_seconds(), own_cpu() + time.process_time()
    result = piece()
    foreign = (machine_cpu_seconds() - machine) - (own_cpu() + time.process_time() - own)
    return result, max(0.0, foreign) / (time.monotonic() - start)
