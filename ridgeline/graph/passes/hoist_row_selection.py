"""Select the sampled rows as early as possible.

The model computes logits of every token and picks the sampled rows; whatever lies between the last
attention and the logits need only be computed for those rows. Saves, for every token not sampled: the LM
head, the final norm, the last layer's MLP and output projection.
"""

from __future__ import annotations

from ridgeline.graph.ir import Graph, Node, Value
from ridgeline.graph.ops import OPS
from ridgeline.graph.rewrite import Rewriter


def run(graph: Graph) -> Graph:
    """Moves every ``select_rows`` up through row-wise operators that only it reads."""
    for node in graph.nodes:
        if node.op == "select_rows":
            graph = _hoist(graph, node)
    return graph


def _hoist(graph: Graph, select: Node) -> Graph:
    edit = Rewriter(graph)
    cone = _cone(edit, select)
    rows = select.inputs[1]
    selected: dict[Value, Value] = {}

    def row(value: Value) -> Value:
        """The selected rows of an old value (weights stay whole)."""
        if value.dtype == "weight":
            return value
        if value not in selected:
            selected[value] = edit.emit("select_rows", (value, rows), {})[0]
        return selected[value]

    for node in graph.nodes:
        if node in cone:
            outputs = edit.emit(node.op, [row(v) for v in node.inputs], node.attrs)
            selected.update(zip(node.outputs, outputs, strict=True))
        elif node is select:
            edit.alias(select.outputs[0], row(select.inputs[0]))
        else:
            edit.keep(node)
    return edit.finish()


def _cone(edit: Rewriter, select: Node) -> set[Node]:
    """Row-wise nodes whose every reader is in the cone or is ``select`` itself."""
    cone: set[Node] = set()
    for node in reversed(edit.graph.nodes):
        readers = [r for out in node.outputs for r in edit.consumers.get(out, [])]
        free = not any(out in edit.outputs for out in node.outputs)
        if free and readers and OPS[node.op].row_wise and all(r is select or r in cone for r in readers):
            cone.add(node)
    return cone
