"""The passes, in the order they run, and what each one saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ridgeline.graph.cost import Cost, Load, total
from ridgeline.graph.ir import Graph
from ridgeline.graph.ops import OPS
from ridgeline.graph.passes import (
    dead_code,
    fuse_add_norm,
    fuse_quantize,
    fuse_rope_kv_write,
    fuse_silu_mul,
    hoist_row_selection,
    merge_projections,
    narrow_activations,
    quantize_activations,
)
from ridgeline.graph.target import Target

FUSIONS: dict[str, Callable[[Graph], Graph]] = {
    "hoist_row_selection": hoist_row_selection.run,
    "merge_projections": merge_projections.run,
    "fuse_silu_mul": fuse_silu_mul.run,
    "fuse_rope_kv_write": fuse_rope_kv_write.run,
    "fuse_add_norm": fuse_add_norm.run,
}
"""Passes a target may ask for, that leave results unchanged, in order."""


def graph_cost(graph: Graph, load: Load) -> Cost:
    """Cost of one step of a graph, node by node."""
    return total(OPS[n.op].cost(n.inputs, n.outputs, n.attrs, load) for n in graph.nodes)


@dataclass(frozen=True)
class PassReport:
    """A pass that ran: the graph before and after, from which what it saved is reckoned when asked."""

    name: str
    before: Graph
    after: Graph

    @property
    def operators_saved(self) -> int:
        """Operators fewer than before (negative for a pass that inserts some)."""
        return len(self.before.nodes) - len(self.after.nodes)

    def saved(self, load: Load) -> Cost:
        """Cost before less cost after, under ``load``."""
        return graph_cost(self.before, load).plus(graph_cost(self.after, load), -1)

    def describe(self, load: Load) -> str:
        """One line for people."""
        cost = self.saved(load)
        moved = (cost.bytes_read + cost.bytes_written) / 1e6
        return (
            f"{self.name}: {self.operators_saved} operators, {moved:.3f} MB moved, {cost.dot_ops / 1e9:.3f} GOP saved"
        )


def run_passes(graph: Graph, target: Target) -> tuple[Graph, list[PassReport]]:
    """Rewrites a model's naive graph for ``target``."""
    reports: list[PassReport] = []

    def apply(name: str, run: Callable[[Graph], Graph]) -> None:
        nonlocal graph
        before, graph = graph, run(graph)
        reports.append(PassReport(name, before, graph))

    for name, run in FUSIONS.items():
        if name in target.fusions:
            apply(name, run)
    if any(dtype != "f32" for dtype in target.activation.values()):
        apply("quantize_activations", lambda g: quantize_activations.run(g, target.activation))
    if "fuse_quantize" in target.fusions:
        apply("fuse_quantize", fuse_quantize.run)
    apply("dead_code", dead_code.run)
    if target.hidden != "f32":
        apply("narrow_activations", lambda g: narrow_activations.run(g, target.hidden))
    return graph, reports
