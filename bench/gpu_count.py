"""How many instructions a launch issues and how many bytes of shared memory it reads and writes, from its machine code
and from how often each part of it must run."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, replace

from ridgeline.backends.cuda.ladder.card import Card
from ridgeline.backends.cuda.ladder.sass import Code, base, class_of, parse, shared_bytes, tensor_size

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)(.*);")
_TARGET = re.compile(r"\b0x([0-9a-f]+)\b")


@dataclass(frozen=True)
class Runs:
    """How often the parts of a kernel run.

    Attributes:
        jobs: tiles, times parts along K or along the keys, over the grid.
        parts: of a tile that its last job folds, after an atomic arrival.
        operations: of the tensor cores over the grid, padding included.
        loops: how often each innermost loop of a kernel without tensor cores runs, in code order.
        folds: how often a loop after the arrival runs.
        passes: how often a job enters its hottest loop: parts along K that one program adds up.
        branch: share of the jobs that take the first way, where a kernel's programs part for good; 1: they do not.
    """

    jobs: float
    parts: float = 1.0
    operations: float = 0.0
    loops: tuple[float, ...] = ()
    folds: float = 1.0
    branch: float = 1.0
    passes: float = 1.0


def skips(sass: str) -> list[tuple[int, int]]:
    """Forward branches: (place of the branch, place where it lands)."""
    places: dict[int, int] = {}
    jumps: list[tuple[int, int]] = []
    for place, match in enumerate(filter(None, map(_LINE.match, sass.splitlines()))):
        places[int(match.group(1), 16)] = place
        target = _TARGET.search(match.group(3)) if base(match.group(2)) == "BRA" else None
        if target:
            jumps.append((place, int(target.group(1), 16)))
    return [(place, places[to]) for place, to in jumps if places.get(to, -1) > place]


def operations_of(opcode: str) -> float:
    """Multiplies and adds of a warp's part of one tensor-core instruction."""
    size, warps = tensor_size(opcode)
    return 2.0 * size / warps


def is_tensor(opcode: str) -> bool:
    """Whether it runs on the tensor cores."""
    return class_of(opcode) == "tensor"


def innermost(code: Code) -> list[tuple[int, int]]:
    """Loops that hold no other, in code order."""
    return sorted(a for a in code.loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in code.loops))


def once_in(span: tuple[int, int], code: Code, jumps: list[tuple[int, int]]) -> set[int]:
    """Places of a loop over tiles and K together that are a tile's end: skipped but for its last step.

    They are what a forward branch inside the loop jumps over, with stores and without products.
    """
    found: set[int] = set()
    for place, to in jumps:
        inside = code.opcodes[place + 1 : to]
        if span[0] <= place and to <= span[1] and not any(map(is_tensor, inside)):
            if any(base(op) == "STG" for op in inside) or _is_setup(inside):
                found.update(range(place + 1, to))
    return found


def _is_setup(opcodes: tuple[str, ...]) -> bool:
    """Whether a skipped part works out a tile's origin: it divides, which takes a reciprocal."""
    return any(op.startswith("MUFU.RCP") for op in opcodes)


def specialized(code: Code) -> list[tuple[int, int]]:
    """The loops that warp groups of one kernel run side by side: one that loads, others that multiply; or none."""
    loops = innermost(code)
    multiply = [span for span in loops if code.classes(*span)["tensor"]]
    load = [s for s in loops if s not in multiply and "UTMALDG" in map(base, code.opcodes[s[0] : s[1] + 1])]
    return load + multiply if load and len(multiply) > 1 else []


def hot_part(code: Code, jumps: list[tuple[int, int]]) -> list[int]:
    """Places of the hottest loop that run in each of its steps; none without tensor cores."""
    span = code.hot_loop()
    if span is None or not code.classes(*span)["tensor"]:
        return []
    once = once_in(span, code, jumps)
    return [place for place in range(span[0], span[1] + 1) if place not in once]


def times(sass: str, warps: int, runs: Runs) -> list[float]:
    """How often all warps of a launch together run each instruction, in code order.

    The hottest loop, or those of specialized warp groups together, run until their tensor-core instructions have done
    the operations; what is around that loop, as often as a job enters it; all else once a job, whatever branch it lies
    on; what follows an atomic arrival, once a tile.
    """
    code, jumps = parse(sass), skips(sass)
    weights = [1.0] * len(code.opcodes)
    for span, turns in zip(innermost(code), runs.loops, strict=False):
        for place in range(span[0], span[1] + 1):
            weights[place] = turns
    arrival = next((i for i, op in enumerate(code.opcodes) if base(op) in ("ATOM", "ATOMG")), len(code.opcodes))
    for place in range(arrival + 1, len(weights)):
        weights[place] = 1 / runs.parts
    for span in innermost(code):
        if span[0] > arrival:
            for place in range(span[0], span[1] + 1):
                weights[place] = runs.folds / runs.parts
    hot = hot_part(code, jumps)
    if groups := specialized(code):  # each group of warps runs its own loop, and its own share of the rest
        warps //= len(groups)
        hot = [place for span in groups for place in range(span[0], span[1] + 1)]
    for span in groups or [code.hot_loop()]:
        for place in _around(span, code):
            weights[place] *= runs.passes
    if hot and runs.operations:
        done = sum(operations_of(code.opcodes[i]) for i in hot if is_tensor(code.opcodes[i]))
        for place in hot:
            weights[place] = runs.operations / (done * warps * runs.jobs)
    if runs.branch < 1:
        _part(weights, code, jumps, runs.branch)
    return [weight * warps * runs.jobs for weight in weights]


def issued(sass: str, warps: int, runs: Runs) -> float:
    """Instructions that all warps of a launch issue."""
    return sum(times(sass, warps, runs))


def moved(sass: str, warps: int, runs: Runs) -> float:
    """Bytes that all warps of a launch read from shared memory and write to it, but for TMA's writes.

    Those of loads, stores and copies of a warp, and the operands of Hopper's tensor-core instructions. Spills count
    too: the first-level cache that holds them is the same memory behind the same port. Where the hottest loop copies,
    what is copied ahead of it is not copied in its last steps, though those instructions are issued.
    """
    code = parse(sass)
    hot = set(hot_part(code, skips(sass)))
    ahead = any(base(code.opcodes[place]) == "LDGSTS" for place in hot)
    each = [
        0.0
        if ahead and base(op) == "LDGSTS" and place not in hot
        else shared_bytes(op) + spill_bytes(op) + operand_bytes(op, how) / 4
        for place, (op, how) in enumerate(instructions(sass))
    ]
    return sum(n * size for n, size in zip(times(sass, warps, runs), each, strict=False))


def instructions(sass: str) -> list[tuple[str, str]]:
    """Opcodes and their operands, in order."""
    return [(match.group(2), match.group(3)) for match in filter(None, map(_LINE.match, sass.splitlines()))]


def spill_bytes(opcode: str) -> int:
    """Bytes of local memory that a warp reads or writes."""
    if base(opcode) not in ("LDL", "STL"):
        return 0
    return 4 * next((int(f) for f in opcode.split(".") if f in ("64", "128")), 32)


def operand_bytes(opcode: str, operands: str) -> int:
    """Bytes that a warp group's instruction of Hopper's tensor cores reads from shared memory: the second operand, and
    the first unless it lies in registers."""
    if base(opcode) not in ("HGMMA", "IGMMA", "QGMMA"):
        return 0
    shape = next(field for field in opcode.split(".") if field.count("x") == 2)
    rows, columns, depth = map(int, shape.split("x"))
    item = 2 if base(opcode) == "HGMMA" else 1
    first = 0 if re.match(r"\s*R\d+,\s*R\d+", operands) else rows
    return (first + columns) * depth * item


def _around(span: tuple[int, int] | None, code: Code) -> range:
    """Places of the loop over parts that holds a hottest loop, and is held by that over tiles; none without it."""

    def holders(inner: tuple[int, int]) -> list[tuple[int, int]]:
        return [a for a in code.loops if a != inner and a[0] <= inner[0] and inner[1] <= a[1]]

    found = [a for a in (holders(span) if span else []) if holders(a)]
    first, last = min(found, key=lambda a: a[1] - a[0], default=(0, -1))
    return range(first, last + 1)


def _part(weights: list[float], code: Code, jumps: list[tuple[int, int]], share: float) -> None:
    """Weighs two ways that end in exits of their own: the longest forward branch leads to the second."""
    start, second = max(jumps, key=lambda jump: jump[1] - jump[0])
    for place in range(start + 1, len(weights)):
        weights[place] *= share if place < second else 1 - share


def steady(card: Card, sass: str) -> Card:
    """A card whose hottest loop is without what its steps skip but for a tile's last."""
    code = parse(sass)
    inside = [code.opcodes[place] for place in hot_part(code, skips(sass))]
    if not inside:
        return card
    classes = Counter(map(class_of, inside))
    cycles = sum(map(shared_bytes, inside)) / 32  # 128 bytes a cycle, for four schedulers
    return replace(card, loop=replace(card.loop, classes=classes, shared_cycles=cycles))
