"""What the scheduler decides for one step: ints and lists, from which the engine builds a Batch."""

from __future__ import annotations

from dataclasses import dataclass, field

from ridgeline.kvcache.cache import Copies, Updates
from ridgeline.scheduler.sequence import Sequence


@dataclass(slots=True)
class Chunk:
    """Tokens of one sequence in one step.

    Attributes:
        start, size: positions ``start`` to ``start + size``, drafts left out.
        drafts: guesses fed after them; each has a row.
        score_from, score_to: positions whose rows are scored or pooled (none if equal).
        samples: whether the last token's row gives the next token.
    """

    sequence: Sequence
    start: int
    size: int
    drafts: list[int]
    score_from: int
    score_to: int
    samples: bool

    @property
    def num_rows(self) -> int:
        """Rows of the step that belong to it."""
        return self.score_to - self.score_from + self.samples + len(self.drafts)


@dataclass(slots=True)
class StepPlan:
    """One step.

    Attributes:
        number: counts steps from 1.
        time_us: when it was planned.
        decodes: sequences that are fed the one token they sampled last, which each of them has a row for.
        repeats: the same sequences, in the same order, were all of the step planned before this one.
        chunks: everything else, after the decodes.
        started: sequences that got their slot for this step.
        updates: changed cells of block tables, per group.
        copies: blocks to copy before anything is written, per group.
        num_tokens: tokens of the step, drafts included.
    """

    number: int
    time_us: int
    decodes: list[Sequence] = field(default_factory=list)
    repeats: bool = False
    chunks: list[Chunk] = field(default_factory=list)
    started: list[Sequence] = field(default_factory=list)
    updates: Updates = field(default_factory=list)
    copies: Copies = field(default_factory=list)
    num_tokens: int = 0
