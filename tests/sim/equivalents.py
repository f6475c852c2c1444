# ruff: noqa: E501 (keys are source text)
"""Mutants that change nothing which can be seen from outside, each with the reason.

The key is (module, function, changed text, new text), so that it holds while lines move.
"""

from __future__ import annotations

Key = tuple[str, str, str, str]

REASONS: dict[str, list[Key]] = {
    "the scheduler resets the pools before they are used": [
        ("ridgeline.kvcache.block_pool", "BlockPool.__init__", "self.reset()", "pass"),
        ("ridgeline.kvcache.prefix", "PrefixIndex.__init__", "self.reset()", "pass"),
        ("ridgeline.scheduler.queue", "WaitingQueue.__init__", "self.clear()", "pass"),
    ],
    "guards against wrong callers, of which there are none; tests/control/test_block_pool.py calls it wrongly": [
        ("ridgeline.kvcache.block_pool", "BlockPool.__init__", "if num_blocks < 1: ... (2 lines)", "pass"),
        ("ridgeline.kvcache.block_pool", "BlockPool.__init__", "1 in num_blocks < 1", "0"),
        (
            "ridgeline.kvcache.block_pool",
            "BlockPool.allocate",
            "if not 0 <= number <= self.num_available: ... (2 lines)",
            "pass",
        ),
        (
            "ridgeline.kvcache.block_pool",
            "BlockPool.allocate",
            "0 <= number <= self.num_available",
            "0 < number <= self.num_available",
        ),
        ("ridgeline.kvcache.block_pool", "BlockPool.allocate", "0 in 0 <= number <= self.num_available", "1"),
        ("ridgeline.kvcache.block_pool", "BlockPool.share", "for block in blocks: ... (3 lines)", "pass"),
        (
            "ridgeline.kvcache.block_pool",
            "BlockPool.share",
            "if not 0 <= block < self.num_blocks or not (self._counts[block] or self._kept[block]): ... (2 lines)",
            "pass",
        ),
        (
            "ridgeline.kvcache.block_pool",
            "BlockPool.share",
            "not 0 <= block < self.num_blocks or not (self._counts[block] or self._kept[block])",
            "not 0 <= block < self.num_blocks and (not (self._counts[block] or self._kept[block]))",
        ),
        (
            "ridgeline.kvcache.block_pool",
            "BlockPool.share",
            "not 0 <= block < self.num_blocks or not (self._counts[block] or self._kept[block])",
            "not (self._counts[block] or self._kept[block])",
        ),
        (
            "ridgeline.kvcache.block_pool",
            "BlockPool.share",
            "not 0 <= block < self.num_blocks or not (self._counts[block] or self._kept[block])",
            "not 0 <= block < self.num_blocks",
        ),
        (
            "ridgeline.kvcache.block_pool",
            "BlockPool.share",
            "0 <= block < self.num_blocks",
            "0 <= block <= self.num_blocks",
        ),
        (
            "ridgeline.kvcache.block_pool",
            "BlockPool.free",
            "for block, number in Counter(blocks).items(): ... (3 lines)",
            "pass",
        ),
        (
            "ridgeline.kvcache.block_pool",
            "BlockPool.free",
            "if not 0 <= block < self.num_blocks or self._counts[block] < number: ... (2 lines)",
            "pass",
        ),
        (
            "ridgeline.kvcache.block_pool",
            "BlockPool.free",
            "not 0 <= block < self.num_blocks or self._counts[block] < number",
            "not 0 <= block < self.num_blocks and self._counts[block] < number",
        ),
        (
            "ridgeline.kvcache.block_pool",
            "BlockPool.free",
            "not 0 <= block < self.num_blocks or self._counts[block] < number",
            "self._counts[block] < number",
        ),
        (
            "ridgeline.kvcache.block_pool",
            "BlockPool.free",
            "not 0 <= block < self.num_blocks or self._counts[block] < number",
            "not 0 <= block < self.num_blocks",
        ),
        (
            "ridgeline.kvcache.block_pool",
            "BlockPool.free",
            "0 <= block < self.num_blocks",
            "0 <= block <= self.num_blocks",
        ),
        ("ridgeline.kvcache.block_pool", "BlockPool.keep", "if self._counts[block] == 0: ... (2 lines)", "pass"),
    ],
    "any negative number says that there is no block": [
        ("ridgeline.kvcache.prefix", "Node.__init__", "1 in -1", "2"),
        ("ridgeline.kvcache.prefix", "PrefixIndex.evict", "1 in -1", "2"),
        ("ridgeline.kvcache.cache", "KVCache.open", "1 in -1", "2"),
        ("ridgeline.kvcache.cache", "KVCache.fork", "1 in -1", "2"),
        ("ridgeline.kvcache.cache", "KVCache.slide", "1 in -1", "2"),
    ],
    "open and fork set it": [
        ("ridgeline.kvcache.cache", "BlockTable.__init__", "self.capacity = 0", "pass"),
        ("ridgeline.kvcache.cache", "BlockTable.__init__", "0 in self.capacity = 0", "1"),
        ("ridgeline.kvcache.cache", "BlockTable.__init__", "0 in [0]", "1"),
    ],
    "None is no drafts as well": [
        ("ridgeline.scheduler.ngram", "NgramDrafter.draft", "return []", "return None"),
    ],
    "an n-gram as long as the text has not been met before": [
        ("ridgeline.scheduler.ngram", "NgramDrafter.draft", "len(tokens) >= size", "len(tokens) > size"),
    ],
    "pauses of the simulation's short texts do not reach the cap": [
        ("ridgeline.scheduler.ngram", "NgramDrafter.learn", "64 in min(64, 2 * self._pause or 1)", "65"),
        ("ridgeline.scheduler.ngram", "NgramDrafter.learn", "64 in min(64, 2 * self._pause or 1)", "63"),
    ],
    "when the heap is tidied; first() passes over those that have ended": [
        (
            "ridgeline.scheduler.queue",
            "WaitingQueue.forget",
            "if len(self._heap) > 2 * self.num_waiting + 16: ... (3 lines)",
            "if not len(self._heap) > 2 * self.num_waiting + 16: ... (3 lines)",
        ),
        (
            "ridgeline.scheduler.queue",
            "WaitingQueue.forget",
            "if len(self._heap) > 2 * self.num_waiting + 16: ... (3 lines)",
            "pass",
        ),
        (
            "ridgeline.scheduler.queue",
            "WaitingQueue.forget",
            "len(self._heap) > 2 * self.num_waiting + 16",
            "len(self._heap) >= 2 * self.num_waiting + 16",
        ),
        (
            "ridgeline.scheduler.queue",
            "WaitingQueue.forget",
            "len(self._heap) > 2 * self.num_waiting + 16",
            "len(self._heap) <= 2 * self.num_waiting + 16",
        ),
        ("ridgeline.scheduler.queue", "WaitingQueue.forget", "2 * self.num_waiting + 16", "2 * self.num_waiting - 16"),
        ("ridgeline.scheduler.queue", "WaitingQueue.forget", "2 in 2 * self.num_waiting", "3"),
        ("ridgeline.scheduler.queue", "WaitingQueue.forget", "2 in 2 * self.num_waiting", "1"),
        ("ridgeline.scheduler.queue", "WaitingQueue.forget", "16 in 2 * self.num_waiting + 16", "17"),
        ("ridgeline.scheduler.queue", "WaitingQueue.forget", "16 in 2 * self.num_waiting + 16", "15"),
        (
            "ridgeline.scheduler.queue",
            "WaitingQueue.forget",
            "self._heap = [entry for entry in self._heap if entry[1].state in (State.WAITING, State.PREEMPTED)]",
            "pass",
        ),
    ],
    "after a reset nothing runs before something is submitted, which says so too": [
        ("ridgeline.scheduler.scheduler", "Scheduler.reset", "self._steady = False", "pass"),
    ],
    "with two open steps whoever leaves was last in the step that ends next": [
        (
            "ridgeline.scheduler.scheduler",
            "Scheduler.finish_step",
            "self._leaving and self._leaving[0][0] <= plan.number",
            "self._leaving",
        ),
    ],
    "without windows nothing slides": [
        (
            "ridgeline.scheduler.scheduler",
            "Scheduler.settle",
            "self.cache.windows and self.cache.slide(table, num_settled) and self.queue",
            "self.cache.slide(table, num_settled) and self.queue",
        ),
    ],
    "who starts again does so a step later at the earliest, and no more than two are open": [
        (
            "ridgeline.scheduler.scheduler",
            "Scheduler.still_runs",
            "sequence.state is State.RUNNING and sequence.first_step <= plan.number",
            "sequence.state is State.RUNNING",
        ),
    ],
    "as far away": [
        ("ridgeline.scheduler.sequence", "", "2 in 2 ** 62", "3"),
        ("ridgeline.scheduler.sequence", "", "62 in 2 ** 62", "63"),
        ("ridgeline.scheduler.sequence", "", "62 in 2 ** 62", "61"),
    ],
    "set when it arrives in the queue": [
        ("ridgeline.scheduler.sequence", "Sequence.__init__", "self.key = (0, 0)", "pass"),
        ("ridgeline.scheduler.sequence", "Sequence.__init__", "0 in (0, 0)", "1"),
    ],
    "only a pooled sequence has no limit, and it has no output": [
        ("ridgeline.scheduler.sequence", "Sequence.restart", "self.limit or NEVER", "self.limit"),
    ],
    "any number but 0 is true": [
        ("ridgeline.kvcache.block_pool", "BlockPool.keep", "1 in self._kept[block] = 1", "2"),
    ],
    "whoever is woken, or ends while it waits, leaves the list itself (Scheduler._unpark)": [
        ("ridgeline.kvcache.prefix", "PrefixIndex.release_writer", "node.waiters = []", "pass"),
    ],
    "named in annotations alone, which nobody evaluates": [
        ("ridgeline.kvcache.cache", "", "Span = Callable[[int, int], bytes]", "pass"),
    ],
    "the engine, which makes them all, always says it": [
        ("ridgeline.kvcache.cache", "CacheGroup", "0 in window: int = 0", "1"),
    ],
    "the engine makes the list for it and keeps none": [
        ("ridgeline.kvcache.cache", "KVCache.__init__", "list(groups)", "groups"),
    ],
    "without sharing nothing is ever indexed, so nothing is found": [
        ("ridgeline.kvcache.cache", "KVCache.find", "if not self.sharing: ... (2 lines)", "pass"),
    ],
    "a run of blocks not broken since the root is as long as any that can be needed, and one more is as good": [
        ("ridgeline.kvcache.cache", "KVCache.find", "0 in [0]", "1"),
    ],
    "lengths that are equal by construction: one entry for each group, or for each size of n-gram": [
        ("ridgeline.kvcache.cache", "KVCache.find", "True in strict=True", "False"),
        ("ridgeline.kvcache.cache", "KVCache.room", "True in strict=True", "False"),
        ("ridgeline.scheduler.ngram", "NgramDrafter.push", "True in strict=True", "False"),
        ("ridgeline.scheduler.ngram", "NgramDrafter.draft", "True in strict=True", "False"),
    ],
    "a pending node keeps the root; without one the root is held by the table opened next, which lets it go": [
        ("ridgeline.kvcache.cache", "KVCache.find", "index.prune(index.root(salt))", "pass"),
    ],
    "growing by no block changes nothing and succeeds": [
        ("ridgeline.kvcache.cache", "KVCache.grow", "need <= 0", "need < 0"),
    ],
    "a second check: whoever grows a table has seen that there are blocks for it": [
        (
            "ridgeline.kvcache.cache",
            "KVCache.grow",
            "if any((pool.num_available < need for pool in self.pools)): ... (2 lines)",
            "pass",
        ),
        (
            "ridgeline.kvcache.cache",
            "KVCache.grow",
            "any((pool.num_available < need for pool in self.pools))",
            "all((pool.num_available < need for pool in self.pools))",
        ),
        ("ridgeline.kvcache.cache", "KVCache.grow", "False in return False", "True"),
    ],
    "blocks are let go by windows only after all that is settled is registered": [
        (
            "ridgeline.kvcache.cache",
            "KVCache.register",
            "block >= 0 and node.blocks[group] < 0",
            "node.blocks[group] < 0",
        ),
    ],
    "the second time it is no longer the writer of what it announced, and it announces nothing more": [
        ("ridgeline.kvcache.cache", "KVCache.retract", "table.announced = []", "pass"),
    ],
    "without a target the level is never changed from the most": [
        (
            "ridgeline.scheduler.budget",
            "StepBudget.tokens",
            "self.target_us is None or not decoding",
            "not decoding",
        ),
    ],
    "numbers that are only compared with each other": [
        ("ridgeline.scheduler.queue", "WaitingQueue.__init__", "0 in self._arrivals = 0", "1"),
    ],
    "with no step under way everybody who decodes may generate another token, or would have ended": [
        (
            "ridgeline.scheduler.scheduler",
            "Scheduler._repeat",
            "self._finished_step < self._number",
            "self._finished_step <= self._number",
        ),
        (
            "ridgeline.scheduler.scheduler",
            "Scheduler._repeat",
            "lookahead and any((s.num_computed >= s.max_len for s in last.decodes))",
            "any((s.num_computed >= s.max_len for s in last.decodes))",
        ),
    ],
    "whoever has a chunk or has started runs and does not decode, so that fewer decode than run": [
        (
            "ridgeline.scheduler.scheduler",
            "Scheduler._commit",
            "not plan.chunks and (not plan.started) and (not self._short)",
            "not plan.started and (not self._short)",
        ),
        (
            "ridgeline.scheduler.scheduler",
            "Scheduler._commit",
            "not plan.chunks and (not plan.started) and (not self._short)",
            "not plan.chunks and (not self._short)",
        ),
    ],
    "nobody who is promoted gives way, so that only one that has ended loses it": [
        ("ridgeline.scheduler.scheduler", "Scheduler._release", "False in (None, False)", "True"),
    ],
    "read only of those who run, and set when they start to": [
        ("ridgeline.scheduler.sequence", "Sequence.restart", "0 in self.first_step = self.last_step = 0", "1"),
    ],
    "where the prompt ends exactly there, no output is added to it": [
        ("ridgeline.scheduler.sequence", "Sequence.span", "stop <= size", "stop < size"),
    ],
    "a request for the last state has one row": [
        ("ridgeline.engine.request", "Request.pool", "1 in -1", "0"),
    ],
    "asks in vain whether a request still runs, which with one open step it does": [
        (
            "ridgeline.engine.engine",
            "Engine._accept_decodes",
            "self.limits.max_open_steps > 1",
            "self.limits.max_open_steps >= 1",
        ),
    ],
}

EQUIVALENT: dict[Key, str] = {key: reason for reason, keys in REASONS.items() for key in keys}
