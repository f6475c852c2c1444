"""AsyncLLM on the embedded model and the native kernels: the bits of LLM, and cancellation at random points."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing
from pathlib import Path

from ridgeline import LLM, AsyncLLM, SamplingParams

PROMPTS = ["The capital of France is", "2, 4, 6, 8,", "Once upon a time there was a " * 9, "A", "The sea is"]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12, logprobs=2, prompt_logprobs=1),
    SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=16, n=3),
    SamplingParams(top_k=40, min_p=0.02, seed=4, max_tokens=9, ignore_eos=True, frequency_penalty=0.5),
    SamplingParams(temperature=0, max_tokens=16, logprobs=3, min_tokens=4),
    SamplingParams(temperature=0.7, seed=5, max_tokens=20, stop=[" the", "."], logprobs=0),
]
CHAT = [{"role": "user", "content": "Which city is the capital of Japan?"}]


def test_it_gives_the_bits_of_llm(smollm2_path: Path) -> None:
    with LLM(str(smollm2_path)) as llm:
        whole = llm.generate(PROMPTS, PARAMS)
        answer, embeddings = llm.chat(CHAT, PARAMS[0]), llm.embed(PROMPTS)
        streamed = [list(llm.stream(p, s)) for p, s in zip(PROMPTS[2:], PARAMS[2:], strict=True)]

    async def work() -> None:
        async with AsyncLLM(str(smollm2_path), max_num_seqs=5, max_num_batched_tokens=24) as llm:

            async def stream(prompt: str, params: SamplingParams) -> list[object]:
                return [piece async for piece in llm.stream(prompt, params)]

            alone = asyncio.gather(*(llm.generate(p, s) for p, s in zip(PROMPTS, PARAMS, strict=True)))
            streams = asyncio.gather(*map(stream, PROMPTS[2:], PARAMS[2:]))
            together, chat, embedded = await asyncio.gather(
                llm.generate(PROMPTS, PARAMS), llm.chat(CHAT, PARAMS[0]), llm.embed(PROMPTS)
            )
            assert together == whole and [r for (r,) in await alone] == whole
            assert chat == answer and embedded == embeddings
            for deltas, same in zip(await streams, streamed, strict=True):
                for name in ("token_ids", "logprobs"):
                    both = [[x for d in each for x in getattr(d, name) or ()] for each in (deltas, same)]
                    assert both[0] == both[1]
                assert "".join(map(str, deltas)) == "".join(map(str, same))
                assert deltas[-1].finish_reason == same[-1].finish_reason  # type: ignore[attr-defined]

    asyncio.run(work())


def test_streams_closed_at_random_points_leave_the_pool_empty(smollm2_path: Path) -> None:
    draw = random.Random(0)
    params = SamplingParams(seed=7, max_tokens=12, ignore_eos=True)

    async def work() -> None:
        async with AsyncLLM(str(smollm2_path), max_num_seqs=8) as llm:
            whole = [r.outputs[0].token_ids for r in await llm.generate(PROMPTS, params)]

            async def reader(which: int, pieces: int) -> None:
                tokens: list[int] = []
                async with aclosing(llm.stream(PROMPTS[which], params)) as stream:
                    async for piece in stream:
                        tokens += piece.token_ids
                        pieces -= 1
                        if pieces <= 0:
                            break
                assert tokens and tokens == whole[which][: len(tokens)]

            await asyncio.gather(*(reader(draw.randrange(5), draw.randint(0, 14)) for _ in range(24)))
            held = llm.service.call(lambda engine: (engine.check(), engine.num_held_blocks, engine.has_work))
            assert await asyncio.wrap_future(held) == (None, 0, False)

    asyncio.run(work())
