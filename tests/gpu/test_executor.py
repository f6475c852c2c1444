"""The CUDA executor on the emulated device: as accurate as its roundings allow, and the same bits in any company."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ridgeline.core.errors import RidgelineError
from ridgeline.core.types import POOL, SAMPLING_DTYPE, SlotStart, TokenMasks
from tests.gpu.small_model import executor, model, reference
from tests.graph.small_llama import Driver

Work = list[tuple[int, list[int]]]
MIXED: tuple[Work, ...] = (
    [(0, [3, 1, 4])],
    [(1, list(range(20))), (0, [15])],
    [(0, [9]), (2, [2, 6, 5]), (1, [35])],
)
"""A prompt; a decode beside a longer prompt; decodes beside a prompt."""


def relative(values: np.ndarray, truth: np.ndarray) -> float:
    """The largest difference over the truth's root mean square."""
    return float(np.abs(values - truth).max() / np.sqrt(np.mean(truth**2)))


def drive(made: Any, steps: Sequence[Work], sampling: Any = None) -> list[tuple[Any, np.ndarray]]:
    """Steps one after another; teacher-forced, as the work names its tokens."""
    driver = Driver(made, 40, 16)
    return [driver.step(work, sampling) for work in steps]


@pytest.mark.parametrize(
    ("fmt", "kv_dtype", "hidden"),
    [
        ("bf16", "bf16", "bf16"),
        ("f16", "f16", "f16"),
        ("q4_0", "bf16", "bf16"),
        ("q4_1", "bf16", "bf16"),
        ("q8_0", "int8", "bf16"),
        ("f16", "fp8", "f16"),
        ("q4_0", "fp8", "bf16"),
    ],
)
def test_logits_lose_what_their_roundings_cost(fmt: str, kv_dtype: str, hidden: str) -> None:
    """Twice what numpy loses that rounds where the plan says; the truth is the naive graph in float64."""
    graph, plan, weights = model(fmt, kv_dtype, hidden)
    truth = drive(reference(graph, weights, np.float64), MIXED)
    plain = drive(reference(plan, weights), MIXED)
    found = drive(executor(fmt, kv_dtype, hidden=hidden), MIXED)
    allowed = 2 * max(relative(p, t) for (_, p), (_, t) in zip(plain, truth, strict=True))
    for (output, logits), (_, right) in zip(found, truth, strict=True):
        assert relative(logits, right) <= allowed
        sure = np.sort(right, axis=1)
        margin = (sure[:, -1] - sure[:, -2]) / np.sqrt(np.mean(right**2)) > 2 * allowed
        assert (output.token_ids == right.argmax(axis=1))[margin].all()


def test_a_request_has_the_bits_it_has_alone() -> None:
    """In any batch, in chunks of any size, in whatever order the device's streams run."""
    prompt = [7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43]
    alone = drive(executor(seed=1), [[(0, prompt)], [(0, [50])]])
    others = list(range(60, 75))
    steps: list[Work] = [
        [(1, others)],
        [(2, [5, 6]), (0, prompt[:3])],
        [(0, prompt[3:]), (1, [90])],
        [(1, [91]), (0, [50])],
    ]
    beside = drive(executor(seed=2), steps)
    assert np.array_equal(alone[0][1][0], beside[2][1][0])
    assert np.array_equal(alone[1][1][0], beside[3][1][1])


def test_a_long_request_before_a_short_one() -> None:
    """The executor runs short ones first; what it hands out is in the order that was asked for."""
    prompt = list(range(30, 42))
    apart = drive(executor(seed=3, layers=1), [[(0, prompt)], [(1, [7, 8])]])
    made = executor(seed=4, layers=1)
    driver = Driver(made, 40, 16)
    sampling = rows(2, num_logprobs=[0, 2], masked=[1, 1])
    ticket = made.launch(driver.batch([(0, prompt), (1, [7, 8])], sampling))
    bits = np.zeros((2, 5), np.uint32)
    bits[0, 1], bits[1, 3] = 1 << 4, 1 << 5
    output = made.finish(ticket, TokenMasks(bits))
    assert output.token_ids.tolist() == [36, 101]
    assert output.top_ids[:, 0].tolist() == [-1, int(apart[1][1][0].argmax())]
    for row in range(2):
        assert np.array_equal(made.last_logits[row], apart[row][1][0])


def rows(count: int, **values: Any) -> np.ndarray:
    """Sampling parameters, greedy but for what is given."""
    made = np.zeros(count, SAMPLING_DTYPE)
    made["num_logprobs"], made["top_p"] = -1, 1.0
    for name, value in values.items():
        made[name] = value
    return made


def test_tokens_are_fed_back_on_the_device() -> None:
    """Two steps open at once: the second is fed what the first has not handed out yet."""
    waited, ahead = executor(seed=3), executor(seed=4)
    first = Driver(waited, 40, 16)
    token = first.step([(0, [1, 2, 3])])[0].token_ids[0]
    expected = first.step([(0, [int(token)])])[0].token_ids[0]
    driver = Driver(ahead, 40, 16)
    one = ahead.launch(driver.batch([(0, [1, 2, 3])]))
    two = ahead.launch(driver.batch([(0, [-1])]))
    with pytest.raises(RidgelineError, match="2 steps are open"):
        ahead.launch(driver.batch([(1, [1])]))
    assert ahead.finish(one).token_ids[0] == token
    assert ahead.finish(two).token_ids[0] == expected
    with pytest.raises(RidgelineError, match="not open"):
        ahead.finish(two)


def test_samples_are_the_references() -> None:
    """Temperature, filters, penalties, bias and bad words: the same tokens on the same logits."""
    graph, plan, weights = model("bf16", "bf16")
    made = executor(seed=5)
    driver, shadow = Driver(made, 40, 16), Driver(reference(plan, weights), 40, 16)
    sampling = rows(
        2, num_logprobs=[3, 0], seed=[12345678901234567890, 3], temperature=[0.8, 1.5], top_k=[0, 9], top_p=[0.9, 1.0]
    )
    penalties = {"repetition_penalty": 1.7, "presence_penalty": 0.5, "frequency_penalty": 0.3}
    bias: Any = {"bias_ids": np.array([8, 30], np.int32), "bias": np.array([4.0, 2.0], np.float32)}
    starts: tuple[SlotStart, ...] = (SlotStart(1, 2, **penalties, **bias, bad_words=((2, 9), (8,))),)
    for work in ([(0, [4, 5]), (1, [1, 2])], [(0, [6]), (1, [9])]):
        batch, twin = driver.batch(work, sampling), shadow.batch(work, sampling)
        batch.slot_starts = twin.slot_starts = starts
        starts = ()
        output = made.finish(made.launch(batch))
        right = shadow.executor.finish(shadow.executor.launch(twin))
        assert np.array_equal(output.token_ids, right.token_ids)
        assert np.array_equal(output.top_ids, right.top_ids)
        assert np.allclose(output.top_logprobs, right.top_logprobs, atol=0.1, equal_nan=True)
        assert np.allclose(output.logprobs, right.logprobs, atol=0.1)


def test_masked_rows_wait_for_their_mask() -> None:
    made = executor(seed=6)
    driver = Driver(made, 40, 16)
    sampling = rows(2, masked=[1, 0])
    ticket = made.launch(driver.batch([(0, [1, 2]), (1, [3])], sampling))
    ahead = made.launch(driver.batch([(1, [-1])]))  # leaves other logits where the flagged row's were
    bits = np.zeros((1, 5), np.uint32)
    bits[0, 2] = 1 << 7
    with pytest.raises(RidgelineError, match="1 rows wait"):
        made.finish(ticket)
    masked = made.finish(ticket, TokenMasks(bits))
    assert masked.token_ids[0] == 2 * 32 + 7
    alone = drive(executor(seed=7), [[(1, [3])]])[0][0]
    assert masked.token_ids[1] == alone.token_ids[0]
    made.finish(ahead)
    follow = made.finish(made.launch(driver.batch([(0, [-1])])))
    assert follow.token_ids[0] == drive(executor(seed=8), [[(0, [1, 2])], [(0, [71])]])[1][0].token_ids[0]


def test_drafts_are_accepted_up_to_the_first_wrong_one() -> None:
    plain = drive(executor(seed=9), [[(0, [1, 2, 3])]])
    good = int(plain[0][0].token_ids[0])
    made = executor(seed=10)
    driver = Driver(made, 40, 16)
    batch = driver.batch([(0, [1, 2, 3, good, (good + 1) % 160])], rows(1))
    batch.sample_rows, batch.sampling = np.array([2, 3, 4], np.int32), rows(3)
    output = made.finish(made.launch(batch))
    assert output.accepted.tolist() == [1, 1, 0] and output.token_ids[0] == good


def test_hidden_states_scores_and_copied_blocks() -> None:
    graph, plan, weights = model("bf16", "bf16")
    made, right = executor(seed=11), reference(plan, weights)
    outputs = []
    for one in (made, right):
        driver = Driver(one, 40, 16)
        first = driver.batch([(0, [4, 8, 15])], rows(1, target=POOL))
        one_output = one.finish(one.launch(first))
        block = int(first.block_updates[0][0, 2])
        second = driver.batch([(1, [16])], rows(1, target=1 + 42, num_logprobs=0))
        second.positions[:], second.context_lens[:] = 3, 4  # goes on from a copy of the first request's block
        second.block_copies = [np.array([[block, second.block_updates[0][0, 2]]], np.int32)]
        outputs.append((one_output, one.finish(one.launch(second)), one.last_logits))
    (pooled, scored, logits), (pooled_right, scored_right, logits_right) = outputs
    assert pooled.token_ids.tolist() == [-1] and pooled.hidden.shape == (1, 128)
    assert relative(pooled.hidden, pooled_right.hidden) < 0.05
    assert scored.token_ids.tolist() == [42]
    assert relative(logits, logits_right) < 0.05
    assert abs(scored.logprobs[0] - scored_right.logprobs[0]) < 0.05


def test_steps_are_finished_in_any_order() -> None:
    """One may stay open while others come and go: what it gave is still its own."""
    prompts = [[4, 8], [15], [16, 23, 42], [3, 1]]
    apart = drive(executor(seed=12, layers=1), [[(slot, prompt)] for slot, prompt in enumerate(prompts)])
    made = executor(seed=13, layers=1)
    driver = Driver(made, 40, 16)
    oldest = made.launch(driver.batch([(0, prompts[0])]))
    for slot in (1, 2, 3):
        ticket = made.launch(driver.batch([(slot, prompts[slot])]))
        assert made.finish(ticket).token_ids == apart[slot][0].token_ids
    assert made.finish(oldest).token_ids == apart[0][0].token_ids


def test_pooled_rows_of_requests_that_change_places() -> None:
    prompt = list(range(30, 42))
    made = executor(seed=14, layers=1)
    driver = Driver(made, 40, 16)
    sampling = rows(2, target=POOL)
    both = made.finish(made.launch(driver.batch([(0, prompt), (1, [7, 8])], sampling)))
    apart = [driver.step([work], rows(1, target=POOL))[0] for work in ((2, prompt), (3, [7, 8]))]
    assert np.array_equal(both.hidden, np.concatenate([one.hidden for one in apart]))


def test_more_adjustments_than_a_block_was_made_for() -> None:
    """Its place grows while another step is under way; all later ones fit in it, and the old one is given back."""
    made = executor(seed=15, layers=1)
    driver, device = Driver(made, 40, 16), made.device
    whole = {"bias_ids": np.arange(160, dtype=np.int32), "bias": np.full(160, -100, np.float32)}
    whole["bias"][159] = 100.0

    def batch(starts: tuple[SlotStart, ...] = ()) -> Any:
        made_ = driver.batch([(slot, [slot]) for slot in range(3)])
        made_.slot_starts = starts
        return made_

    before = [made.launch(batch()), made.launch(batch())]  # either place has been used for such a step
    quiet = [made.finish(ticket).token_ids.tolist() for ticket in before]
    held = len(device.live)  # type: ignore[attr-defined]
    tickets = [made.launch(batch(tuple(SlotStart(slot, tokens=np.zeros(2, np.int32), **whole) for slot in range(3))))]
    tickets.append(made.launch(batch()))
    found = [made.finish(ticket).token_ids.tolist() for ticket in tickets]
    assert found == [[159] * 3] * 2 != quiet
    assert len(device.live) == held + len(made.memory._grown)  # type: ignore[attr-defined]
