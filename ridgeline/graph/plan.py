"""From a model's graph to what a backend runs: segments of operators with their buffers resolved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ridgeline.graph.cost import Cost, Load, total
from ridgeline.graph.ir import CacheSpec, Dim, Graph, Node, Value, bound, row_bytes
from ridgeline.graph.memory import Lifetime, place, row_stride
from ridgeline.graph.ops import OPS
from ridgeline.graph.passes import PassReport, run_passes
from ridgeline.graph.target import Target


@dataclass(frozen=True, eq=False)
class PlanOp:
    """One operator call; activations live in ``Plan.buffers``, weights and caches with the backend."""

    op: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    attrs: Mapping[str, Any]

    def cost(self, load: Load) -> Cost:
        """Operations and bytes of this call under ``load``."""
        return OPS[self.op].cost(self.inputs, self.outputs, self.attrs, load)

    @property
    def label(self) -> str:
        """The operator, and of which projection or norm: the same in every layer ("linear q+k+v")."""
        weight = next((v for v in self.inputs if v.dtype == "weight"), None)
        if weight is None:
            return self.op
        return f"{self.op} {'+'.join(part.rsplit('.', 1)[-1] for part in weight.info.parts)}"

    @property
    def layer(self) -> int | None:
        """Of its cache or weights ("layers.3.attn.q"); None: they say nothing of one."""
        for value in self.inputs:
            if value.cache is not None:
                return value.cache.layer
            if value.dtype == "weight":
                first, *rest = value.info.parts[0].split(".")
                return int(rest[0]) if first == "layers" and rest and rest[0].isdigit() else None
        return None


@dataclass(frozen=True)
class Segment:
    """Operators run one after another with nothing of the host in between."""

    ops: tuple[PlanOp, ...]


@dataclass(frozen=True)
class Buffer:
    """A value's place in the arena.

    Attributes:
        offset: bytes from the arena's start, a multiple of 64.
        row_bytes: distance between rows: a multiple of 64, but for vectors (``positions``), which are dense.
        rows: the symbol or number of rows; the arena has room for its bound.
    """

    offset: int
    row_bytes: int
    rows: Dim


@dataclass(frozen=True, eq=False)
class Plan:
    """A compiled graph.

    Attributes:
        segments: one, until there are collectives.
        buffers: by ``Value.id``, for every activation, the named inputs and the logits.
        arena_bytes: size of the arena at the bounds of T and S.
        inputs, outputs: the graph's, by name ("token_ids", "positions", "sample_rows"; "logits").
        weights: by name; a merged weight's name joins those of its parts with "+".
        reports: what each pass saved.
    """

    target: Target
    graph: Graph
    segments: tuple[Segment, ...]
    buffers: Mapping[int, Buffer]
    arena_bytes: int
    caches: tuple[CacheSpec, ...]
    weights: Mapping[str, Value]
    inputs: Mapping[str, Value]
    outputs: Mapping[str, Value]
    reports: tuple[PassReport, ...]

    def cost(self, load: Load) -> Cost:
        """Cost of one step: the sum over its operators."""
        return total(op.cost(load) for segment in self.segments for op in segment.ops)


def compile(graph: Graph, target: Target) -> Plan:
    """Fuses a graph for ``target`` and lays its values out.

    Raises ValueError when the graph's caches do not hold the target's dtype.
    """
    for spec in graph.caches:
        if spec.dtype != target.kv_dtype:
            raise ValueError(f"the graph's cache holds {spec.dtype}, target {target.name} wants {target.kv_dtype}")
    graph, reports = run_passes(graph, target)
    ops = tuple(PlanOp(n.op, n.inputs, n.outputs, n.attrs) for n in graph.nodes)
    buffers, arena_bytes = plan_memory(graph, target.in_place)
    return Plan(
        target,
        graph,
        (Segment(ops),),
        buffers,
        arena_bytes,
        graph.caches,
        graph.weights,
        graph.inputs,
        graph.outputs,
        tuple(reports),
    )


def final_norm(graph: Graph) -> Node | None:
    """The norm whose rows the LM head multiplies, a model's final hidden states; None: the graph has none such."""
    made = {out: node for node in graph.nodes for out in node.outputs}
    node = made.get(graph.outputs["logits"])
    if node is not None and node.op == "select_rows":
        node = made.get(node.inputs[0])
    if node is None or node.op != "linear":
        return None
    node = made.get(node.inputs[0])
    if node is not None and node.op == "quantize":
        node = made.get(node.inputs[0])
    return node if node is not None and node.op in ("rms_norm", "add_rms_norm") else None


def plan_memory(graph: Graph, in_place: frozenset[str] = frozenset()) -> tuple[dict[int, Buffer], int]:
    """Buffers by value id and the arena's size. Inputs are live from before the first node to their last
    reader, outputs to past the last node, others from their node to their last reader. All live one node longer
    than that: a thread may begin an operator before others have ended the one before.

    An operator ``in_place`` takes the place of its first input, where another such made that and nobody else reads it
    later: each of a chain of sums lies where the first does.
    """
    first: dict[Value, int] = {v: -1 for v in graph.inputs.values() if v.dtype != "cache"}
    last: dict[Value, int] = dict(first)
    for step, node in enumerate(graph.nodes):
        for value in node.inputs:
            if value in first:
                last[value] = step + 1
        for value in node.outputs:
            if value.dtype != "cache":
                first[value], last[value] = step, step + 1
    for value in graph.outputs.values():
        if value in first:
            last[value] = len(graph.nodes)
    stride = {v: row_bytes(v) if len(v.shape) == 1 else row_stride(row_bytes(v)) for v in first}
    start = _chains(graph, in_place, last)
    for value, head in start.items():
        last[head] = max(last[head], last[value])
    lifetimes = {v: Lifetime(first[v], last[v], stride[v] * bound(v.shape[0])) for v in first if v not in start}
    offsets, arena = place(lifetimes)
    return {v.id: Buffer(offsets[start.get(v, v)], stride[v], v.shape[0]) for v in first}, arena


def _chains(graph: Graph, in_place: frozenset[str], last: Mapping[Value, int]) -> dict[Value, Value]:
    """Values that take another's place, and the first of their chain."""
    start: dict[Value, Value] = {}
    made: set[Value] = set()
    kept = set(graph.outputs.values())
    for step, node in enumerate(graph.nodes):
        if node.op not in in_place:
            continue
        before, after = node.inputs[0], node.outputs[0]
        alike = (before.shape, before.dtype) == (after.shape, after.dtype)
        if before in made and before not in kept and last[before] == step + 1 and alike:
            start[after] = start.get(before, before)
        made.add(after)
    return start
