"""Sampling parameters of every kind, and when rounding alone may decide between two tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from ridgeline.backends.reference.sampling import gumbel_noise, survivors
from ridgeline.core.types import SAMPLING_DTYPE

CLOSE = 1e-4  # scores nearer than this may come out in either order: logs are fp32 natively, fp64 in the reference


def rows_of(count: int, **values: Any) -> np.ndarray:
    """Sampling parameters, vLLM's defaults but for ``values`` (scalars or one per row)."""
    rows = np.zeros(count, SAMPLING_DTYPE)
    rows["temperature"], rows["top_p"], rows["num_logprobs"] = 1.0, 1.0, -1
    for name, value in values.items():
        rows[name] = value
    return rows


def random_rows(count: int, rng: np.random.Generator) -> np.ndarray:
    """Parameters of every kind."""

    def one_of(*choices: float) -> np.ndarray:
        return rng.choice(choices, count)

    return rows_of(
        count,
        seed=rng.integers(0, 2**64, count, np.uint64),
        temperature=one_of(0.0, 0.05, 0.3, 1.0, 1.0, 2.0, 20.0),
        top_k=one_of(-1, 0, 1, 2, 5, 50, 700, 5000),
        top_p=one_of(1.0, 1.0, 0.9, 0.5, 0.1, 1e-6),
        min_p=one_of(0.0, 0.0, 0.01, 0.2, 1.0),
        sample_index=rng.integers(0, 5, count),
        num_logprobs=one_of(-1, 0, 1, 7),
    )


def is_close_call(logits: np.ndarray, row: Any, position: int, token: int, other: int, allowed: Any) -> bool:
    """Whether rounding alone may decide between two tokens: by score, or by lying at the edge of a filter."""
    masked = logits.astype(np.float64) if allowed is None else np.where(allowed, logits, -np.inf).astype(np.float64)
    scaled = (masked - masked.max()) / float(row["temperature"])
    score = scaled + gumbel_noise(int(row["seed"]), position, int(row["sample_index"]), len(logits))
    if abs(score[token] - score[other]) < CLOSE:
        return True
    looser = survivors(scaled - 1e-6, int(row["top_k"]), min(1.0, float(row["top_p"]) * (1 + 1e-6)), 0.0)
    looser &= scaled >= np.log(max(float(row["min_p"]), 1e-300)) - 1e-5
    tighter = survivors(scaled, int(row["top_k"]), float(row["top_p"]) * (1 - 1e-6), float(row["min_p"]) * (1 + 1e-5))
    return bool(looser[token] and looser[other] and not (tighter[token] and tighter[other]))
