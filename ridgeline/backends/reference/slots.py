"""What a slot's owner asks of the sampler, recomputed from its whole log for every row: the truth for native state."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ridgeline.core.types import Float32, Int32, SlotStart


class SlotLog:
    """A slot's tokens by position: those it started with and those it was fed."""

    def __init__(self, start: SlotStart) -> None:
        self.start = start
        self.tokens = np.asarray(start.tokens, np.int32)

    def feed(self, position: int, tokens: Int32) -> None:
        """Records tokens from ``position`` on and forgets what stood there and after.

        Raises ValueError when tokens before ``position`` are missing.
        """
        if position > len(self.tokens):
            raise ValueError(f"slot {self.start.slot} skips positions {len(self.tokens)} to {position}")
        self.tokens = np.concatenate([self.tokens[:position], tokens]).astype(np.int32)


def adjusted(logits: Float32, start: SlotStart, tokens: Int32) -> Float32:
    """The logits of the token after ``tokens`` as the sampler sees them, before temperature and filters.

    In the order of vLLM (v1/sample/sampler.py), in float32: bad words and, below min_tokens, min_tokens_ids become
    -inf; logit bias is added; then the penalties for repetition, frequency and presence. Bad words look at prompt and
    output alike. What would be infinite is the largest float32.

    Args:
        logits: [vocab].
        start: what is asked.
        tokens: [n] the log up to and including the row's own token.

    Returns:
        A new array [vocab].
    """
    x = logits.astype(np.float32)
    largest = np.finfo(np.float32).max
    x[banned(start, tokens)] = -np.inf
    for token, bias in zip(start.bias_ids, start.bias, strict=True):
        x[token] = min(x[token] + np.float32(bias), largest)
    output = np.bincount(tokens[start.prompt_len :], minlength=len(x))
    seen = np.bincount(tokens, minlength=len(x)) > 0
    penalty = np.float32(start.repetition_penalty)
    with np.errstate(over="ignore"):
        penalized = np.where(x > 0, x / penalty, x * penalty)
        penalized = penalized - np.float32(start.frequency_penalty) * output.astype(np.float32)
        penalized = penalized - np.where(output > 0, np.float32(start.presence_penalty), np.float32(0))
    result: npt.NDArray[np.float32] = np.where(seen, np.minimum(penalized, largest), x)
    return result


def banned(start: SlotStart, tokens: Int32) -> list[int]:
    """Tokens that bad words and min_tokens rule out after ``tokens``."""
    history: Sequence[int] = tokens.tolist()
    ids = [w[-1] for w in start.bad_words if history[max(0, len(history) - len(w) + 1) :] == list(w[:-1])]
    if max(0, len(history) - start.prompt_len) < start.min_tokens:
        ids += [int(t) for t in start.min_tokens_ids]
    return ids
