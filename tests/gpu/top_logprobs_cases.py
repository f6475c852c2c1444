"""The most likely tokens of a row: order and ties are numpy's stable sort, log probabilities float64's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ridgeline.backends.cuda.kernels.top_logprobs import MOST, top_logprobs
from ridgeline.backends.cuda.ladder.climb import Climb, Expected
from tests.gpu.sample_cases import cost_of_logprobs


@dataclass(frozen=True)
class TopCase:
    """Rows of logits.

    Attributes:
        levels: logits take so many values, so that many are equal; 0: any.
        bad: the first row holds an infinity.
    """

    rows: int
    vocab: int
    levels: int = 0
    bad: bool = False
    op: str = "top_logprobs"

    @property
    def name(self) -> str:
        """For test ids."""
        return f"top_logprobs-{self.rows}x{self.vocab}-{self.levels}{'-bad' if self.bad else ''}"


CASES = [
    TopCase(6, 5),
    TopCase(5, 64, 3),
    TopCase(4, 300),
    TopCase(4, 700, 9),
    TopCase(3, 2500),
    TopCase(3, 2100, 40),
    TopCase(3, 90, bad=True),
]


def build(case: TopCase, arch: str, only: int | None = None) -> Climb:
    """``only``: the row alone."""
    rng = np.random.default_rng(case.vocab)
    logits = (4 * rng.standard_normal((case.rows, case.vocab))).astype(np.float32)
    if case.levels:
        logits = np.round(logits * case.levels / 16).astype(np.float32)
    if case.bad:
        logits[0, 7] = np.inf
    wanted = rng.choice([-1, 0, 1, 2, 5, 20, 63, 64], case.rows).astype(np.int32)
    wanted[-1] = MOST
    rows = np.arange(case.rows) if only is None else np.array([only])
    logits, wanted = logits[rows], wanted[rows]
    ids = np.full((len(rows), MOST), -1, np.int64)
    scores = np.zeros((len(rows), MOST))
    for r, row in enumerate(logits.astype(np.float64)):
        if not np.isfinite(row).all():
            continue
        count = min(max(int(wanted[r]), 0), case.vocab)
        best = np.argsort(-row, kind="stable")[:count]
        ids[r, :count] = best
        scores[r, :count] = (row - row.max() - np.log(np.exp(row - row.max()).sum()))[best]
    made = torch.empty(len(rows), MOST, dtype=torch.int32), torch.empty(len(rows), MOST)
    launches = top_logprobs(torch.from_numpy(logits), torch.from_numpy(wanted), *made)
    plain = np.where(ids >= 0, scores + cost_of_logprobs(logits), 0.0).astype(np.float32)
    listed = Expected(made[0], ids.astype(np.float64), ids.astype(np.float32), exact=True)
    return Climb(launches, (listed, Expected(made[1], scores, plain)))
