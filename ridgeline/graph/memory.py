"""Places every intermediate value in one arena, by lifetime."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

K = TypeVar("K", bound=Hashable)

ALIGNMENT = 64
"""Bytes; a cache line and an AVX-512 register."""


def align(size: int) -> int:
    """``size`` rounded up to the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def row_stride(size: int) -> int:
    """Bytes between rows of ``size`` bytes: aligned, and no multiple of 1024, or the same column of many rows
    would share a few sets of a cache."""
    stride = align(size)
    return stride + ALIGNMENT if stride % 1024 == 0 else stride


@dataclass(frozen=True)
class Lifetime:
    """A block of ``size`` bytes in use from step ``first`` to step ``last``, both included."""

    first: int
    last: int
    size: int


def place(lifetimes: Mapping[K, Lifetime]) -> tuple[dict[K, int], int]:
    """Offsets such that blocks in use at the same step never overlap, and the arena's size.

    Blocks are placed as they come into use, each in the smallest free gap that holds it (best fit);
    among those that start together the largest goes first. Offsets are multiples of ``ALIGNMENT``.
    """
    offsets: dict[K, int] = {}
    live: list[K] = []
    end = 0
    order = sorted(lifetimes, key=lambda k: (lifetimes[k].first, -lifetimes[k].size))
    for key in order:
        block = lifetimes[key]
        live = [k for k in live if lifetimes[k].last >= block.first]
        offset = _best_gap(((offsets[k], align(lifetimes[k].size)) for k in live), align(block.size), end)
        offsets[key] = offset
        live.append(key)
        end = max(end, offset + align(block.size))
    return offsets, end


def _best_gap(used: Iterable[tuple[int, int]], size: int, end: int) -> int:
    """Start of the smallest gap of at least ``size`` bytes between used (offset, size) blocks."""
    gaps: list[tuple[int, int]] = []  # (size, start)
    cursor = 0
    for offset, length in sorted(used):
        gaps.append((offset - cursor, cursor))
        cursor = max(cursor, offset + length)
    gaps.append((end - cursor, cursor))
    fitting = [gap for gap in gaps if gap[0] >= size]
    return min(fitting)[1] if fitting else cursor
