"""The model that the simulation serves: tokens from hashes, so that a wrong cell anywhere changes the output.

Attention is a sum. The cell of position p in cache group g holds

    cell(p, g) = hash(sum of the cells that p sees before itself, token at p, p, g)

where a full group sees every earlier position and a group with a window of W sees the W - 1 before it. The token
that follows p is a hash of what p sees in every group and of everything the sampler is told. ``solo`` computes a
request's answer from its tokens alone; the executor computes it through block tables. Hashes of tuples of numbers
do not depend on PYTHONHASHSEED.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ridgeline.core.types import SamplingParams, SlotStart

CELL = 2**44 - 1
"""Cells are this wide at most, so that the sum of a context stays a machine word."""

NAN_SEED = 666
"""A request with this seed meets logits that are not numbers at some positions: the row gives -1."""


def took(tokens: int) -> int:
    """Microseconds that a step of so many tokens takes."""
    return 50 + 20 * tokens


class Rules(NamedTuple):
    """What a simulated model is.

    Attributes:
        vocab: token ids are below this.
        windows: for each cache group, how many positions a query sees, itself included; 0: all.
        loopy: of 16 tokens, how many follow from the last token alone, so that the text repeats itself.
    """

    vocab: int
    windows: tuple[int, ...]
    loopy: int


class Sampler(NamedTuple):
    """What a slot's sampler was started with: a digest of what changes tokens, and what it obeys to the letter.

    Attributes:
        digest: hash of the penalties, biases and bad words.
        prompt_len: position of the first output token.
        min_tokens, min_ids: while fewer output tokens exist, tokens that are not sampled.
    """

    digest: int
    prompt_len: int
    min_tokens: int
    min_ids: frozenset[int]


def token_words(words: Iterable[Iterable[int]]) -> tuple[tuple[int, ...], ...]:
    """Token sequences as a tuple that hashes the same whatever their order."""
    return tuple(sorted({tuple(int(t) for t in w) for w in words}))


def sampler_of(start: SlotStart) -> Sampler | None:
    """The sampler that ``start`` asks for; None where it asks for nothing."""
    bias = tuple(sorted(zip(start.bias_ids.tolist(), start.bias.tolist(), strict=True)))
    min_ids = frozenset(start.min_tokens_ids.tolist()) if start.min_tokens else frozenset()
    penalties = (start.repetition_penalty, start.presence_penalty, start.frequency_penalty)
    asks = (*penalties, bias, token_words(start.bad_words))
    if asks == (1.0, 0.0, 0.0, (), ()) and not min_ids:
        return None
    return Sampler(hash(asks), start.prompt_len, start.min_tokens if min_ids else 0, min_ids)


def sampler_for(params: SamplingParams, prompt_len: int, stop_ids: frozenset[int]) -> Sampler | None:
    """The sampler that a request needs, from its parameters alone."""
    bias = params.logit_bias or {}
    number = len(bias)
    return sampler_of(
        SlotStart(
            slot=0,
            prompt_len=prompt_len,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            bias_ids=np.fromiter((int(t) for t in bias), np.int32, number),
            bias=np.fromiter(bias.values(), np.float32, number),
            min_tokens=params.min_tokens,
            min_tokens_ids=np.array(sorted(stop_ids) if params.min_tokens else [], np.int32),
            bad_words=tuple(w for w in params.bad_words if not isinstance(w, str)),
        )
    )


class Row(NamedTuple):
    """One row of SAMPLING_DTYPE as Python numbers, in its order."""

    seed: int
    temperature: float
    top_p: float
    min_p: float
    top_k: int
    sample_index: int
    num_logprobs: int
    masked: int
    target: int


def see(reads: tuple[int, ...], position: int) -> int:
    """The "hidden state" at ``position``: a hash of what it reads in every cache group."""
    return hash((reads, position)) & CELL


def sample(
    rules: Rules, hidden: int, position: int, last: int, row: Row, sampler: Sampler | None = None, log: int = 0
) -> int:
    """The token that follows ``position``, where ``last`` is.

    A greedy row knows neither seed nor sample index. ``log`` is the hash of the slot's tokens up to here; it counts
    only where the sampler asks for something.
    """
    if row.seed == NAN_SEED and hidden % 5 == 0:
        return -1
    chance = (0, 0) if row.temperature == 0 else (row.seed, row.sample_index)
    state = 0 if sampler is None else (sampler.digest, sampler.prompt_len, log)
    h = hash((hidden, *chance, row.temperature, row.top_k, row.top_p, row.min_p, state))
    token = (last * 5 + 3) % rules.vocab if h & 15 < rules.loopy else (h >> 8) % rules.vocab
    if sampler is not None and position + 1 - sampler.prompt_len < sampler.min_tokens:
        while token in sampler.min_ids:
            token = (token + 1) % rules.vocab
    return token


def logprob(hidden: int, token: int) -> float:
    """The log probability of ``token``, a multiple of 1/64 that a float32 holds exactly."""
    return -float(hash((hidden, token, 1)) % 4096) / 64


def best(rules: Rules, hidden: int, number: int) -> tuple[list[int], list[float]]:
    """The ``number`` most likely tokens and their log probabilities."""
    ids = [(hidden + i * 7) % rules.vocab for i in range(number)]
    return ids, [-float(i) - (hidden % 64) / 64 for i in range(number)]


@dataclass
class Answer:
    """What a request must give.

    Attributes:
        tokens: its output, a stop token included.
        reason: why it ends.
        text: its text up to the stop string, if it has a detokenizer.
        logprobs: (log probability, best ids, their log probabilities) of every output token, if asked for.
        prompt_logprobs: the same for every prompt token after the first, if asked for.
    """

    tokens: list[int] = field(default_factory=list)
    reason: str = ""
    text: str = ""
    logprobs: list[tuple[float, list[int], list[float]]] = field(default_factory=list)
    prompt_logprobs: list[tuple[float, list[int], list[float]]] = field(default_factory=list)


LETTERS = "abcdefghijklmnopqrstuvwxyz"


def letter(token: int) -> str:
    """The text of a token: one letter, or nothing for every ninth."""
    return "" if token % 9 == 8 else LETTERS[token % 26]


class Letters:
    """A detokenizer of one letter a token."""

    def push(self, token_id: int) -> str:
        """The token's letter."""
        return letter(token_id)

    def finish(self) -> str:
        """Nothing is ever held back."""
        return ""


class Solo:
    """One sequence alone: fed token by token, without blocks, tables or batches."""

    def __init__(self, rules: Rules) -> None:
        self.rules = rules
        self.cells: list[list[int]] = [[] for _ in rules.windows]
        self.sums = [0] * len(rules.windows)
        self.log = 0
        self.length = 0

    def feed(self, token: int) -> int:
        """Add a token; returns the hidden state at its position."""
        position = self.length
        for group, cells in enumerate(self.cells):
            cell = hash((self.sums[group], token, position, group)) & CELL
            cells.append(cell)
            self.sums[group] += cell
        hidden = see(tuple(self.sums), position)
        for group, window in enumerate(self.rules.windows):
            if window and position + 1 >= window:
                self.sums[group] -= self.cells[group][position + 1 - window]
        self.log = hash((self.log, token))
        self.length += 1
        return hidden


def row_of(params: SamplingParams, seed: int, index: int = 0) -> Row:
    """The row of sampling parameters that a request must be sampled with."""
    asked = -1 if params.logprobs is None else params.logprobs
    temperature, top_p, min_p = (float(np.float32(f)) for f in (params.temperature, params.top_p, params.min_p))
    return Row(seed, temperature, top_p, min_p, max(0, params.top_k), index, asked, 0, 0)


def answer(
    rules: Rules, prompt: Sequence[int], params: SamplingParams, row: Row, *, limit: int, eos_ids: frozenset[int]
) -> Answer:
    """A request's answer, from its tokens alone; ``limit`` is the most tokens that it may generate."""
    stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids)
    sampler = sampler_for(params, len(prompt), stop_ids)
    out, solo = Answer(), Solo(rules)
    hidden = 0
    for position, token in enumerate(prompt):
        if params.prompt_logprobs is not None and position:
            out.prompt_logprobs.append((logprob(hidden, token), *best(rules, hidden, params.prompt_logprobs)))
        hidden = solo.feed(token)
    last, searched = prompt[-1], 0
    while not out.reason:
        last = sample(rules, hidden, solo.length - 1, last, row, sampler, solo.log)
        if last < 0:
            out.reason = "error"
            break
        out.tokens.append(last)
        if params.logprobs is not None:
            out.logprobs.append((logprob(hidden, last), *best(rules, hidden, params.logprobs)))
        hidden = solo.feed(last)
        if last in stop_ids:
            out.reason = "stop"
            break
        out.text += letter(last)
        if len(out.tokens) <= params.min_tokens:
            searched = len(out.text)
        ends = [at for s in params.stop if (at := out.text.find(s, searched)) >= 0]
        if ends:
            out.reason, out.text = "stop", out.text[: min(ends)]
        elif len(out.tokens) >= limit:
            out.reason = "length"
    return out


def answer_tokens(
    rules: Rules, prompt: Sequence[int], params: SamplingParams, room: int, eos_ids: frozenset[int]
) -> list[int]:
    """The tokens alone, of a request with a seed of its own."""
    row = row_of(params, params.seed or 0)
    return answer(rules, prompt, params, row, limit=min(params.max_tokens, room), eos_ids=eos_ids).tokens


def states(rules: Rules, prompt: Sequence[int]) -> list[int]:
    """The hidden state at every position."""
    solo = Solo(rules)
    return [solo.feed(token) for token in prompt]


def state_row(hidden: int) -> list[float]:
    """A pooled row: the hidden state as a few numbers."""
    return [float(hidden % 1024), float(hidden % 7), 1.0]
