"""Runs a plan on a GPU, or on the emulated device: batches go in on a side stream, graphs run, samples come out.

A step is, on the compute stream: its block of inputs copied to where the graphs read it; changed block-table cells,
block copies and logit adjustments; the graph of its bucket (tokens fed back on the device, then every operator of the
plan); sampling; the copy of what was sampled to the host. The next step's inputs travel on another stream meanwhile,
into another block, so that nothing is written while a step may read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ridgeline.backends.cuda import weights as packed
from ridgeline.backends.cuda.beside import every_launch_beside, sample_and_settle, update_cache
from ridgeline.backends.cuda.device import Device, Event, Graph, HostBuffer
from ridgeline.backends.cuda.kernels import step as kernels
from ridgeline.backends.cuda.kernels.top_logprobs import top_logprobs
from ridgeline.backends.cuda.launch import Launch
from ridgeline.backends.cuda.lowering import Lowering, Sizes
from ridgeline.backends.cuda.memory import DeviceMemory, Limits
from ridgeline.backends.cuda.step import (
    Asked,
    Held,
    Layout,
    adjustments,
    asked,
    encode,
    few_first,
    held_rows,
    sizes_of,
    varying,
)
from ridgeline.backends.cuda.variants import buckets, key
from ridgeline.backends.reference.slots import SlotLog
from ridgeline.core.errors import RidgelineError
from ridgeline.core.ranges import Ranges, trace, within
from ridgeline.core.types import POOL, Batch, Float32, StepOutput, Ticket, TokenMasks
from ridgeline.graph.ir import bound
from ridgeline.graph.plan import Plan, final_norm

MOST_OPEN = 2
"""Steps under way at once, each with a block of inputs and one of results of its own until it is finished."""


LEAST_TIMED = 16
"""Launches in a graph that is timed: fewer are over before the host has queued the next."""


@dataclass
class Bucket:
    """A size of step.

    Attributes:
        layout: of its block of inputs.
        launches: of its graph.
        graph: these, captured; None: they are launched one by one.
        logits: fp32 [rows, vocabulary], where they are left.
        hidden: [rows, hidden size], the final norm's; None where the plan has no such norm of sampled rows.
    """

    layout: Layout
    launches: list[Launch]
    graph: Graph | None
    logits: torch.Tensor
    hidden: torch.Tensor | None


@dataclass
class Place:
    """An open step's: its inputs on their way in, its results on their way out.

    Attributes:
        inputs, staged: the block, and what varies in length after it, on the host and on the device.
        held: what the host's block holds.
        results, best: as in ``DeviceMemory``, on the host.
        done: all of the step, which is finished by waiting for it; None before the first.
    """

    inputs: HostBuffer
    staged: torch.Tensor
    results: HostBuffer
    best: HostBuffer
    done: Event | None = None
    held: Held = field(default_factory=Held)
    made: dict[Any, Any] = field(default_factory=dict)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What ``make`` gave the first time, for as long as the buffers stay: views, and launches over them."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def fields(self, layout: Layout) -> dict[str, torch.Tensor]:
        """A bucket's fields on the device."""
        found: dict[str, torch.Tensor] = self.once(("fields", id(layout)), lambda: layout.tensors(self.staged))
        return found


@dataclass
class Step:
    """A step under way.

    Attributes:
        batch: as it runs, requests of few tokens first; back: where each of its rows was; None: there.
        asked: what its rows ask for.
        extras: what varies in length, on the device, by name.
        logits: a copy for rows under a mask, which are sampled when later steps may have run; None without any.
        hidden: the final norm's rows, on the host; None where none are pooled.
    """

    batch: Batch
    asked: Asked
    bucket: Bucket
    place: Place
    extras: dict[str, torch.Tensor]
    back: npt.NDArray[np.intp] | None = None
    logits: torch.Tensor | None = None
    hidden: HostBuffer | None = None

    @property
    def fields(self) -> dict[str, torch.Tensor]:
        """Its block on the device, which no other step writes while this one is open."""
        return self.place.fields(self.bucket.layout)


class CudaExecutor:
    """The executor contract of ``core.types.Executor`` on GPU kernels; two steps may be open.

    With ``batch_invariant`` the bits of a row depend on neither the rows beside it nor the chunks its prompt came in.
    """

    def __init__(
        self,
        plan: Plan,
        weights: Mapping[str, packed.StoredWeight],
        device: Device,
        *,
        num_slots: int,
        num_blocks: list[int],
        max_blocks_per_slot: int,
        batch_invariant: bool = True,
        graphs: bool = True,
    ) -> None:
        """Uploads the weights, allocates everything a step will need, and captures a graph for every bucket.

        Args:
            plan: compiled for ``cuda_target``.
            weights: by the names the plan uses.
            num_slots: requests that may run at once.
            num_blocks: blocks of each cache group.
            max_blocks_per_slot: most blocks of one request.
            batch_invariant: False lets tiles and splits depend on how many rows a product has.
            graphs: False launches a step's operators one by one, as profilers want them.

        Raises:
            UnsupportedError: an operator, format or shape without a kernel.
            ConfigError: not enough memory.
            ModelFileError: a weight that holds NaN or infinity, by name.
        """
        self.plan, self.device, self._graphs = plan, device, graphs
        self._compute, self._copies = device.stream(), device.stream()
        limits = Limits.of(plan, num_slots, num_blocks, max_blocks_per_slot)
        self.memory = DeviceMemory.allocate(plan, weights, device, self._compute, limits, batch_invariant)
        self._final_norm = final_norm(plan.graph)
        most = limits.largest
        self._buckets = [self._capture(sizes) for sizes in buckets(most.tokens, most.requests, most.rows)]
        self._places = [self._place() for _ in range(MOST_OPEN)]
        self._logs: dict[int, SlotLog] = {}
        self._open: dict[int, Step] = {}
        self._count = 0
        self._last: Step | None = None
        self._asked: Asked | None = None
        beside = every_launch_beside(plan, self._buckets[-1].layout, self.memory.caches, device.arch)
        captured = [launch for bucket in self._buckets for launch in bucket.launches]
        device.ready({key(launch) for launch in captured + beside})

    def _capture(self, sizes: Sizes) -> Bucket:
        layout, memory = Layout(sizes), self.memory
        step = layout.step_tensors(memory.inputs, memory.token_ids[: sizes.tokens], memory.identity)
        lowering: Lowering = memory.lowering(step)
        fields = layout.tensors(memory.inputs)
        launches = kernels.resolve(
            fields["fed"], fields["token_slots"], memory.last_tokens, memory.token_ids[: sizes.tokens]
        )
        launches += lowering.launches(sizes)
        normed = None if self._final_norm is None else self._final_norm.outputs[-1]
        selected = normed is not None and normed.shape[0] == self.plan.inputs["sample_rows"].shape[0]
        hidden = lowering.view(normed) if normed is not None and selected else None
        logits = lowering.view(self.plan.outputs["logits"])
        graph = self._compute.capture(launches) if self._graphs else None
        return Bucket(layout, launches, graph, logits, hidden)

    def _place(self) -> Place:
        size = max(bucket.layout.nbytes for bucket in self._buckets) + (1 << 12)
        results, best = (self.device.host(t.nbytes) for t in (self.memory.results, self.memory.best))
        return Place(self.device.host(size), self.device.memory(size), results, best)

    @property
    def num_blocks(self) -> list[int]:
        """Blocks of each cache group."""
        return list(self.memory.limits.num_blocks)

    @property
    def weights_bytes(self) -> int:
        """Of the weights on the device."""
        return sum(weight.nbytes() for weight in self.memory.weights.values())

    @property
    def workspace_bytes(self) -> int:
        """Of what operators use one after another."""
        return self.memory.workspace.partials.nbytes + self.memory.workspace.counters.nbytes

    def bucket_of(self, sizes: Sizes) -> Bucket:
        """The smallest bucket that a step of these sizes fits."""
        for bucket in self._buckets:
            of = bucket.layout.sizes
            if sizes.tokens <= of.tokens and sizes.requests <= of.requests and sizes.rows <= of.rows:
                if sizes.prefills == of.prefills:
                    return bucket
        raise RidgelineError(f"malformed batch: {sizes} is larger than the largest step")

    @property
    def last_logits(self) -> Float32:
        """[S, vocab] of the last step, copied from the device."""
        if self._last is None or not len(self._last.batch.sample_rows):
            return np.empty((0, bound(self.plan.outputs["logits"].shape[1])), np.float32)
        rows, logits = len(self._last.batch.sample_rows), self._last.bucket.logits
        result: Float32 = self._fetch(whole_rows(logits)).view(np.float32)[:rows, : logits.shape[1]]
        return result.copy() if self._last.back is None else result[np.argsort(self._last.back)]

    def _fetch(self, tensor: torch.Tensor) -> Any:
        """A contiguous tensor's bytes, along its last dimension, once all that is queued is done."""
        host = self.device.host(tensor.nbytes)
        self._compute.copy_out(host, tensor)
        self._compute.record().synchronize()
        return host.read().reshape(*tensor.shape[:-1], -1)

    def launch(self, batch: Batch) -> Ticket:
        """Queues a step. Raises RidgelineError when two are open or the batch is larger than the largest step."""
        if len(self._open) == MOST_OPEN:
            raise RidgelineError(f"{MOST_OPEN} steps are open: finish one first")
        widths = batch.query_starts[1:] - batch.query_starts[:-1]
        bucket = self.bucket_of(sizes_of(batch, widths))
        batch, back = few_first(batch, widths) if bucket.layout.sizes.prefills else (batch, None)
        ask = self._asked = asked(batch.sampling, self._asked)
        if ask.pooled and bucket.hidden is None:
            raise RidgelineError("this plan has no final norm whose rows could be pooled")
        self._know_tokens(batch)
        taken = [step.place for step in self._open.values()]
        place = next(place for place in self._places if not any(place is other for other in taken))
        step = Step(batch, ask, bucket, place, self._send(batch, ask, bucket.layout, place), back)
        if step.extras:
            self._compute.launch(self._updates(step.extras))
        self._run_operators(bucket)
        self._sample(step)
        self._count += 1
        self._open[self._count] = self._last = step
        return Ticket(self._count)

    def _run_operators(self, bucket: Bucket) -> None:
        if bucket.graph is None:
            self._compute.launch(bucket.launches)
        else:
            self._compute.replay(bucket.graph)

    def trace(self, ranges: Ranges) -> Callable[[], None]:
        """Puts the parts of ``launch`` in ranges until what is returned is called; those of operators, and of what
        graphs are captured from, are the device's (``Device.ranges``)."""
        names = {"inputs": "_send", "operators": "_run_operators", "sample": "_sample", "wait": "_wait"}
        return trace(within(ranges), [(name, self, method) for name, method in names.items()])

    def time_operators(self, repetitions: int = 20) -> tuple[dict[str, tuple[int, float]], float]:
        """By label, the launches and seconds of each operator of the step launched last, and seconds of them all.

        All layers' calls of an operator are captured as a graph of their own: weights and keys are as cold as in the
        step, and no launch of the host is in between. What they compute is thrown away, but the cache they write to.

        Raises ConfigError on a device without time, RidgelineError before the first step.
        """
        if self._last is None:
            raise RidgelineError("no step has run whose operators could be timed")
        groups: dict[str, list[Launch]] = {}
        for launch in self._last.bucket.launches:
            groups.setdefault(launch.label[-1] if launch.label else "feed tokens", []).append(launch)
        found = {}
        for label, launches in groups.items():
            copies = max(1, LEAST_TIMED // len(launches))
            seconds = self._compute.time(self._compute.capture(launches * copies), repetitions)
            found[label] = (len(launches), seconds / copies)
        return found, self._compute.time(self._compute.capture(self._last.bucket.launches), repetitions)

    def _know_tokens(self, batch: Batch) -> None:
        """Keeps the logs of slots that ask for penalties and the like; for these every token must be known."""
        for start in batch.slot_starts:
            self._logs.pop(start.slot, None)
            if not start.asks_nothing:
                self._logs[start.slot] = SlotLog(start)
        for b, slot in enumerate(batch.slots.tolist() if self._logs else ()):
            if slot in self._logs:
                first, end = batch.query_starts[b], batch.query_starts[b + 1]
                tokens = batch.token_ids[first:end]
                if (tokens < 0).any():
                    sampled = self._fetch(self.memory.last_tokens).view(np.int32)[slot]
                    tokens = np.where(tokens < 0, sampled, tokens)
                self._logs[slot].feed(int(batch.positions[first]), tokens)

    def _send(self, batch: Batch, ask: Asked, layout: Layout, place: Place) -> dict[str, torch.Tensor]:
        """Sends a step's block, and what varies in length, to the device; returns the latter's tensors there."""
        adjusted = adjustments(batch, self._logs)
        parts = varying(batch, adjusted)
        total = layout.nbytes + sum(_round_up(part.nbytes) for part in parts.values())
        if total > len(place.staged):
            self.device.free(place.staged)
            place.inputs, place.staged = self.device.host(2 * total), self.device.memory(2 * total)
            place.made.clear()
            place.held = Held()
        block = place.inputs.write()
        arrays = place.once(("arrays", id(layout)), lambda: layout.arrays(block))
        encode(batch, layout, arrays, None if adjusted is None else adjusted.rows, ask, place.held)
        found, at = {}, layout.nbytes
        for name, part in parts.items():
            block[at : at + part.nbytes] = part.view(np.uint8).reshape(-1)
            dtype = torch.float32 if part.dtype == np.float32 else torch.int32
            found[name] = place.staged[at : at + part.nbytes].view(dtype).view(part.shape)
            at += _round_up(part.nbytes)
        size = layout.nbytes
        to, fixed = place.once(("block", id(layout)), lambda: (self.memory.inputs[:size], place.staged[:size]))
        self._copies.copy_in(fixed if at == size else place.staged[:at], place.inputs)
        self._compute.wait(self._copies.record())
        self._compute.copy(to, fixed)
        return found

    def _updates(self, extras: dict[str, torch.Tensor]) -> list[Launch]:
        """What changes before the operators run."""
        found: list[Launch] = []
        for group, cache in enumerate(self.memory.caches):
            found += update_cache(cache, extras.get(f"updates{group}"), extras.get(f"copies{group}"))
        return found

    def _sample(self, step: Step) -> None:
        """Samples every row that waits for no mask, and sends the results home."""
        logits = step.bucket.logits
        if step.asked.masked:
            name = f"logits{self._places.index(step.place)}"
            whole = whole_rows(logits)
            kept = self.memory.grown(name, whole.nbytes, self._compute)[: whole.nbytes].view(whole.dtype)
            self._compute.copy(kept.view(whole.shape), whole)
            step.logits = kept.view(whole.shape)[:, : logits.shape[1]]
        self._queue_sampling(step, "settles", logits, None)
        if step.asked.listed:
            ids, logprobs = self.memory.best[:, : len(logits)]
            tokens, wanted = self.memory.results[0, : len(logits)], step.fields["wanted"]
            best = top_logprobs(logits, tokens, wanted, ids, logprobs.view(torch.float32), arch=self.device.arch)
            self._compute.launch(best)
            self._compute.copy_out(step.place.best, self.memory.best)
        if step.asked.pooled:
            assert step.bucket.hidden is not None
            rows = whole_rows(step.bucket.hidden)
            step.hidden = self.device.host(rows.nbytes)
            self._compute.copy_out(step.hidden, rows)
        self._send_home(step)

    def _send_home(self, step: Step) -> None:
        self._compute.copy_out(step.place.results, self.memory.results)
        step.place.done = self._compute.record()

    def _queue_sampling(self, step: Step, settles: str, logits: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Samples every row of ``logits``; settles the requests that the field ``settles`` names."""
        memory, filters = self.memory, step.asked.filtered

        def launches(adjusted: Any) -> list[Launch]:
            results = memory.results[:, : step.bucket.layout.sizes.rows]
            return sample_and_settle(
                step.fields, settles, logits, results, memory.last_tokens, adjusted, mask, filters, self.device.arch
            )

        if "penalties" in step.extras:
            penalties = step.extras["penalties"]
            counts, bias = memory.adjusted(len(penalties), self._compute)
            self._compute.launch(kernels.adjust(step.extras["cells"], counts, bias))
            self._compute.launch(launches((counts, bias, penalties)))
        elif mask is not None:
            self._compute.launch(launches(None))
        else:  # by far the most steps: the same launches each time
            key = ("sample", id(step.bucket), filters)
            self._compute.launch(step.place.once(key, lambda: launches(None)))

    def _wait(self, step: Step) -> npt.NDArray[np.int32]:
        """A step's results: int32 [3, rows]."""
        assert step.place.done is not None
        step.place.done.synchronize()
        words = step.place.results.read().view(np.int32).reshape(3, -1)
        return words[:, : len(step.batch.sample_rows)].copy()

    def finish(self, ticket: Ticket, masks: TokenMasks | None = None) -> StepOutput:
        """Waits for a step; samples its flagged rows under ``masks``.

        Raises RidgelineError for a ticket that is not open, or masks that do not match the flagged rows.
        """
        step = self._open.get(ticket.number)
        if step is None:
            raise RidgelineError(f"ticket {ticket.number} is not open: finish each ticket exactly once")
        flagged = np.flatnonzero(step.batch.sampling["masked"]) if step.asked.masked else ()
        given = 0 if masks is None else len(masks.bits)
        if given != len(flagged):
            raise RidgelineError(f"{len(flagged)} rows wait for a token mask, got {given}")
        if masks is not None and not masks.bits.any(axis=1).all():
            raise RidgelineError("the token mask allows no token")
        del self._open[ticket.number]
        results = self._wait(step)
        if masks is not None and given:
            results = self._sample_masked(step, masks, flagged, results)
        return self._output(step, results)

    def _sample_masked(
        self, step: Step, masks: TokenMasks, flagged: Any, first: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int32]:
        """The step's results with its flagged rows sampled, on the logits it left."""
        rows, width = step.bucket.layout.sizes.rows, masks.bits.shape[1]
        host = self.device.host(4 * rows * width)
        allowed = host.write().view(np.uint32).reshape(rows, width)
        allowed[:] = 0xFFFFFFFF
        # Masks come in the order of the batch as it was handed in.
        given = np.arange(len(flagged)) if step.back is None else np.argsort(np.argsort(step.back[flagged]))
        allowed[flagged] = masks.bits[given]
        there = self.memory.grown("masks", 4 * rows * width, self._compute)[: 4 * rows * width]
        self._compute.copy_in(there, host)
        assert step.logits is not None
        self._queue_sampling(step, "settles_masked", step.logits, there.view(torch.int32).view(rows, width))
        self._send_home(step)
        second = self._wait(step)
        second[1] = np.where(held_rows(step.batch), second[1], first[1])
        return second

    def _output(self, step: Step, results: npt.NDArray[np.int32]) -> StepOutput:
        sampling = step.batch.sampling
        tokens, accepted = results[0], results[1]
        pooled = sampling["target"] == POOL if step.asked.pooled else None
        if pooled is not None:
            tokens[pooled] = -1
        if step.asked.scored:
            logprobs = np.where(sampling["num_logprobs"] < 0, np.float32("nan"), results[2].view(np.float32))
            logprobs[tokens < 0] = np.nan
        else:
            logprobs = np.full(len(tokens), np.nan, np.float32)
        hidden = np.zeros((0, 0), np.float32) if pooled is None else self._hidden(step, pooled)
        ids, best = self._best(step, tokens)
        if step.back is None:
            return StepOutput(tokens, accepted, logprobs, ids, best, hidden)
        old = np.argsort(step.back)
        hidden = hidden[np.argsort(step.back[pooled])] if pooled is not None else hidden
        return StepOutput(tokens[old], accepted[old], logprobs[old], ids[old], best[old], hidden)

    def _best(self, step: Step, tokens: Any) -> tuple[Any, Any]:
        """The most likely tokens of each row and their log probabilities, as wide as the row that asked for most."""
        if not step.asked.listed:
            return np.empty((len(tokens), 0), np.int32), np.empty((len(tokens), 0), np.float32)
        wanted = np.minimum(step.batch.sampling["num_logprobs"], step.bucket.logits.shape[1])
        wanted = np.where((step.batch.sampling["target"] == POOL) | (tokens < 0), 0, np.maximum(wanted, 0))
        width = int(wanted.max(initial=0))
        ids, logprobs = np.full((len(wanted), width), -1, np.int32), np.full((len(wanted), width), np.nan, np.float32)
        if width:
            words = step.place.best.read().view(np.int32).reshape(self.memory.best.shape)[:, : len(wanted), :width]
            listed = np.arange(width) < wanted[:, None]
            ids[listed], logprobs[listed] = words[0][listed], words[1].view(np.float32)[listed]
        return ids, logprobs

    def _hidden(self, step: Step, pooled: Any) -> Float32:
        if step.hidden is None or step.bucket.hidden is None:
            return np.zeros((0, 0), np.float32)
        tensor = step.bucket.hidden
        rows = torch.from_numpy(step.hidden.read()).view(tensor.dtype).view(len(tensor), -1)[:, : tensor.shape[1]]
        result: Float32 = rows.float().numpy()[: len(pooled)][pooled]
        return result


def whole_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's rows with what pads them: contiguous."""
    return tensor.as_strided((len(tensor), tensor.stride(0)), (tensor.stride(0), 1))


def _round_up(nbytes: int) -> int:
    return -(-nbytes // 16) * 16
