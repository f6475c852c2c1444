"""The loop that turns requests into steps: first come, first served, over the block pools."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from ridgeline.core.errors import RequestError, RidgelineError
from ridgeline.core.types import Batch, Executor, Int32, SamplingParams, StepOutput, Ticket
from ridgeline.engine.batching import BatchBuilder
from ridgeline.engine.request import Request
from ridgeline.engine.text import Detokenizer, TextStream
from ridgeline.kvcache.block_pool import BlockPool


@dataclass(frozen=True)
class EngineLimits:
    """What an engine may hold at once.

    Attributes:
        max_requests: requests running, so slots of the executor.
        max_tokens: tokens in a step.
        max_len: tokens of one sequence, prompt and output.
        vocab_size: token ids are below this.
        block_size: tokens in a block.
        num_blocks: blocks of each cache group.
    """

    max_requests: int
    max_tokens: int
    max_len: int
    vocab_size: int
    block_size: int
    num_blocks: Sequence[int]


class Engine:
    """Runs requests on an executor. Not for use from several threads at once.

    A request takes all the blocks that it can ever need when it is admitted, so nothing that runs has to be put
    off again. Each step decodes one token of every running request and fills the rest of its budget with prompts.

    Args:
        executor: runs the steps; its slots and blocks are as many as ``limits`` says.
        limits: what may be held at once.
        eos_ids: tokens that end every request but those that ignore them.
        detokenizer: makes a fresh detokenizer; needed for streaming and for stop strings.
        seed: draws the seeds of requests that bring none; None takes them from the system.
    """

    def __init__(
        self,
        executor: Executor,
        limits: EngineLimits,
        *,
        eos_ids: Iterable[int] = (),
        detokenizer: Callable[[], Detokenizer] | None = None,
        seed: int | None = None,
    ) -> None:
        self.limits = limits
        self._executor = executor
        self._eos_ids = frozenset(eos_ids)
        self._detokenizer = detokenizer
        self._random = random.Random(seed) if seed is not None else random.SystemRandom()
        self._pools = [BlockPool(n) for n in limits.num_blocks]
        self._builder = BatchBuilder(limits.max_tokens, limits.max_requests, len(self._pools))
        self._waiting: deque[Request] = deque()
        self._prefilling: list[Request] = []
        self._decoding: list[Request] = []
        self._free_slots = list(range(limits.max_requests - 1, -1, -1))
        self._updates: list[list[tuple[int, int, int]]] = [[] for _ in self._pools]
        self._steady: Int32 | None = None  # the last step's tokens while only the same requests decode
        self._only_decodes = False  # whether the last batch held no part of a prompt
        self._ticket: Ticket | None = None

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self._decoding or self._prefilling or self._waiting)

    def make_request(self, prompt_ids: Sequence[int], params: SamplingParams, *, stream: bool = False) -> Request:
        """A request, checked but not yet queued. ``stream`` keeps its text up to date after every step.

        Raises RequestError for one that can never be served.
        """
        prompt = self._check_prompt(prompt_ids)
        limit = min(params.max_tokens, self.limits.max_len - len(prompt))
        text = None
        if stream or params.stop:
            if self._detokenizer is None:
                raise RequestError("stop strings and streamed text need a tokenizer, and this engine has none")
            text = TextStream(self._detokenizer(), params.stop)
        stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_ids)
        seed = params.seed if params.seed is not None else self._random.getrandbits(64)
        request = Request(prompt, params, limit=limit, seed=seed, stop_ids=stop_ids, text=text)
        need = self._blocks_needed(request)
        for group, pool in enumerate(self._pools):
            if need > pool.num_blocks:
                raise RequestError(
                    f"the request needs {need} blocks of KV cache and group {group} has {pool.num_blocks}: "
                    f"lower max_tokens (now {params.max_tokens}) or raise num_kv_blocks"
                )
        return request

    def _check_prompt(self, prompt_ids: Sequence[int]) -> Int32:
        limits = self.limits
        if len(prompt_ids) == 0:
            raise RequestError("the prompt is empty: give at least one token")
        if len(prompt_ids) >= limits.max_len:
            raise RequestError(
                f"the prompt has {len(prompt_ids)} tokens and the context is {limits.max_len}: "
                "shorten it to leave room for at least one token of output"
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
        return prompt.astype(np.int32)

    def _blocks_needed(self, request: Request) -> int:
        return -(-request.max_len // self.limits.block_size)

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests behind those that wait already."""
        self._waiting.extend(requests)

    def abort(self, request: Request) -> None:
        """Drop a request at once, if it has not ended; what it held is free again."""
        if request.finish_reason is not None:
            return
        try:
            if any(r is request for r in (*self._decoding, *self._prefilling)):
                self._decoding = [r for r in self._decoding if r is not request]
                self._prefilling = [r for r in self._prefilling if r is not request]
                self._release(request)
            self._waiting = deque(r for r in self._waiting if r is not request)
            request.end("abort")
        except BaseException:
            self._drop_all()
            raise

    def step(self) -> None:
        """Run one step: every decoding request gains a token, prompts advance as far as the budget allows.

        When anything goes wrong, Ctrl-C included, all requests are dropped and the engine is idle and usable.
        """
        try:
            self._admit()
            batch, sampled = self._plan()
            self._ticket = self._executor.launch(batch)
            output = self._executor.finish(self._ticket)
            self._ticket = None
            self._accept(sampled, output)
        except BaseException:
            self._drop_all()
            raise

    def _admit(self) -> None:
        """Give the first who wait a slot and all their blocks, as long as there are enough of both."""
        while self._waiting and self._free_slots:
            need = self._blocks_needed(self._waiting[0])
            if any(pool.num_free < need for pool in self._pools):
                return
            request = self._waiting.popleft()
            request.slot = slot = self._free_slots.pop()
            self._prefilling.append(request)
            request.blocks = [pool.allocate(need) for pool in self._pools]
            for updates, blocks in zip(self._updates, request.blocks, strict=True):
                updates.extend((slot, index, block) for index, block in enumerate(blocks))

    def _plan(self) -> tuple[Batch, list[Request]]:
        """The next batch and the requests whose rows it samples, decode first."""
        decoding = self._decoding
        if self._steady is not None and not self._prefilling:
            batch = self._builder.again(self._steady)
            for request in decoding:
                request.num_computed += 1
            return batch, decoding
        budget = self.limits.max_tokens - len(decoding)
        chunks: list[tuple[Request, int]] = []
        for request in self._prefilling:
            if budget == 0:
                break
            size = min(budget, len(request.prompt) - request.num_computed)
            chunks.append((request, size))
            budget -= size
        batch = self._builder.build(decoding, chunks, self._updates)
        self._updates = [[] for _ in self._pools]
        for request in decoding:
            request.num_computed += 1
        for request, size in chunks:
            request.num_computed += size
        # Chunks are in order of arrival and only the last can be cut short.
        done = [r for r, _ in chunks if r.num_computed == len(r.prompt)]
        self._prefilling = self._prefilling[len(done) :]
        self._decoding = decoding + done
        self._only_decodes = not chunks
        return batch, self._decoding

    def _accept(self, sampled: list[Request], output: StepOutput) -> None:
        """Hand each sampled token to its request; let go of those that ended."""
        tokens: list[int] = output.token_ids.tolist()
        ended = []
        for row, (request, token) in enumerate(zip(sampled, tokens, strict=True)):
            if token < 0:
                raise RidgelineError("the model's logits are not numbers (NaN): its weights are damaged")
            if request.accept(token, output, row):
                ended.append(request)
        self._steady = output.token_ids if self._only_decodes else None
        if ended:
            self._decoding = [r for r in sampled if r.finish_reason is None]
            for request in ended:
                self._release(request)

    def _release(self, request: Request) -> None:
        for pool, blocks in zip(self._pools, request.blocks, strict=True):
            pool.free(blocks)
        self._free_slots.append(request.slot)
        request.blocks, request.slot = [], -1
        self._steady = None

    def _drop_all(self) -> None:
        if self._ticket is not None:
            with suppress(Exception):
                self._executor.finish(self._ticket)
            self._ticket = None
        for request in [*self._decoding, *self._prefilling, *self._waiting]:
            if request.finish_reason is None:
                request.finish_reason = "abort"
            request.blocks, request.slot = [], -1
        self._waiting.clear()
        self._prefilling, self._decoding = [], []
        for pool in self._pools:
            pool.reset()
        self._free_slots = list(range(self.limits.max_requests - 1, -1, -1))
        self._updates = [[] for _ in self._pools]
        self._steady = None

    def check(self) -> None:
        """Raise AssertionError unless blocks and slots are each held by exactly the requests that run."""
        running = [*self._decoding, *self._prefilling]
        for group, pool in enumerate(self._pools):
            pool.check(r.blocks[group] for r in running)
        slots = [r.slot for r in running] + self._free_slots
        if sorted(slots) != list(range(self.limits.max_requests)):
            raise AssertionError(f"slots are lost or held twice: {sorted(slots)}")
        if any(r.finish_reason is not None for r in running):
            raise AssertionError("a request that has ended still runs")
