"""The steps that profiles are made of: whole prompts, or decode steps of a batch at a context, on a loaded engine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ridgeline.core.errors import ConfigError, RidgelineError
from ridgeline.engine.load import Runtime
from ridgeline.engine.request import Request
from ridgeline.graph.cost import Load
from ridgeline.perf.bench import greedy, need_room, random_prompt

WARM = 4
"""Steps that come first and are not measured."""


@dataclass(frozen=True)
class Shape:
    """What a step computes.

    Attributes:
        batch: requests that decode a token each; 0: a prompt is read.
        length: tokens of that prompt, or in the cache of each request.
    """

    batch: int
    length: int

    @property
    def decodes(self) -> bool:
        """Whether it is a decode step."""
        return self.batch > 0

    @property
    def tokens(self) -> int:
        """Computed in it."""
        return self.batch or self.length

    @property
    def title(self) -> str:
        """For tables."""
        if self.decodes:
            return f"decode, batch {self.batch}, context {self.length}"
        return f"prefill, {self.length} tokens"

    def loads(self, most_tokens: int) -> list[Load]:
        """Of its steps, of which a prompt of more than ``most_tokens`` takes several."""
        if self.decodes:
            return [Load.of([(self.length - 1, 1)] * self.batch)]
        starts = range(0, self.length, most_tokens)
        return [Load.of([(first, min(most_tokens, self.length - first))]) for first in starts]


def shapes_of(prompt: int, batches: Sequence[int], context: int) -> list[Shape]:
    """A prompt (0: none), and decode steps at each batch size. Raises ConfigError for sizes that make no sense."""
    if prompt < 0 or context < 1 or min(batches, default=1) < 1:
        raise ConfigError("profile needs a prompt of at least 0, and batches and a context of at least 1")
    shapes = ([Shape(0, prompt)] if prompt else []) + [Shape(batch, context) for batch in batches]
    if not shapes:
        raise ConfigError("nothing to profile: give -p a prompt's tokens, or -b batch sizes")
    return shapes


def check_shapes(runtime: Runtime, shapes: Sequence[Shape], steps: int) -> None:
    """Raises ConfigError for ``steps`` of a shape that the engine cannot hold."""
    most = runtime.engine.limits.max_requests
    if steps <= WARM:
        raise ConfigError("profile needs at least 1 step")
    for shape in shapes:
        if shape.batch > most:
            raise ConfigError(f"a batch of {shape.batch} needs --max-num-seqs {shape.batch} (now {most})")
        if shape.decodes:
            need_room(runtime, shape.batch, _start(shape, steps) + _decoded(runtime, shape, steps), "-b or --context")
        else:
            need_room(runtime, 1, shape.length + 1, "-p")


def _start(shape: Shape, steps: int) -> int:
    """Tokens of the prompts, so that half the steps come before the context is reached."""
    return max(1, shape.length - steps // 2 - 1)


def _decoded(runtime: Runtime, shape: Shape, steps: int) -> int:
    """Tokens that a request may decode: its steps, and those while others still read their prompts."""
    reading = shape.batch * _start(shape, steps) // max(1, runtime.engine.limits.max_tokens - shape.batch) + 2
    return steps + reading + 2


@dataclass
class Work:
    """Steps of one shape.

    Attributes:
        number: of steps, the first WARM included.
        loads, title: of one of them; of decode steps, once the first has been handed out, the one in the middle.
    """

    runtime: Runtime
    shape: Shape
    number: int
    loads: list[Load] = field(init=False)
    title: str = field(init=False)

    def __post_init__(self) -> None:
        self.loads, self.title = self.shape.loads(self.runtime.engine.limits.max_tokens), self.shape.title

    def steps(self) -> Iterator[Callable[[], None]]:
        """Each to be called once. Raises RidgelineError when not every request has got a token of each."""
        return self._decodes() if self.shape.decodes else self._prompts()

    def _prompts(self) -> Iterator[Callable[[], None]]:
        engine = self.runtime.engine
        for number in range(self.number):
            ids = random_prompt(self.runtime, self.shape.length, number)
            request = engine.make_request(ids, greedy(1), cache_salt=object())
            engine.submit([request])

            def read(request: Request = request) -> None:
                while request.finish_reason is None:
                    engine.step()

            yield read

    def _decodes(self) -> Iterator[Callable[[], None]]:
        engine, shape = self.runtime.engine, self.shape
        params = greedy(_decoded(self.runtime, shape, self.number))
        prompts = [random_prompt(self.runtime, _start(shape, self.number), i) for i in range(shape.batch)]
        requests = [engine.make_request(prompt, params, cache_salt=object()) for prompt in prompts]
        engine.submit(requests)
        try:
            while any(not r.output_ids for r in requests):
                engine.step()
            before = [len(r.output_ids) for r in requests]
            # Cost is linear in the context, so the middle stands for all.
            middle = [r.num_computed + self.number // 2 for r in requests]
            self.loads = [Load.of([(tokens, 1) for tokens in middle])]
            self.title = Shape(shape.batch, round(statistics.fmean(middle)) + 1).title
            for _ in range(self.number):
                yield lambda: engine.step()  # looked up when it is called: tracing puts another there
            if any(len(r.output_ids) != n + self.number for r, n in zip(requests, before, strict=True)):
                raise RidgelineError(f"not every one of {shape.batch} requests decoded {self.number} tokens")
        finally:
            for request in requests:
                engine.abort(request)
