"""What passes are written with: walk a graph, keep nodes or emit others in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ridgeline.graph.ir import Graph, Node, Value, WeightInfo
from ridgeline.graph.ops import OPS


class Rewriter:
    """Builds a new graph from an old one.

    A pass goes through ``graph.nodes`` in order and either keeps each node or emits new ones and points
    the old results at them with ``alias``. Nodes left unused disappear in ``finish``.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.producer: dict[Value, Node] = {out: n for n in graph.nodes for out in n.outputs}
        self.consumers: dict[Value, list[Node]] = {}
        for node in graph.nodes:
            for value in node.inputs:
                self.consumers.setdefault(value, []).append(node)
        self.outputs = set(graph.outputs.values())
        self._alias: dict[Value, Value] = {}
        self._nodes: list[Node] = []
        self._weights = dict(graph.weights)
        self._next_id = graph.next_id

    def only_consumer(self, value: Value) -> Node | None:
        """The one node that reads ``value``, or None if there are several or it is an output."""
        readers = self.consumers.get(value, [])
        return readers[0] if len(readers) == 1 and value not in self.outputs else None

    def made_by(self, value: Value, op: str) -> Node | None:
        """The node that produced ``value``, if it is an ``op``."""
        node = self.producer.get(value)
        return node if node is not None and node.op == op else None

    def now(self, value: Value) -> Value:
        """What an old value has become."""
        while value in self._alias:
            value = self._alias[value]
        return value

    def alias(self, old: Value, new: Value) -> None:
        """Readers of ``old`` read ``new`` from here on."""
        self._alias[old] = new

    def emit(self, op: str, inputs: Sequence[Value], attrs: Mapping[str, Any]) -> tuple[Value, ...]:
        """Adds a node; returns its new outputs."""
        spec = OPS[op]
        now = tuple(self.now(v) for v in inputs)
        full = spec.complete(attrs)
        cache = next((v.cache for v in now if v.cache), None)
        outputs = []
        for shape, dtype in spec.infer(now, full):
            name = f"{op}.{self._next_id}"
            outputs.append(Value(self._next_id, name, shape, dtype, cache=cache if dtype == "cache" else None))
            self._next_id += 1
        self._nodes.append(Node(op, now, tuple(outputs), full))
        return tuple(outputs)

    def keep(self, node: Node) -> None:
        """Takes a node over, on what its inputs have become."""
        now = tuple(self.now(v) for v in node.inputs)
        if now == node.inputs:
            self._nodes.append(node)
            return
        same = all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(now, node.inputs, strict=True))
        if same:
            self._nodes.append(replace(node, inputs=now))
            return
        for old, new in zip(node.outputs, self.emit(node.op, now, node.attrs), strict=True):
            self.alias(old, new)

    def replace(self, node: Node, op: str, inputs: Sequence[Value], attrs: Mapping[str, Any]) -> None:
        """Emits ``op`` in place of ``node``, output for output."""
        for old, new in zip(node.outputs, self.emit(op, inputs, attrs), strict=True):
            self.alias(old, new)

    def merged_weight(self, parts: Sequence[Value], interleave: int) -> Value:
        """The concatenation of weights of one format and K along N."""
        names = tuple(name for p in parts for name in p.info.parts)
        name = "+".join(names)
        if name not in self._weights:
            rows = sum(p.shape[0] for p in parts if isinstance(p.shape[0], int))
            info = WeightInfo(parts[0].info.format, names, interleave)
            self._weights[name] = Value(self._next_id, name, (rows, *parts[0].shape[1:]), "weight", weight=info)
            self._next_id += 1
        return self._weights[name]

    def finish(self) -> Graph:
        """The new graph, without nodes and weights nobody reads."""
        outputs = {name: self.now(v) for name, v in self.graph.outputs.items()}
        return prune(
            replace(self.graph, nodes=tuple(self._nodes), outputs=outputs, weights=self._weights, next_id=self._next_id)
        )


def prune(graph: Graph) -> Graph:
    """The graph without nodes that no output needs, and without weights that no node reads."""
    needed = set(graph.outputs.values())
    kept: list[Node] = []
    for node in reversed(graph.nodes):
        if any(out in needed for out in node.outputs):
            needed.update(node.inputs)
            kept.append(node)
    weights = {name: v for name, v in graph.weights.items() if v in needed}
    return replace(graph, nodes=tuple(reversed(kept)), weights=weights)
