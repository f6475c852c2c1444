"""Random workloads for the determinism contract: requests of every kind, ways to serve them, and what must not change.

A request's fingerprint is taken over its tokens, the bits of their log probabilities, the best tokens beside them, the
prompt's log probabilities and the reason it ended.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ridgeline.api.outputs import CompletionOutput, Logprob, RequestOutput, StreamDelta
from ridgeline.core.types import Batch, Executor, SamplingParams, StepOutput, Ticket, TokenMasks
from ridgeline.engine.engine import Engine, EngineLimits
from ridgeline.engine.request import Request, Scored

Scores = list[list[tuple[int, float]]] | None


@dataclass(frozen=True)
class Ask:
    """One request: token ids and how to sample."""

    prompt: tuple[int, ...]
    params: SamplingParams


def workload(seed: int, number: int, vocab: int, longest: int, outputs: tuple[int, int]) -> list[Ask]:
    """``number`` requests with prompts of 1 to ``longest`` tokens; most share a prefix with some others, many repeat
    themselves, and every sampling option is asked for by some."""
    rng = random.Random(seed)
    stems = [_ids(rng, vocab, n) for n in (longest // 3, longest // 2, 16, 32)]
    asks = []
    for i in range(number):
        prompt = list(rng.choice([*stems, []]))
        if rng.random() < 0.4:
            prompt += _ids(rng, vocab, rng.randint(2, 5)) * rng.randint(2, 5)  # something that n-grams find
        room = max(1, longest - len(prompt))
        if rng.random() < 0.8 or not prompt:
            prompt += _ids(rng, vocab, rng.randint(1, room if rng.random() < 0.2 else min(room, 12)))
        prompt = prompt[:longest]
        asks.append(Ask(tuple(prompt), _params(rng, prompt, vocab, outputs, sampled=i % 2 == 1)))
    return asks


def _ids(rng: random.Random, vocab: int, number: int) -> list[int]:
    return [rng.randrange(vocab) for _ in range(number)]


def _params(
    rng: random.Random, prompt: Sequence[int], vocab: int, outputs: tuple[int, int], sampled: bool
) -> SamplingParams:
    values: dict[str, Any] = {"temperature": 0, "max_tokens": rng.randint(*outputs)}
    if sampled:
        values |= {"temperature": rng.choice([0.3, 0.8, 1.0, 1.7]), "seed": rng.getrandbits(64)}
        values |= rng.choice([{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.05}, {"top_k": 40, "top_p": 0.8}])
        values |= {"n": rng.choice([1, 1, 1, 2, 3])}
    options: list[dict[str, Any]] = [
        {"logprobs": rng.choice([0, 1, 5])},
        {"prompt_logprobs": rng.choice([0, 2])},
        {"repetition_penalty": rng.choice([0.8, 1.3]), "presence_penalty": 0.5},
        {"frequency_penalty": rng.choice([-0.5, 0.7])},
        {"logit_bias": {t: rng.choice([-100.0, 2.5]) for t in _ids(rng, vocab, 4)}},
        {"bad_words": ((rng.choice(prompt),), tuple(_ids(rng, vocab, 2)))},
        {"min_tokens": rng.randint(1, outputs[0]), "stop_token_ids": tuple(_ids(rng, vocab, vocab // 20))},
        {"ignore_eos": True},
    ]
    for option in options:
        if rng.random() < 0.3 or "logprobs" in option:
            values |= option
    return SamplingParams(**values)


class Ahead:
    """Two steps under way over an executor that has one at a time: runs a step at its launch, hands it out later."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._done: dict[Ticket, StepOutput] = {}
        self.most = 0

    def launch(self, batch: Batch) -> Ticket:
        ticket = self._executor.launch(batch)
        self._done[ticket] = self._executor.finish(ticket)
        self.most = max(self.most, len(self._done))
        return ticket

    def finish(self, ticket: Ticket, masks: TokenMasks | None = None) -> StepOutput:
        assert masks is None
        return self._done.pop(ticket)


def alone(engine: Engine, asks: Iterable[Ask]) -> list[list[str]]:
    """The fingerprints of each ask's samples, every one a request of its own, run to its end before the next."""
    return [[_alone(engine, ask, i) for i in range(ask.params.n)] for ask in asks]


def _alone(engine: Engine, ask: Ask, index: int) -> str:
    changes = {"n": 1} | ({"prompt_logprobs": None} if index else {})  # which the first of n samples reports
    request = engine.make_request(ask.prompt, replace(ask.params, **changes), index=index)
    engine.submit([request])
    while request.finish_reason is None:
        engine.step()
    return fingerprint(request)


def together(engine: Engine, asks: Sequence[Ask], seed: int) -> list[list[str]]:
    """The same served at once: in a random order, some while others run, beside requests that are dropped midway."""
    rng = random.Random(seed)
    groups = [engine.make_requests(ask.prompt, ask.params) for ask in asks]
    decoys = [engine.make_requests(ask.prompt, ask.params) for ask in rng.sample(asks, len(asks) // 6)]
    coming, dropped = [(g, g in decoys) for g in (*groups, *decoys)], []
    rng.shuffle(coming)
    while coming or engine.has_work:
        for _ in range(min(len(coming), rng.choice([0, 1, 1, 3, 3, len(coming)]))):
            group, drop = coming.pop()
            engine.submit(group)
            dropped += group if drop else []
        if engine.has_work:
            engine.step()
            engine.check()
        if dropped and rng.random() < 0.2:
            engine.abort(dropped.pop(0))
    assert engine.num_held_blocks == 0
    return [[fingerprint(r) for r in group] for group in groups]


def engine_of(executor: Executor, limits: EngineLimits, eos_ids: Iterable[int] = ()) -> Engine:
    """An engine; on an executor that runs ahead if the limits want two open steps."""
    return Engine(Ahead(executor) if limits.max_open_steps > 1 else executor, limits, eos_ids=eos_ids)


def fingerprint(request: Request) -> str:
    """Of a request that has ended."""
    assert request.finish_reason in ("stop", "length") and request.error is None, request.error
    return _hash(
        request.output_ids,
        _scores(request.output_ids, request.logprobs),
        _scores(request.prompt[1:], request.prompt_logprobs),
        request.finish_reason,
    )


def fingerprints(output: RequestOutput) -> list[str]:
    """Of what the API returns, one for each sample; the same as those of the requests behind it."""
    prompt = None if output.prompt_logprobs is None else output.prompt_logprobs[1:]
    return [_of_completion(c, None if c.index else prompt) for c in output.outputs]


def _of_completion(output: CompletionOutput, prompt: Sequence[dict[int, Logprob] | None] | None) -> str:
    return _hash(output.token_ids, _dicts(output.logprobs), _dicts(prompt), output.finish_reason)


def fingerprint_of_stream(deltas: Sequence[StreamDelta]) -> str:
    """Of a stream read to its end, for a request without prompt log probabilities."""
    scores = [entry for d in deltas for entry in d.logprobs or []]
    whole = None if deltas[0].logprobs is None else scores
    return _hash([t for d in deltas for t in d.token_ids], _dicts(whole), None, deltas[-1].finish_reason)


def one_hash(prints: Sequence[Sequence[str]]) -> str:
    """Of a whole workload."""
    return hashlib.blake2b(repr([list(p) for p in prints]).encode(), digest_size=8).hexdigest()


def _scores(tokens: Sequence[int], scored: Sequence[Scored] | None) -> Scores:
    if scored is None:
        return None
    pairs = zip(tokens, scored, strict=True)
    return [sorted({t: own, **dict(zip(ids, values, strict=True))}.items()) for t, (own, ids, values) in pairs]


def _dicts(entries: Sequence[dict[int, Logprob] | None] | None) -> Scores:
    if entries is None:
        return None
    return [sorted((t, e.logprob) for t, e in (entry or {}).items()) for entry in entries]


def _hash(tokens: Iterable[int], scores: Scores, prompt: Scores, reason: str | None) -> str:
    whole = (list(tokens), scores, prompt, reason)  # repr tells any two floats apart
    return hashlib.blake2b(repr(whole).encode(), digest_size=8).hexdigest()
