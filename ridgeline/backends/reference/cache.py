"""The paged KV cache, and where a step's tokens lie in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.backends.reference.numerics import Array, fixed_point, rounded
from ridgeline.core.types import Batch, Int32


@dataclass(frozen=True)
class PagedCache:
    """Keys and values of one layer.

    Attributes:
        group: which block tables it goes by.
        dtype: what numbers are rounded to when written.
        k, v: [num_blocks, block_size, num_kv_heads, head_dim].
    """

    group: int
    dtype: str
    k: Array
    v: Array

    @classmethod
    def empty(
        cls,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: str,
        group: int = 0,
        compute: Any = np.float32,
    ) -> PagedCache:
        """A cache of NaN: what was never written must never matter."""
        shape = (num_blocks, block_size, num_kv_heads, head_dim)
        return cls(group, dtype, np.full(shape, np.nan, compute), np.full(shape, np.nan, compute))


@dataclass(frozen=True)
class StepContext:
    """The parts of a ``Batch`` that cache operators read.

    Attributes:
        positions: [T]; slots: [B]; query_starts: [B + 1]; context_lens: [B].
        block_tables: per cache group [num_slots, max_blocks] block ids.
    """

    positions: Int32
    slots: Int32
    query_starts: Int32
    context_lens: Int32
    block_tables: list[Int32]

    @classmethod
    def of(cls, batch: Batch, block_tables: list[Int32]) -> StepContext:
        """A batch's, with tables that hold its ``block_updates`` already."""
        return cls(batch.positions, batch.slots, batch.query_starts, batch.context_lens, block_tables)

    def token_slots(self) -> npt.NDArray[np.int64]:
        """Slot of each token: [T]."""
        return np.repeat(self.slots, np.diff(self.query_starts)).astype(np.int64)


def copy_blocks(cache: PagedCache, copies: Int32) -> None:
    """Copies whole blocks in place: ``copies`` is [N, 2], source and destination ids, all read before any is written.

    Raises ValueError when a destination is also another copy's destination or a source.
    """
    source, destination = copies[:, 0], copies[:, 1]
    if len({*destination.tolist()} | {*source.tolist()}) != len(destination) + len({*source.tolist()}):
        raise ValueError("a block that is copied to may be no other copy's source or destination")
    cache.k[destination], cache.v[destination] = cache.k[source], cache.v[source]


def _stored(x: Array, dtype: str) -> Array:
    """Keys or values [T, num_kv_heads, head_dim] as the cache keeps them; int8 has a scale per token and head."""
    return fixed_point(x, 127) if dtype == "int8" else rounded(x, dtype)


def write(cache: PagedCache, k: Array, v: Array, context: StepContext) -> PagedCache:
    """Stores each token's keys and values ([T, num_kv_heads * head_dim]), rounded, in place."""
    size, shape = cache.k.shape[1], (len(k), *cache.k.shape[2:])
    positions = context.positions.astype(np.int64)
    blocks = context.block_tables[cache.group][context.token_slots(), positions // size]
    cache.k[blocks, positions % size] = _stored(k.reshape(shape), cache.dtype)
    cache.v[blocks, positions % size] = _stored(v.reshape(shape), cache.dtype)
    return cache


def read(cache: PagedCache, slot: int, length: int, context: StepContext) -> tuple[Array, Array]:
    """Keys and values of a slot's first ``length`` tokens: [length, num_kv_heads, head_dim] each."""
    size = cache.k.shape[1]
    blocks = context.block_tables[cache.group][slot, : -(-length // size)]
    k = cache.k[blocks].reshape(-1, *cache.k.shape[2:])[:length]
    v = cache.v[blocks].reshape(-1, *cache.v.shape[2:])[:length]
    return k, v
