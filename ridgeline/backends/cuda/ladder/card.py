# FIX
"""Rung 2, second half: a kernel's card, what its machine code says about how it will run.

The predictions are a model, not a measurement: a launch takes at least as long as its bytes at the memory's rate and
its operations at the tensor cores' rate, slowed down by what else its hottest loop issues and by a last wave of
programs that does not fill the device.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from ridgeline.backends.cuda.ladder.compile import Binary
from ridgeline.backends.cuda.ladder.sass import Code, base, parse
from ridgeline.backends.cuda.launch import CardShape
from ridgeline.core.hardware import DATASHEET


@dataclass(frozen=True)
class Device:
    """What occupancy and waves follow from (CUDA C++ Programming Guide, compute capabilities 8.0 and 9.0).

    Attributes:
        peaks: its entry in ``core/hardware.py``.
        processors: streaming multiprocessors.
        registers, shared_bytes, warps, programs: of a multiprocessor; 64 warps, 32 programs on both.
        clock: boost, in Hz.
    """

    peaks: str
    processors: int
    shared_bytes: int
    clock: float
    registers: int = 65536
    warps: int = 64
    programs: int = 32


DEVICES = {
    "sm_80": Device("a100-sxm4-80gb", 108, 164 << 10, 1.41e9),
    "sm_90": Device("h100-sxm5-80gb", 132, 228 << 10, 1.98e9),
}
_PROGRAM_SHARED = 1 << 10  # what the driver keeps of shared memory for each program
_COPY_RATE = 0.9  # of the memory's datasheet rate that a copy reaches


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
        loop: the same in the hottest loop; empty without a loop.
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
    loop: Counter[str]

    @property
    def per_tensor(self) -> float:
        """Other instructions for each tensor-core instruction of the hottest loop; 0 if there is none."""
        tensor = self.loop["tensor"]
        return (sum(self.loop.values()) - tensor) / tensor if tensor else 0.0


def card_of(binary: Binary) -> Card:
    """Reads a compiled kernel."""
    code = parse(binary.sass)
    span = code.hot_loop()
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
        code.classes(*span) if span else Counter(),
    )


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
        bound: "memory", "tensor" or "float".
        waves: programs over those that run at once.
    """

    shape: str
    microseconds: float
    roofline_share: float
    bound: str
    waves: float


def predict(shape: CardShape, cards: list[Card], kind: str = "bf16") -> Prediction:
    """The time of a shape's launches, each with its card, by the model of this module.

    ``kind``: whose peak the operations count against, an attribute of ``Peaks``.
    """
    device = DEVICES[cards[0].arch]
    peaks = DATASHEET[device.peaks]
    tensor = any(card.tensor for card in cards)
    peak = (getattr(peaks, kind) or peaks.bf16) if tensor else peaks.f32
    card, programs = cards[0], _programs(shape)
    waves = programs / (device.processors * max(1, card.occupancy // card.num_warps))
    busy = min(1.0, programs / device.processors)  # multiprocessors with anything to do
    tail = math.ceil(waves) / waves if waves > 1 else 1.0  # the last wave takes as long as a full one
    compute = "tensor" if tensor else "float"
    times = {
        # Half of the multiprocessors draw all that the memory gives.
        "memory": shape.bytes_moved / (peaks.bandwidth * _COPY_RATE) / min(1.0, 2 * busy),
        compute: shape.operations / peak * _issue(cards) / busy * tail,
    }
    bound = max(times, key=lambda name: times[name])
    roofline = max(shape.bytes_moved / peaks.bandwidth, shape.operations / peak)
    return Prediction(shape.name, times[bound] * 1e6, roofline / times[bound], bound, waves)


def _programs(shape: CardShape) -> int:
    return max(math.prod(launch.grid) for launch in shape.launches)


def _issue(cards: list[Card]) -> float:
    """Slow-down by other instructions beside the tensor cores: a scheduler issues one instruction a cycle.

    On Ampere an HMMA.16816 keeps a scheduler's tensor core busy for 8 cycles (1,024 multiply-adds a cycle and
    multiprocessor, four schedulers); a warp's quarter of a Hopper wgmma of 64 x 128 x 16 for 32.
    """
    card = max(cards, key=lambda c: c.loop["tensor"])
    return max(1.0, card.per_tensor / (8.0 if card.arch == "sm_80" else 32.0))
