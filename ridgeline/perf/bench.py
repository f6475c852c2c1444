"""Speed of a loaded model, told as throughput and as a share of this machine's roofline."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np

from ridgeline.core.config import EngineConfig
from ridgeline.core.errors import ConfigError, RidgelineError
from ridgeline.core.hardware import Peaks
from ridgeline.core.types import SamplingParams
from ridgeline.engine.load import Runtime
from ridgeline.engine.request import Request
from ridgeline.graph.cost import Cost, Load
from ridgeline.graph.roofline import roofline
from ridgeline.perf.machine import better, peaks_now, peaks_of

DEPTH = 128  # tokens in the cache before a decode measurement begins


@dataclass(frozen=True)
class Measurement:
    """One row of the table.

    Attributes:
        test: "pp512" (prompt tokens), "tg128" (generated), "tg128 b8" (the same for 8 requests at once).
        tokens: tokens of one repetition, over all requests.
        seconds: time of each repetition, sampling and Python included.
        bandwidths: bytes per second that memory reads at beside each repetition, the mean of right before and after.
        streamed_bytes, dot_ops: cost of one repetition.
        bound_seconds: the roofline of each repetition, at that bandwidth.
    """

    test: str
    tokens: int
    seconds: tuple[float, ...]
    bandwidths: tuple[float, ...]
    streamed_bytes: float
    dot_ops: float
    bound_seconds: tuple[float, ...]

    @property
    def rates(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [self.tokens / s for s in self.seconds]

    @property
    def mean(self) -> float:
        """Mean tokens per second."""
        return statistics.fmean(self.rates)

    @property
    def deviation(self) -> float:
        """Sample standard deviation of the tokens per second (0 for one repetition)."""
        return statistics.stdev(self.rates) if len(self.seconds) > 1 else 0.0

    @property
    def gb_s(self) -> float:
        """Weights and KV read, in 1e9 bytes per second."""
        return self.streamed_bytes / statistics.fmean(self.seconds) / 1e9

    @property
    def peak_gb_s(self) -> float:
        """The mean bandwidth beside the repetitions, in 1e9 bytes per second."""
        return statistics.fmean(self.bandwidths) / 1e9

    @property
    def gop_s(self) -> float:
        """Dot-product operations, in 1e9 per second."""
        return self.dot_ops / statistics.fmean(self.seconds) / 1e9

    @property
    def share(self) -> float:
        """Share of the roofline that all repetitions together reach, 1.0 being all of it."""
        return sum(self.bound_seconds) / sum(self.seconds)


class Timed(NamedTuple):
    """Seconds of each repetition, and the read bandwidth beside it in bytes/s."""

    seconds: tuple[float, ...]
    bandwidths: tuple[float, ...]


@dataclass(frozen=True)
class Report:
    """All measurements of one run; ``peaks`` are the best of those taken before and after all of them."""

    rows: list[Measurement]
    peaks: Peaks
    load_s: float
    first_token_s: float
    peak_rss_mb: float


def run_bench(
    runtime: Runtime, prompt: int, generate: int, batches: Sequence[int], repetitions: int, *, fresh: bool = True
) -> Report:
    """Measure prefill of ``prompt`` tokens and decoding of ``generate`` tokens at each batch size.

    ``fresh`` also measures start to first token and peak memory in processes of their own. Either length may be
    0 to leave its tests out. Raises ConfigError for what the engine cannot hold.
    """
    _check_sizes(runtime, prompt, generate, batches, repetitions)
    peaks = peaks_of(runtime)
    timed: list[tuple[str, int, Timed, list[Load]]] = []
    if prompt:
        timed.append((f"pp{prompt}", prompt, *_prefill(runtime, prompt, repetitions, peaks)))
    if generate:
        for batch in batches:
            name = f"tg{generate}" + (f" b{batch}" if batch > 1 else "")
            timed.append((name, batch * generate, *_decode(runtime, generate, batch, repetitions, peaks)))
    first, rss = _fresh_process(runtime, repetitions) if fresh else (float("nan"), float("nan"))
    peaks = better(peaks, peaks_of(runtime))
    return Report([_measurement(runtime, peaks, *t) for t in timed], peaks, runtime.load_seconds, first, rss)


def step_share(runtime: Runtime, peaks: Peaks, loads: Sequence[Load], seconds: float) -> float:
    """Share of the roofline reached by steps of ``loads`` that took ``seconds`` together."""
    return sum(roofline(runtime.plan.cost(load), peaks).seconds for load in loads) / seconds


def check_arguments(prompt: int, generate: int, batches: Sequence[int], repetitions: int) -> None:
    """Raise ConfigError for numbers that no engine can hold."""
    if prompt < 0 or generate < 0 or repetitions < 1 or not batches or min(batches) < 1:
        raise ConfigError("bench needs lengths of at least 0, at least 1 repetition and batches of at least 1")


def _check_sizes(runtime: Runtime, prompt: int, generate: int, batches: Sequence[int], repetitions: int) -> None:
    check_arguments(prompt, generate, batches, repetitions)
    limits = runtime.engine.limits
    if max(batches) > limits.max_requests:
        raise ConfigError(f"a batch of {max(batches)} needs --max-num-seqs {max(batches)} (now {limits.max_requests})")
    if prompt:
        need_room(runtime, 1, prompt + 1, "-p")
    for batch in batches if generate else ():
        need_room(runtime, batch, DEPTH + _decode_tokens(runtime, generate, batch), "-n or -b")


def need_room(runtime: Runtime, batch: int, tokens: int, flags: str) -> None:
    """Raise ConfigError unless ``batch`` sequences of ``tokens`` fit at once, warm-up steps included."""
    limits = runtime.engine.limits
    if tokens > limits.max_len:
        raise ConfigError(
            f"a test takes sequences of {tokens} tokens and the context is {limits.max_len}: "
            f"lower {flags}, or raise --max-model-len if the model allows it"
        )
    blocks = batch * -(-tokens // limits.block_size)
    if blocks > min(limits.num_blocks):
        raise ConfigError(
            f"a test takes {blocks} blocks of KV cache and there are {min(limits.num_blocks)}: "
            f"lower {flags}, or give --num-kv-blocks {blocks}"
        )


def random_prompt(runtime: Runtime, length: int, number: int) -> list[int]:
    """Token ids that no two requests share; what they say does not matter to the time they take."""
    random = np.random.default_rng(number)
    ids: list[int] = random.integers(0, runtime.engine.limits.vocab_size, length).tolist()
    return ids


def _time(runtime: Runtime, repetitions: int, peaks: Peaks, prepare: Callable[[int], Callable[[], float]]) -> Timed:
    """Repetitions 1, 2 and so on (0 warms up): what ``prepare`` returns is called between two looks at the bandwidth
    and says how many seconds it took."""
    prepare(0)()
    seconds, bandwidths = [], []
    for repetition in range(1, repetitions + 1):
        run = prepare(repetition)
        before = peaks_now(runtime, peaks).bandwidth
        seconds.append(run())
        bandwidths.append((before + peaks_now(runtime, peaks).bandwidth) / 2)
    return Timed(tuple(seconds), tuple(bandwidths))


def _prefill(runtime: Runtime, length: int, repetitions: int, peaks: Peaks) -> tuple[Timed, list[Load]]:
    engine = runtime.engine

    def prepare(repetition: int) -> Callable[[], float]:
        # A salt of its own: what is in the cache from another run must not be found.
        request = engine.make_request(random_prompt(runtime, length, repetition), greedy(1), cache_salt=object())

        def run() -> float:
            start = time.perf_counter()
            engine.submit([request])
            while request.finish_reason is None:
                engine.step()
            return time.perf_counter() - start

        return run

    size = engine.limits.max_tokens
    chunks = [Load.of([(first, min(size, length - first))]) for first in range(0, length, size)]
    return _time(runtime, repetitions, peaks, prepare), chunks


def _decode(runtime: Runtime, generate: int, batch: int, repetitions: int, peaks: Peaks) -> tuple[Timed, list[Load]]:
    engine = runtime.engine
    loads: list[Load] = []

    def prepare(repetition: int) -> Callable[[], float]:
        requests = _start(runtime, generate, batch, repetition)
        before = [len(r.output_ids) for r in requests]

        def run() -> float:
            start = time.perf_counter()
            for _ in range(generate):
                engine.step()
            seconds = time.perf_counter() - start
            if any(len(r.output_ids) != n + generate for r, n in zip(requests, before, strict=True)):
                raise RidgelineError(
                    f"not every one of {batch} requests decoded {generate} tokens: the time means nothing"
                )
            # Cost is linear in the context, so the middle of the run stands for all its steps.
            middle = [(r.num_computed - generate // 2 - 1, 1) for r in requests]
            loads[:] = [Load.of(middle)] * generate
            for request in requests:
                engine.abort(request)
            return seconds

        return run

    return _time(runtime, repetitions, peaks, prepare), loads


def _start(runtime: Runtime, generate: int, batch: int, repetition: int) -> list[Request]:
    """``batch`` requests that have read DEPTH tokens each and now only decode."""
    engine = runtime.engine
    params = greedy(_decode_tokens(runtime, generate, batch))
    prompts = [random_prompt(runtime, DEPTH, repetition * batch + i) for i in range(batch)]
    requests = [engine.make_request(prompt, params, cache_salt=object()) for prompt in prompts]
    engine.submit(requests)
    while any(not r.output_ids for r in requests):
        engine.step()
    return requests


def _decode_tokens(runtime: Runtime, generate: int, batch: int) -> int:
    """Tokens a request may need: the timed ones, and those it decodes while others still read their prompts."""
    reading = -(-batch * DEPTH // max(1, runtime.engine.limits.max_tokens - batch)) + 1
    return generate + reading + 1


def greedy(max_tokens: int) -> SamplingParams:
    """Of a request that generates so many tokens, whatever they are."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def _measurement(
    runtime: Runtime, peaks: Peaks, test: str, tokens: int, timed: Timed, loads: list[Load]
) -> Measurement:
    cost = Cost()
    bounds = [0.0] * len(timed.seconds)
    for load in set(loads):
        number = loads.count(load)
        one = runtime.plan.cost(load)
        for i, bandwidth in enumerate(timed.bandwidths):
            bounds[i] += number * roofline(one, replace(peaks, bandwidth=bandwidth)).seconds
        for _ in range(number):
            cost = cost.plus(one)
    return Measurement(test, tokens, *timed, cost.streamed_bytes, cost.dot_ops, tuple(bounds))


# Runs the command line and then says its own peak memory: a parent cannot tell, for a new process's ru_maxrss
# begins at its parent's.
_CHILD = """
import sys
from ridgeline.api.cli import main
try:
    main()
except SystemExit as end:
    if end.code:
        raise
with open("/proc/self/status") as status:
    print(next(line for line in status if line.startswith("VmHWM")), file=sys.stderr)
"""
_SIXTEEN_TOKENS = "The quick brown fox jumps over the lazy dog and then it runs off"


def _fresh_process(runtime: Runtime, repetitions: int) -> tuple[float, float]:
    """Seconds from process start to the first token of a 16-token prompt (median after a warm-up), and the
    peak memory in MB (1e6 bytes) of one that fills a cache of 512 tokens (or of as many as there can be)."""
    starts = [_child(runtime, _SIXTEEN_TOKENS, 1)[0] for _ in range(repetitions + 1)][1:]
    limits, tokenizer = runtime.engine.limits, runtime.tokenizer
    length = min(512, limits.max_len, min(limits.num_blocks) * limits.block_size) - 1  # and one token of output
    words = length
    while words > 1 and len(tokenizer.encode(" the" * words)) > length:
        words -= 1
    # One token alone: from the second on, the closing line measures bandwidth, in a buffer of its own.
    return statistics.median(starts), _child(runtime, " the" * words, 1)[1]


def _child(runtime: Runtime, prompt: str, number: int) -> tuple[float, float]:
    command = [sys.executable, "-c", _CHILD, "run", runtime.config.model, "-p", prompt, "-n", str(number)]
    command += ["--ignore-eos", "--temperature", "0"]
    command += flags_of(runtime.config)
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        first = time.perf_counter() - start
        process.stdout.read()
        messages = process.stderr.read().decode()
    if process.returncode:
        raise RidgelineError(f"a fresh process failed with code {process.returncode}: {messages.strip()}")
    return first, int(messages.rpartition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def flags_of(config: EngineConfig) -> list[str]:
    """The command-line flags that make a configuration, but for its model."""
    changed = [(f.name, getattr(config, f.name)) for f in fields(config) if getattr(config, f.name) != f.default]
    words = []
    for name, value in changed:
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif name != "model":
            words += [f"--{flag}", str(value)]
    return words
