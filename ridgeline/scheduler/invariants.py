"""What must hold between any two steps, whatever has happened: called by tests after each, and behind a flag."""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import TYPE_CHECKING

from ridgeline.kvcache.cache import BlockTable
from ridgeline.scheduler.sequence import State

if TYPE_CHECKING:
    from ridgeline.scheduler.scheduler import Scheduler


def check(scheduler: Scheduler, free_slots: Several[int], leaving: Several[tuple[int, BlockTable]]) -> None:
    """Raise AssertionError for the first invariant that does not hold.

    Args:
        scheduler: whose state is checked.
        free_slots: slots that nobody owns.
        leaving: slots and tables that a step under way may still write.
    """
    running = scheduler.running
    slots = [s.slot for s in running] + [slot for slot, _ in leaving] + list(free_slots)
    if sorted(slots) != list(range(scheduler.max_running)):
        raise AssertionError(f"slots are lost or held twice: {sorted(slots)}")
    tables = [s.table for s in running if s.table is not None]
    if len(tables) != len(running) or any(s.state is not State.RUNNING for s in running):
        raise AssertionError("a sequence runs without blocks, or has ended and still runs")
    if [s.key for s in running] != sorted(s.key for s in running):
        raise AssertionError("those that run are not in the order of the queue")
    scheduler.cache.check([*tables, *(table for _, table in leaving)])
    for sequence in running:
        _check_sequence(scheduler, sequence)
    _check_waiting(scheduler)
    if not scheduler.has_work and not leaving:
        if any(pool.num_available != pool.num_blocks for pool in scheduler.cache.pools):
            raise AssertionError("an idle scheduler holds blocks")


def _check_sequence(scheduler: Scheduler, sequence: object) -> None:
    from ridgeline.scheduler.sequence import Sequence

    assert isinstance(sequence, Sequence) and sequence.table is not None
    table, size = sequence.table, scheduler.cache.block_size
    if sequence.num_computed > min(table.capacity, sequence.max_len):
        raise AssertionError("a sequence computes tokens beyond its blocks or its limit")
    if sequence.num_settled > sequence.num_computed and not sequence.busy:
        raise AssertionError("a sequence has more tokens in the cache than were computed")
    for group, pool in enumerate(scheduler.cache.pools):
        # What it writes next, and what is under way, must be its own and not be in the prefix index.
        for index in range(sequence.num_computed // size, len(table.blocks[group])):
            block = table.blocks[group][index]
            if index >= table.first[group] and (pool.count(block) != 1 or pool.is_kept(block)):
                raise AssertionError(f"block {block} of group {group} is shared and will be written")


def _check_waiting(scheduler: Scheduler) -> None:
    waiting = scheduler.queue.members()
    if len(waiting) != len(scheduler.queue) or len({id(s) for s in waiting}) != len(waiting):
        raise AssertionError("the queue has lost count of who waits")
    if sum(s.num_tokens for s in waiting) != scheduler.queue.num_tokens:
        raise AssertionError("the queue has lost count of its tokens")
    for sequence in [*waiting, *scheduler.parked.values()]:
        if sequence.table is not None or sequence.slot >= 0:
            raise AssertionError("a sequence that waits holds blocks or a slot")
    for sequence in scheduler.parked.values():
        if sequence.state is not State.PARKED or sequence.parked_on is None:
            raise AssertionError("a parked sequence waits for nothing")
