"""Rung 2, second half: a kernel's card, what its machine code says about how it will run.

The predictions are a model, not a measurement. A launch takes the longest of what each part of the device needs for
it, of which the table's ``bound`` names the one:

- memory: bytes that must move at least once, at 90% of the datasheet's rate, by as many multiprocessors as there are
  programs;
- L2: bytes that all programs ask for, re-reads included;
- tensor (or float, without tensor cores): the operations, those that fill up tiles too, at the datasheet's peak, the
  last wave of programs taking as long as a full one;
- issue, shared: the same, slowed down by the hottest loop's other instructions, one a cycle and scheduler, or by its
  shared memory accesses, 128 bytes a cycle and multiprocessor, where these take longer than its tensor instructions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ridgeline.backends.cuda.ladder.compile import Binary
from ridgeline.backends.cuda.ladder.sass import Code, base, parse, shared_bytes, tensor_size
from ridgeline.backends.cuda.launch import CardShape
from ridgeline.core.hardware import DATASHEET


@dataclass(frozen=True)
class Device:
    """What occupancy, waves and bounds follow from.

    CUDA C++ Programming Guide, compute capabilities 8.0 and 9.0; NVIDIA A100 and H100 architecture white papers. The
    A100's L2 cache gives 5,120 bytes a clock; NVIDIA does not say what the H100's does, so the same is assumed.

    Attributes:
        peaks: its entry in ``core/hardware.py``.
        processors: streaming multiprocessors.
        registers, shared_bytes, warps, programs: of a multiprocessor; 64 warps, 32 programs on both.
        clock: at which the tensor cores reach the datasheet's peak, in Hz.
        multiply_adds: of a multiprocessor's tensor cores in a cycle, 16-bit floats; twice as many of 8-bit numbers.
        l2_bytes: a clock.
    """

    peaks: str
    processors: int
    shared_bytes: int
    clock: float
    multiply_adds: int
    l2_bytes: int = 5120
    registers: int = 65536
    warps: int = 64
    programs: int = 32


DEVICES = {
    "sm_80": Device("a100-sxm4-80gb", 108, 164 << 10, 1.41e9, 1024),
    "sm_90": Device("h100-sxm5-80gb", 132, 228 << 10, 1.83e9, 2048),
}
_PROGRAM_SHARED = 1 << 10  # what the driver keeps of shared memory for each program
_COPY_RATE = 0.9  # of the memory's datasheet rate that a copy reaches
_SCHEDULERS = 4  # of a multiprocessor; each issues one instruction a cycle


@dataclass(frozen=True)
class Loop:
    """What a warp does in one pass of a kernel's hottest loop.

    Attributes:
        classes: instructions by class; empty without a loop.
        multiply_adds: of its tensor-core instructions, a warp group's shared out to its warps.
        tensor_cycles: that these keep its scheduler's tensor core busy.
        shared_cycles: that its share of the shared memory's rate takes for its accesses.
    """

    classes: Counter[str]
    multiply_adds: float = 0.0
    tensor_cycles: float = 0.0
    shared_cycles: float = 0.0

    @property
    def others(self) -> int:
        """Instructions that are not the tensor cores'."""
        return sum(self.classes.values()) - self.classes["tensor"]


@dataclass(frozen=True)
class Card:
    """One kernel in one configuration on one architecture.

    Attributes:
        registers, local_bytes, shared_bytes: of a thread, a thread, a program; local bytes are spills.
        occupancy: warps that fit a multiprocessor at once, of 64.
        tensor: tensor-core instructions by opcode.
        copies: asynchronous copies by mnemonic.
        widths: bytes of a thread's global loads and stores: "16": 12 of them, ...
        classes: instructions by class in the whole kernel.
        loop: the hottest one.
    """

    kernel: str
    arch: str
    registers: int
    local_bytes: int
    shared_bytes: int
    num_warps: int
    occupancy: int
    tensor: Counter[str]
    copies: Counter[str]
    widths: Counter[int]
    classes: Counter[str]
    loop: Loop

    @property
    def per_tensor(self) -> float:
        """Other instructions for each tensor-core instruction of the hottest loop; 0 if there is none."""
        tensor = self.loop.classes["tensor"]
        return self.loop.others / tensor if tensor else 0.0


def card_of(binary: Binary) -> Card:
    """Reads a compiled kernel."""
    code = parse(binary.sass)
    copies = Counter(base(op) for op in code.opcodes if base(op) in ("LDGSTS", "UTMALDG", "UTMASTG"))
    return Card(
        binary.name,
        binary.arch,
        binary.registers,
        binary.local_bytes,
        binary.shared_bytes,
        binary.num_warps,
        occupancy(binary),
        Counter(op for op in code.opcodes if code_is_tensor(op)),
        copies,
        access_widths(code),
        code.classes(),
        loop_of(code, DEVICES[binary.arch]),
    )


def loop_of(code: Code, device: Device) -> Loop:
    """The hottest loop of some code."""
    span = code.hot_loop()
    if span is None:
        return Loop(Counter())
    opcodes = code.opcodes[span[0] : span[1] + 1]
    done = cycles = 0.0
    for opcode in filter(code_is_tensor, opcodes):
        size, warps = tensor_size(opcode)
        rate = device.multiply_adds * (1 if base(opcode) in ("HMMA", "HGMMA") else 2)
        done += size / warps
        cycles += size / warps / (rate / _SCHEDULERS)
    shared = sum(map(shared_bytes, opcodes)) / (128 / _SCHEDULERS)
    return Loop(code.classes(*span), done, cycles, shared)


def code_is_tensor(opcode: str) -> bool:
    """Whether an instruction runs on the tensor cores."""
    return base(opcode).endswith("MMA")


def access_widths(code: Code) -> Counter[int]:
    """Bytes of each global load and store instruction: how wide a thread's accesses are."""
    widths: Counter[int] = Counter()
    for op in code.opcodes:
        if base(op) not in ("LDG", "STG", "LDGSTS"):
            continue
        fields = op.split(".")
        bits = next((int(f) for f in fields if f in ("64", "128")), 32)
        narrow = next((8 if f in ("U8", "S8") else 16 for f in fields if f in ("U8", "S8", "U16", "S16")), bits)
        widths[narrow // 8] += 1
    return widths


def occupancy(binary: Binary) -> int:
    """Warps of a multiprocessor that run at once, of 64."""
    device = DEVICES[binary.arch]
    registers = -(-binary.registers // 8) * 8 * 32 * binary.num_warps  # allocated by 256 for a warp
    by_registers = device.registers // max(registers, 1)
    by_shared = device.shared_bytes // (binary.shared_bytes + _PROGRAM_SHARED)
    programs = min(by_registers, by_shared, device.programs, device.warps // binary.num_warps)
    return programs * binary.num_warps


@dataclass(frozen=True)
class Prediction:
    """One shape on one device.

    Attributes:
        microseconds: what the model says.
        roofline_share: the roofline's time over that.
        bound: see the module.
        waves: programs over those that run at once.
        traffic: bytes that programs ask for over those that must move.
        per_output: instructions of a thread for each element of the output: of the hottest loop where it multiplies
            on the tensor cores, else of the whole code, each taken as run once.
    """

    shape: str
    microseconds: float
    roofline_share: float
    bound: str
    waves: float
    traffic: float
    per_output: float


def predict(shape: CardShape, cards: Sequence[Card], kind: str = "bf16") -> Prediction:
    """The time of a shape's launches, each with its card, by the model of this module.

    ``kind``: whose peak the operations count against, an attribute of ``Peaks``.
    """
    device = DEVICES[cards[0].arch]
    peaks = DATASHEET[device.peaks]
    tensor = any(card.tensor for card in cards)
    peak = (getattr(peaks, kind) or peaks.bf16) if tensor else peaks.f32
    hot, programs = max(cards, key=lambda c: c.loop.multiply_adds), _programs(shape)
    waves = programs / (device.processors * max(1, cards[0].occupancy // cards[0].num_warps))
    busy = min(1.0, programs / device.processors)  # multiprocessors with anything to do
    tail = math.ceil(waves) / waves if waves > 1 else 1.0  # the last wave takes as long as a full one
    compute = (shape.padded or shape.operations) / peak / busy * tail
    traffic = shape.bytes_moved if shape.traffic is None else shape.traffic
    times = {
        # Half of the multiprocessors draw all that the memory gives.
        "memory": shape.bytes_moved / (peaks.bandwidth * _COPY_RATE) / min(1.0, 2 * busy),
        "L2": traffic / (device.l2_bytes * device.clock) / min(1.0, 2 * busy),
        "tensor" if tensor else "float": compute,
    }
    if hot.loop.tensor_cycles:
        times["issue"] = compute * sum(hot.loop.classes.values()) / hot.loop.tensor_cycles
        times["shared"] = compute * hot.loop.shared_cycles / hot.loop.tensor_cycles
    bound = max(times, key=lambda name: times[name])
    roofline = max(shape.bytes_moved / peaks.bandwidth, shape.operations / peak)
    share = roofline / times[bound]
    return Prediction(
        shape.name, times[bound] * 1e6, share, bound, waves, traffic / shape.bytes_moved, _per_output(shape, hot)
    )


def _programs(shape: CardShape) -> int:
    return max(math.prod(launch.grid) for launch in shape.launches)


def _per_output(shape: CardShape, card: Card) -> float:
    last = shape.launches[-1]
    outputs = sum(last.args[name].numel() for name in last.writes if name != "workspace") or 1
    if card.loop.multiply_adds:
        passes = (shape.padded or shape.operations) / 2 / card.loop.multiply_adds  # of all warps together
        return 32 * passes * sum(card.loop.classes.values()) / outputs
    return 32 * card.num_warps * math.prod(last.grid) * sum(card.classes.values()) / outputs
