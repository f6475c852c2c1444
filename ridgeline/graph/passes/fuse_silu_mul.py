"""silu(gate) * up in one step: as the epilogue of the merged gate/up linear, else as one operator.

Saves writing and reading gate and up, and silu(gate).
"""

from __future__ import annotations

from ridgeline.graph.ir import Graph, Node, Value
from ridgeline.graph.rewrite import Rewriter


def run(graph: Graph) -> Graph:
    """Rewrites every mul(silu(a), b), in either order."""
    edit = Rewriter(graph)
    for node in graph.nodes:
        found = _match(edit, node) if node.op == "mul" else None
        if found is None:
            edit.keep(node)
            continue
        gate, up = found
        linear = _merged_linear(edit, gate, up)
        if linear is not None:
            edit.replace(node, "linear", linear.inputs, {**linear.attrs, "epilogue": "silu_mul"})
        else:
            edit.replace(node, "silu_mul", (gate, up), {})
    return edit.finish()


def _match(edit: Rewriter, mul: Node) -> tuple[Value, Value] | None:
    for a, b in (mul.inputs, mul.inputs[::-1]):
        silu = edit.made_by(a, "silu")
        if silu is not None and edit.only_consumer(a):
            return silu.inputs[0], b
    return None


def _merged_linear(edit: Rewriter, gate: Value, up: Value) -> Node | None:
    """The interleaved linear whose two halves these are, if nothing else reads them."""
    split = edit.made_by(gate, "split")
    if split is None or not split.attrs["interleave"] or split.outputs != (gate, up):
        return None
    alone = all(edit.only_consumer(v) for v in (gate, up, split.inputs[0]))
    linear = edit.made_by(split.inputs[0], "linear")
    return linear if alone and linear is not None and linear.attrs["epilogue"] is None else None
