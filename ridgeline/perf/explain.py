"""What a model will cost on a device, from its shape alone: passes, operators, memory, predicted speed.

The predictions are rooflines: an operator takes the longer of its bytes at the memory's rate and its operations at the
peak of their kind, and its launch. What that leaves out is said with every prediction (``ASSUMPTIONS``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ridgeline.core.config import EngineConfig
from ridgeline.core.errors import ConfigError
from ridgeline.core.hardware import GPU_RESERVED, MEMORY, Peaks
from ridgeline.graph.cost import Cost, Load
from ridgeline.graph.ir import kv_row_bytes
from ridgeline.graph.plan import Plan, PlanOp
from ridgeline.graph.roofline import roofline
from ridgeline.models.description import Description

LAUNCH_SECONDS = 2e-6
"""Of a kernel within a CUDA graph: the gap to the one before it."""

ASSUMPTIONS = (
    "weights and cache come from memory once a step and activations stay in the L2 cache",
    "memory and tensor cores reach their datasheet rates and overlap within an operator, not between operators",
    f"each launch adds {LAUNCH_SECONDS * 1e6:.0f} us; nothing has been timed on a GPU",
)


@dataclass(frozen=True)
class PassLine:
    """A pass and what it saves of one decoded token.

    Attributes:
        operators: fewer than before; saved_bytes: not read or written any more.
    """

    name: str
    before: int
    after: int
    saved_bytes: float


@dataclass(frozen=True)
class OpLine:
    """One kind of operator in a step: all of them that read weights of one shape.

    Attributes:
        count: how many there are.
        launches: kernels that they are, in all; 0: not a GPU's.
        kernel, reason: what runs it and why.
        cost: of all of them; seconds: their roofline, launches included.
        binds: "memory", "compute" or "launch".
    """

    name: str
    count: int
    launches: int
    kernel: str
    reason: str
    cost: Cost
    seconds: float
    binds: str


@dataclass(frozen=True)
class Memory:
    """Bytes on a device.

    Attributes:
        total: of the device; 0: not known.
        cache_per_token: keys and values of one token in all layers.
        workspace: what kernels use one after another, and what steps bring.
    """

    total: int
    weights: int
    arena: int
    workspace: int
    cache_per_token: int

    @property
    def free(self) -> int:
        """What is left for the cache."""
        return self.total - GPU_RESERVED - self.weights - self.arena - self.workspace

    def cache(self, batch: int, context: int) -> int:
        """Of ``batch`` requests at ``context`` tokens."""
        return batch * context * self.cache_per_token

    def largest_batch(self, context: int) -> int:
        """Requests of ``context`` tokens that fit at once."""
        return max(0, self.free // (context * self.cache_per_token))


def pass_lines(plan: Plan, context: int) -> list[PassLine]:
    """The passes of a plan, by what each saves a decoded token at a context."""
    load = Load.of([(context - 1, 1)])
    lines = []
    for report in plan.reports:
        saved = report.saved(load)
        moved = saved.bytes_read + saved.bytes_written
        lines.append(PassLine(report.name, len(report.before.nodes), len(report.after.nodes), moved))
    return lines


def op_lines(plan: Plan, load: Load, peaks: Peaks, launched: dict[str, tuple[int, str, str]] | None) -> list[OpLine]:
    """Operators of a step, those of one label together, in the order they first run.

    Args:
        launched: by label, a GPU's launches of one operator, its kernel and why; None on a CPU, which has none.
    """
    groups: dict[str, list[PlanOp]] = {}
    for op in (op for segment in plan.segments for op in segment.ops):
        groups.setdefault(op.label, []).append(op)
    lines = []
    for label, ops in groups.items():
        launches, kernel, reason = (launched or {}).get(label, (0, "", ""))
        cost = Cost()
        seconds = waits = 0.0
        for op in ops:
            one = op.cost(load)
            bound = roofline(one, peaks)
            cost, seconds, waits = cost.plus(one), seconds + bound.seconds, waits + launches * LAUNCH_SECONDS
        binds = "launch" if waits > seconds else roofline(cost, peaks).binds
        lines.append(OpLine(label, len(ops), launches * len(ops), kernel, reason, cost, seconds + waits, binds))
    return lines


def check_fits(memory: Memory, model: Description, config: EngineConfig, batch: int, context: int, device: str) -> None:
    """Raises ConfigError, naming the smallest change that helps, for a model that a device has no room for."""
    needed = memory.cache(batch, context)
    if needed <= memory.free:
        return
    short = needed - memory.free
    raise ConfigError(
        f"{model.name} does not fit {device}: weights {gib(memory.weights)}, arena {gib(memory.arena)}, workspace "
        f"{gib(memory.workspace)} and a cache of {gib(needed)} for {batch} requests at {context} tokens are "
        f"{gib(short)} too much for {gib(memory.total)}. The smallest change: "
        + _smallest(memory, model, batch, context)
    )


def _smallest(memory: Memory, model: Description, batch: int, context: int) -> str:
    """What makes it fit, the least painful first: fewer requests, a shorter context, a smaller cache, fewer bits."""
    fewer = memory.largest_batch(context)
    if fewer >= 1:
        return f"at most {fewer} requests (--batch {fewer})"
    shorter = max(0, memory.free) // (batch * memory.cache_per_token)
    if shorter >= 256:
        return f"a context of {shorter // 256 * 256} tokens (--context {shorter // 256 * 256})"
    for stored in ("q8_0", "q4_0"):
        less = model.weight_bytes - model.stored_as(stored).weight_bytes
        if less > 0 and memory.cache(batch, context) <= memory.free + less:
            return f"weights in {stored}, {gib(less)} less (--weights {stored})"
    return "a device with more memory, or several (tensor parallelism is not built yet)"


def cache_per_token(plan: Plan) -> int:
    """Bytes of one token's keys and values in all layers."""
    return sum(len(c.layers) * 2 * c.num_kv_heads * kv_row_bytes(c.dtype, c.head_dim) for c in plan.caches)


def device_memory(name: str) -> int:
    """Bytes of a device; raises ConfigError for one that is not known."""
    if name not in MEMORY:
        raise ConfigError(f"no device is called {name}: cpu, {', '.join(MEMORY)}")
    return MEMORY[name]


def step_seconds(lines: Sequence[OpLine]) -> float:
    """Of all operators, one after another."""
    return sum(line.seconds for line in lines)


def gib(count: float) -> str:
    """Bytes as text."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"
