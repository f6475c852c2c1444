"""SimModel as small tests want it: one full cache group, and an error at a step of their choice."""

from __future__ import annotations

from collections.abc import Sequence

from ridgeline.core.types import SamplingParams
from ridgeline.engine.engine import EngineLimits
from tests.sim.executor import SimModel
from tests.sim.model import Rules, answer, row_of, states


def rules_for(vocab: int, groups: int = 1, loopy: int = 0) -> Rules:
    """A model of full groups."""
    return Rules(vocab, (0,) * groups, loopy)


class SimExecutor(SimModel):
    """A SimModel that raises ``error`` at its launch number ``fail_at``; steps run when they are finished."""

    def __init__(
        self, limits: EngineLimits, *, error: BaseException | None = None, fail_at: int = -1, loopy: int = 0
    ) -> None:
        super().__init__(limits, rules_for(limits.vocab_size, len(limits.num_blocks), loopy), lazy=True)
        self.error, self.fail_at = error, fail_at

    def _fail(self, where: str) -> None:
        if where == "launch" and self.launches == self.fail_at and self.error is not None:
            self.reader.failed = True
            raise self.error

    @property
    def largest(self) -> int:
        """Most requests in a step so far."""
        return self.counts.most_requests

    @property
    def copied(self) -> int:
        """Blocks copied so far."""
        return self.counts.copies


def hidden_states(tokens: Sequence[int]) -> list[int]:
    """The hidden state at each of ``tokens``."""
    return states(rules_for(0), tokens)


def solo(
    prompt: Sequence[int], params: SamplingParams, vocab: int, max_len: int, eos_ids: frozenset[int], index: int = 0
) -> tuple[list[int], str]:
    """What one request must give, computed from its tokens alone: tokens and finish reason."""
    row = row_of(params, params.seed or 0, index)
    limit = min(params.max_tokens, max_len - len(prompt))
    right = answer(rules_for(vocab), prompt, params, row, limit=limit, eos_ids=eos_ids)
    return right.tokens, right.reason
