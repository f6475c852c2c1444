"""Let the operator that makes a value also quantize it, when only the quantized form is read.

Saves writing and reading the float32 form, and one operator. A row selection in between passes the
quantized rows through.
"""

from __future__ import annotations

from ridgeline.graph.ir import Q8_GROUP, Graph, Node
from ridgeline.graph.ops import OPS
from ridgeline.graph.rewrite import Rewriter


def run(graph: Graph) -> Graph:
    """Fuses ``quantize`` into norms, attention, silu_mul and the silu_mul linear."""
    edit = Rewriter(graph)
    absorbed: set[Node] = set()
    for node in graph.nodes:
        quantize = _quantize_after(edit, node)
        if quantize is not None:
            edit.replace(node, node.op, node.inputs, {**node.attrs, "quantize": quantize.attrs["to"]})
            absorbed.add(quantize)
        elif node in absorbed:
            edit.alias(node.outputs[0], edit.now(node.inputs[0]))
        else:
            edit.keep(node)
    return edit.finish()


def _quantize_after(edit: Rewriter, node: Node) -> Node | None:
    """The one quantize that reads the last output of ``node``, if ``node`` can do its work."""
    if node.attrs.get("quantize", "absent") is not None:  # set already, or no such attribute
        return None
    if node.op == "linear" and node.attrs["epilogue"] != "silu_mul":  # a whole row is needed per group of 32
        return None
    assert "quantize" in OPS[node.op].attrs
    reader = edit.only_consumer(node.outputs[-1])
    if reader is not None and reader.op == "select_rows":
        reader = edit.only_consumer(reader.outputs[0])
    if reader is None or reader.op != "quantize":
        return None
    # Attention finishes one head at a time: a group of 32 must not lie across two.
    if node.op == "attention" and reader.attrs["to"] == "q8" and node.attrs["head_dim"] % Q8_GROUP:
        return None
    return reader
