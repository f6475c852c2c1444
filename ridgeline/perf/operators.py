"""Where a step's time goes, as a table: one row for each operator, whatever clock measured it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ridgeline.core.hardware import Peaks
from ridgeline.graph.cost import Cost, Load
from ridgeline.graph.plan import Plan
from ridgeline.graph.roofline import roofline

NEAR = 0.6
"""From this share of its roofline on, an operator is bound by what the roofline says."""
WAITS = 0.3
"""From this share of an operator's time on, its waits are what binds it."""
LOW_OCCUPANCY = 0.25
"""Under this share of a GPU's warps, too few are there to hide the memory's latency."""

ADVICE = {
    "memory": "memory bandwidth: fewer bytes help (a narrower weight or cache format, more requests a step)",
    "compute": "arithmetic at the peak of its kind: fewer or cheaper operations help (a narrower format)",
    "instructions": "instructions that the roofline does not count (unpacking, scales, softmax): a better kernel helps",
    "overhead": "waits between operators (barriers, launches): fewer, larger operators help, or more tokens a step",
    "imbalance": "threads without work while one is still busy: a finer split helps, or an idle machine",
    "occupancy": "too few warps at once to hide latency: fewer registers or less shared memory a block help",
    "host": "Python between steps: more tokens a step help, or steps launched ahead (--max-open-steps 2 on a GPU)",
}
"""What binds, and what that says."""


@dataclass(frozen=True)
class OpRow:
    """One part of a step. Times are seconds a step.

    Attributes:
        kind: "operator"; "runtime": the executor between operators; "host": Python.
        calls: a step.
        bytes, ops: read from memory, and dot-product operations, a step.
        bound: its roofline; limit: "memory" or "compute", whichever that is; "": it has none.
        waiting: until the last thread's work was seen by all (a barrier), or a kernel started.
        imbalance: mean over threads of the time between their end and the last one's.
        occupancy: share of a GPU's warps that were active; None: not measured.
    """

    name: str
    kind: str
    calls: float
    seconds: float
    bytes: float = 0.0
    ops: float = 0.0
    bound: float = 0.0
    limit: str = ""
    waiting: float = 0.0
    imbalance: float = 0.0
    occupancy: float | None = None

    @property
    def gb_s(self) -> float:
        """1e9 bytes a second."""
        return self.bytes / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def gop_s(self) -> float:
        """1e9 operations a second."""
        return self.ops / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def share(self) -> float:
        """Of its roofline."""
        return self.bound / self.seconds if self.seconds else 0.0

    @property
    def binds(self) -> str:
        """A key of ``ADVICE``: what the row's time goes to first."""
        if self.kind != "operator":
            return {"host": "host", "runtime": "overhead"}[self.kind]
        if max(self.waiting, self.imbalance) > WAITS * self.seconds:
            return "overhead" if self.waiting >= self.imbalance else "imbalance"
        if self.limit and self.share >= NEAR:
            return self.limit
        if self.occupancy is not None and self.occupancy < LOW_OCCUPANCY:
            return "occupancy"
        return "instructions"


@dataclass(frozen=True)
class OpTable:
    """A step, part by part.

    Attributes:
        title: "decode, batch 1, context 256".
        seconds: of the step, by a clock around it.
        tokens: computed in it.
        rows: the longest first, within a kind.
        steps: measured, of which ``kept``, the quieter half, are in the table.
        overhead: what the counters add to a step, as a share of it, and between which two shares that lies with
            95% confidence; None: not measured.
        notes: what else a reader should know.
    """

    title: str
    seconds: float
    tokens: int
    rows: tuple[OpRow, ...]
    peaks: Peaks
    steps: int = 1
    kept: int = 1
    overhead: tuple[float, float, float] | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def unattributed(self) -> float:
        """Seconds of the step in no row."""
        return self.seconds - sum(row.seconds for row in self.rows)

    def of_kind(self, kind: str) -> list[OpRow]:
        """Its rows."""
        return [row for row in self.rows if row.kind == kind]

    def total(self, kind: str) -> float:
        """Seconds of all rows of a kind."""
        return sum(row.seconds for row in self.of_kind(kind))

    @property
    def share(self) -> float:
        """Of the roofline of all its operators."""
        return sum(row.bound for row in self.rows) / self.seconds

    @property
    def counts_warps(self) -> bool:
        """Whether occupancy was measured: then there are no threads that wait or are idle."""
        return any(row.occupancy is not None for row in self.rows)

    def verdict(self) -> str:
        """What binds most of the step, as a sentence."""
        spent: dict[str, float] = {}
        for row in self.rows:
            spent[row.binds] = spent.get(row.binds, 0.0) + row.seconds
        if not spent:
            return "nothing was measured"
        worst = max(spent, key=lambda name: spent[name])
        rows = sorted((r for r in self.rows if r.binds == worst), key=lambda r: -r.seconds)
        names = ", ".join(row.name for row in rows[:2])
        return f"{spent[worst] / self.seconds:.0%} of the step is {ADVICE[worst]}; first of all {names}"


def operator_costs(plan: Plan, loads: Sequence[Load], peaks: Peaks) -> dict[str, tuple[Cost, float, str]]:
    """By label, over all its calls under ``loads``: the cost, its roofline in seconds and what binds that."""
    found: dict[str, tuple[Cost, float, str]] = {}
    for op in (op for segment in plan.segments for op in segment.ops):
        for load in loads:
            one = op.cost(load)
            cost, seconds, _ = found.get(op.label, (Cost(), 0.0, ""))
            cost = cost.plus(one)
            found[op.label] = (cost, seconds + roofline(one, peaks).seconds, roofline(cost, peaks).binds)
    return {
        name: (cost, seconds, binds if cost.streamed_bytes or cost.dot_ops else "")
        for name, (cost, seconds, binds) in found.items()
    }


def ordered(rows: Sequence[OpRow]) -> tuple[OpRow, ...]:
    """Operators, then the runtime, then the host, the longest first."""
    kinds = ("operator", "runtime", "host")
    return tuple(sorted(rows, key=lambda row: (kinds.index(row.kind), -row.seconds)))
