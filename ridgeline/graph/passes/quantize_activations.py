"""Insert the target's activation quantization before linears, as explicit operators.

Integer weights then multiply int8 activations, bf16 weights bf16 ones. Linears that read the same value
in the same dtype share one. Saves three quarters (half) of the bytes a linear reads of its input, and is
what lets it use the integer (bf16) dot-product units.
"""

from __future__ import annotations

from collections.abc import Mapping

from ridgeline.graph.ir import Graph, Value
from ridgeline.graph.rewrite import Rewriter


def run(graph: Graph, activation: Mapping[str, str]) -> Graph:
    """``activation`` maps a weight format's name to "q8", "bf16" or "f32" (left as it is)."""
    edit = Rewriter(graph)
    done: dict[tuple[Value, str], Value] = {}
    for node in graph.nodes:
        to = activation.get(node.inputs[1].info.format.name, "f32") if node.op == "linear" else "f32"
        if to == "f32" or node.inputs[0].dtype != "f32":
            edit.keep(node)
            continue
        x = node.inputs[0]
        if (x, to) not in done:
            done[x, to] = edit.emit("quantize", (x,), {"to": to})[0]
        edit.replace(node, "linear", (done[x, to], node.inputs[1]), node.attrs)
    return edit.finish()
