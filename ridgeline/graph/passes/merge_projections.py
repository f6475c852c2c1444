"""Merge linears that read the same value.

gate and up of an MLP become one linear of interleaved rows (16 of gate, 16 of up, alternating), so that
silu(gate) * up can be its epilogue; q, k and v become one linear of concatenated rows. Where storage
formats differ the linears stay and a ``concat`` joins their results, so that later fusions apply either
way. Saves two passes over the input, and the barriers between small linears.
"""

from __future__ import annotations

from ridgeline.graph.ir import INTERLEAVE, Graph, Node, Value
from ridgeline.graph.rewrite import Rewriter


def run(graph: Graph) -> Graph:
    """Merges gate/up pairs first, then what else shares an input."""
    edit = Rewriter(graph)
    groups: dict[Node, tuple[list[Node], int]] = {}  # every member -> its group in order, interleave
    taken: set[Node] = set()
    for node in graph.nodes:
        pair = _gate_up(edit, node) if node.op == "mul" else None
        if pair is not None:
            taken.update(pair)
            if _mergeable(edit, pair) and _rows(pair[0]) == _rows(pair[1]) and _rows(pair[0]) % INTERLEAVE == 0:
                groups.update({member: (pair, INTERLEAVE) for member in pair})
    by_input: dict[Value, list[Node]] = {}
    for node in graph.nodes:
        if node.op == "linear" and node not in taken:
            by_input.setdefault(node.inputs[0], []).append(node)
    groups.update({m: (members, 0) for members in by_input.values() if len(members) > 1 for m in members})

    done: set[Node] = set()
    for node in graph.nodes:
        if node not in groups:
            edit.keep(node)
        elif node not in done:
            members, interleave = groups[node]
            done.update(members)
            _merge(edit, members, interleave)
    return edit.finish()


def _gate_up(edit: Rewriter, mul: Node) -> list[Node] | None:
    """[gate, up] linears of one input when ``mul`` is silu(gate) * up."""
    for a, b in (mul.inputs, mul.inputs[::-1]):
        silu, up = edit.made_by(a, "silu"), edit.made_by(b, "linear")
        gate = edit.made_by(silu.inputs[0], "linear") if silu else None
        if silu is None or gate is None or up is None or gate.inputs[0] is not up.inputs[0]:
            continue
        if gate is not up:
            return [gate, up]
    return None


def _rows(linear: Node) -> int:
    rows = linear.inputs[1].shape[0]
    assert isinstance(rows, int)
    return rows


def _mergeable(edit: Rewriter, members: list[Node]) -> bool:
    """One storage format, and no weight read elsewhere (a tied embedding keeps its own copy)."""
    weights = [m.inputs[1] for m in members]
    alone = all(edit.only_consumer(w) for w in weights)
    return alone and len({w.info.format for w in weights}) == 1


def _merge(edit: Rewriter, members: list[Node], interleave: int) -> None:
    x = members[0].inputs[0]
    if interleave or _mergeable(edit, members):
        weight = edit.merged_weight([m.inputs[1] for m in members], interleave)
        (whole,) = edit.emit("linear", (x, weight), {})
    else:
        parts = [edit.emit("linear", (x, m.inputs[1]), m.attrs)[0] for m in members]
        (whole,) = edit.emit("concat", parts, {})
    sizes = tuple(_rows(m) for m in members)
    for member, part in zip(
        members, edit.emit("split", (whole,), {"sizes": sizes, "interleave": interleave}), strict=True
    ):
        edit.alias(member.outputs[0], part)
