"""Add the residual and norm the sum in one walk. Saves reading the sum back, and one operator."""

from __future__ import annotations

from ridgeline.graph.ir import Graph, Node
from ridgeline.graph.rewrite import Rewriter


def run(graph: Graph) -> Graph:
    """Rewrites rms_norm(a + b, w); the sum stays available to its other readers."""
    edit = Rewriter(graph)
    fused: set[Node] = set()
    for node in graph.nodes:
        norm = _norm_of(edit, node) if node.op == "add" else None
        if norm is not None:
            total, y = edit.emit("add_rms_norm", (*node.inputs, norm.inputs[1]), norm.attrs)
            edit.alias(node.outputs[0], total)
            edit.alias(norm.outputs[0], y)
            fused.add(norm)
        elif node not in fused:
            edit.keep(node)
    return edit.finish()


def _norm_of(edit: Rewriter, add: Node) -> Node | None:
    """The first norm that reads the sum; its weight is there from the start, so it may run earlier."""
    total = add.outputs[0]
    for reader in edit.consumers.get(total, []):
        if reader.op == "rms_norm" and reader.inputs[0] is total:
            return reader
    return None
