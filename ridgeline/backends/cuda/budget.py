"""What of a device's memory the cache may have: all that a plan's own byte counts leave."""

from __future__ import annotations

from dataclasses import dataclass

from ridgeline.backends.cuda.choices import weights_bytes, workspace_bytes
from ridgeline.backends.cuda.executor import MOST_OPEN
from ridgeline.backends.cuda.kernels.top_logprobs import MOST
from ridgeline.backends.cuda.memory import Limits
from ridgeline.backends.cuda.step import Layout
from ridgeline.core.errors import ConfigError
from ridgeline.core.hardware import GPU_RESERVED
from ridgeline.graph.ir import bound, kv_row_bytes
from ridgeline.graph.plan import Plan


@dataclass(frozen=True)
class Budget:
    """Bytes that are not the cache's.

    Attributes:
        weights, arena, workspace: as the executor will allocate them.
        steps: inputs and results of the steps under way, block tables, rotary angles.
        asked: what penalties, bias and masks take when every row asks for them; taken then and not before.
        reserved: for the driver, its graphs and the kernels' code.
    """

    weights: int
    arena: int
    workspace: int
    steps: int
    asked: int
    reserved: int = GPU_RESERVED

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.arena + self.workspace + self.steps + self.asked + self.reserved

    def __str__(self) -> str:
        parts = ("weights", "arena", "workspace", "steps", "asked", "reserved")
        return ", ".join(f"{name} {getattr(self, name) / 2**20:,.0f} MiB" for name in parts)


def budget_of(plan: Plan, arch: str, limits: Limits, context: int) -> Budget:
    """The budget of an executor; ``context``: tokens of the longest sequence, in whole blocks."""
    vocab, rows = bound(plan.outputs["logits"].shape[1]), limits.rows
    head_dim = max(cache.head_dim for cache in plan.caches)
    tables = 4 * limits.num_slots * limits.max_blocks_per_slot * len(plan.caches)
    results = 4 * rows * (3 + 2 * MOST)
    return Budget(
        weights=weights_bytes(plan),
        arena=plan.arena_bytes,
        workspace=workspace_bytes(plan, arch, context, limits.num_slots),
        steps=(1 + MOST_OPEN) * (Layout(limits.largest).nbytes + (1 << 12)) + results + tables + 4 * context * head_dim,
        # Counts and bias, masks, and logits kept for masks of every open step; memory that grows is doubled.
        asked=2 * 4 * rows * vocab * (2 + MOST_OPEN) + 2 * rows * vocab // 8,
    )


def cache_blocks(plan: Plan, arch: str, limits: Limits, context: int, free: int) -> int:
    """Blocks of every cache group that fit in ``free`` bytes beside everything else.

    Raises ConfigError when there is no room for two tokens.
    """
    block = sum(
        len(c.layers) * 2 * c.num_kv_heads * kv_row_bytes(c.dtype, c.head_dim) * c.block_size for c in plan.caches
    )
    budget = budget_of(plan, arch, limits, context)
    blocks = max(0, free - budget.total) // block
    if blocks * min(c.block_size for c in plan.caches) < 2:
        raise ConfigError(
            f"the GPU has {free / 2**20:,.0f} MiB free and {budget.total / 2**20:,.0f} MiB are spoken for ({budget}): "
            "no room for a cache; lower max_num_batched_tokens, max_num_seqs or max_model_len, or take a model in "
            "fewer bits"
        )
    return int(blocks)
