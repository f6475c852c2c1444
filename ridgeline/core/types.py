"""The contract between the engine and an executor: flat int32 batches in, sampled tokens out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ridgeline.core.errors import RequestError

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

SAMPLING_DTYPE = np.dtype(
    [
        ("seed", "<u8"),  # Philox key
        ("temperature", "<f4"),  # 0 = greedy
        ("top_p", "<f4"),
        ("min_p", "<f4"),
        ("top_k", "<i4"),  # 0 = off
        ("sample_index", "<i4"),  # which of the n samples of one request
        ("num_logprobs", "<i4"),  # -1 = none, k = the sampled token's and the k best
        ("masked", "<i4"),  # 1 = sampled by finish(), under a token mask
        ("target", "<i4"),  # 0 = sample, 1 + t = score token t instead, POOL = the hidden state and no token
    ],
    align=True,
)
"""One row of sampling parameters, read as it is by the native sampler (40 bytes)."""

POOL = -1
"""``target`` of a row whose hidden state is wanted and no token."""


@dataclass(frozen=True)
class SamplingParams:
    """How to turn logits into tokens, with vLLM's names and defaults.

    Raises RequestError on construction for a value that cannot work.

    Attributes:
        temperature: divides the logits, at most 3.4e38 (a float32); 0 means greedy.
        top_k: keep the k most likely tokens (0 or -1: all), below 2**31.
        top_p: keep the smallest set with at least this probability, in (0, 1].
        min_p: drop tokens below this share of the most likely one's probability, in [0, 1].
        max_tokens: most tokens to generate, at least 1.
        seed: 64-bit seed; the same seed gives the same tokens. None draws one.
        stop: strings that end the text; they are not part of the result.
        stop_token_ids: tokens of the vocabulary that end the text.
        ignore_eos: go on past the end-of-text token.
        logprobs: return the sampled token's log probability and the k best (None: neither).
        prompt_logprobs: the same for each prompt token but the first (None: neither).
        n: samples of the prompt, at least 1; more than one needs a temperature above 0.
        repetition_penalty: divides positive and multiplies negative logits of tokens met in prompt or output,
            above 0 (1: off).
        presence_penalty, frequency_penalty: subtracted from the logits of tokens in the output, once and times
            their count, from -2 to 2.
        logit_bias: what is added to the logits of some tokens, by token id, each from -100 to 100.
        bad_words: texts (or sequences of token ids) that are not generated.
        min_tokens: before so many tokens nothing but ``max_tokens`` ends the text.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 16
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    bad_words: tuple[str | tuple[int, ...], ...] = ()
    min_tokens: int = 0

    def __init__(self, **values: Any) -> None:
        known = {f.name: f.default for f in fields(type(self))}
        for name in values:
            if name not in known:
                raise RequestError(unknown_argument("SamplingParams", name, list(known)))
        for name, default in known.items():
            object.__setattr__(self, name, values.get(name, default))
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, what in (
            ("stop", "a string or a list of strings"),
            ("stop_token_ids", "a list of token ids"),
            ("bad_words", "a list of texts"),
        ):
            value = getattr(self, name)
            if value is None:
                value = ()
            if not isinstance(value, Iterable) or isinstance(value, (str, bytes, bytearray, Mapping)):
                raise RequestError(f"{name} must be {what}, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        words = tuple(tuple(w) if isinstance(w, (list, np.ndarray)) else w for w in self.bad_words)
        object.__setattr__(self, "bad_words", words)
        self._check()
        self._check_adjustments()

    def _need(self, ok: bool, name: str, what: str) -> None:
        if not ok:
            raise RequestError(f"{name} must be {what}, got {getattr(self, name)!r}")

    def _check(self) -> None:
        need, real, whole = self._need, _is_real, _is_whole
        need(
            real(self.temperature) and 0 <= self.temperature <= 3.4e38,
            "temperature",
            "a number of at least 0 (0 is greedy) and at most 3.4e38",
        )
        need(
            whole(self.top_k) and -1 <= self.top_k < 2**31,
            "top_k",
            "an integer of at least -1 (-1 or 0: all) and below 2**31",
        )
        need(real(self.top_p) and 0 < self.top_p <= 1, "top_p", "above 0 and at most 1")
        need(real(self.min_p) and 0 <= self.min_p <= 1, "min_p", "from 0 to 1")
        need(whole(self.max_tokens) and self.max_tokens >= 1, "max_tokens", "an integer of at least 1")
        need(
            self.seed is None or (whole(self.seed) and 0 <= self.seed < 2**64),
            "seed",
            "an integer from 0 to 2**64 - 1",
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            need(value is None or (whole(value) and 0 <= value <= 64), name, "an integer from 0 to 64")
        need(isinstance(self.ignore_eos, (bool, np.bool_)), "ignore_eos", "True or False")
        need(all(isinstance(s, str) and s for s in self.stop), "stop", "non-empty strings")
        need(all(whole(t) for t in self.stop_token_ids), "stop_token_ids", "token ids")
        need(whole(self.n) and 1 <= self.n <= 2**16, "n", "an integer from 1 to 65536")
        need(self.n == 1 or self.temperature > 0, "n", "1 at temperature 0, where all samples are the same")

    def _check_adjustments(self) -> None:
        """What changes the logits before sampling."""
        need, real, whole = self._need, _is_real, _is_whole
        need(
            real(self.repetition_penalty) and 0 < self.repetition_penalty <= 1e6,
            "repetition_penalty",
            "a number above 0 and at most 1e6 (1 is off)",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            need(real(value) and -2 <= value <= 2, name, "a number from -2 to 2")
        need(
            whole(self.min_tokens) and 0 <= self.min_tokens <= self.max_tokens,
            "min_tokens",
            f"an integer from 0 to max_tokens ({self.max_tokens})",
        )
        need(self.logit_bias is None or isinstance(self.logit_bias, Mapping), "logit_bias", "a dict by token id")
        need(
            all(whole(t) and real(b) and -100 <= b <= 100 for t, b in (self.logit_bias or {}).items()),
            "logit_bias",
            "token ids with numbers from -100 to 100",
        )
        need(
            all(w and (isinstance(w, str) or isinstance(w, tuple) and all(map(whole, w))) for w in self.bad_words),
            "bad_words",
            "non-empty texts or sequences of token ids",
        )


def _is_real(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def unknown_argument(owner: str, name: str, known: list[str]) -> str:
    """The message for an argument nobody knows, with the nearest one that somebody does."""
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
    return f"{owner} has no argument {name!r}: {hint}"


@dataclass(frozen=True)
class SlotStart:
    """What a slot's new owner asks of the sampler beyond a row of SAMPLING_DTYPE; sent once, with its first step.

    The executor keeps it, and a log of the slot's tokens by position (what it is fed, drafts included, a later
    token at a position replacing an earlier one), until the slot starts anew. A slot whose request asks for
    nothing of this starts with a SlotStart of defaults only if an owner before it had one.

    Attributes:
        slot: the slot that starts.
        prompt_len: tokens before this position are prompt, those from it on output.
        tokens: [C] tokens whose KV is in the cache already (a prefix hit), which no batch will feed.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or output
            (Keskar et al., 2019, "CTRL").
        presence_penalty, frequency_penalty: subtracted for each token in the output, once and times its count.
        bias_ids, bias: [N] tokens and what is added to their logits.
        min_tokens, min_tokens_ids: while fewer output tokens exist, these tokens are not sampled.
        bad_words: token sequences that are never completed: the last token of one is not sampled where the
            tokens before it are the rest.
    """

    slot: int
    prompt_len: int = 0
    tokens: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias_ids: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))
    bias: Float32 = field(default_factory=lambda: np.zeros(0, np.float32))
    min_tokens: int = 0
    min_tokens_ids: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))
    bad_words: tuple[tuple[int, ...], ...] = ()

    @property
    def asks_nothing(self) -> bool:
        """Whether sampling is as if the slot had never started: no log of its tokens is kept either."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        minimum = self.min_tokens > 0 and len(self.min_tokens_ids) > 0
        return penalties == (1.0, 0.0, 0.0) and not (len(self.bias_ids) or minimum or self.bad_words)


@dataclass(slots=True)
class Batch:
    """One step's work, flat. T tokens of B requests (prefill chunks and decodes alike), S sampled rows.

    A request with drafts (speculation) is fed its last token and the drafts after it, and samples the row of each.

    Attributes:
        token_ids: [T]; -1 means "what this slot sampled last".
        positions: [T]; position of each token in its sequence.
        slots: [B]; the stable small int each running request owns.
        query_starts: [B + 1]; request b owns tokens query_starts[b] to query_starts[b + 1].
        context_lens: [B]; tokens in the cache once this step has run (so position + 1 of the last).
        sample_rows: [S]; ascending indices into T whose next token is wanted.
        sampling: [S] of SAMPLING_DTYPE.
        block_updates: one [N, 3] array per cache group: (slot, index in its table, block id).
        block_copies: one [N, 2] array per cache group: (source block, destination block), copied after every
            earlier step and before this one writes; empty list: none in any group.
        slot_starts: sampling state of slots with a new owner.
        extras: further graph inputs by name (adapter ids, embeddings).
    """

    token_ids: Int32
    positions: Int32
    slots: Int32
    query_starts: Int32
    context_lens: Int32
    sample_rows: Int32
    sampling: npt.NDArray[np.void]
    block_updates: list[Int32]
    block_copies: list[Int32] = field(default_factory=list)
    slot_starts: Sequence[SlotStart] = ()
    extras: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)


@dataclass(slots=True)
class StepOutput:
    """What a step produced, one entry per row of ``Batch.sample_rows``.

    Attributes:
        token_ids: [S] sampled tokens; a scored row's own; -1 for a pooled row.
        accepted: [S] 1 where the row's sample stands, 0 where an earlier row of the same request sampled another
            token than the draft that follows it. So a request advances by the sum over its rows.
        logprobs: [S] log probability of the sampled token (NaN where not asked for).
        top_ids, top_logprobs: [S, k] the most likely tokens, k the largest asked for in the step;
            ties go to the lower id. Computed on the raw logits, before penalties, temperature and filters.
        hidden: [P, hidden_size] final hidden states of the P rows whose target is POOL, in row order.
    """

    token_ids: Int32
    accepted: Int32
    logprobs: Float32
    top_ids: Int32
    top_logprobs: Float32
    hidden: Float32 = field(default_factory=lambda: np.zeros((0, 0), np.float32))


@dataclass(frozen=True)
class TokenMasks:
    """Allowed tokens for flagged rows: ``bits`` is [flagged, ceil(vocab / 32)] uint32, bit set = allowed."""

    bits: npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Ticket:
    """A step under way; hand it back to ``finish`` exactly once."""

    number: int


class Executor(Protocol):
    """Runs steps. Per-slot state (block table, last token) lives here; ``Batch`` carries changes."""

    def launch(self, batch: Batch) -> Ticket:
        """Start a step; samples every row not flagged as masked."""
        ...

    def finish(self, ticket: Ticket, masks: TokenMasks | None = None) -> StepOutput:
        """Wait for a step; sample its flagged rows under ``masks``."""
        ...
