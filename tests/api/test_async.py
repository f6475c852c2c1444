"""AsyncLLM over the simulated executor: cancellation, bounds, failures, many callers, several loops, no idling."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

import pytest

from ridgeline import (
    AsyncLLM,
    ConfigError,
    EngineDeadError,
    QueueFullError,
    RequestError,
    RidgelineError,
    SamplingParams,
    SlowReaderError,
    StreamDelta,
)
from ridgeline.core.types import Batch, StepOutput, Ticket, TokenMasks
from ridgeline.engine.engine import Engine, EngineLimits
from tests.api.sim_runtime import LIMITS, expected, sim_runtime
from tests.sim.model import state_row
from tests.sim.small import SimExecutor, hidden_states, solo

SEEDED = SamplingParams(seed=11, max_tokens=9)
LONG = SamplingParams(seed=11, max_tokens=60, ignore_eos=True)
Make = Callable[..., AsyncLLM]


class Gate(SimExecutor):
    """Lets steps end one by one, when ``turns`` says so; from the start all of them may."""

    def __init__(self, limits: EngineLimits, **values: Any) -> None:
        super().__init__(limits, **values)
        self.turns = threading.Semaphore(10**9)
        self.at_gate = threading.Event()  # a step waits to end

    def hold(self) -> None:
        """From now on no step ends without a turn."""
        self.turns = threading.Semaphore(0)
        self.at_gate.clear()

    def finish(self, ticket: Ticket, masks: TokenMasks | None = None) -> StepOutput:
        self.at_gate.set()
        self.turns.acquire()
        return super().finish(ticket, masks)

    async def wait(self) -> None:
        """Until a step waits to end."""
        assert await asyncio.to_thread(self.at_gate.wait, 30)

    def let_go(self) -> None:
        """Let all steps end again."""
        self.turns.release(10**6)


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes an AsyncLLM over the simulated executor; closes it at the end."""
    made: list[AsyncLLM] = []
    gates: list[Gate] = []

    def build(limits: EngineLimits = LIMITS, executor: SimExecutor | None = None, **options: Any) -> AsyncLLM:
        monkeypatch.setattr("ridgeline.api.async_llm.load_runtime", lambda config: sim_runtime(limits, executor))
        made.append(AsyncLLM("any", **options))
        gates.extend([executor] if isinstance(executor, Gate) else [])
        return made[-1]

    yield build
    for gate in gates:
        gate.let_go()
    for llm in made:
        llm.close()


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine; a test that hangs fails."""
    return asyncio.run(asyncio.wait_for(work, 60))


async def look(llm: AsyncLLM, function: Callable[[Engine], Any]) -> Any:
    return await asyncio.wrap_future(llm.service.call(function))


async def need_empty(llm: AsyncLLM, what: str = "") -> None:
    """The engine holds nothing: what was asked for before has been dropped by the time this command runs."""

    def check(engine: Engine) -> tuple[int, int, int]:
        engine.check()
        return engine.num_held_blocks, engine.num_running, engine.num_waiting

    assert await look(llm, check) == (0, 0, 0), what


async def collect(llm: AsyncLLM, prompt: Any, params: SamplingParams, **options: Any) -> list[StreamDelta]:
    return [delta async for delta in llm.stream(prompt, params, **options)]


def test_generate_chat_embed_and_stream_give_what_llm_gives(make: Make) -> None:
    async def work() -> None:
        llm = make()
        several = await llm.generate(["abc", [97, 98], "x"], [SEEDED, LONG, SamplingParams(n=3, seed=4)])
        assert [r.prompt for r in several] == ["abc", None, "x"]
        assert several[0].outputs[0].token_ids == expected("abc", SEEDED)[0]
        assert several[1].outputs[0].token_ids == expected([97, 98], LONG)[0]
        for i, output in enumerate(several[2].outputs):
            tokens, reason = solo([120], SamplingParams(seed=4), 128, 64, frozenset({3}), i)
            assert (output.index, output.token_ids, output.finish_reason) == (i, tokens, reason)
        talk = [{"role": "user", "content": "hi"}]
        answer = (await llm.chat(talk, SEEDED))[0]
        assert answer.outputs[0].token_ids == expected([*b"hi", 2], SEEDED)[0]
        deltas = await collect(llm, talk, SEEDED)
        assert [t for d in deltas for t in d.token_ids] == answer.outputs[0].token_ids
        assert "".join(map(str, deltas)) == answer.outputs[0].text
        assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason == answer.outputs[0].finish_reason
        last = await llm.embed(["abcdefgh", "b"], pooling="last")
        assert [e.embedding for e in last] == [list(state_row(hidden_states(list(p))[-1])) for p in (b"abcdefgh", b"b")]
        assert await llm.generate([]) == []
        await need_empty(llm)

    run(work())


def test_a_stream_carries_logprobs_when_asked(make: Make) -> None:
    async def work() -> None:
        llm = make()
        deltas = await collect(llm, "abc", SamplingParams(seed=1, max_tokens=5, ignore_eos=True, logprobs=0))
        entries = [entry for d in deltas for entry in d.logprobs or ()]
        assert [list(e) for e in entries] == [[t] for d in deltas for t in d.token_ids] and len(entries) == 5
        assert all(d.logprobs is None for d in await collect(llm, "abc", SEEDED))

    run(work())


def test_requests_are_refused_at_once(make: Make) -> None:
    async def work() -> None:
        llm = make()
        for wrong, message in (("", "prompt is empty"), ("x" * 64, "context is 64"), (3, "must be a text")):
            with pytest.raises(RequestError, match=message):
                llm.stream(wrong, SEEDED)  # type: ignore[arg-type]
            with pytest.raises(RequestError, match=message):
                await llm.generate(["good", wrong] if wrong != 3 else wrong, SEEDED)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="AsyncLLM.stream gives one completion"):
            llm.stream("a", SamplingParams(n=2))
        with pytest.raises(RequestError, match="did you mean 'priority'"):
            llm.stream("a", SEEDED, prioritty=1)
        with pytest.raises(RequestError, match="priority must be an integer"):
            await llm.generate("a", SEEDED, priority=1.5)  # type: ignore[arg-type]
        with pytest.raises(RequestError, match="pooling must be"):
            await llm.embed("a", pooling="max")
        assert await look(llm, lambda engine: engine.stats().steps) == 0

    run(work())
    for bound in (0, True, 1.5):
        with pytest.raises(ConfigError, match="max_undelivered_tokens must be an integer of at least 1"):
            make(max_undelivered_tokens=bound)


def test_the_queue_is_bounded(make: Make) -> None:
    async def work() -> None:
        gate = Gate(replace(LIMITS, max_requests=1))
        llm = make(replace(LIMITS, max_requests=1, max_queued_requests=2), gate)
        gate.hold()
        tasks = [asyncio.create_task(llm.generate("a", SEEDED))]
        await gate.wait()
        tasks += [asyncio.create_task(llm.generate("b", SEEDED)) for _ in range(3)]
        await asyncio.sleep(0)
        gate.let_go()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(r) for r in results] == [list, list, list, QueueFullError]
        with pytest.raises(QueueFullError, match="max_queued_requests"):
            await collect(llm, "a", SEEDED) and await llm.generate(["a"] * 4, SEEDED)
        await need_empty(llm)

    run(work())


def test_cancellation_by_every_way_frees_blocks_within_a_step(make: Make) -> None:
    async def work() -> None:
        gate = Gate(LIMITS)
        llm = make(executor=gate)
        for way in ("cancel", "close", "abandon", "abort", "abort a stream"):
            gate.hold()
            stream = llm.stream("abc", LONG, request_id="it")
            name_only = way in ("cancel", "abort")
            work_of = llm.generate("abc", LONG, request_id="it") if name_only else anext(stream)
            task = asyncio.ensure_future(work_of)
            await gate.wait()
            gate.turns.release(3)
            if way == "cancel":
                task.cancel()
            elif way.startswith("abort"):
                aborted = asyncio.create_task(llm.abort("it"))
                await asyncio.sleep(0)
            else:
                assert (await task).finish_reason is None
                if way == "close":
                    await stream.aclose()
                del stream, work_of  # and the task, which holds on to what it has awaited
                task = asyncio.ensure_future(asyncio.sleep(0))
                gc.collect()
            for _ in range(5):  # an abandoned generator is closed by its loop, a few turns later
                await asyncio.sleep(0)
            gate.turns.release(1)
            await need_empty(llm, way)
            gate.let_go()
            if way == "abort":
                assert await aborted and not await llm.abort("it")
                (output,) = (await task)[0].outputs
                whole = expected("abc", LONG)[0]
                assert output.finish_reason == "abort" and output.token_ids == whole[: len(output.token_ids)]
            if way == "abort a stream":
                deltas = [await task, *[d async for d in stream]]
                assert await aborted and deltas[-1].finish_reason == "abort"
            with suppress(asyncio.CancelledError):
                await task
        assert (await llm.generate("abc", SEEDED))[0].outputs[0].token_ids == expected("abc", SEEDED)[0]

    run(work())


def test_request_ids_are_of_one_request_at_a_time(make: Make) -> None:
    async def work() -> None:
        gate = Gate(LIMITS)
        llm = make(executor=gate)
        gate.hold()
        task = asyncio.create_task(llm.generate("abc", SEEDED, request_id="it"))
        await gate.wait()
        with pytest.raises(RequestError, match="request_id 'it' is in use"):
            await llm.generate("abc", SEEDED, request_id="it")
        gate.let_go()
        await task
        assert not await llm.abort("it") and await llm.generate("abc", SEEDED, request_id="it") == await task
        embedding = asyncio.create_task(llm.embed("x" * 60, request_id="it"))
        gate.hold()
        await gate.wait()
        aborted = asyncio.create_task(llm.abort("it"))
        await asyncio.sleep(0)
        gate.let_go()
        assert await aborted
        with pytest.raises(RidgelineError, match="embedding was aborted"):
            await embedding

    run(work())


def test_a_reader_that_stalls_is_dropped_alone(make: Make) -> None:
    async def work() -> None:
        limits = replace(LIMITS, max_len=1024, num_blocks=[1024])
        llm = make(limits, max_undelivered_tokens=100)
        params = SamplingParams(seed=11, max_tokens=900, ignore_eos=True)
        stalled = llm.stream("abc", params)
        first = await anext(stalled)
        other = SamplingParams(seed=11, max_tokens=400, ignore_eos=True)
        results = await asyncio.gather(*(llm.generate("other", other) for _ in range(3)))
        assert all(r[0].outputs[0].finish_reason == "length" for r in results)
        await need_empty(llm)  # the stalled one is gone, too, whatever its reader does
        tokens = list(first.token_ids)
        with pytest.raises(SlowReaderError, match="max_undelivered_tokens is 100: read faster or raise it"):
            async for delta in stalled:
                assert len(delta.token_ids) <= 100
                tokens += delta.token_ids
        assert tokens == expected("abc", params, limits)[0][: len(tokens)] and len(tokens) <= 100 + len(first.token_ids)
        fast = [t for d in await collect(make(limits), "abc", params) for t in d.token_ids]
        assert fast == expected("abc", params, limits)[0]

    run(work())


@pytest.mark.parametrize("error", [RidgelineError("broken"), MemoryError(), KeyboardInterrupt()])
def test_a_failure_of_the_engine_ends_every_caller_and_refuses_more(make: Make, error: BaseException) -> None:
    async def work() -> None:
        llm = make(executor=SimExecutor(LIMITS, error=error, fail_at=3))
        message = f"the engine has failed .{type(error).__name__}"
        tasks = [asyncio.create_task(llm.generate("ab", LONG)) for _ in range(6)]
        streams = [asyncio.create_task(collect(llm, "abc", LONG)) for _ in range(6)]
        for result in await asyncio.gather(*tasks, *streams, return_exceptions=True):
            assert isinstance(result, EngineDeadError) and result.__cause__ is error
        for call in (llm.generate("a"), llm.chat([{"role": "user", "content": "hi"}]), llm.embed("a")):
            with pytest.raises(EngineDeadError, match=message):
                await call
        with pytest.raises(EngineDeadError, match=message):
            llm.stream("a")
        assert not await llm.abort("nobody")

    run(work())


def test_logits_that_are_not_numbers_end_their_request_alone(make: Make) -> None:
    class Damaged(SimExecutor):
        def launch(self, batch: Batch) -> Ticket:
            self.bad = batch.sampling["seed"] == 666
            return super().launch(batch)

        def finish(self, ticket: Ticket, masks: TokenMasks | None = None) -> StepOutput:
            output = super().finish(ticket, masks)
            output.token_ids[self.bad] = -1
            return output

    async def work() -> None:
        llm = make(executor=Damaged(LIMITS))
        bad = SamplingParams(seed=666)
        results = await asyncio.gather(
            llm.generate("abc", SEEDED),
            llm.generate("abc", bad),
            collect(llm, "abc", bad),
            collect(llm, "abc", SEEDED),
            return_exceptions=True,
        )
        assert [type(r) for r in results] == [list, RidgelineError, RidgelineError, list]
        assert "not numbers" in str(results[1])
        await need_empty(llm)

    run(work())


def test_close_in_the_middle_ends_every_caller(make: Make) -> None:
    async def work() -> None:
        gate = Gate(LIMITS)
        async with make(executor=gate) as llm:
            gate.hold()
            tasks = [asyncio.create_task(llm.generate(["ab", "cd"], LONG)) for _ in range(4)]
            tasks += [asyncio.create_task(collect(llm, "abc", LONG)) for _ in range(4)]
            await gate.wait()
            threading.Timer(0.05, gate.let_go).start()  # the step ends while close waits for it
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineDeadError) and "was closed" in str(result)
        with pytest.raises(RequestError, match="this AsyncLLM is closed"):
            await llm.generate("a")
        with pytest.raises(RequestError, match="this AsyncLLM is closed"):
            llm.stream("a")
        assert not await llm.abort("nobody")
        llm.close()
        with pytest.raises(EngineDeadError):
            llm.service.call(lambda engine: None)

    run(work())


def test_one_that_is_forgotten_ends_its_thread(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ridgeline.api.async_llm.load_runtime", lambda config: sim_runtime())
    llm = AsyncLLM("any")
    thread = llm.service._thread
    assert run(llm.generate("abc", SEEDED))[0].outputs[0].token_ids == expected("abc", SEEDED)[0]
    del llm
    gc.collect()
    assert not thread.is_alive()


def test_a_loop_that_is_gone_takes_its_requests_along(make: Make) -> None:
    gate = Gate(LIMITS)
    llm = make(executor=gate)
    gate.hold()
    loop = asyncio.new_event_loop()
    task = loop.create_task(llm.generate("abc", LONG))
    loop.run_until_complete(asyncio.sleep(0))
    gate.at_gate.wait()
    stream = llm.stream("abc", LONG)
    other = loop.create_task(anext(stream))  # type: ignore[arg-type]
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    gate.let_go()

    async def work() -> None:
        assert (await llm.generate("abc", SEEDED))[0].outputs[0].token_ids == expected("abc", SEEDED)[0]
        while await look(llm, lambda engine: engine.has_work):
            pass
        await need_empty(llm)

    run(work())
    for pending in (task, other):
        pending._log_destroy_pending = False  # type: ignore[attr-defined]


def test_callers_in_several_event_loops(make: Make) -> None:
    llm = make()
    results: dict[int, Any] = {}

    async def work(number: int) -> Any:
        params = SamplingParams(seed=number, max_tokens=20, ignore_eos=True)
        return await asyncio.gather(*(collect(llm, "abc", params) for _ in range(5)))

    threads = [
        threading.Thread(target=lambda n=n: results.update({n: run(work(n))}))  # type: ignore[misc]
        for n in range(1, 5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(1, 5):
        tokens = expected("abc", SamplingParams(seed=number, max_tokens=20, ignore_eos=True))[0]
        assert [[t for d in deltas for t in d.token_ids] for deltas in results[number]] == [tokens] * 5


async def careless(llm: AsyncLLM, draw: random.Random, limits: EngineLimits) -> str:
    """One caller of the crowd: what it gets is right so far, and whole unless it goes away before."""
    prompt = draw.choice(["", "a shared beginning "]) + "".join(draw.choices("abcdef", k=draw.randint(1, 12)))
    params = SamplingParams(
        seed=draw.getrandbits(40),
        max_tokens=draw.randint(1, 25),
        n=draw.choice([1, 1, 3]),
        ignore_eos=draw.random() < 0.5,
    )
    options = {"priority": draw.randint(-1, 1), "cache_salt": draw.choice([None, "salt"])}
    leaves = draw.random() < 0.4
    whole = expected(prompt, params, limits)
    if params.n == 1 and draw.random() < 0.7:
        tokens, reason, left = [], None, draw.randint(0, 10)
        async with aclosing(llm.stream(prompt, params, **options)) as stream:  # type: ignore[type-var]
            async for delta in stream:
                tokens, reason, left = [*tokens, *delta.token_ids], delta.finish_reason, left - 1
                if leaves and left < 0:
                    break
        assert tokens == whole[0][: len(tokens)] and reason in (None, whole[1])
        assert reason is None if leaves and len(tokens) < len(whole[0]) else len(tokens) == len(whole[0])
        return "left" if reason is None else "whole"
    task = asyncio.create_task(llm.generate(prompt, params, **options))
    if leaves:
        for _ in range(draw.randint(0, 30)):
            await asyncio.sleep(0)
        task.cancel()
    try:
        first = (await task)[0].outputs[0]
    except asyncio.CancelledError:
        return "left"
    assert (first.token_ids, first.finish_reason) == whole
    return "whole"


@pytest.mark.parametrize("seed", range(4))
def test_a_crowd_that_comes_and_goes(make: Make, seed: int) -> None:
    """Hundreds of callers over a cache too small for them; whoever stays gets what it would get alone."""
    draw = random.Random(seed)
    limits = replace(
        LIMITS,
        max_requests=8,
        max_tokens=draw.choice([8, 32]),
        num_blocks=[24],
        max_open_steps=1 + seed % 2,
        speculation=draw.choice([None, "ngram"]),
        max_sampled_rows=40,
    )

    async def work() -> list[str]:
        llm = make(limits)
        callers = [careless(llm, random.Random(draw.getrandbits(64)), limits) for _ in range(300)]
        results = await asyncio.gather(*callers)
        while await look(llm, lambda engine: engine.has_work):  # a step under way may still write what was dropped
            pass
        await need_empty(llm)
        return results

    results = run(work())
    assert "left" in results and "whole" in results  # how many is up to the threads


def test_it_idles_at_no_cpu(make: Make) -> None:
    async def work() -> float:
        llm = make()
        await llm.generate("abc", SEEDED)
        begin = time.process_time()
        await asyncio.sleep(0.5)
        return time.process_time() - begin

    assert run(work()) < 0.1
