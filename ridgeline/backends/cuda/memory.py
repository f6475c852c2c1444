"""What an executor keeps on its device: weights, cache, arena, and what steps leave for each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ridgeline.backends.cuda import weights as packed
from ridgeline.backends.cuda.device import Device, Stream
from ridgeline.backends.cuda.kernels.top_logprobs import MOST
from ridgeline.backends.cuda.launch import TORCH
from ridgeline.backends.cuda.lowering import Cache, Lowering, Sizes, StepTensors, Workspace, workspace_sizes
from ridgeline.backends.cuda.step import Layout
from ridgeline.core.errors import UnsupportedError
from ridgeline.graph.ir import CacheSpec, bound
from ridgeline.graph.plan import Plan


@dataclass(frozen=True)
class Limits:
    """What a plan will be run with.

    Attributes:
        num_slots: requests that may run at once.
        num_blocks: blocks of each cache group.
        max_blocks_per_slot: most blocks of one request.
        tokens, rows: most of a step.
    """

    num_slots: int
    num_blocks: tuple[int, ...]
    max_blocks_per_slot: int
    tokens: int
    rows: int

    @classmethod
    def of(cls, plan: Plan, num_slots: int, num_blocks: list[int], max_blocks_per_slot: int) -> Limits:
        """With the plan's own bounds on a step."""
        tokens, rows = bound(plan.inputs["token_ids"].shape[0]), bound(plan.outputs["logits"].shape[0])
        return cls(num_slots, tuple(num_blocks), max_blocks_per_slot, tokens, rows)

    @property
    def largest(self) -> Sizes:
        """The largest step."""
        return Sizes(self.tokens, min(self.num_slots, self.tokens), self.rows, True)


@dataclass
class DeviceMemory:
    """Tensors on a device, by what they are for.

    Attributes:
        inputs: the block that graphs read (``step.Layout``), uint8.
        token_ids: int32 [T], -1 resolved; identity: 0, 1, 2, ....
        last_tokens: int32 [slots]: what each sampled last.
        results: int32 [3, rows]: tokens, which stand, log probabilities.
        best: int32 [2, rows, MOST]: the most likely tokens, and the bits of their log probabilities.
    """

    plan: Plan
    device: Device
    limits: Limits
    weights: dict[str, packed.Matrix | packed.Vector]
    caches: list[Cache]
    arena: torch.Tensor
    workspace: Workspace
    angles: tuple[torch.Tensor, torch.Tensor]
    inputs: torch.Tensor
    token_ids: torch.Tensor
    identity: torch.Tensor
    last_tokens: torch.Tensor
    results: torch.Tensor
    best: torch.Tensor
    batch_invariant: bool = True
    _grown: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def allocate(
        cls,
        plan: Plan,
        weights: Mapping[str, packed.StoredWeight],
        device: Device,
        stream: Stream,
        limits: Limits,
        batch_invariant: bool,
    ) -> DeviceMemory:
        """Allocates everything, uploads the weights on ``stream`` and waits for them."""
        upload = Upload(device, stream)
        matrices = packed.load(plan, weights, upload.place)
        context = limits.max_blocks_per_slot * plan.caches[0].block_size
        partials, counters = workspace_sizes(plan, matrices, limits.largest, context, device.arch)

        def ints(count: int, zeros: bool = False) -> torch.Tensor:
            return device.memory(4 * max(4, count), zeros).view(torch.int32)[:count]

        memory = cls(
            plan,
            device,
            limits,
            matrices,
            [allocate_cache(s, n, limits, device) for s, n in zip(plan.caches, limits.num_blocks, strict=True)],
            device.memory(max(256, plan.arena_bytes)),
            Workspace(device.memory(4 * max(4, partials)).view(torch.float32), ints(max(4, counters), zeros=True)),
            rotary_angles(plan, context, upload),
            device.memory(Layout(limits.largest).nbytes, zeros=True),
            ints(limits.tokens),
            upload.place(torch.arange(limits.tokens, dtype=torch.int32)),
            ints(limits.num_slots, zeros=True),
            ints(3 * padded_rows(limits.rows), zeros=True).view(3, -1),
            ints(2 * limits.rows * MOST).view(2, limits.rows, MOST),
            batch_invariant,
        )
        stream.record().synchronize()
        return memory

    def lowering(self, step: StepTensors) -> Lowering:
        """The plan over this memory."""
        context = self.limits.max_blocks_per_slot * self.plan.caches[0].block_size
        return Lowering(
            self.plan,
            self.device.arch,
            self.arena,
            self.weights,
            self.caches,
            step,
            self.angles,
            self.workspace,
            context,
            self.batch_invariant,
        )

    def grown(self, name: str, nbytes: int, stream: Stream) -> torch.Tensor:
        """At least so many bytes under a name, larger than the last time if need be, once nothing uses the old."""
        have = self._grown.get(name)
        if have is None or len(have) < nbytes:
            if have is not None:
                stream.record().synchronize()
                self.device.free(have)
            have = self._grown[name] = self.device.memory(max(256, 2 * nbytes))
        return have

    def adjusted(self, places: int, stream: Stream) -> tuple[torch.Tensor, torch.Tensor]:
        """Token counts, int32, and bias, fp32: [places, vocabulary] each."""
        vocab = bound(self.plan.outputs["logits"].shape[1])
        counts, bias = (self.grown(name, 4 * places * vocab, stream) for name in ("counts", "bias"))
        size = 4 * places * vocab
        return (
            counts[:size].view(torch.int32).view(places, vocab),
            bias[:size].view(torch.float32).view(places, vocab),
        )


def padded_rows(rows: int) -> int:
    """Columns of a result, so that each of its rows begins at a multiple of 16 bytes."""
    return -(-rows // 4) * 4


@dataclass
class Upload:
    """Takes tensors of the host to the device through page-locked memory, two pieces on their way at once."""

    device: Device
    stream: Stream
    piece: int = 16 << 20

    def __post_init__(self) -> None:
        self._buffers = [self.device.host(self.piece) for _ in range(2)]
        self._events: list[Any] = [None, None]
        self._next = 0

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device; its copy is queued, not done."""
        source = tensor.contiguous().view(-1).view(torch.uint8).numpy()
        there = self.device.memory(max(16, -(-source.nbytes // 16) * 16))
        for start in range(0, source.nbytes, self.piece):
            size = min(self.piece, source.nbytes - start)
            index, self._next = self._next, 1 - self._next
            if self._events[index] is not None:
                self._events[index].synchronize()
            self._buffers[index].write()[:size] = source[start : start + size]
            self.stream.copy_in(there[start : start + size], self._buffers[index])
            self._events[index] = self.stream.record()
        return there[: source.nbytes].view(tensor.dtype).view(tensor.shape)


def allocate_cache(spec: CacheSpec, blocks: int, limits: Limits, device: Device) -> Cache:
    """Empty blocks of a group of layers, and its block tables."""
    if spec.dtype not in ("bf16", "f16", "int8", "fp8"):
        raise UnsupportedError(f"the CUDA executor keeps no {spec.dtype} cache: use bf16, f16, int8 or fp8")
    shape = (len(spec.layers), blocks, spec.num_kv_heads, spec.block_size, spec.head_dim)
    dtype, count = TORCH[spec.dtype], int(np.prod(shape))

    def scales() -> torch.Tensor | None:
        if spec.dtype != "int8":
            return None
        return device.memory(4 * count // spec.head_dim).view(torch.float32).view(shape[:-1])

    k, v = (device.memory(count * dtype.itemsize).view(dtype).view(shape) for _ in range(2))
    cells = limits.num_slots * limits.max_blocks_per_slot
    tables = device.memory(4 * cells, zeros=True).view(torch.int32).view(limits.num_slots, -1)
    return Cache(k, v, tables, scales(), scales())


def rotary_angles(plan: Plan, positions: int, upload: Upload) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position's angles, fp32 [positions, head_dim / 2], computed in float64.

    Raises UnsupportedError for a plan whose layers rotate differently.
    """
    ropes = [op.attrs for segment in plan.segments for op in segment.ops if op.op == "rope_kv_write"]
    kinds = {(a["head_dim"], a["theta"], a["freq_factors"]) for a in ropes}
    if len(kinds) != 1:
        raise UnsupportedError(f"the CUDA executor runs models with one rotary embedding, not {len(kinds)}")
    head_dim, theta, factors = kinds.pop()
    inverse = theta ** (-np.arange(head_dim // 2, dtype=np.float64) / (head_dim // 2))
    if factors is not None:
        inverse = inverse / np.asarray(factors, np.float64)
    angles = np.arange(positions)[:, None] * inverse
    cos, sin = (torch.from_numpy(f(angles).astype(np.float32)) for f in (np.cos, np.sin))
    return upload.place(cos), upload.place(sin)
