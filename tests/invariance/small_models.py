"""Small random models on the native executor, of every format, cache dtype and shape between them."""

from __future__ import annotations

from functools import cache
from typing import Any

from graph.small_llama import config, random_weights

from ridgeline.backends.cpu import _native
from ridgeline.backends.cpu.executor import CpuExecutor
from ridgeline.backends.cpu.lowering import plan_target
from ridgeline.graph.plan import Plan, compile
from ridgeline.graph.target import Target
from ridgeline.models import llama
from ridgeline.models.load import Weight

WAYS = _native.available_isas()
if "amx" in WAYS:
    WAYS.append("amx int8")
"""Instruction sets here, and int8 activations where bf16 is what large batches take."""
SLOTS, BLOCKS, MAX_TOKENS, MAX_ROWS = 6, 44, 700, 24  # BLOCKS: of 16 tokens, for each slot

# Weight format, exceptions by weight, cache dtype, config: between them every format and dtype, grouped and plain
# queries, tied and untied heads, merged and unmerged projections.
MODELS: dict[str, tuple[str, dict[str, str], str, dict[str, Any]]] = {
    "q4_1": ("q4_1", {}, "bf16", {"num_heads": 6}),
    "q8_0-f16": ("q8_0", {"embed": "f16"}, "f16", {"tied": False, "intermediate_size": 160}),
    "q4_0-f32": ("q4_0", {}, "f32", {"num_kv_heads": 4, "head_dim": 96}),
    "bf16": ("bf16", {}, "bf16", {"num_heads": 8, "num_kv_heads": 1, "head_dim": 64, "intermediate_size": 80}),
    "f32": ("f32", {}, "bf16", {"num_heads": 3, "num_kv_heads": 1, "head_dim": 48}),
    "q8_0, heads of 48": ("q8_0", {}, "bf16", {"num_heads": 2, "num_kv_heads": 1, "head_dim": 48, "hidden_size": 96}),
    "q8_0-int8": ("q8_0", {}, "int8", {"num_heads": 6, "head_dim": 64}),
    "bf16-int8": ("bf16", {}, "int8", {"num_heads": 8, "num_kv_heads": 1, "head_dim": 48}),
    "q8_0, v apart": ("q8_0", {"v": "f16"}, "bf16", {}),  # only every second norm has a lone linear behind it
    "mixed": ("q8_0", {"v": "f16", "up": "bf16", "lm_head": "f32"}, "bf16", {"tied": False}),
}


def target_of(kv_dtype: str, way: str) -> Target:
    """What plans that run in one of WAYS are compiled for."""
    isa, _, activation_dtype = way.partition(" ")
    return plan_target(kv_dtype, isa, activation_dtype or "auto")


@cache
def model_of(name: str, way: str) -> tuple[Plan, dict[str, Weight]]:
    """A small random model, compiled."""
    fmt, override, kv_dtype, changes = MODELS[name]
    cfg = config(**{"context_length": 1024, "head_dim": 32, **changes})
    weights = random_weights(cfg, fmt, seed=len(name), override=override)
    formats = {n: w.tensor.format for n, w in weights.items()}
    graph = llama.build(cfg, formats, max_tokens=MAX_TOKENS, max_rows=MAX_ROWS, kv_dtype=kv_dtype, block_size=16)
    return compile(graph, target_of(kv_dtype, way)), weights


def executor(name: str, way: str, threads: int) -> CpuExecutor:
    """A small random model on the native executor."""
    plan, weights = model_of(name, way)
    size = {"num_slots": SLOTS, "num_blocks": [SLOTS * BLOCKS], "max_blocks_per_slot": BLOCKS}
    return CpuExecutor(plan, weights, **size, threads=threads, isa=way.split()[0])
