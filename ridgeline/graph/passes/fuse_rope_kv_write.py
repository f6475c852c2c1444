"""Rotate q and k and write k and v in one walk over the merged q/k/v rows.

Saves writing and reading the rotated k and the split parts, and two operators a layer.
"""

from __future__ import annotations

from ridgeline.graph.ir import Graph, Node
from ridgeline.graph.rewrite import Rewriter


def run(graph: Graph) -> Graph:
    """Rewrites kv_write(cache, rope(k), v) whose q, k, v are the parts of one split."""
    edit = Rewriter(graph)
    for node in graph.nodes:
        rope_q = _match(edit, node) if node.op == "kv_write" else None
        if rope_q is None:
            edit.keep(node)
            continue
        rope_k = edit.producer[node.inputs[1]]
        split = edit.producer[node.inputs[2]]
        attrs = {
            "num_heads": rope_q.attrs["num_heads"],
            "num_kv_heads": rope_k.attrs["num_heads"],
            "head_dim": rope_k.attrs["head_dim"],
            "theta": rope_k.attrs["theta"],
            "freq_factors": rope_k.attrs["freq_factors"],
        }
        inputs = (split.inputs[0], rope_k.inputs[1], node.inputs[0])
        q, cache = edit.emit("rope_kv_write", inputs, attrs)
        edit.alias(rope_q.outputs[0], q)
        edit.alias(node.outputs[0], cache)
    return edit.finish()


def _match(edit: Rewriter, write: Node) -> Node | None:
    """The rope of q that belongs to this write, if the whole pattern is there."""
    rope_k, split = edit.made_by(write.inputs[1], "rope"), edit.made_by(write.inputs[2], "split")
    if rope_k is None or split is None or split.attrs["interleave"] or len(split.outputs) != 3:
        return None
    q, k, v = split.outputs
    rope_q = edit.only_consumer(q)
    if rope_q is None or rope_q.op != "rope" or rope_k.inputs[0] is not k or write.inputs[2] is not v:
        return None
    same = all(rope_q.attrs[a] == rope_k.attrs[a] for a in ("head_dim", "theta", "freq_factors"))
    alone = all(edit.only_consumer(value) for value in (k, v, write.inputs[1]))
    # The rotated q appears where the write was: nothing may read it before, and its one rightful reader,
    # the attention over this very cache, cannot.
    reader = edit.only_consumer(rope_q.outputs[0])
    after = reader is not None and reader.op == "attention" and reader.inputs[1] is write.outputs[0]
    return rope_q if same and alone and after and rope_q.inputs[1] is rope_k.inputs[1] else None
