"""Sampling: the truth for every backend's sampler, and its counter-based random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint32]
Float64 = npt.NDArray[np.float64]

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)


def philox4x32_10(counter: npt.ArrayLike, key: tuple[int, int]) -> Words:
    """Philox 4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).

    Args:
        counter: [..., 4] words, below 2**32.
        key: two words.

    Returns:
        [..., 4] uint32 random words.
    """
    c0, c1, c2, c3 = np.moveaxis(np.asarray(counter, dtype=np.uint64), -1, 0)
    for i in range(10):
        k0, k1 = (np.uint64((key[j] + i * _WEYL[j]) & 0xFFFFFFFF) for j in range(2))
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2  # 32 x 32 bits fit in 64
        c0, c1, c2, c3 = (p1 >> np.uint64(32)) ^ c1 ^ k0, p1 & _LOW, (p0 >> np.uint64(32)) ^ c3 ^ k1, p0 & _LOW
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def gumbel_noise(seed: int, position: int, sample_index: int, vocab: int) -> Float64:
    """-log(-log u) for each token id: [vocab].

    u = ((word >> 8) + 0.5) / 2**24 lies strictly inside (0, 1) in float64 (in float32 it could round to 1).
    """
    quads = np.arange(-(-vocab // 4), dtype=np.uint64)
    counter = np.zeros((len(quads), 4), np.uint64)
    counter[:, 0], counter[:, 1], counter[:, 2] = position, sample_index, quads
    words = philox4x32_10(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(-1)[:vocab]
    u = ((words >> np.uint32(8)).astype(np.float64) + 0.5) / 2.0**24
    return -np.log(-np.log(u))


def survivors(scaled: Float64, top_k: int, top_p: float, min_p: float) -> npt.NDArray[np.bool_]:
    """Tokens that the filters keep, in the order top-k, top-p, min-p.

    Args:
        scaled: [vocab] (logit - largest logit) / temperature.
        top_k: 0 or less keeps all; tokens equal to the k-th largest are kept too.
        top_p: smallest prefix, by falling probability and rising id, that sums to at least this over what
            top-k kept.
        min_p: least probability as a share of the largest.
    """
    keep = np.isfinite(scaled)
    if 0 < top_k < len(scaled):
        keep &= scaled >= np.partition(scaled, -top_k)[-top_k]
    if top_p < 1.0:
        order = np.argsort(-scaled, kind="stable")
        p = np.where(keep, np.exp(scaled), 0.0)[order]
        cumulative = np.cumsum(p) / p.sum()
        count = int(np.searchsorted(cumulative, top_p)) + 1
        inside = np.zeros_like(keep)
        inside[order[:count]] = True
        keep &= inside
    if min_p > 0.0:
        keep &= np.exp(scaled) >= min_p
    return keep


@dataclass(frozen=True)
class Sampled:
    """A sampled token; ``logprob`` of the raw logits, NaN unless asked for; the k best, ids and logprobs."""

    token: int
    logprob: float
    top_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]


NO_TOKEN = Sampled(-1, float("nan"), np.empty(0, np.int32), np.empty(0, np.float32))
"""Of a row that has none: pooled, not a number, or with every token ruled out."""


def sample(
    logits: npt.NDArray[Any],
    params: Any,
    position: int,
    allowed: npt.NDArray[np.bool_] | None = None,
    adjusted: npt.NDArray[np.float32] | None = None,
) -> Sampled:
    """Samples one row, or scores its target.

    Args:
        logits: [vocab] float32.
        params: a scalar of ``core.types.SAMPLING_DTYPE`` whose target is not POOL.
        position: in the sequence, of the token being sampled.
        allowed: [vocab] tokens a mask allows; None: all.
        adjusted: [vocab] logits after penalties and the like (``slots.adjusted``); None: the logits themselves.
            Log probabilities see neither.

    Returns:
        The token, -1 where logits are NaN or infinite, or where nothing may be sampled.

    Raises:
        ValueError: the mask allows nothing.
    """
    raw = logits.astype(np.float64)
    if allowed is not None and not allowed.any():
        raise ValueError("the token mask allows no token")
    if not np.isfinite(raw).all():
        return NO_TOKEN
    if params["target"] > 0:
        return _with_logprobs(int(params["target"]) - 1, raw, max(int(params["num_logprobs"]), 0))
    masked = raw if adjusted is None else adjusted.astype(np.float64)
    if allowed is not None:
        masked = np.where(allowed, masked, -np.inf)
    largest = masked.max()
    if largest == -np.inf:
        return NO_TOKEN
    temperature = float(params["temperature"])
    if temperature == 0.0:
        token = int(np.argmax(masked))
    else:
        scaled = (masked - largest) / temperature
        keep = survivors(scaled, int(params["top_k"]), float(params["top_p"]), float(params["min_p"]))
        noise = gumbel_noise(int(params["seed"]), position, int(params["sample_index"]), len(raw))
        token = int(np.argmax(np.where(keep, scaled + noise, -np.inf)))
    return _with_logprobs(token, raw, int(params["num_logprobs"]))


def _with_logprobs(token: int, raw: Float64, count: int) -> Sampled:
    """The token with its log probability and the ``count`` best, or with neither for a count below 0."""
    count = min(count, len(raw))
    if count < 0:
        return Sampled(token, float("nan"), np.empty(0, np.int32), np.empty(0, np.float32))
    logprobs = raw - raw.max() - np.log(np.exp(raw - raw.max()).sum())
    best = np.argsort(-raw, kind="stable")[:count]
    return Sampled(token, float(logprobs[token]), best.astype(np.int32), logprobs[best].astype(np.float32))
