"""What a seed stands for: an engine's configuration, the requests that come, and what goes wrong meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from ridgeline.core.types import SamplingParams
from ridgeline.engine.engine import EngineLimits
from tests.sim.model import NAN_SEED, Rules, answer_tokens, letter, took

BLOCK_SIZES = (1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 8, 16, 32)


@dataclass(frozen=True)
class Case:
    """One request, or n samples of one prompt.

    Attributes:
        number: which case of its scenario it is.
        arrival: step before which it is submitted.
        prompt, params, priority, salt, stream: as ``make_requests`` takes them.
        pooling: "mean" or "last" for a request that is only read.
        late: steps after the first of its samples at which the others are submitted.
        abort_after: steps from its arrival until one of its samples is aborted; None: never.
        reader: of its text: "eager" after every step, "lazy" now and then, "stalled" never until it has ended.
    """

    number: int
    arrival: int
    prompt: list[int]
    params: SamplingParams
    priority: int = 0
    salt: str | None = None
    stream: bool = False
    pooling: str | None = None
    late: int = 0
    abort_after: int | None = None
    reader: str = "eager"


@dataclass(frozen=True)
class Scenario:
    """Everything a run depends on.

    Attributes:
        seed: what it was drawn from, and the engine's.
        lazy: the executor runs a step only when it is finished.
        hash_bits: bits of the prefix index's hashes that are left; None: all of them.
        roomy: every pool holds all that ever runs, so nothing is preempted or evicted.
        faults: (where, how many calls until then, from the last such fault on) at which the executor raises.
        jumps: step -> microseconds that the clock jumps before it, forwards or back.
    """

    seed: int
    limits: EngineLimits
    rules: Rules
    eos_ids: frozenset[int]
    lazy: bool
    hash_bits: int | None
    roomy: bool
    cases: list[Case]
    faults: list[tuple[str, int]] = field(default_factory=list)
    jumps: dict[int, int] = field(default_factory=dict)


def blocks_for(tokens: int, window: int, block_size: int) -> int:
    """Fewest blocks of a group with which ``tokens`` can be computed one by one, counted position by position."""
    return max(
        p // block_size - (max(0, p - window + 1) if window else 0) // block_size + 1 for p in range(max(1, tokens))
    )


def draw(seed: int) -> Scenario:
    """The scenario of a seed."""
    rng = Random(seed)
    vocab = rng.choice((5, 12, 30, 60))
    groups = rng.choice((1, 1, 1, 2, 2, 3))
    windows = tuple(0 if rng.random() < (0.8 if g == 0 else 0.3) else rng.randint(1, 24) for g in range(groups))
    speculation = rng.random() < 0.4
    rules = Rules(vocab, windows, rng.choice((0, 12, 16, 16)) if speculation else rng.choice((0, 0, 8)))
    eos = frozenset(rng.sample(range(vocab), rng.randint(0, 2))) if vocab > 5 else frozenset()
    max_len = rng.randint(12, 56)
    cases = _cases(rng, rules, eos, max_len)
    roomy = rng.random() < 0.35
    limits = _limits(rng, rules, max_len, cases, roomy, speculation)
    faults = []
    if rng.random() < 0.15:
        kinds = rng.choice((("launch",), ("launch", "middle", "finish")))
        faults = [(rng.choice(kinds), rng.randint(1, 25)) for _ in range(rng.randint(1, 4))]
    jumps = {}
    if limits.step_target_us is not None:
        jumps = {
            rng.randint(1, 60): rng.choice((-1, 1)) * rng.randint(1, 10**6)
            for _ in range(rng.choice((0, 0, 0, 1, 2, 4)))
        }
    return Scenario(
        seed, limits, rules, eos, rng.random() < 0.4, rng.choice((None, None, None, None, 0, 2, 4)), roomy, cases,
        faults, jumps,
    )  # fmt: skip


def _limits(
    rng: Random, rules: Rules, max_len: int, cases: Sequence[Case], roomy: bool, speculation: bool
) -> EngineLimits:
    block_size = rng.choice(BLOCK_SIZES)
    max_requests = rng.choice((1, 2, 3, 3, 4, 5, 6))
    max_tokens = rng.randint(max_requests, max_requests + rng.choice((2, 12, 40)))
    longest = [min(max_len, len(c.prompt) + c.params.max_tokens) for c in cases for _ in range(c.params.n)]
    tight, num_blocks = rng.random(), []
    for window in rules.windows:
        if roomy:
            num_blocks.append(sum(-(-n // block_size) + 1 for n in longest) + 2 * max_requests + 2)
        else:
            whole = max(blocks_for(n, window, block_size) for n in longest)
            least, most = ((whole + 1) // 2, whole + 1) if tight < 0.2 else (whole, whole + (whole + 3) // 2)
            num_blocks.append(min(200, rng.randint(least, most if tight < 0.8 else 3 * whole + 3)))
    ngram_min = rng.randint(1, 2)
    return EngineLimits(
        max_requests=max_requests,
        max_tokens=max_tokens,
        max_len=max_len,
        vocab_size=rules.vocab,
        block_size=block_size,
        num_blocks=num_blocks,
        windows=() if not any(rules.windows) and rng.random() < 0.5 else rules.windows,
        max_sampled_rows=None if rng.random() < 0.4 else max_requests + rng.randint(0, 8),
        max_open_steps=rng.randint(1, 2),
        prefix_sharing=rng.random() < 0.8,
        speculation="ngram" if speculation else None,
        num_draft_tokens=rng.randint(1, 5),
        ngram_min=ngram_min,
        ngram_max=ngram_min + rng.randint(0, 2),
        max_queued_requests=rng.randint(1, 8) if rng.random() < 0.1 else None,
        max_queued_tokens=rng.randint(20, 200) if rng.random() < 0.1 else None,
        max_preemptions=rng.choice((0, 1, 2, 4)),
        priority_aging_steps=rng.choice((1, 4, 16, 256)),
        step_target_us=_target(rng) if rng.random() < 0.3 else None,
    )


def _target(rng: Random) -> int:
    """A latency target, often one that a step can hit exactly."""
    return rng.choice((rng.randint(70, 300), took(rng.randint(2, 8))))


def _cases(rng: Random, rules: Rules, eos: frozenset[int], max_len: int) -> list[Case]:
    """The requests of a run: of few families, so that prompts repeat and share their beginnings."""
    number = rng.choice((1, 3, 4, 5, 6, 7, 8, 12))
    families = [[rng.randrange(rules.vocab) for _ in range(max_len)] for _ in range(rng.randint(1, 2))]
    spread = rng.choice((0, 3, 15))
    aborts = rng.choice((0.0, 0.0, 0.2, 0.5))
    urgent, salted, growing = rng.random() < 0.3, rng.random() < 0.25, rng.random() < 0.15
    cases: list[Case] = []
    for i in range(number):
        prompt = _prompt(rng, rules, eos, max_len, families, cases)
        if growing:  # short prompts and long answers, so that blocks run out while all decode
            prompt = prompt[: rng.randint(1, 8)]
        pooling = rng.choice(("mean", "last")) if rng.random() < 0.06 else None
        params = SamplingParams() if pooling else _params(rng, rules, growing)
        cases.append(
            Case(
                number=i,
                arrival=rng.randint(0, spread),
                prompt=prompt,
                params=params,
                priority=rng.randint(-2, 2) if urgent and not pooling else 0,
                salt=None if pooling or not salted else rng.choice((None, "a", "b")),
                stream=not pooling and rng.random() < 0.15,
                pooling=pooling,
                late=rng.randint(1, 12) if params.n > 1 and rng.random() < 0.5 else 0,
                abort_after=rng.randint(0, rng.choice((3, 25))) if rng.random() < aborts * params.n else None,
                reader=rng.choice(("eager", "lazy", "stalled")),
            )
        )
    return cases


def _prompt(
    rng: Random, rules: Rules, eos: frozenset[int], max_len: int, families: list[list[int]], cases: list[Case]
) -> list[int]:
    most = max_len - 1
    kind = rng.random()
    if cases and kind < 0.2:
        return list(rng.choice(cases).prompt)  # once more
    if cases and kind < 0.35:  # a conversation goes on: prompt, answer, and a new question
        before = rng.choice(cases)
        told = before.prompt + answer_tokens(rules, before.prompt, before.params, max_len - len(before.prompt), eos)
        return (told + [rng.randrange(rules.vocab) for _ in range(rng.randint(0, 4))])[:most]
    if kind < 0.45:  # the same few tokens over and over: equal blocks after different prefixes
        period = rng.randint(1, 4)
        return (families[0][:period] * max_len)[: rng.randint(1, most)]
    shared = rng.randint(0, most) if kind < 0.85 else 0
    own = rng.randint(0 if shared else 1, 8)
    return (rng.choice(families)[:shared] + [rng.randrange(rules.vocab) for _ in range(own)])[:most]


def _params(rng: Random, rules: Rules, growing: bool) -> SamplingParams:
    vocab = rules.vocab
    values: dict[str, Any] = {
        "max_tokens": rng.randint(16, 36) if growing else rng.randint(1, rng.choice((3, 16, 36))),
        "seed": NAN_SEED if rng.random() < 0.01 else rng.getrandbits(64),
        "temperature": rng.choice((0, 0.5, 1.0, 1.0)),
        "ignore_eos": rng.random() < 0.7,
    }
    if rng.random() < 0.2:
        values["stop_token_ids"] = rng.sample(range(vocab), rng.randint(1, 2))
    if rng.random() < 0.15:
        values["stop"] = ["".join(letter(rng.randrange(vocab)) for _ in range(2)) or "a" for _ in range(2)]
    if rng.random() < 0.15:
        values["logprobs"] = rng.randint(0, 3)
    if rng.random() < 0.1:
        values["prompt_logprobs"] = rng.randint(0, 3)
    if values["temperature"] and rng.random() < 0.25:
        values["n"] = rng.randint(2, 4)
    if rng.random() < 0.15:
        values |= {"top_k": rng.randint(-1, 5), "top_p": 0.5, "min_p": 0.25}
    if rng.random() < 0.3:
        values |= rng.choice(
            (
                {"repetition_penalty": 1.5},
                {"presence_penalty": 0.5, "frequency_penalty": -1.0},
                {"logit_bias": {rng.randrange(vocab): 4.0, rng.randrange(vocab): -2.0}},
                {"bad_words": [[rng.randrange(vocab)], [1, rng.randrange(vocab)]]},
                {"min_tokens": rng.randint(0, values["max_tokens"])},
            )
        )
    return SamplingParams(**values)
