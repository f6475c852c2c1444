"""Give activations the dtype that a target keeps them in: each operator then rounds what it stores.

Halves the bytes of every activation (bf16 and f16), and is what 16-bit tensor cores read. The logits stay float32:
sampling sees what the last product summed.
"""

from __future__ import annotations

from dataclasses import replace

from ridgeline.graph.ir import Graph, Value


def run(graph: Graph, hidden: str) -> Graph:
    """``hidden``: "bf16" or "f16"; every float32 value of two dimensions becomes that, outputs excepted."""
    outputs = set(graph.outputs.values())
    becomes: dict[Value, Value] = {}
    for node in graph.nodes:
        for value in node.outputs:
            if value.dtype == "f32" and len(value.shape) == 2 and value not in outputs:
                becomes[value] = replace(value, dtype=hidden)
    nodes = tuple(
        replace(
            node,
            inputs=tuple(becomes.get(v, v) for v in node.inputs),
            outputs=tuple(becomes.get(v, v) for v in node.outputs),
        )
        for node in graph.nodes
    )
    return replace(graph, nodes=nodes)
