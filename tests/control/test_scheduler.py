"""The scheduler alone: order, budget, waiting for prefixes, ageing, preemption, latency."""

from __future__ import annotations

import pytest

from ridgeline.core.errors import QueueFullError, RequestError
from ridgeline.core.types import SamplingParams
from ridgeline.engine.engine import Engine, EngineLimits
from ridgeline.engine.request import Request
from ridgeline.kvcache.cache import CacheGroup, KVCache
from ridgeline.scheduler.budget import StepBudget
from ridgeline.scheduler.ngram import NgramDrafter
from ridgeline.scheduler.scheduler import Scheduler
from ridgeline.scheduler.sequence import TRANSITIONS, Sequence, State
from tests.sim.small import SimExecutor

VOCAB = 50


def make_scheduler(blocks: int = 64, running: int = 4, tokens: int = 16, **options: int) -> Scheduler:
    cache = KVCache([CacheGroup(blocks)], 4)
    return Scheduler(cache, max_running=running, max_rows=running, budget=StepBudget(tokens, None), **options)


def run_step(scheduler: Scheduler) -> tuple[list[Sequence], list[tuple[Sequence, int]]]:
    """One step in which every sequence that samples gets token 1: who decoded, and who read how much."""
    plan = scheduler.schedule(0)
    assert plan.num_tokens
    scheduler.finish_step(plan, 1)
    for sequence in plan.decodes:
        sequence.output_ids.append(1)
        scheduler.settle(sequence, sequence.num_tokens - 1)
    for chunk in plan.chunks:
        if chunk.samples:
            chunk.sequence.output_ids.append(1)
        scheduler.settle(chunk.sequence, chunk.start + chunk.size)
    for sequence in list(scheduler.running):
        if len(sequence.output_ids) >= sequence.limit:
            scheduler.end(sequence)
    scheduler.check()
    return plan.decodes, [(c.sequence, c.size) for c in plan.chunks]


def submit(scheduler: Scheduler, size: int, first: int = 0, limit: int = 8, priority: int = 0) -> Sequence:
    sequence = Sequence(list(range(first, first + size)), limit, priority=priority)
    scheduler.submit(sequence)
    return sequence


def test_decodes_come_first_and_prompts_share_what_is_left_in_order() -> None:
    scheduler = make_scheduler(tokens=10)
    a, b, c = submit(scheduler, 3), submit(scheduler, 20, 100), submit(scheduler, 5, 200)
    assert run_step(scheduler) == ([], [(a, 3), (b, 7)])
    assert run_step(scheduler) == ([a], [(b, 9)])
    assert run_step(scheduler) == ([a], [(b, 4), (c, 5)])
    assert run_step(scheduler) == ([a, b, c], [])


def test_a_later_arrival_waits_for_the_prefix_another_computes() -> None:
    scheduler = make_scheduler(tokens=18)
    a, b, c = submit(scheduler, 17), submit(scheduler, 17), submit(scheduler, 1, 100)
    assert run_step(scheduler)[1] == [(a, 17), (c, 1)]
    assert scheduler.parked and b.state is State.PARKED
    assert run_step(scheduler) == ([a, c], [(b, 1)])
    assert scheduler.stats.prefix_hit_tokens == 16


@pytest.mark.parametrize("how", ["end", "preempt"])
def test_whoever_waits_for_a_prefix_goes_on_when_its_writer_does_not(how: str) -> None:
    scheduler = make_scheduler(tokens=18)
    a, b = submit(scheduler, 17), submit(scheduler, 17)
    plan = scheduler.schedule(0)
    assert plan.num_tokens == 17 and b.state is State.PARKED
    scheduler.finish_step(plan, 1)
    if how == "end":
        scheduler.end(a)
    else:
        scheduler._preempt(a)
    scheduler.check()
    while scheduler.has_work:
        run_step(scheduler)
    assert b.state is State.FINISHED and len(b.output_ids) == 8


def test_priorities_age_so_that_nobody_starves() -> None:
    scheduler = make_scheduler(running=1, aging_steps=10)
    late = submit(scheduler, 4, limit=2, priority=1)
    for step in range(60):
        if step % 2 == 0:
            submit(scheduler, 4, 100 + 4 * step, limit=2)
        run_step(scheduler)
        if late.state is State.FINISHED:
            assert 10 <= step <= 40
            return
    raise AssertionError("a request of lower priority never ran")


def test_the_youngest_starts_again_when_blocks_run_out_and_everybody_ends() -> None:
    scheduler = make_scheduler(blocks=6, max_preemptions=2)
    sequences = [submit(scheduler, 4, 100 * i, limit=17) for i in range(4)]
    order: list[Sequence] = []
    for _ in range(500):
        if not scheduler.has_work:
            break
        run_step(scheduler)
        order += [s for s in sequences if s.state is State.FINISHED and s not in order]
    assert order[0] is sequences[0] and len(order) == 4
    assert 0 < scheduler.stats.preemptions and all(s.preemptions <= 2 for s in sequences)


def test_state_changes_are_those_of_the_table() -> None:
    assert set(TRANSITIONS) == set(State)
    sequence = Sequence([1], 1)
    with pytest.raises(AssertionError, match="from new to running"):
        sequence.move(State.RUNNING)


def test_the_budget_follows_a_latency_target() -> None:
    budget = StepBudget(512, 1000)
    assert budget.tokens(0) == 512
    for _ in range(10):
        tokens = budget.tokens(4)
        budget.observe(tokens * 10, tokens, 4)  # 10 us a token: 100 tokens meet it
    assert 90 <= budget.tokens(4) <= 113
    budget.observe(-5, 100, 4)
    budget.observe(10**9, 100, 4)
    assert budget.tokens(4) == 5
    for _ in range(60):
        budget.observe(1, budget.tokens(4), 4)
    assert budget.tokens(4) == 512


def test_drafts_copy_what_followed_before_and_failures_pause_them() -> None:
    drafter = NgramDrafter([1, 2, 3, 4, 5, 1, 2, 3], 4, 2, 3)
    assert drafter.draft() == [4, 5, 1], "few at first"
    drafter.learn(3, 0)
    assert drafter.waiting and drafter.draft() == []
    drafter.push(4)
    assert drafter.draft() == [5, 1, 2], "few after a failure"
    drafter.learn(3, 2)
    drafter.push(5)
    assert drafter.draft() == [1, 2, 3, 4]
    assert NgramDrafter([7, 7, 7], 3, 2, 3).draft() == [7, 7, 7], "a loop goes on past its end"
    assert NgramDrafter([1, 2], 4, 2, 3).draft() == []


def run_all(engine: Engine, requests: list[Request]) -> None:
    while engine.has_work:
        engine.step()
        engine.check()
    assert all(r.finish_reason in ("length", "stop") for r in requests)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_shared_prefix_is_computed_once(at_once: bool) -> None:
    limits = EngineLimits(8, 64, 160, VOCAB, 4, [400])
    executor = SimExecutor(limits)
    engine = Engine(executor, limits, seed=0)
    prefix = [n * n % VOCAB for n in range(100)]
    requests = [
        engine.make_request([*prefix, n % VOCAB, n // VOCAB], SamplingParams(max_tokens=2, seed=n, ignore_eos=True))
        for n in range(60)
    ]
    for request in requests:
        engine.submit([request])
        if not at_once:
            engine.step()
    run_all(engine, requests)
    assert engine.stats().tokens_computed <= 100 + 60 * 3


def test_samples_of_one_prompt_copy_its_last_block_and_compute_one_token_of_it() -> None:
    limits = EngineLimits(8, 64, 64, VOCAB, 4, [100])
    executor = SimExecutor(limits)
    engine = Engine(executor, limits, seed=0)
    requests = engine.make_requests(list(range(11)), SamplingParams(n=5, max_tokens=6, seed=1, ignore_eos=True))
    engine.submit(requests)
    run_all(engine, requests)
    assert executor.copied == 4
    assert engine.stats().tokens_computed == 11 + 4 + 5 * 5
    assert len({tuple(r.output_ids) for r in requests}) == 5


def test_drafts_save_steps_where_the_output_repeats() -> None:
    steps = {}
    for speculation in (None, "ngram"):
        limits = EngineLimits(2, 64, 200, VOCAB, 4, [100], max_sampled_rows=16, speculation=speculation)
        engine = Engine(SimExecutor(limits, loopy=16), limits, seed=0)
        request = engine.make_request([3, 1, 4], SamplingParams(max_tokens=60, seed=5, ignore_eos=True))
        engine.submit([request])
        run_all(engine, [request])
        steps[speculation] = (request.output_ids, engine.stats().steps)
    assert steps["ngram"][0] == steps[None][0]
    assert engine.stats().drafts_accepted == 60 - steps["ngram"][1] > 0


def test_the_queue_is_bounded() -> None:
    limits = EngineLimits(1, 16, 64, VOCAB, 4, [16], max_queued_requests=2, max_queued_tokens=10)
    engine = Engine(SimExecutor(limits), limits, seed=0)
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    engine.submit([engine.make_request([1, 2], params) for _ in range(2)])
    with pytest.raises(QueueFullError, match="2 requests wait and 1 more would exceed max_queued_requests"):
        engine.submit([engine.make_request([1], params)])
    engine.step()
    with pytest.raises(QueueFullError, match="2 tokens wait and 9 more"):
        engine.submit([engine.make_request([1] * 9, params)])
    engine.submit([engine.make_request([1] * 8, params)])
    while engine.has_work:
        engine.step()


def test_a_request_is_submitted_once() -> None:
    limits = EngineLimits(1, 16, 64, VOCAB, 4, [16])
    engine = Engine(SimExecutor(limits), limits, seed=0)
    request = engine.make_request([1, 2], SamplingParams(max_tokens=2))
    for several in ([request, request], [request]):
        if several == [request]:
            engine.submit(several)
        with pytest.raises(RequestError, match="submitted once"):
            engine.submit(several)
    engine.abort(request)
    with pytest.raises(RequestError, match="submitted once"):
        engine.submit([request])
    assert not engine.has_work
