"""The least time a cost can take on a machine, and what binds. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from ridgeline.core.hardware import Peaks
from ridgeline.graph.cost import Cost


@dataclass(frozen=True)
class Roofline:
    """Bound of one cost.

    Attributes:
        seconds: the least time: memory and arithmetic overlap perfectly.
        binds: "memory" or "compute".
        memory_seconds, compute_seconds: either one alone.
    """

    seconds: float
    binds: str
    memory_seconds: float
    compute_seconds: float


def roofline(cost: Cost, peaks: Peaks) -> Roofline:
    """The bound: streamed bytes (weights and KV read) at the bandwidth, dot operations each at the peak of
    its kind. Elementwise work and cache-resident activations are not counted, so it is optimistic."""
    memory = cost.streamed_bytes / peaks.bandwidth
    speed = {"int8": peaks.int8, "bf16": peaks.bf16, "f32": peaks.f32}
    compute = sum(ops / speed[kind] for kind, ops in cost.dot.items())
    return Roofline(max(memory, compute), "memory" if memory >= compute else "compute", memory, compute)
