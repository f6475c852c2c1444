"""What is cached: it is used where it can be, waited for where it is on its way, and lost in the right order.

From the engine are taken the blocks that hold content and the chain of tokens before each; what can be reused, who
waits for whom and what was used least recently is worked out here.
"""

from __future__ import annotations

from array import array

from tests.sim import view
from tests.sim.batches import Step
from tests.sim.oracles import Oracles, Record, common, must


class Reuse:
    """Watches the prefix index and the cached blocks of one engine."""

    def __init__(self, oracles: Oracles) -> None:
        self.oracles, self.engine = oracles, oracles.engine
        self.limits, self.windows = oracles.scenario.limits, oracles.scenario.rules.windows
        self.sharing = self.limits.prefix_sharing
        self.exact = self.sharing and oracles.scenario.hash_bits is None
        self.aging = [Aging(oracles, group) for group in range(len(self.windows))]
        self.running: set[int] = set()  # by id(), before the step
        self.parked: set[int] = set()
        oracles.watchers.append(self.launched)

    def before_step(self) -> None:
        """Note what is cached and who runs."""
        self.running = {id(r) for r in self.oracles.live if r.request.slot >= 0}
        self.parked = {id(r) for r in self.oracles.live if view.parked(r.request)}
        if self.sharing:
            for aging in self.aging:
                aging.before_step()

    def launched(self, step: Step) -> None:
        """All oracles, once a step is planned."""
        if not self.sharing:
            return
        live = self.oracles.live
        running = [r for r in live if r.request.slot >= 0]
        gave_way = len(self.running - {id(r) for r in running}) > 0
        parked = [r for r in live if view.parked(r.request)]
        queued = [r for r in live if view.queued(r.request)]
        started = {r.request.slot: r for r in running if id(r) not in self.running}
        self.tidy(running)
        for aging in self.aging:
            aging.find_lost()
        look = self.exact and step.work[0].first % 4 == 0
        if started or parked or queued or look:
            chains = view.Chains(self.engine)
            for record in running if look else ():
                self.is_indexed(chains, record)
            for work in step.work:
                record = started.get(work.slot)
                if record is not None:
                    usable = self.usable(chains, record)
                    must(work.first >= usable, f"{usable} tokens are cached, a request that starts uses {work.first}")
            if not gave_way:  # whoever waited for one that gave way is woken by the next step
                for record in parked:
                    self.waits(chains, record, running)
            for record in queued:
                for path in self.path(chains, record):
                    for aging in self.aging:
                        aging.may_be_touched(path[aging.group])
        for aging in self.aging:
            aging.launched(gave_way)

    # -- what can be shared ------------------------------------------------------------------------------------------

    def path(self, chains: view.Chains, record: Record) -> list[list[int]]:
        """The blocks of each node of the index along a request's tokens."""
        known = array("i", record.tokens()).tobytes()
        size = 4 * self.limits.block_size
        return chains.follow(record.case.salt, [known[at : at + size] for at in range(0, len(known) - size + 1, size)])

    def shareable(self, record: Record) -> int:
        """Most tokens that it may take from others: one is left over, and the rows it wants it computes itself."""
        case, number = record.case, len(record.tokens())
        if case.pooling == "mean":
            return 0
        if case.params.prompt_logprobs is not None and record.index == 0:
            done = len(record.request.prompt_logprobs or ())
            if done < len(case.prompt) - 1:
                number = done + 1
        return number - 1

    def usable(self, chains: view.Chains, record: Record) -> int:
        """Tokens that the index holds for a request, in every group all that the token after them reads, and the last
        block at least."""
        size, most, held = self.limits.block_size, 0, self.path(chains, record)
        for depth in range(1, min(len(held), self.shareable(record) // size) + 1):
            lows = (min(depth - 1, max(0, depth * size - w + 1) // size if w else 0) for w in self.windows)
            if all(held[i][group] >= 0 for group, low in enumerate(lows) for i in range(low, depth)):
                most = depth * size
        return most

    def settled(self, record: Record) -> int:
        """Tokens of a running request that steps which have ended have computed."""
        slot = record.request.slot
        open_work = [w.first for s in self.oracles.model.open.values() for w in s.work if w.slot == slot]
        now = [w.first for w in self.oracles.launching if w.slot == slot]
        return min([*open_work, *now], default=self.oracles.model.reader.slots[slot].next)

    def waits(self, chains: view.Chains, record: Record, running: list[Record]) -> None:
        """Who waits for another is waiting for tokens that nobody has and that the other has yet to compute."""
        leader, size = record.leader, self.limits.block_size
        if leader in running and not record.request.output_ids:
            assert leader is not None
            if self.settled(leader) < len(leader.case.prompt) - 1:
                return
        own, most, usable = record.tokens(), self.shareable(record), self.usable(chains, record)
        others = [r for r in running if r.case.salt == record.case.salt]
        computes = [(self.settled(r), min(common(own, r.tokens()), most) // size * size) for r in others]
        if id(record) in self.parked:
            # As others come and go some of the blocks that it waits for may turn out not to be needed.
            fine = any(have < shared for have, shared in computes)
        else:
            fine = any(max(have, usable) < shared for have, shared in computes)
            lost = any(aging.lost for aging in self.aging)  # perhaps one that was there when it was parked
            if not lost and not any(self.windows):  # with windows a block may be lost that it does not need
                fine &= any(have < usable + size <= shared for have, shared in computes)
        must(fine, f"case {record.case.number} waits for tokens that are there, or that nobody will compute")

    def is_indexed(self, chains: view.Chains, record: Record) -> None:
        """All whole blocks that a running request has computed can be found."""
        settled, size = self.settled(record), self.limits.block_size
        held = self.path(chains, record)[: settled // size]
        must(len(held) == settled // size, "blocks that are computed are not in the index")
        if not self.oracles.scenario.roomy:
            return  # another's block of the same content may have been indexed, and lost since
        for group, window in enumerate(self.windows):
            low = max(0, settled - window + 1) // size if window else 0
            must(all(blocks[group] >= 0 for blocks in held[low:]), "a block that is computed and held cannot be found")

    def tidy(self, running: list[Record]) -> None:
        """The index holds whole blocks of tokens; it says that somebody computes them only where somebody does, and
        lists nobody as waiting who does not."""
        tables = {id(r.request.table) for r in running}
        for node in view.nodes(self.engine):
            must(len(node.tokens) == 4 * self.limits.block_size, "a node of the index is not one block of tokens")
            must(
                node.writer is None or id(node.writer) in tables, "a node of the index waits for a writer that is gone"
            )
            must(all(map(view.parked, node.waiters)), "a request is listed as waiting for tokens and does not wait")
        for record in running:
            followers = record.request.followers
            must(all(map(view.parked, followers)), "a request is listed as waiting for another and does not wait")


class Aging:
    """Cached blocks of one group are given out least recently used first, and only when no block is free.

    Seen from outside, a block was last used between two looks: those of different looks are in order; of one look,
    those that one request alone held go from the end of its text to the beginning.
    """

    def __init__(self, oracles: Oracles, group: int) -> None:
        self.oracles, self.engine, self.group = oracles, oracles.engine, group
        self.ordered = oracles.scenario.rules.windows[group] == 0  # a window lets blocks go one by one
        self.now = 0
        self.since: dict[int, int] = {}  # when each cached block was let go
        self.used: dict[int, int] = {}  # when one was last looked at for a request that then could not start
        self.holder: dict[int, tuple[int, int]] = {}  # the one request that held it last, and where
        self.content: dict[int, object] = {}
        self.lost: list[int] = []  # whose content this step has cost

    def before_step(self) -> None:
        """A look at what is cached before the step."""
        self._look()
        self.content = dict(view.content(self.engine, self.group))

    def find_lost(self) -> None:
        """Which blocks hold no more what they did before the step."""
        content = view.content(self.engine, self.group)
        self.lost = [b for b, what in self.content.items() if content.get(b) is not what]

    def may_be_touched(self, block: int) -> None:
        """Somebody who waits has tried to start with this block."""
        self.used[block] = self.now + 1

    def _look(self) -> None:
        self.now += 1
        self.since = {b: self.since.get(b, self.now) for b in view.cached(self.engine, self.group)}

    def launched(self, gave_way: bool) -> None:
        """A step is planned: what was lost for it was next to be lost."""
        before, content, lost = self.since, view.content(self.engine, self.group), self.lost
        self._look()
        if lost:
            must(gave_way or not view.free(self.engine, self.group), "content was lost though a block was free")
            latest = max(before.get(b, self.now) for b in lost)
            for block in before.keys() & self.since.keys():
                if self.content.get(block) is content.get(block):
                    last = max(before[block], self.used.get(block, 0))
                    must(latest <= last, f"block {block} was used before another whose content was lost")
                    if self.ordered and last == before[block]:
                        self._end_first(block, [b for b in lost if before.get(b) == last])
        self._note_holders()

    def _end_first(self, block: int, lost: list[int]) -> None:
        """Of what one request let go at once, its end is lost before its beginning."""
        mine = self.holder.get(block)
        for other in lost:
            his = self.holder.get(other)
            if mine is not None and his is not None and mine[0] == his[0]:
                must(his[1] > mine[1], f"block {other} was lost before block {block}, which follows it")

    def _note_holders(self) -> None:
        fresh: dict[int, tuple[int, int]] = {}
        shared: set[int] = set()
        for record in self.oracles.live:
            if record.request.slot >= 0:
                for index, block in enumerate(view.table(record.request, self.group)):
                    if block in fresh:
                        shared.add(block)
                    fresh[block] = (id(record), index)
        self.holder.update(fresh)
        for block in shared:
            del self.holder[block]
