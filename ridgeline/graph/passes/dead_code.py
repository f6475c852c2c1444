"""Drop nodes whose results nobody needs (cache writes are needed: they are outputs) and unread weights."""

from __future__ import annotations

from ridgeline.graph.ir import Graph
from ridgeline.graph.rewrite import prune


def run(graph: Graph) -> Graph:
    """See the module."""
    return prune(graph)
