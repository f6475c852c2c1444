"""NVIDIA machine code as text: instructions, their classes, and the loop where a kernel spends its time."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)(.*);")
"""Address, a predicate, the instruction: as ``cuobjdump -sass`` prints it."""
_TARGET = re.compile(r"\b0x([0-9a-f]+)\b")

TENSOR = ("HMMA", "HGMMA", "IMMA", "IGMMA", "QGMMA", "DMMA", "BGMMA")
"""Mnemonics of the tensor cores."""

CLASSES: dict[str, tuple[str, ...]] = {
    "tensor": TENSOR,
    "async copy": ("LDGSTS", "UTMALDG", "UTMASTG", "UBLKCP"),
    "global": ("LDG", "STG", "LD", "ST", "RED", "REDG", "ATOM", "ATOMG"),
    "shared": ("LDS", "STS", "LDSM", "STSM", "ATOMS"),
    "local": ("LDL", "STL"),
    "special": ("MUFU",),
    "float": ("FADD", "FMUL", "FFMA", "FSETP", "FSEL", "FMNMX", "HADD2", "HMUL2", "HFMA2", "HMNMX2", "F2F", "F2FP"),
    "convert": ("I2F", "I2FP", "F2I", "F2IP", "I2I"),
    "sync": ("BAR", "SYNCS", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "MEMBAR", "ERRBAR", "WARPGROUP", "FENCE"),
    "branch": ("BRA", "EXIT", "CALL", "RET", "BSSY", "BSYNC", "NOP", "BREAK"),
}
"""Everything else is integer, logic and address arithmetic."""


@dataclass(frozen=True)
class Code:
    """A kernel's instructions.

    Attributes:
        opcodes: with modifiers ("HMMA.16816.F32.BF16"), in order.
        loops: (first, last) instruction of every backward branch, innermost first.
    """

    opcodes: tuple[str, ...]
    loops: tuple[tuple[int, int], ...]

    def count(self, prefix: str) -> int:
        """Instructions of a mnemonic."""
        return sum(base(op) == prefix for op in self.opcodes)

    def classes(self, first: int = 0, last: int | None = None) -> Counter[str]:
        """Instructions by class between two places."""
        end = len(self.opcodes) if last is None else last + 1
        return Counter(class_of(op) for op in self.opcodes[first:end])

    def hot_loop(self) -> tuple[int, int] | None:
        """The innermost loop with the most tensor-core instructions, or, without any, the longest innermost one."""
        inner = [a for a in self.loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in self.loops)]
        if not inner:
            return None
        return max(inner, key=lambda span: (self.classes(*span)["tensor"], span[1] - span[0]))


def base(opcode: str) -> str:
    """A mnemonic without its modifiers."""
    return opcode.split(".", 1)[0]


def class_of(opcode: str) -> str:
    """The class of an instruction."""
    mnemonic = base(opcode)
    return next((name for name, members in CLASSES.items() if mnemonic in members), "integer")


def tensor_size(opcode: str) -> tuple[int, int]:
    """Multiply-adds of a tensor-core instruction, and the warps that run it together: 1, or 4 on Hopper.

    Shapes are written "16816" (16 x 8 x 16) for a warp's and "64x128x16" for a warp group's.
    """
    fields = opcode.split(".")[1:]
    group = next((f for f in fields if f.count("x") == 2), None)
    if group is not None:
        m, n, k = map(int, group.split("x"))
        return m * n * k, 4
    warp = next((f for f in fields if f.isdigit() and len(f) > 3), "")
    if not warp.startswith("168"):
        raise ValueError(f"a tensor-core instruction of unknown shape: {opcode}")
    return 16 * 8 * int(warp[3:]), 1


def shared_bytes(opcode: str) -> int:
    """Bytes of shared memory that a warp reads or writes by one instruction; 0 for others."""
    mnemonic, fields = base(opcode), opcode.split(".")[1:]
    if mnemonic in ("LDSM", "STSM"):
        return 128 * int(fields[-1]) if fields and fields[-1].isdigit() else 128
    if mnemonic in ("LDS", "STS"):
        wide = next((int(f) for f in fields if f in ("64", "128")), 32)
        narrow = next((int(f[1:]) for f in fields if f in ("U8", "S8", "U16", "S16")), wide)
        return 4 * narrow  # 32 threads, bits to bytes
    if mnemonic == "LDGSTS":  # the store half
        return 4 * next((int(f) for f in fields if f in ("64", "128")), 32)
    return 0


def parse(sass: str) -> Code:
    """Reads what ``cuobjdump -sass`` prints of one kernel."""
    opcodes: list[str] = []
    at: dict[int, int] = {}
    branches: list[tuple[int, int]] = []
    for match in filter(None, map(_INSTRUCTION.match, sass.splitlines())):
        address, opcode, operands = int(match.group(1), 16), match.group(2), match.group(3)
        at[address] = len(opcodes)
        target = _TARGET.search(operands) if base(opcode) == "BRA" else None
        if target:
            branches.append((len(opcodes), int(target.group(1), 16)))
        opcodes.append(opcode)
    idle = {place for place, target in branches if at.get(target) == place}
    while opcodes and (base(opcodes[-1]) == "NOP" or len(opcodes) - 1 in idle):  # what pads the end
        opcodes.pop()
    loops = {(at[target], place) for place, target in branches if at.get(target, place) < place < len(opcodes)}
    return Code(tuple(opcodes), tuple(sorted(loops, key=lambda span: span[1] - span[0])))
