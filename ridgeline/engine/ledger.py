"""Where the memory of a loaded model goes, and what its cache can serve."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ridgeline.core.types import Executor
from ridgeline.engine.limits import EngineLimits
from ridgeline.graph.ir import bound
from ridgeline.graph.plan import Plan


@dataclass(frozen=True)
class Ledger:
    """Bytes, and tokens of KV cache.

    Attributes:
        weights_bytes: weights as the backend keeps them.
        cache_bytes: KV cache when all of it is in use; memory is taken as it is used, on a CPU a little ahead.
        arena_bytes: activations of the largest step.
        workspace_bytes: what the backend keeps besides; None where it does not say.
        cache_tokens: tokens that the smallest cache group of full attention holds.
        full_requests: requests of the longest length that fit at once, in whole blocks.
    """

    weights_bytes: int
    cache_bytes: int
    arena_bytes: int
    workspace_bytes: int | None
    cache_tokens: int
    full_requests: int


def make_ledger(plan: Plan, executor: Executor, limits: EngineLimits, backend: str) -> Ledger:
    """The ledger of an engine whose executor runs ``plan``."""
    told: int | None = getattr(executor, "weights_bytes", None)
    if told is not None:
        weights = told
    elif backend == "cpu":
        from ridgeline.backends.cpu.lowering import packed_weight_bytes

        weights = packed_weight_bytes(plan)
    else:
        weights = 4 * sum(int(np.prod([bound(d) for d in v.shape])) for v in plan.weights.values())
    blocks = min(limits.num_blocks)
    return Ledger(
        weights_bytes=weights,
        cache_bytes=sum(
            n * c.bytes_per_token * c.block_size for n, c in zip(limits.num_blocks, plan.caches, strict=True)
        ),
        arena_bytes=plan.arena_bytes,
        workspace_bytes=getattr(executor, "workspace_bytes", None),
        cache_tokens=blocks * limits.block_size,
        full_requests=blocks // -(-limits.max_len // limits.block_size),
    )


def render_ledger(ledger: Ledger) -> str:
    """The ledger as two lines of text, sizes in MiB."""

    def mib(size: int | None) -> str:
        return "not told" if size is None else f"{size / 2**20:,.1f} MiB"

    return (
        f"memory: weights {mib(ledger.weights_bytes)}, KV cache {mib(ledger.cache_bytes)}, "
        f"arena {mib(ledger.arena_bytes)}, workspace {mib(ledger.workspace_bytes)}\n"
        f"KV cache: {ledger.cache_tokens:,} tokens, {ledger.full_requests:,} requests of full length"
    )
