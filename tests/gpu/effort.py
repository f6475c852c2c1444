"""How much work steps may cost: an executor that computes more, copies more, waits or builds more is noticed.

Every answer can be right and the executor slow. So the work of one script is added up and held against what it was when
this was written (``python -m tests.gpu.effort`` prints it anew). More of it is an error; a change that is worth it, or
one of the scripts, records its numbers here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

from ridgeline.backends.cuda.emulated import EmulatedDevice, EmulatedEvent, EmulatedStream  # noqa: E402
from ridgeline.backends.cuda.executor import CudaExecutor  # noqa: E402
from ridgeline.backends.cuda.launch import Launch  # noqa: E402
from ridgeline.core.types import StepOutput  # noqa: E402
from tests.gpu.scripts import Script, play  # noqa: E402
from tests.gpu.small_model import model, sizes_for  # noqa: E402

WINDOWS, SEED, STEPS = (0, 20), 73, 8


@dataclass
class Effort:
    """Totals over the steps of a script.

    Attributes:
        launches, programs: queued on the device; options: constants of them that are true, each a thing to do.
        built: launches put together by the host; the others are made once and queued again.
        copies, copied: their number and bytes, in, out and on the device.
        waits: of the host for the device; ahead: steps, of those launched, that the host waited for a device in.
        allocated: bytes of the device after it is ready, and of page-locked memory.
    """

    launches: int = 0
    programs: int = 0
    options: int = 0
    built: int = 0
    copies: int = 0
    copied: int = 0
    waits: int = 0
    ahead: int = 0
    allocated: int = 0

    def excess(self, recorded: Effort) -> list[str]:
        """What is more than was recorded."""
        pairs = zip(fields(self), astuple(self), astuple(recorded), strict=True)
        return [f"{f.name}: {now}, recorded {then}" for f, now, then in pairs if now > then]


RECORDED = Effort(
    launches=239, programs=1841, options=259, built=57, copies=42, copied=61472, waits=12, ahead=1, allocated=28464
)


@contextmanager
def counted(effort: Effort) -> Iterator[None]:
    """Within it what emulated devices are asked for is added up."""
    kept: list[tuple[Any, str, Any]] = []

    def hook(owner: Any, name: str, count: Any) -> None:
        real = getattr(owner, name)
        kept.append((owner, name, real))

        def wrapped(self: Any, *args: Any, **more: Any) -> Any:
            count(self, *args)
            return real(self, *args, **more)

        setattr(owner, name, wrapped)

    def launches(_: Any, queued: Sequence[Launch]) -> None:
        effort.launches += len(queued)
        effort.programs += sum(math.prod(launch.grid) for launch in queued)
        effort.options += sum(value is True for launch in queued for value in launch.config.meta.values())

    def copied(_: Any, first: Any, second: Any, *rest: Any) -> None:
        effort.copies += 1
        effort.copied += min(one.nbytes for one in (first, second) if hasattr(one, "nbytes"))

    def add(name: str, amount: Any) -> Any:
        return lambda *args: setattr(effort, name, getattr(effort, name) + amount(*args))

    hook(EmulatedStream, "launch", launches)
    for name in ("copy_in", "copy_out", "copy"):
        hook(EmulatedStream, name, copied)
    hook(Launch, "__init__", add("built", lambda *_: 1))
    hook(EmulatedEvent, "synchronize", add("waits", lambda *_: 1))
    for name in ("memory", "host"):
        hook(EmulatedDevice, name, add("allocated", lambda _, nbytes, *rest: nbytes))
    try:
        yield
    finally:
        for owner, name, real in kept:
            setattr(owner, name, real)


def measure() -> tuple[Effort, list[StepOutput]]:
    """Of the script, two steps under way at once; and what it gave."""
    _, plan, weights = model("bf16", "bf16", windows=WINDOWS)
    made = CudaExecutor(plan, weights, EmulatedDevice(seed=3), **sizes_for(plan))
    effort = Effort()
    with counted(effort):
        launch = made.launch

        def waiting(batch: Any) -> Any:
            before = effort.waits
            ticket = launch(batch)
            effort.ahead += effort.waits > before
            return ticket

        made.launch = waiting  # type: ignore[method-assign]
        outputs = play(Script(SEED, WINDOWS), made, STEPS, 2)
    return effort, outputs


if __name__ == "__main__":
    print(measure()[0])
