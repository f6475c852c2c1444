"""What an engine may hold at once, and how it goes about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class EngineLimits:
    """Sizes and options of an engine.

    Attributes:
        max_requests: requests running, so slots of the executor.
        max_tokens: tokens in a step.
        max_len: tokens of one sequence, prompt and output.
        vocab_size: token ids are below this.
        block_size: tokens in a block.
        num_blocks: blocks of each cache group.
        windows: tokens that a layer of each cache group sees, 0 for all; empty: all, in every group.
        max_sampled_rows: rows that a step may sample or score; None: one for each of max_requests.
        max_open_steps: steps under way at once, 1 or 2.
        prefix_sharing: whether requests share the blocks of equal prefixes.
        speculation: None, or "ngram": drafts from what the request holds already.
        num_draft_tokens: most drafts of one request in a step.
        ngram_min, ngram_max: lengths of the n-grams that are looked up.
        max_queued_requests, max_queued_tokens: what may wait; None: no bound.
        max_preemptions: how often a request may have to start again before it comes first.
        priority_aging_steps: steps of waiting that outweigh one level of priority.
        step_target_us: microseconds that a step should take while something decodes; None: no target.
    """

    max_requests: int
    max_tokens: int
    max_len: int
    vocab_size: int
    block_size: int
    num_blocks: Sequence[int]
    windows: Sequence[int] = ()
    max_sampled_rows: int | None = None
    max_open_steps: int = 1
    prefix_sharing: bool = True
    speculation: str | None = None
    num_draft_tokens: int = 7
    ngram_min: int = 2
    ngram_max: int = 4
    max_queued_requests: int | None = None
    max_queued_tokens: int | None = None
    max_preemptions: int = 4
    priority_aging_steps: int = 256
    step_target_us: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < self.max_requests or self.max_rows < self.max_requests:
            raise ValueError("max_tokens and max_sampled_rows must be at least max_requests: all decode in one step")
        if self.windows and len(self.windows) != len(self.num_blocks):
            raise ValueError("windows and num_blocks must have one entry for each cache group")
        if self.max_open_steps not in (1, 2):
            raise ValueError(f"max_open_steps must be 1 or 2, got {self.max_open_steps}")
        if self.speculation not in (None, "ngram"):
            raise ValueError(f"speculation must be None or 'ngram', got {self.speculation!r}")

    @property
    def max_rows(self) -> int:
        """Rows that a step may sample or score."""
        return self.max_requests if self.max_sampled_rows is None else self.max_sampled_rows
