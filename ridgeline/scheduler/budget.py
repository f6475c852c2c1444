"""How many tokens a step may have, so that those who decode do not wait longer than a target."""

from __future__ import annotations


class StepBudget:
    """The token budget of a step: fixed, or adapted to a latency target.

    With a target, a step too long cuts the budget in proportion to the excess and a step that used its whole
    budget in less than the target raises it by an eighth. It applies only to steps in which something decodes.

    Args:
        max_tokens: most tokens in any step.
        target_us: microseconds a step should take at most; None: no target.
    """

    def __init__(self, max_tokens: int, target_us: int | None) -> None:
        self.max_tokens = max_tokens
        self.target_us = target_us
        self.adapted = max_tokens

    def tokens(self, decoding: int) -> int:
        """Tokens for the next step, in which ``decoding`` sequences decode: one more than those at least."""
        if self.target_us is None or not decoding:
            return self.max_tokens
        return min(self.max_tokens, max(self.adapted, decoding + 1))

    def observe(self, step_us: int, num_tokens: int, decoding: int) -> None:
        """A step of ``num_tokens``, ``decoding`` of them decodes, took ``step_us`` (a clock may jump: any int)."""
        if self.target_us is None or not decoding or step_us <= 0 or num_tokens <= decoding:
            return
        if step_us > self.target_us:
            self.adapted = max(1, min(self.adapted, num_tokens) * self.target_us // step_us)
        elif num_tokens >= self.adapted:
            self.adapted = min(self.max_tokens, self.adapted + self.adapted // 8 + 1)
