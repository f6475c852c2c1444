"""Many short requests through AsyncLLM, a fifth of them aborted at random moments: does anything leak?

    python bench/soak_requests.py [--requests 20000] [--callers 64] [--kv-blocks 512] [--seed 0]

Streams, whole generations, several samples, logprobs and stop strings; those that are aborted are cancelled before
they start, while they wait, or in the middle, by closing the stream, cancelling the task or ``abort``. Prints resident
memory every 1,000 requests. Exit status 1 when a block is held at the end, or resident memory grew by more than 1%
after the first 1,000. The KV cache is small, so that the first 1,000 requests write all of it: memory that is the
cache's, which is taken as it is used, must not look like a leak.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import time
from collections import Counter
from contextlib import aclosing, suppress

from ridgeline import AsyncLLM, SamplingParams

WORDS = (
    "the sea a river stone light winter bird that runs under old bridge and sings of bread iron seven letters".split()
)
MILESTONE = 1000
ABORTED, GROWTH = 0.2, 0.01


def resident_bytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def request(draw: random.Random) -> tuple[str, SamplingParams]:
    """A prompt of 4 to 40 words, some of which begin alike, and what to do with it."""
    start = "You are a helpful assistant who answers briefly. " if draw.random() < 0.3 else ""
    prompt = start + " ".join(draw.choices(WORDS, k=draw.randint(4, 40)))
    values = {"max_tokens": draw.randint(1, 16), "seed": draw.getrandbits(32)}
    kind = draw.random()
    if kind < 0.1:
        values |= {"n": 2}
    elif kind < 0.2:
        values |= {"logprobs": 2}
    elif kind < 0.3:
        values |= {"stop": ["\n", "the"]}
    elif kind < 0.4:
        values |= {"temperature": 0, "repetition_penalty": 1.1}
    return prompt, SamplingParams(**values)


async def serve(llm: AsyncLLM, draw: random.Random, number: int) -> str:
    """One request from start to end; what became of it."""
    prompt, params = request(draw)
    streams = params.n == 1 and draw.random() < 0.5
    aborts = draw.random() < ABORTED
    if streams:
        pieces = draw.randint(0, params.max_tokens) if aborts else params.max_tokens
        async with aclosing(llm.stream(prompt, params)) as stream:
            async for piece in stream:
                pieces -= 1
                if aborts and pieces <= 0:
                    return "aborted" if piece.finish_reason is None else "ended before its abort"
        return "streamed" if not aborts else "ended before its abort"
    name = str(number)
    task = asyncio.create_task(llm.generate(prompt, params, request_id=name))
    if not aborts:
        await task
        return "generated"
    await asyncio.sleep(draw.choice([0, draw.uniform(0, 0.4)]))
    if draw.random() < 0.5:
        was = await llm.abort(name)
        await task
        return "aborted" if was or task.result()[0].outputs[0].finish_reason == "abort" else "ended before its abort"
    was = task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    return "aborted" if was else "ended before its abort"


class Soak:
    """Hands requests to callers and keeps count."""

    def __init__(self, llm: AsyncLLM, number: int, seed: int) -> None:
        self.llm, self.number, self.draw = llm, number, random.Random(seed)
        self.next = 0
        self.outcomes: Counter[str] = Counter()
        self.resident: list[int] = []
        self.begin = time.perf_counter()

    async def caller(self) -> None:
        """Requests one after the other, until there are none left."""
        while self.next < self.number:
            self.next += 1
            self.outcomes[await serve(self.llm, random.Random(self.draw.getrandbits(64)), self.next)] += 1
            if self.outcomes.total() % MILESTONE == 0:
                self.milestone()

    def milestone(self) -> None:
        """Print where it stands."""
        done, seconds = self.outcomes.total(), time.perf_counter() - self.begin
        self.resident.append(resident_bytes())
        growth = self.resident[-1] / self.resident[0] - 1
        print(
            f"{done:>7} requests {done / seconds:>7.1f}/s   resident {self.resident[-1] / 1e6:>8.2f} MB "
            f"{growth:>+8.2%} since the first {MILESTONE}",
            flush=True,
        )


async def soak(args: argparse.Namespace) -> dict[str, object]:
    """Run everything; the figures."""
    options = {"num_kv_blocks": args.kv_blocks, "seed": args.seed, "threads": args.threads}
    async with AsyncLLM(args.model, **options) as llm:
        run = Soak(llm, args.requests, args.seed)
        await asyncio.gather(*(run.caller() for _ in range(args.callers)))
        seconds = time.perf_counter() - run.begin

        def leaked(engine: object) -> int:
            engine.check()  # type: ignore[attr-defined]
            assert not engine.has_work  # type: ignore[attr-defined]
            return engine.num_held_blocks  # type: ignore[attr-defined]

        blocks = await asyncio.wrap_future(llm.service.call(leaked))
    resident = run.resident or [resident_bytes()]
    return {
        "requests": args.requests,
        "outcomes": dict(run.outcomes),
        "blocks_leaked": blocks,
        "resident_mb": [round(r / 1e6, 2) for r in resident],
        "resident_growth": round(max(resident) / resident[0] - 1, 5),
        "requests_per_s": round(args.requests / seconds, 1),
    }


def main() -> int:
    """Prints a line every 1,000 requests and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--kv-blocks", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    result = asyncio.run(soak(parser.parse_args()))
    print(json.dumps(result))
    return 1 if result["blocks_leaked"] or result["resident_growth"] > GROWTH else 0  # type: ignore[operator]


if __name__ == "__main__":
    sys.exit(main())
