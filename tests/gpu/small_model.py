"""A model small enough to be interpreted, on the CUDA executor over the emulated device and on the reference."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from ridgeline.backends.cuda.emulated import EmulatedDevice
from ridgeline.backends.cuda.executor import CudaExecutor
from ridgeline.backends.reference.executor import ReferenceExecutor
from ridgeline.graph.ir import Graph
from ridgeline.graph.plan import Plan, compile
from ridgeline.graph.target import cuda_target
from ridgeline.models import llama
from ridgeline.models.load import Weight
from tests.graph.small_llama import config, random_weights

SIZES: dict[str, Any] = {"num_slots": 4, "num_blocks": [40], "max_blocks_per_slot": 20}


@cache
def model(fmt: str, kv_dtype: str, hidden: str = "bf16", layers: int = 2) -> tuple[Graph, Plan, dict[str, Weight]]:
    """Two layers of hidden size 128, grouped queries: the naive graph, the plan and the weights."""
    cfg = config(hidden_size=128, intermediate_size=192, head_dim=32, vocab_size=160, num_layers=layers)
    weights = random_weights(cfg, fmt, seed=5)
    formats = {name: w.tensor.format for name, w in weights.items()}
    graph = llama.build(cfg, formats, max_tokens=32, max_rows=8, kv_dtype=kv_dtype, block_size=16)
    return graph, compile(graph, cuda_target(kv_dtype, hidden)), weights


def executor(
    fmt: str = "bf16", kv_dtype: str = "bf16", seed: int = 0, arch: str = "sm_90", **more: Any
) -> CudaExecutor:
    """The small model on the emulated device; ``seed`` draws the order in which its streams run."""
    _, plan, weights = model(fmt, kv_dtype, **more)
    return CudaExecutor(plan, weights, EmulatedDevice(arch, seed), **SIZES)


def reference(graph: Graph | Plan, weights: dict[str, Weight], dtype: Any = np.float32) -> ReferenceExecutor:
    """The same model in numpy."""
    return ReferenceExecutor(graph, weights, **SIZES, dtype=dtype)
