"""The engine's loop over the simulated executor, case by case; random loads are in ``tests/sim``."""

from __future__ import annotations

import numpy as np
import pytest

from ridgeline.core.errors import RequestError, RidgelineError
from ridgeline.core.types import SamplingParams, SlotStart
from ridgeline.engine.engine import Engine, EngineLimits
from tests.sim.model import state_row
from tests.sim.small import SimExecutor, hidden_states, solo

VOCAB = 50
EOS = frozenset({7, 31})


def make_engine(bounds: EngineLimits, executor: SimExecutor | None = None) -> Engine:
    return Engine(executor or SimExecutor(bounds), bounds, eos_ids=EOS, seed=0)


def assert_idle(engine: Engine) -> None:
    """An idle engine holds nothing."""
    assert not engine.has_work
    engine.check()


BOUNDS = EngineLimits(4, 16, 64, VOCAB, 4, [64])


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RidgelineError("broken"), MemoryError()])
@pytest.mark.parametrize("fail_at", [1, 2, 5])
def test_a_failing_step_drops_everything_and_leaves_a_usable_engine(error: BaseException, fail_at: int) -> None:
    engine = make_engine(BOUNDS, SimExecutor(BOUNDS, error=error, fail_at=fail_at))
    params = SamplingParams(max_tokens=20, seed=1, ignore_eos=True)
    requests = [engine.make_request([n, n + 1] * 5, params) for n in range(6)]
    engine.submit(requests)
    with pytest.raises(type(error)):
        for _ in range(fail_at):
            engine.step()
    assert {r.finish_reason for r in requests} == {"abort"}
    assert_idle(engine)
    engine.check()
    again = engine.make_request([3, 4, 5], params)
    engine.submit([again])
    while engine.has_work:
        engine.step()
    assert again.output_ids == solo([3, 4, 5], params, VOCAB, 64, EOS)[0]


def test_requests_run_side_by_side_and_decode_comes_first() -> None:
    executor = SimExecutor(BOUNDS)
    engine = make_engine(BOUNDS, executor)
    params = SamplingParams(max_tokens=8, seed=5, ignore_eos=True)
    first = engine.make_request([1, 2], params)
    engine.submit([first, engine.make_request(list(range(40)), params)])
    engine.step()
    assert len(first.output_ids) == 1
    engine.step()
    assert len(first.output_ids) == 2, "a long prompt beside it must not hold a decoding request up"
    assert executor.largest == 2


def test_logits_that_are_not_numbers_end_their_request_only() -> None:
    class Nan(SimExecutor):
        def finish(self, ticket, masks=None):  # type: ignore[no-untyped-def]
            output = super().finish(ticket, masks)
            if self.launches == 2:
                output.token_ids[0] = -1
            return output

    engine = make_engine(BOUNDS, Nan(BOUNDS))
    params = SamplingParams(max_tokens=8, seed=3, ignore_eos=True)
    damaged, whole = engine.make_request([1], params), engine.make_request([2], params)
    engine.submit([damaged, whole])
    while engine.has_work:
        engine.step()
        engine.check()
    assert damaged.finish_reason == "error" and damaged.error is not None and "NaN" in damaged.error
    assert len(damaged.output_ids) == 1
    assert whole.output_ids == solo([2], params, VOCAB, 64, EOS)[0]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], SamplingParams(), "prompt is empty"),
        ([1] * 64, SamplingParams(), "64 tokens and the context is 64"),
        ([1, VOCAB], SamplingParams(), f"token id {VOCAB} is outside"),
        ([1, -1], SamplingParams(), "token id -1 is outside"),
        ([1.5], SamplingParams(), "flat list of integers"),
        ([[1], [2, 3]], SamplingParams(), "flat list of integers"),
        ([1], SamplingParams(stop="x"), "need a tokenizer"),
    ],
)
def test_what_can_never_be_served_is_refused(prompt: list[int], params: SamplingParams, message: str) -> None:
    engine = make_engine(BOUNDS)
    with pytest.raises(RequestError, match=message):
        engine.make_request(prompt, params)
    assert_idle(engine)


def test_a_request_larger_than_the_cache_is_refused_with_the_way_out() -> None:
    engine = make_engine(EngineLimits(2, 16, 64, VOCAB, 4, [3]))
    engine.make_request([1] * 8, SamplingParams(max_tokens=5))  # 12 tokens of KV: the last is never read back
    with pytest.raises(RequestError, match="needs 4 blocks .* lower max_tokens"):
        engine.make_request([1] * 8, SamplingParams(max_tokens=6))


def test_output_ends_where_the_context_does() -> None:
    engine = make_engine(BOUNDS)
    request = engine.make_request([1] * 60, SamplingParams(max_tokens=100, ignore_eos=True, seed=0))
    engine.submit([request])
    while engine.has_work:
        engine.step()
    assert len(request.output_ids) == 4 and request.finish_reason == "length"


def test_seeds_are_drawn_from_the_engines_seed() -> None:
    draws = [[make_engine(BOUNDS).make_request([1], SamplingParams()).row["seed"] for _ in range(1)] for _ in range(2)]
    assert draws[0] == draws[1]
    engine = make_engine(BOUNDS)
    seeds = {int(engine.make_request([1], SamplingParams()).row["seed"]) for _ in range(8)}
    assert len(seeds) == 8
    assert engine.make_request([1], SamplingParams(seed=2**64 - 1)).row["seed"] == np.uint64(2**64 - 1)


@pytest.mark.parametrize("open_steps", [1, 2])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_pooled_states_do_not_depend_on_chunks(pooling: str, open_steps: int) -> None:
    prompts = [list(range(1, 1 + n)) for n in (1, 9, 40, 64)]
    for rows in (4, 16):
        bounds = EngineLimits(4, 16, 64, VOCAB + 20, 4, [64], max_sampled_rows=rows, max_open_steps=open_steps)
        engine = make_engine(bounds)
        requests = [engine.make_pooling_request(p, pooling) for p in prompts]
        engine.submit(requests)
        while engine.has_work:
            engine.step()
            engine.check()
        for request, prompt in zip(requests, prompts, strict=True):
            states = np.array([state_row(h) for h in hidden_states(prompt)])
            expected = states.sum(axis=0) / len(prompt) if pooling == "mean" else states[-1]
            np.testing.assert_array_equal(request.pooled, expected)
            assert request.finish_reason == "stop"


def test_a_slot_starts_with_what_its_request_asks_of_the_sampler_and_is_cleared_after() -> None:
    class Starts(SimExecutor):
        def launch(self, batch):  # type: ignore[no-untyped-def]
            starts.extend(batch.slot_starts)
            return super().launch(batch)

    starts: list[SlotStart] = []
    bounds = EngineLimits(1, 16, 64, VOCAB, 4, [64])
    engine = make_engine(bounds, Starts(bounds))
    plain = SamplingParams(max_tokens=2, seed=1)
    asking = SamplingParams(
        max_tokens=9, seed=1, repetition_penalty=1.5, logit_bias={3: -2.0}, bad_words=[[4, 5]], min_tokens=2
    )
    prompts = [[1, 2], list(range(9)), list(range(9)), [1], [2]]
    for prompt, params in zip(prompts, [plain, asking, asking, plain, plain], strict=True):
        engine.submit([engine.make_request(prompt, params)])
        while engine.has_work:
            engine.step()
    assert [s.slot for s in starts] == [0, 0, 0], "two that ask, and one that comes after them"
    assert (starts[0].prompt_len, starts[0].tokens.tolist()) == (9, [])
    assert starts[1].tokens.tolist() == list(range(8)), "a prefix hit, which no batch feeds"
    assert starts[0].bad_words == ((4, 5),) and starts[0].bias.tolist() == [-2.0]
    assert (starts[0].min_tokens, starts[0].min_tokens_ids.tolist()) == (2, sorted(EOS))
    assert starts[2].repetition_penalty == 1.0 and not starts[2].bad_words


def test_a_failing_step_with_two_under_way_drops_everything() -> None:
    bounds = EngineLimits(4, 16, 64, VOCAB, 4, [64], max_open_steps=2)
    executor = SimExecutor(bounds, error=RidgelineError("broken"), fail_at=5)
    engine = make_engine(bounds, executor)
    requests = [engine.make_request([n, 1], SamplingParams(max_tokens=20, ignore_eos=True)) for n in range(6)]
    engine.submit(requests)
    with pytest.raises(RidgelineError, match="broken"):
        for _ in range(5):
            engine.step()
    assert not executor.open and {r.finish_reason for r in requests} == {"abort"}
    assert_idle(engine)
