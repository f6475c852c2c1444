"""Random ways of computing the same sequences: any chunks, any company, any slots and blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ridgeline.core.types import SAMPLING_DTYPE, Batch, StepOutput, Ticket

BLOCK = 16


class Runs(Protocol):
    """What is driven: an executor whose last logits can be looked at."""

    last_logits: Any

    def launch(self, batch: Batch) -> Ticket:
        """Starts a step."""
        ...

    def finish(self, ticket: Ticket) -> StepOutput:
        """Ends it."""
        ...


@dataclass
class Request:
    """A request whose every token is known beforehand; ``done`` of them are computed."""

    number: int
    ids: np.ndarray
    slot: int
    blocks: list[int]
    done: int = 0


def sampling_row(number: int) -> np.ndarray:
    """Parameters of one request, of every kind by turns."""
    row = np.zeros((), SAMPLING_DTYPE)
    row["seed"], row["top_p"], row["num_logprobs"] = 1000 + number, 1.0, number % 3 - 1
    row["temperature"] = (0.0, 0.7, 1.0, 1.5)[number % 4]
    row["top_k"], row["min_p"] = (0, 20)[number % 2], (0.0, 0.01)[number // 2 % 2]
    if number % 5 == 0:
        row["top_p"] = 0.9
    return row


@dataclass(frozen=True)
class Sampled:
    """What one position gave: logits as bits, the token and its log probability as bits."""

    logits: np.ndarray
    token: int
    logprob: np.ndarray


def step_of(parts: Sequence[tuple[Request, int]], fresh: bool) -> Batch:
    """One step: so many next tokens of each sequence, every row sampled. ``fresh`` hands over block tables."""
    i32 = np.int32
    starts = np.cumsum([0] + [n for _, n in parts]).astype(i32)
    updates = [(s.slot, i, b) for s, _ in parts if fresh or s.done == 0 for i, b in enumerate(s.blocks)]
    return Batch(
        np.concatenate([s.ids[s.done : s.done + n] for s, n in parts]).astype(i32),
        np.concatenate([np.arange(s.done, s.done + n) for s, n in parts]).astype(i32),
        np.array([s.slot for s, _ in parts], i32),
        starts,
        np.array([s.done + n for s, n in parts], i32),
        np.arange(starts[-1], dtype=i32),
        np.array([sampling_row(s.number) for s, n in parts for _ in range(n)], SAMPLING_DTYPE),
        [np.array(updates, i32).reshape(-1, 3)],
    )


def last_rows(batch: Batch, rng: np.random.Generator, most: int) -> Batch:
    """Samples only some of the rows, as real steps do: the selection must not matter either."""
    keep = np.sort(rng.permutation(len(batch.sample_rows))[: int(rng.integers(0, most + 1))])
    batch.sample_rows, batch.sampling = batch.sample_rows[keep], batch.sampling[keep]
    return batch


def run_mix(
    executor: Runs,
    prompts: Sequence[np.ndarray],
    seed: int,
    *,
    slots: int,
    max_tokens: int,
    max_rows: int,
    chunks: Sequence[int] = (1, 1, 1, 2, 5, 16, 33, 64, 128),
) -> dict[tuple[int, int], Sampled]:
    """Computes all prompts in a random order, chunking and company.

    Returns:
        By (prompt number, position), whatever was sampled on the way.
    """
    rng = np.random.default_rng(seed)
    per_slot = -(-max(map(len, prompts)) // BLOCK)
    blocks = rng.permutation(slots * per_slot).reshape(slots, per_slot)
    waiting = list(rng.permutation(len(prompts)))
    free, running, results = list(rng.permutation(slots)), [], {}
    while waiting or running:
        while waiting and free and rng.random() < 0.7:
            slot, number = int(free.pop()), int(waiting.pop())
            table = [int(b) for b in blocks[slot, : -(-len(prompts[number]) // BLOCK)]]
            running.append(Request(number, prompts[number], slot, table))
        parts, left = [], max_tokens
        for s in rng.permutation(np.array(running, object)) if running else ():
            if left and rng.random() < 0.8:
                n = min(int(rng.choice(chunks)), len(s.ids) - s.done, left)
                parts.append((s, n))
                left -= n
        if not parts:
            continue
        batch = last_rows(step_of(parts, bool(rng.random() < 0.3)), rng, max_rows)
        output = executor.finish(executor.launch(batch))
        rows = np.repeat(np.arange(len(parts)), [n for _, n in parts])
        for i, row in enumerate(batch.sample_rows):
            key = (parts[rows[row]][0].number, int(batch.positions[row]))
            logits = executor.last_logits[i].copy().view(np.uint32)
            results[key] = Sampled(logits, int(output.token_ids[i]), output.logprobs[i : i + 1].view(np.uint32))
        for s, n in parts:
            s.done += n
            if s.done == len(s.ids):
                running.remove(s)
                free.append(s.slot)
    return results


def run_alone(
    executor: Runs, prompts: Sequence[np.ndarray], wanted: Sequence[tuple[int, int]], *, max_rows: int
) -> dict[tuple[int, int], Sampled]:
    """The plain way: each prompt by itself in one step from its start, repeated for more rows than fit."""
    results = {}
    for number in sorted({n for n, _ in wanted}):
        positions = sorted(p for n, p in wanted if n == number)
        for i in range(0, len(positions), max_rows):
            some = np.array(positions[i : i + max_rows])
            ids = prompts[number][: some[-1] + 1]
            s = Request(number, ids, 0, list(range(-(-len(ids) // BLOCK))))
            batch = step_of([(s, len(ids))], True)
            batch.sample_rows, batch.sampling = batch.sample_rows[some], batch.sampling[some]
            output = executor.finish(executor.launch(batch))
            for r, p in enumerate(some):
                logits = executor.last_logits[r].copy().view(np.uint32)
                results[number, int(p)] = Sampled(
                    logits, int(output.token_ids[r]), output.logprobs[r : r + 1].view(np.uint32)
                )
    return results


def run_steps(executor: Runs, ids: np.ndarray, sizes: Sequence[int]) -> dict[tuple[int, int], Sampled]:
    """One request in steps of the given sizes, by itself; the last row of each is sampled."""
    results = {}
    s = Request(0, ids, 0, list(range(-(-len(ids) // BLOCK))))
    for n in sizes:
        batch = step_of([(s, n)], False)
        batch.sample_rows, batch.sampling = batch.sample_rows[-1:], batch.sampling[-1:]
        output = executor.finish(executor.launch(batch))
        s.done += n
        results[0, s.done - 1] = Sampled(
            executor.last_logits[0].copy().view(np.uint32), int(output.token_ids[0]), output.logprobs.view(np.uint32)
        )
    return results


def assert_same(a: dict[tuple[int, int], Sampled], b: dict[tuple[int, int], Sampled]) -> None:
    """Bitwise, wherever both sampled."""
    both = a.keys() & b.keys()
    assert both, "nothing to compare"
    for key in both:
        np.testing.assert_array_equal(a[key].logits, b[key].logits, err_msg=f"logits of (prompt, position) {key}")
        assert a[key].token == b[key].token, key
        np.testing.assert_array_equal(a[key].logprob, b[key].logprob, err_msg=f"{key}")
