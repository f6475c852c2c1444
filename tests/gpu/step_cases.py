"""What surrounds a step: integers moved, so every case is exact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ridgeline.backends.cuda.kernels import step
from ridgeline.backends.cuda.ladder.climb import Climb, Expected


@dataclass(frozen=True)
class StepCase:
    """One kernel at one size.

    Attributes:
        what: the launcher.
        size: of what it goes over.
    """

    what: str
    size: int
    op: str = "step"

    @property
    def name(self) -> str:
        """For test ids."""
        return f"step-{self.what}-{self.size}"


CASES = [
    StepCase(what, size)
    for what, sizes in (
        ("put_cells", (1, 3, 130)),
        ("copy_blocks", (1, 3)),
        ("copy_fp8_blocks", (2,)),
        ("resolve", (1, 7, 129)),
        ("settle", (1, 5, 16)),
        ("adjust", (0, 2, 140)),
    )
    for size in sizes
]


def exactly(tensor: torch.Tensor, truth: np.ndarray[Any, Any]) -> Expected:
    """An output that must be this."""
    return Expected(tensor, truth.astype(np.float64), truth.astype(np.float32), exact=True)


def ints(values: Any) -> torch.Tensor:
    """An int32 tensor."""
    return torch.tensor(np.asarray(values, np.int32))


def _put_cells(rng: np.random.Generator, n: int) -> Climb:
    places = rng.permutation(40 * 9)[:n]
    cells = np.stack([places // 9, places % 9, rng.integers(0, 1 << 20, n)], axis=1)
    table = rng.integers(0, 100, (40, 9))
    given = ints(table)
    table[cells[:, 0], cells[:, 1]] = cells[:, 2]
    return Climb(step.put_cells(ints(cells), given), (exactly(given, table),))


def _copy_blocks(rng: np.random.Generator, n: int, dtype: torch.dtype = torch.float32) -> Climb:
    cache = rng.integers(-16, 17, (2, 9, 3, 8, 50)).astype(np.float32)
    order = rng.permutation(9)
    copies = np.stack([rng.choice(order[n:], n), order[:n]], axis=1)
    given = torch.tensor(cache).to(dtype)
    cache[:, copies[:, 1]] = cache[:, copies[:, 0]]
    return Climb(step.copy_blocks(ints(copies), given), (exactly(given, cache),))


def _copy_fp8_blocks(rng: np.random.Generator, n: int) -> Climb:
    return _copy_blocks(rng, n, torch.float8_e4m3fn)


def _resolve(rng: np.random.Generator, n: int) -> Climb:
    fed = np.where(rng.random(n) < 0.5, -1, rng.integers(0, 1000, n))
    slots, last = rng.integers(-1, 5, n), rng.integers(0, 1000, 5)
    truth = np.where(fed < 0, np.where(slots < 0, 0, last[slots]), fed)
    out = torch.empty(n, dtype=torch.int32)
    return Climb(step.resolve(ints(fed), ints(slots), ints(last), out), (exactly(out, truth),))


def _settle(rng: np.random.Generator, n: int) -> Climb:
    """Requests of 1 to 4 tokens that sample none, the last or all of their rows; some are scored, some fail."""
    widths = rng.integers(1, 5, n)
    starts = np.concatenate([[0], np.cumsum(widths)])
    rows: list[int] = []
    row_starts = [0]
    for b in range(n):
        rows += list(range(starts[b] + rng.integers(0, widths[b] + 1), starts[b + 1]))
        row_starts.append(len(rows))
    fed, tokens = rng.integers(0, 2, starts[-1]), rng.integers(-1, 2, len(rows))
    targets = np.where(rng.random(len(rows)) < 0.2, 7, 0)
    slots, last = rng.permutation(n + 2)[:n], rng.integers(5, 9, n + 2)
    accepted, after = np.ones(len(rows), int), last.copy()
    for b in range(n):
        stands = True
        for r in range(row_starts[b], row_starts[b + 1]):
            if targets[r]:
                continue
            accepted[r] = stands
            if stands and tokens[r] >= 0:
                after[slots[b]] = tokens[r]
            follower = rows[r] + 1
            stands = stands and (follower >= starts[b + 1] or fed[follower] == tokens[r])
    out, kept = torch.zeros(max(1, len(rows)), dtype=torch.int32)[: len(rows)], ints(last)
    arrays = [ints(a) for a in (tokens, targets, rows, row_starts, starts, slots, fed)]
    return Climb(step.settle(*arrays, out, kept), (exactly(out, accepted), exactly(kept, after)))


def _adjust(rng: np.random.Generator, n: int) -> Climb:
    places = rng.permutation(3 * 1100)[:n]
    counts, bias = np.zeros((3, 1100), np.int32), np.zeros((3, 1100), np.float32)
    rows, ids = places // 1100, places % 1100
    counts[rows, ids] = rng.integers(1, 99, n)
    bias[rows, ids] = np.where(rng.random(n) < 0.3, -100.0, rng.standard_normal(n))
    bits = bias.view(np.int32)[rows, ids]
    cells = np.stack([rows, ids, counts[rows, ids], bits], axis=1).reshape(n, 4)
    made = torch.empty(3, 1100, dtype=torch.int32), torch.empty(3, 1100)
    return Climb(step.adjust(ints(cells), *made), (exactly(made[0], counts), exactly(made[1], bias)))


def build(case: StepCase, arch: str) -> Climb:
    """The case's launches and what must come out; the same for both architectures."""
    rng = np.random.default_rng(case.size + len(case.what))
    return globals()[f"_{case.what}"](rng, case.size)  # type: ignore[no-any-return]
