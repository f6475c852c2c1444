"""SimModel itself: it computes what a solo run does, and refuses every batch that breaks the contract."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ridgeline.core.types import SAMPLING_DTYPE, Batch, SamplingParams, SlotStart, Ticket
from ridgeline.engine.engine import EngineLimits
from tests.sim.batches import ContractError
from tests.sim.executor import SimModel
from tests.sim.model import Rules, Solo, row_of, sample, sampler_of

LIMITS = EngineLimits(4, 16, 32, 30, 4, [12, 12], windows=(0, 5), max_open_steps=2, max_sampled_rows=8)
RULES = Rules(30, (0, 5), 0)


def ints(*values: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.array(values, np.int32)


def batch(tokens: list[int], first: int = 0, rows: tuple[int, ...] | None = None, slot: int = 0, **more: Any) -> Batch:
    """One request's step, its blocks those of its slot: block 3 * slot + index in both groups."""
    number = len(tokens)
    rows = (number - 1,) if rows is None else rows
    sampling = np.zeros(len(rows), SAMPLING_DTYPE)
    sampling["temperature"], sampling["num_logprobs"], sampling["top_p"] = 1, -1, 1
    cells = [(slot, i, 3 * slot + i) for i in range((first + number - 1) // 4 + 1)]
    made = Batch(
        token_ids=ints(*tokens),
        positions=ints(*range(first, first + number)),
        slots=ints(slot),
        query_starts=ints(0, number),
        context_lens=ints(first + number),
        sample_rows=ints(*rows),
        sampling=sampling,
        block_updates=[np.array(cells, np.int32).reshape(-1, 3)] * 2,
    )
    return replace(made, **more)


def run(model: SimModel, step: Batch) -> list[int]:
    tokens: list[int] = model.finish(model.launch(step)).token_ids.tolist()
    return tokens


def right(tokens: list[int], start: SlotStart | None = None) -> int:
    """The token after ``tokens`` in a solo run."""
    solo = Solo(RULES)
    hidden = [solo.feed(t) for t in tokens][-1]
    sampler = None if start is None else sampler_of(start)
    return sample(RULES, hidden, len(tokens) - 1, tokens[-1], row_of(SamplingParams(), 0), sampler, solo.log)


@pytest.mark.parametrize("lazy", [False, True])
def test_chunks_and_open_steps_give_the_tokens_of_a_solo_run(lazy: bool) -> None:
    model = SimModel(LIMITS, RULES, lazy=lazy)
    prompt = [3, 1, 4, 1, 5, 9]
    assert run(model, batch(prompt[:4], rows=())) == []
    tickets = [model.launch(batch(prompt[4:], 4)), model.launch(batch([-1], 6))]
    first, second = (model.finish(t).token_ids.tolist()[0] for t in tickets)
    assert first == right(prompt)
    assert second == right([*prompt, first])


def test_drafts_stand_up_to_the_first_wrong_one() -> None:
    model = SimModel(LIMITS, RULES)
    prompt = [3, 1, 4]
    first = run(model, batch(prompt))[0]
    second = right([*prompt, first])
    output = model.finish(model.launch(batch([first, second, second + 1 & 7, 2], 3, rows=(0, 1, 2, 3))))
    third = right([*prompt, first, second])
    assert output.token_ids.tolist()[:2] == [second, third]
    assert output.accepted.tolist()[:2] == [1, 1] and output.accepted.tolist()[3] == 0
    assert model.reader.slots[0].next == 3 + output.accepted.sum()


def test_a_log_counts_what_was_cached_before_and_only_where_it_was_asked_for() -> None:
    start = SlotStart(slot=0, prompt_len=5, tokens=ints(7, 7, 7, 7), presence_penalty=1.0)
    model = SimModel(LIMITS, RULES)
    run(model, batch([7, 7, 7, 7]))
    token = run(model, batch([8], 4, slot_starts=[start]))[0]
    assert token == right([7, 7, 7, 7, 8], start) != right([7, 7, 7, 7, 8])
    wrong = SimModel(LIMITS, RULES)
    run(wrong, batch([7, 7, 7, 7]))
    other = replace(start, tokens=ints(7, 7, 7, 6))
    assert run(wrong, batch([8], 4, slot_starts=[other])) != [token]


def test_a_ticket_is_finished_once_and_nothing_is_seen_before() -> None:
    model = SimModel(LIMITS, RULES)
    ticket = model.launch(batch([1, 2]))
    with pytest.raises(ContractError, match="ticket 2 is not open"):
        model.finish(Ticket(2))
    model.finish(ticket)
    with pytest.raises(ContractError, match="ticket 1 is not open"):
        model.finish(ticket)


def test_copied_blocks_go_their_own_way() -> None:
    model = SimModel(LIMITS, RULES)
    run(model, batch([1, 2, 3]))
    fork = [np.array([[1, 0, 3]], np.int32)] * 2
    copy = [np.array([[0, 3]], np.int32)] * 2
    mine = batch([3], 2, slot=1, block_updates=fork, block_copies=copy)
    assert run(model, mine) == [right([1, 2, 3])]
    assert run(model, batch([9], 3, slot=1)) == [right([1, 2, 3, 9])]
    assert run(model, batch([8], 3)) == [right([1, 2, 3, 8])]


BROKEN: list[tuple[str, Callable[[], Batch]]] = [
    ("not flat int32", lambda: batch([1], token_ids=np.array([1], np.int64))),
    ("tokens in a step", lambda: batch([1] * 17)),
    ("not consecutive", lambda: batch([1, 2, 3], positions=ints(0, 2, 3))),
    ("context length", lambda: batch([1, 2], context_lens=ints(3))),
    ("query_starts", lambda: batch([1, 2], query_starts=ints(0, 1))),
    ("does not exist", lambda: batch([1], slots=ints(4))),
    ("ascend", lambda: batch([1, 2, 3], rows=(2, 1))),
    ("outside the step", lambda: batch([1, 2], rows=(2,))),
    ("drafts are the last", lambda: batch([1, 2, 3], rows=(0, 2))),
    ("sampling row for each", lambda: batch([1, 2], sample_rows=ints(0, 1))),
    ("more rows", lambda: batch([1] * 9, rows=tuple(range(9)))),
    ("only the first token", lambda: batch([1, -1])),
    ("sampled nothing here", lambda: batch([-1])),
    ("outside the vocabulary", lambda: batch([30])),
    ("past the context", lambda: batch([1, 2], 31, block_updates=[np.zeros((0, 3), np.int32)] * 2)),
    ("never set", lambda: batch([1], block_updates=[np.zeros((0, 3), np.int32)] * 2)),
    ("reads cells", lambda: batch([1], 2)),
    ("for each group", lambda: batch([1], block_updates=[np.zeros((0, 3), np.int32)])),
    ("outside the tables", lambda: batch([1], block_updates=[np.array([[0, 8, 0]], np.int32)] * 2)),
    ("block 12 of 12", lambda: batch([1], block_updates=[np.array([[0, 0, 12]], np.int32)] * 2)),
    ("copied from and to", lambda: batch([1], block_copies=[np.array([[1, 2], [2, 3]], np.int32)] * 2)),
    ("two copies into", lambda: batch([1], block_copies=[np.array([[1, 3], [2, 3]], np.int32)] * 2)),
    ("without a token", lambda: batch([1], slot_starts=[SlotStart(1, 1, presence_penalty=1.0)])),
    ("asks for nothing", lambda: batch([1], slot_starts=[SlotStart(0)])),
    ("log does not end", lambda: batch([1], slot_starts=[SlotStart(0, 2, ints(1), presence_penalty=1.0)])),
    ("inputs that", lambda: batch([1], extras={"adapter": ints(1)})),
]


@pytest.mark.parametrize(("message", "make"), BROKEN, ids=[m for m, _ in BROKEN])
def test_a_batch_that_breaks_the_contract_is_refused(message: str, make: Callable[[], Batch]) -> None:
    with pytest.raises(ContractError, match=message):
        run(SimModel(LIMITS, RULES), make())


def test_a_slot_with_drafts_in_flight_is_not_launched() -> None:
    model = SimModel(LIMITS, RULES)
    run(model, batch([1, 2, 3]))
    ticket = model.launch(batch([4, 5, 6], 3, rows=(0, 1, 2)))
    with pytest.raises(ContractError, match="drafts in flight"):
        model.launch(batch([7], 6))
    model.finish(ticket)
    run(model, batch([7], model.reader.slots[0].next))


def test_two_slots_do_not_write_one_block() -> None:
    model = SimModel(LIMITS, RULES)
    a, b = batch([1, 2], rows=()), batch([3], slot=1)
    both = Batch(
        token_ids=ints(1, 2, 3),
        positions=ints(0, 1, 0),
        slots=ints(0, 1),
        query_starts=ints(0, 2, 3),
        context_lens=ints(2, 1),
        sample_rows=ints(2),
        sampling=b.sampling,
        block_updates=[np.concatenate([x, np.array([[1, 0, 0]], np.int32)]) for x in a.block_updates],
    )
    with pytest.raises(ContractError, match="written by two slots"):
        model.launch(both)
