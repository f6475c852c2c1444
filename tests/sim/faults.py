"""Classic faults of such engines, as changes of the real code. The general oracles must kill every one."""

from __future__ import annotations

from dataclasses import dataclass

POOL = "ridgeline.kvcache.block_pool"
CACHE = "ridgeline.kvcache.cache"
PREFIX = "ridgeline.kvcache.prefix"
SCHEDULER = "ridgeline.scheduler.scheduler"
QUEUE = "ridgeline.scheduler.queue"
ENGINE = "ridgeline.engine.engine"
BATCHING = "ridgeline.engine.batching"


@dataclass(frozen=True)
class PlantedFault:
    """``before``, which must be in ``module`` once, becomes ``after``."""

    name: str
    module: str
    before: str
    after: str


FAULTS = (
    PlantedFault(
        "missing reference count",
        POOL,
        "                del self._cached[block]\n            self._counts[block] += 1\n",
        "                del self._cached[block]\n                self._counts[block] += 1\n",
    ),
    PlantedFault(
        "block freed while an open step may write it",
        SCHEDULER,
        "        if sequence.last_step > self._finished_step:\n            self._leaving",
        "        if sequence.last_step > self._finished_step + 1:\n            self._leaving",
    ),
    PlantedFault(
        "stale hash: evicted content can still be found",
        POOL,
        "        self._evicted(block)\n",
        "",
    ),
    PlantedFault(
        "hash hit without token comparison",
        PREFIX,
        "        if found is not None and found.parent is node and found.tokens == tokens:\n",
        "        if found is not None:\n",
    ),
    PlantedFault(
        "hash hit that compares the block but not what came before it",
        PREFIX,
        "        if found is not None and found.parent is node and found.tokens == tokens:\n",
        "        if found is not None and found.tokens == tokens:\n",
    ),
    PlantedFault(
        "double free",
        CACHE,
        "        for group, pool in enumerate(self.pools):\n            pool.free(table.held(group))\n",
        "        for group, pool in enumerate(self.pools):\n            pool.free(table.held(group))\n"
        "            pool._free += table.held(group)[:1]\n",
    ),
    PlantedFault(
        "lost abort: the sequence goes on",
        ENGINE,
        '            request.end("abort")\n            self._scheduler.end(request)\n',
        '            request.end("abort")\n',
    ),
    PlantedFault(
        "lost abort: its blocks are never freed",
        SCHEDULER,
        "            self.running.remove(sequence)\n            self._release(sequence)\n        elif",
        "            self.running.remove(sequence)\n        elif",
    ),
    PlantedFault(
        "wrong chunk end",
        SCHEDULER,
        "        whole = stop == sequence.num_tokens\n",
        "        whole = stop >= sequence.num_tokens - 1\n",
    ),
    PlantedFault(
        "shared block written: a fork shares the partial block",
        CACHE,
        "                copies[group].append((blocks[whole], copy))\n",
        "                pool.free([copy])\n                copy = blocks[whole]\n                pool.share([copy])\n",
    ),
    PlantedFault(
        "copy on write without the copy",
        CACHE,
        "                copies[group].append((blocks[whole], copy))\n",
        "",
    ),
    PlantedFault(
        "starvation: who came last goes first",
        QUEUE,
        "sequence.priority * self._aging_steps, self._arrivals)",
        "sequence.priority * self._aging_steps, -self._arrivals)",
    ),
    PlantedFault(
        "starvation: a waiter of a prefix is never woken",
        PREFIX,
        "            self.woken += node.waiters\n",
        "",
    ),
    PlantedFault(
        "prefix pinned too late: found, evicted, then shared",
        POOL,
        "            if self._counts[block] == 0:\n                del self._cached[block]\n",
        "            if self._counts[block] == 0 and len(self._cached) > 1:\n                del self._cached[block]\n",
    ),
    PlantedFault(
        "window block freed one token early",
        CACHE,
        "        return max(0, position - window + 1) // self.block_size\n",
        "        return max(0, position - window + 2) // self.block_size\n",
    ),
    PlantedFault(
        "rejected drafts counted as computed",
        SCHEDULER,
        "        sequence.num_computed = chunk.start + accepted\n",
        "        sequence.num_computed = chunk.start + 1 + len(chunk.drafts)\n",
    ),
    # Found by the simulation in code that had its own tests; here so that they stay found.
    PlantedFault(
        "stale sampling state: a slot's start is lost with a failed launch",
        ENGINE,
        "        self._builder.forget_slots()\n",
        "",
    ),
    PlantedFault(
        "drafts take the budget of those that decode after them",
        SCHEDULER,
        "self._budget - 1 - self._decodes_left - kept",
        "self._budget - 1 - kept",
    ),
    PlantedFault(
        "drafts take the row of a newcomer",
        SCHEDULER,
        "self._spare_rows - kept, left",
        "self._spare_rows, left",
    ),
    PlantedFault(
        "a step short of blocks is repeated, and nobody looks at the queue",
        SCHEDULER,
        "not plan.started and not self._short\n",
        "not plan.started\n",
    ),
    PlantedFault(
        "stale slot state: a new owner's sampler is not reset",
        BATCHING,
        "            start = SlotStart(slot)\n",
        "            pass\n",
    ),
)
