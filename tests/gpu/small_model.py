"""A model small enough to be interpreted, on the CUDA executor over the emulated device and on the reference."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from ridgeline.backends.cuda.emulated import EmulatedDevice
from ridgeline.backends.cuda.executor import CudaExecutor
from ridgeline.backends.reference.executor import ReferenceExecutor
from ridgeline.graph.ir import Graph, Node, Value
from ridgeline.graph.plan import Plan, compile
from ridgeline.graph.target import cuda_target
from ridgeline.models import llama
from ridgeline.models.load import Weight
from tests.graph.small_llama import config, random_weights

SIZES: dict[str, Any] = {"num_slots": 4, "num_blocks": [40], "max_blocks_per_slot": 20}


@cache
def model(
    fmt: str,
    kv_dtype: str,
    hidden: str = "bf16",
    layers: int = 2,
    windows: tuple[int, ...] = (),
    others: tuple[tuple[str, str], ...] = (),
    changes: tuple[tuple[str, Any], ...] = (),
) -> tuple[Graph, Plan, dict[str, Weight]]:
    """Hidden size 128, grouped queries: the naive graph, the plan and the weights.

    Args:
        windows: of each layer, 0 for none; layers of the same share a cache group. Empty: no windows, one group.
        others: formats of weights that are not in ``fmt``, by the last part of their name.
        changes: of the model's configuration.
    """
    sizes = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 32, "vocab_size": 160, "num_layers": layers}
    cfg = config(**{**sizes, **dict(changes)})
    weights = random_weights(cfg, fmt, seed=5, override=dict(others))
    formats = {name: w.tensor.format for name, w in weights.items()}
    graph = llama.build(cfg, formats, max_tokens=32, max_rows=8, kv_dtype=kv_dtype, block_size=16)
    graph = windowed(graph, windows) if windows else graph
    return graph, compile(graph, cuda_target(kv_dtype, hidden)), weights


def windowed(graph: Graph, windows: tuple[int, ...]) -> Graph:
    """The graph with a window for each of its layers' attention, and a cache group for each window."""
    (whole,) = graph.caches
    groups = list(dict.fromkeys(windows))
    layers = [[i for i, w in enumerate(windows) if w == window] for window in groups]
    changed: dict[Value, Value] = {}

    def new(value: Value) -> Value:
        if value.cache is None:
            return value
        if value not in changed:
            layer = value.cache.layer
            group = groups.index(windows[layer])
            info = replace(value.cache, group=group, layer=layers[group].index(layer))
            changed[value] = replace(value, cache=info)
        return changed[value]

    def node(old: Node) -> Node:
        attrs = dict(old.attrs)
        if old.op == "attention":
            cache = old.inputs[1].cache
            assert cache is not None
            attrs["window"] = windows[cache.layer] or None
        return Node(old.op, tuple(map(new, old.inputs)), tuple(map(new, old.outputs)), attrs)

    each = whole.bytes_per_token // len(windows)
    specs = tuple(
        replace(whole, layers=tuple(own), kind="window" if w else "full", bytes_per_token=each * len(own))
        for w, own in zip(groups, layers, strict=True)
    )
    ends = ({name: new(v) for name, v in named.items()} for named in (graph.inputs, graph.outputs))
    return Graph(tuple(map(node, graph.nodes)), *ends, graph.weights, specs, graph.next_id)


def sizes_for(plan: Graph | Plan) -> dict[str, Any]:
    """What executors of a plan hold: as many blocks in each of its cache groups."""
    return SIZES | {"num_blocks": SIZES["num_blocks"] * len(plan.caches)}


def executor(
    fmt: str = "bf16",
    kv_dtype: str = "bf16",
    seed: int = 0,
    arch: str = "sm_90",
    batch_invariant: bool = True,
    **more: Any,
) -> CudaExecutor:
    """The small model on the emulated device; ``seed`` draws the order in which its streams run."""
    _, plan, weights = model(fmt, kv_dtype, **more)
    device = EmulatedDevice(arch, seed)
    return CudaExecutor(plan, weights, device, batch_invariant=batch_invariant, **sizes_for(plan))


def reference(graph: Graph | Plan, weights: dict[str, Weight], dtype: Any = np.float32) -> ReferenceExecutor:
    """The same model in numpy."""
    return ReferenceExecutor(graph, weights, **sizes_for(graph), dtype=dtype)
