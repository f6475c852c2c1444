"""Who waits to run, in order of priority and arrival."""

from __future__ import annotations

import heapq

from ridgeline.scheduler.sequence import Sequence, State


class WaitingQueue:
    """A heap of sequences by ``key``, fixed at arrival: (step of arrival + priority * aging_steps, number).

    That is ageing: each step of waiting brings a sequence as much nearer as it does every other, so after
    ``aging_steps`` for each level of priority between them an older one comes before a new one. Nothing has to be
    updated as steps go by, and the first is found in constant time whatever waits behind it. A sequence that has
    ended while it waited stays in the heap until it comes up, or until the heap is half full of such.
    """

    def __init__(self, aging_steps: int) -> None:
        self._aging_steps = aging_steps
        self._arrivals = 0
        self.clear()

    def clear(self) -> None:
        """Forget everybody."""
        self._heap: list[tuple[tuple[int, int], Sequence]] = []
        self.num_waiting = 0
        self.num_tokens = 0  # of their prompts and outputs

    def __len__(self) -> int:
        return self.num_waiting

    def arrive(self, sequence: Sequence, step: int) -> None:
        """Queue a sequence that comes for the first time, at ``step``."""
        self._arrivals += 1
        sequence.key = (step + sequence.priority * self._aging_steps, self._arrivals)
        self.push(sequence)

    def push(self, sequence: Sequence) -> None:
        """Queue a sequence at the place that its key gives it."""
        heapq.heappush(self._heap, (sequence.key, sequence))
        self.num_waiting += 1
        self.num_tokens += sequence.num_tokens

    def first(self) -> Sequence | None:
        """The sequence whose turn it is; None when nobody waits."""
        heap = self._heap
        while heap and heap[0][1].state not in (State.WAITING, State.PREEMPTED):
            heapq.heappop(heap)
        return heap[0][1] if heap else None

    def pop(self) -> None:
        """Remove the sequence that ``first`` has returned."""
        self._forget(heapq.heappop(self._heap)[1])

    def forget(self, sequence: Sequence) -> None:
        """A sequence in the queue has ended."""
        self._forget(sequence)
        if len(self._heap) > 2 * self.num_waiting + 16:
            self._heap = [entry for entry in self._heap if entry[1].state in (State.WAITING, State.PREEMPTED)]
            heapq.heapify(self._heap)

    def _forget(self, sequence: Sequence) -> None:
        self.num_waiting -= 1
        self.num_tokens -= sequence.num_tokens

    def members(self) -> list[Sequence]:
        """Everybody who waits, in no order."""
        return [s for _, s in self._heap if s.state in (State.WAITING, State.PREEMPTED)]
