"""Cost of the control plane per step: schedule, batch, bookkeeping and detokenizing, over an executor that is a stub.

    python bench/control.py [--steps 200] [--repetitions 5] [--sizes 1,32,256,1024,4096]

Each number is the median over repetitions of the mean microseconds of a step in which every running request
decodes one token and streams its text. Nothing is computed: what remains is what the control plane adds to a step.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import statistics
import time

import numpy as np

from ridgeline.core.types import Batch, SamplingParams, StepOutput, Ticket, TokenMasks
from ridgeline.engine.engine import Engine
from ridgeline.engine.limits import EngineLimits
from ridgeline.text.detokenizer import Detokenizer

BLOCK, PROMPT, VOCAB = 16, 32, 1000
NO_IDS, NO_LOGPROBS = np.zeros((0, 0), np.int32), np.zeros(0, np.float32)


class Stub:
    """An executor that samples the position of each row."""

    def launch(self, batch: Batch) -> Ticket:
        """Keeps what ``finish`` returns."""
        tokens = batch.positions[batch.sample_rows] % VOCAB
        self.output = StepOutput(tokens, np.ones(len(tokens), np.int32), NO_LOGPROBS, NO_IDS, NO_LOGPROBS)
        return Ticket(1)

    def finish(self, ticket: Ticket, masks: TokenMasks | None = None) -> StepOutput:
        """The tokens."""
        return self.output


class Words:
    """A vocabulary of four-letter words, as much of a tokenizer as a Detokenizer asks for."""

    def __init__(self) -> None:
        self._texts: dict[int, str] = {}

    def whole_texts(self, skip_special: bool) -> dict[int, str]:
        """Texts known already."""
        return self._texts

    def token_bytes(self, token_id: int, skip_special: bool = True) -> bytes:
        """The bytes of one token."""
        return f" {token_id:03d}".encode()


def make_engine(running: int, steps: int, blocks: int = 0) -> Engine:
    """An engine with room for ``running`` requests of ``steps`` tokens, and ``blocks`` more."""
    length = PROMPT + steps + 64
    each = -(-length // BLOCK) + 1
    limits = EngineLimits(running, max(512, running), length, VOCAB, BLOCK, [running * each + blocks])
    words = Words()
    return Engine(Stub(), limits, detokenizer=lambda: Detokenizer(words), seed=0)  # type: ignore[arg-type]


def start(engine: Engine, running: int, stream: bool) -> None:
    """Let ``running`` requests read their prompts."""
    params = SamplingParams(max_tokens=engine.limits.max_len - PROMPT, ignore_eos=True, seed=1)
    random = np.random.default_rng(0)
    requests = []
    for number in range(running):  # lengths differ, so that blocks are filled at different steps
        prompt = random.integers(0, VOCAB, PROMPT - number % BLOCK).tolist()
        requests.append(engine.make_request(prompt, params, stream=stream))
    engine.submit(requests)
    while any(not r.output_ids for r in requests):
        engine.step()


def fill_cache(engine: Engine, blocks: int) -> None:
    """Leave ``blocks`` blocks of ended requests in the prefix index."""
    random = np.random.default_rng(1)
    size = engine.limits.max_len // BLOCK * BLOCK - BLOCK
    params = SamplingParams(max_tokens=1, ignore_eos=True, seed=1)
    while engine.num_cached_blocks < blocks:
        engine.submit([engine.make_request(random.integers(0, VOCAB, size).tolist(), params) for _ in range(64)])
        while engine.has_work:
            engine.step()


def measure(running: int, steps: int, *, stream: bool = True, waiting: int = 0, cached: int = 0) -> float:
    """Mean microseconds of a step."""
    engine = make_engine(running, steps, cached)
    if cached:
        fill_cache(engine, cached - 1)
    start(engine, running, stream)
    if waiting:
        params = SamplingParams(max_tokens=4, seed=1)
        engine.submit([engine.make_request([n % VOCAB, n // VOCAB % VOCAB], params) for n in range(waiting)])
    for _ in range(3):
        engine.step()
    gc.collect()
    begin = time.perf_counter()
    for _ in range(steps):
        engine.step()
    return (time.perf_counter() - begin) / steps * 1e6


def main() -> None:
    """Prints one table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--sizes", default="1,32,256,1024,4096")
    parser.add_argument("--many", type=int, default=100_000, help="requests that wait, and blocks that are cached")
    args = parser.parse_args()
    cases: dict[str, dict[str, int]] = {f"{n} running": {"running": int(n)} for n in args.sizes.split(",")}
    cases["32 running, no text"] = {"running": 32, "stream": False}
    cases["256 running, no text"] = {"running": 256, "stream": False}
    cases[f"32 running, {args.many} waiting"] = {"running": 32, "waiting": args.many}
    cases[f"32 running, {args.many} blocks cached"] = {"running": 32, "cached": args.many}
    results = {}
    print(f"{'':<36}{'us a step':>10}{'range':>18}{'us a request':>14}")
    for name, options in cases.items():
        large = options["running"] > 1000 or options.get("waiting") or options.get("cached")
        times = [measure(steps=args.steps, **options) for _ in range(2 if large else args.repetitions)]  # type: ignore[arg-type]
        results[name] = round(statistics.median(times), 1)
        spread = f"{min(times):.1f} to {max(times):.1f}"
        print(f"{name:<36}{results[name]:>10.1f}{spread:>18}{results[name] / options['running']:>14.2f}", flush=True)
    if importlib.util.find_spec("torch") and importlib.util.find_spec("triton"):
        from null_device import host_work

        for size, work in host_work().items():
            for what, microseconds in (("CUDA launch + finish", work.steady), ("all new", work.changing)):
                name = f"{size} decoding, {what}"
                results[name] = round(microseconds, 1)
                print(f"{name:<36}{results[name]:>10.1f}{'no device':>18}{microseconds / size:>14.2f}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
