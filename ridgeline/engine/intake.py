"""Checks what is asked for and makes requests of it."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

from ridgeline.core.errors import RequestError
from ridgeline.core.types import SamplingParams, SlotStart
from ridgeline.engine.limits import EngineLimits
from ridgeline.engine.request import Request, pooling_row
from ridgeline.engine.text import Detokenizer, TextStream
from ridgeline.kvcache.cache import KVCache

WordEncoder = Callable[[str], Sequence[int]]
"""Token ids of plain text, without a begin token."""


class Intake:
    """Makes requests; raises RequestError for one that can never be served.

    Args:
        limits: what the engine can hold.
        cache: its cache, for the blocks a request needs.
        eos_ids: tokens that end every request but those that ignore them.
        detokenizer: makes a fresh detokenizer; None: no streamed text and no stop strings.
        encode_word: encodes bad words; None: they must be token ids.
        seed: draws the seeds of requests that bring none; None takes them from the system.
    """

    def __init__(
        self,
        limits: EngineLimits,
        cache: KVCache,
        eos_ids: Iterable[int],
        detokenizer: Callable[[], Detokenizer] | None,
        encode_word: WordEncoder | None,
        seed: int | None,
    ) -> None:
        self._limits, self._cache = limits, cache
        self._eos_ids = frozenset(eos_ids)
        self._detokenizer, self._encode_word = detokenizer, encode_word
        self._random = random.Random(seed) if seed is not None else random.SystemRandom()

    def request(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        stream: bool,
        priority: int,
        salt: Hashable,
        index: int,
        parent: Request | None,
    ) -> Request:
        """A request that generates; see ``Engine.make_request``."""
        limits = self._limits
        prompt = self._check_prompt(prompt_ids, limits.max_len - 1) if parent is None else parent.prompt
        assert isinstance(prompt, array)
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise RequestError(f"priority must be an integer (less is earlier), got {priority!r}")
        text = None
        if stream or params.stop:
            if self._detokenizer is None:
                raise RequestError("stop strings and streamed text need a tokenizer, and this engine has none")
            text = TextStream(self._detokenizer(), params.stop)
        for token in params.stop_token_ids:
            self._check_token(token, "stop_token_ids")
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_ids)
        if parent is not None:
            seed = int(parent.row["seed"])
        else:
            seed = params.seed if params.seed is not None else self._random.getrandbits(64)
        request = Request(
            prompt,
            params,
            limit=min(params.max_tokens, limits.max_len - len(prompt)),
            seed=seed,
            index=index,
            stop_ids=stop_ids,
            text=text,
            start=self._slot_start(params, stop_ids),
            speculates=limits.speculation is not None,
            priority=priority,
            salt=salt,
            parent=parent,
        )
        self._check_room(request, f"lower max_tokens (now {params.max_tokens}) or raise num_kv_blocks")
        return request

    def pooling(self, prompt_ids: Sequence[int], pooling: str) -> Request:
        """A request for the pooled hidden state of a prompt; see ``Engine.make_pooling_request``."""
        if pooling not in ("mean", "last"):
            raise RequestError(f"pooling must be 'mean' or 'last', got {pooling!r}")
        prompt = self._check_prompt(prompt_ids, self._limits.max_len)
        request = Request(prompt, SamplingParams(temperature=0), limit=0, pooling=pooling)
        request.row = pooling_row()
        self._check_room(request, "shorten the text or raise num_kv_blocks")
        return request

    def _check_prompt(self, prompt_ids: Sequence[int], most: int) -> array[int]:
        limits = self._limits
        if len(prompt_ids) == 0:
            raise RequestError("the prompt is empty: give at least one token")
        if len(prompt_ids) > most:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens and the context is {limits.max_len}: shorten it"
                + (" to leave room for at least one token of output" if most < limits.max_len else "")
            )
        try:
            prompt = np.array(prompt_ids)
        except ValueError:
            prompt = np.zeros(0)
        if prompt.ndim != 1 or prompt.dtype.kind not in "iu":
            raise RequestError("a prompt of token ids must be a flat list of integers")
        if prompt.min() < 0 or prompt.max() >= limits.vocab_size:
            wrong = int(prompt[(prompt < 0) | (prompt >= limits.vocab_size)][0])
            raise RequestError(f"token id {wrong} is outside the vocabulary of {limits.vocab_size}")
        return array("i", prompt.astype(np.int32).tobytes())

    def _check_room(self, request: Request, way_out: str) -> None:
        for group, pool in enumerate(self._cache.pools):
            need = self._cache.blocks_needed(request.max_len, group)
            if need > pool.num_blocks:
                raise RequestError(
                    f"the request needs {need} blocks of KV cache and group {group} has {pool.num_blocks}: {way_out}"
                )

    def _slot_start(self, params: SamplingParams, stop_ids: frozenset[int]) -> SlotStart | None:
        """What the sampler keeps for the request's slot, or None when it asks for nothing of it."""
        bias = dict(params.logit_bias or {})
        for token in bias:
            self._check_token(token, "logit_bias")
        words = tuple(dict.fromkeys(sequence for word in params.bad_words for sequence in self._bad_word(word)))
        held = sorted(t for t in stop_ids if 0 <= t < self._limits.vocab_size) if params.min_tokens else []
        penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
        if not bias and not words and not held and penalties == (1.0, 0.0, 0.0):
            return None
        return SlotStart(
            slot=-1,
            repetition_penalty=float(params.repetition_penalty),
            presence_penalty=float(params.presence_penalty),
            frequency_penalty=float(params.frequency_penalty),
            bias_ids=np.array(list(bias), np.int32),
            bias=np.array(list(bias.values()), np.float32),
            min_tokens=params.min_tokens if held else 0,
            min_tokens_ids=np.array(held, np.int32),
            bad_words=words,
        )

    def _bad_word(self, word: str | Sequence[int]) -> list[tuple[int, ...]]:
        """The token sequences of a bad word: inside a text, with a space before it, as well as at its start."""
        if not isinstance(word, str):
            for token in word:
                self._check_token(token, "bad_words")
            return [tuple(int(t) for t in word)]
        if self._encode_word is None:
            raise RequestError("bad_words as texts need a tokenizer, and this engine has none: give token ids")
        bare = word.lstrip(" ")
        spelled = [tuple(self._encode_word(text)) for text in dict.fromkeys((word, bare, " " + bare)) if text]
        return [s for s in spelled if s]

    def _check_token(self, token: int, name: str) -> None:
        if not 0 <= token < self._limits.vocab_size:
            raise RequestError(f"{name} names token id {token}, outside the vocabulary of {self._limits.vocab_size}")
