"""NVIDIA machine code as text: instructions, their classes, and the loop where a kernel spends its time."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"^[^\t]*\t(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)$")
"""Control codes, a tab, a predicate, the instruction: as Triton prints what nvdisasm says."""
_LABEL = re.compile(r"^(LBB\w+):")
_TARGET = re.compile(r"\b(LBB\w+)")

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


def parse(sass: str) -> Code:
    """Reads a compiled kernel's ``asm["sass"]``."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    for line in sass.splitlines():
        label, match = _LABEL.match(line), _INSTRUCTION.match(line)
        if label:
            labels[label.group(1)] = len(opcodes)
        if not match:
            continue
        target = _TARGET.search(match.group(2)) if base(match.group(1)) == "BRA" else None
        if target:
            branches.append((len(opcodes), target.group(1)))
        opcodes.append(match.group(1))
    while opcodes and base(opcodes[-1]) in ("NOP", "BRA"):  # what pads the end: a branch to itself and nothing
        opcodes.pop()
    loops = {(labels[target], at) for at, target in branches if labels.get(target, at) < at < len(opcodes)}
    return Code(tuple(opcodes), tuple(sorted(loops, key=lambda span: span[1] - span[0])))
