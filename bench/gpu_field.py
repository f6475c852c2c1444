"""Ridgeline's GPU kernels beside the Triton kernels of Liger, flash-attn and vLLM, from their machine code.

    python bench/gpu_field.py --install        fetch the peers' sources (once; nothing of them is built)
    python bench/gpu_field.py                  compile and compare everything, both architectures
    python bench/gpu_field.py --op norm --arch sm_90

No GPU is needed: launches are compiled for sm_80 and sm_90, each peer's as its own launcher makes them. Nothing is
timed; see docs/kernels.md, "Side by side with the field", for what the columns mean.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import gpu_peers
from gpu_cases import CHUNK, CONTEXT, Operator, Peer, operators
from gpu_count import Runs, issued, moved, steady
from rich.console import Console
from rich.table import Table
from triton.tools.tensor_descriptor import TensorDescriptor

from ridgeline.backends.cuda.ladder.card import Card, card_of, predict
from ridgeline.backends.cuda.ladder.compile import compile_launch, in_process
from ridgeline.backends.cuda.ladder.sass import base
from ridgeline.backends.cuda.launch import ARCHS, Launch
from ridgeline.core.errors import RidgelineError

OURS = "Ridgeline"
BLOCKS = (
    ("BLOCK_M", "BLOCK_SIZE_M", "BLOCK_H", "HEADS", "ROWS"),
    ("BLOCK_N", "BLOCK_SIZE_N", "TILE_SIZE", "BLOCK", "BLOCK_SIZE"),
    ("BLOCK_K", "BLOCK_SIZE_K"),
)
"""What launchers call the sides of a tile."""
SAME = 0.02  # differences below two in a hundred are none
LITTLE = 0.01  # and, of shared memory held for an output, a hundredth of a byte: a word for each warp of a row


@dataclass
class Measured:
    """One kernel, or a pair of them, in one shape; per output where it says so, over the whole grid."""

    operator: str
    arch: str
    rows: int
    who: str
    config: str
    registers: int = 0
    spilled: int = 0
    shared: int = 0
    occupancy: int = 0
    tensor: str = "-"
    copies: str = "-"
    instructions: float = 0.0
    traffic: float = 0.0
    shared_per_output: float = 0.0
    share: float = 0.0
    fault: str = ""


def describe(launch: Launch) -> str:
    """Blocks, warps and stages."""
    meta = launch.config.meta
    named = [[meta[n] for n in names if n in meta][:1] for names in BLOCKS]
    return f"{'x'.join(str(v[0]) for v in named if v) or '-'} w{launch.config.num_warps} s{launch.config.num_stages}"


def runs_of(operator: Operator, side: Peer, launch: Launch, rows: int) -> tuple[Runs, float]:
    """How often a launch's parts run, and the outputs of one of its programs or tiles that are some row's."""
    meta, outputs = launch.config.meta, operator.outputs(rows)
    tile, operations = side.tile(launch, rows)
    programs = float(math.prod(launch.grid))
    if "product" not in operator.name:
        parts = float(launch.args.get("splits", 1))
        runs = Runs(programs, parts, operations, side.loops, folds=CONTEXT / CHUNK, branch=side.branch(launch))
        return runs, tile
    height = meta.get("BLOCK_M") or meta["BLOCK_SIZE_M"]
    parts = meta.get("SPLIT", 1) if meta.get("PARALLEL") else 1
    tiles = math.ceil(rows / height) * math.ceil(outputs / rows / (tile / height))
    jobs = programs if "SPLIT_K" in meta else tiles * parts  # a persistent program takes several
    return Runs(jobs, parts, operations, passes=side.passes(launch)), min(rows, height) * tile / height


def tma_bytes(launch: Launch, operations: float) -> float:
    """Bytes that a product's descriptors bring to shared memory: a box of each for every step of a tile."""
    meta = launch.config.meta
    rows, columns, depth = (meta[next(n for n in names if n in meta)] for names in BLOCKS)
    boxes = {name: t for name, t in launch.args.items() if isinstance(t, TensorDescriptor)}
    sizes = {name: math.prod(t.block_shape) * t.base.element_size() for name, t in boxes.items()}
    if "BITS" in meta:  # a box of x is as deep as the codes that lie in the same words
        depth = boxes["x"].block_shape[1]
        sizes["w"] = columns * depth * meta["BITS"] // 8
    step = sum(sizes.values())
    if meta.get("SPECIALIZE"):  # descriptors that the program makes itself
        step = (rows + columns) * depth * launch.args["x"].element_size()
    return operations / (2.0 * rows * columns * depth) * step


def measure(operator: Operator, side: Peer, arch: str, rows: int, launches: list[Launch]) -> Measured:
    """Compiles and counts; raises RidgelineError where it does not compile."""
    result = Measured(operator.name, arch, rows, side.name, describe(launches[0]))
    cards: list[Card] = []
    issues = traffic = padded = 0.0
    for place, launch in enumerate(launches):
        binary = compile_launch(launch, arch)
        card = card_of(binary)
        cards.append(steady(card, binary.sass))
        if place and operator.name != "rotary":  # what merges the parts of the first
            folding = Runs(math.prod(launch.grid), loops=(8.0,))
            issues += issued(binary.sass, card.num_warps, folding)
            traffic += moved(binary.sass, card.num_warps, folding)
            continue
        runs, tile = runs_of(operator, side, launch, rows)
        issues += issued(binary.sass, card.num_warps, runs)
        traffic += moved(binary.sass, card.num_warps, runs)
        if "UTMALDG" in card.copies:
            traffic += tma_bytes(launch, runs.operations)
        padded = max(padded, runs.operations)
        if place == 0:
            result.shared_per_output = card.shared_bytes / tile
    first = cards[0]
    outputs = (side.outputs or operator.outputs)(rows)
    result.instructions, result.traffic = issues / outputs, traffic / outputs
    result.registers, result.spilled = max(c.registers for c in cards), max(c.local_bytes for c in cards)
    result.shared, result.occupancy = first.shared_bytes, first.occupancy
    result.tensor = " ".join(sorted({base(op) for op in first.tensor})) or "-"
    result.copies = " ".join(sorted(first.copies)) or "-"
    result.share = predict(operator.shape(rows, launches, padded), cards, operator.kind).roofline_share
    return result


def theirs(operator: Operator, peer: Peer, arch: str, rows: int, warps: int) -> Measured:
    """A peer's configuration of the best prediction, or what is wrong with it.

    Among equals of a tuner's list, the one with as many ``warps`` as ours: the prediction does not tell them apart.
    """
    fault = ""
    try:
        calls = gpu_peers.launches_of(lambda: peer.call(arch, rows))
        many = max(len(call) for call in calls)
        found = []
        for choice in range(many):
            launches = [call[min(choice, len(call) - 1)] for call in calls]
            try:
                result = measure(operator, peer, arch, rows, launches)
                distance = abs(math.log2(launches[0].config.num_warps / warps))
                found.append(((-round(result.share, 3), result.spilled, distance, result.instructions), result))
            except RidgelineError as error:
                fault = str(error)
        if found:
            return min(found, key=lambda pair: pair[0])[1]
    except Exception as error:  # whatever a peer raises is its fault, and is told
        fault = f"{type(error).__name__}: {error}"
    return Measured(operator.name, arch, rows, peer.name, "-", fault=told(fault))


def told(fault: str) -> str:
    """A fault in a line: what comes after a kernel's constants, which fill a page."""
    return fault.rsplit("}: ", 1)[-1].strip().splitlines()[-1].strip()[:160] if fault.strip() else "no configuration"


def compare(task: tuple[str, str]) -> list[Measured]:
    """One operator on one architecture; in a process of its own."""
    name, arch = task
    operator = next(o for o in operators() if o.name == name)
    us = replace(operator.us, name=OURS)
    launches = {rows: list(operator.us.call(arch, rows)) for rows in operator.shapes}
    results = [measure(operator, us, arch, rows, launches[rows]) for rows in operator.shapes]
    gpu_peers.pretend(arch)
    for rows in operator.shapes:
        warps = launches[rows][0].config.num_warps
        results += [theirs(operator, peer, arch, rows, warps) for peer in operator.peers]
    return results


def verdict(ours: Measured, other: Measured) -> str:
    """Where we are worse, or nothing."""
    if other.fault:
        return ""
    worse = []
    if ours.instructions > other.instructions * (1 + SAME):
        worse.append("instructions")
    if ours.traffic > other.traffic * (1 + SAME):
        worse.append("moved")
    if ours.shared_per_output > other.shared_per_output * (1 + SAME) + LITTLE:
        worse.append("held")
    if ours.share < other.share - SAME / 2:
        worse.append("share")
    return ", ".join(worse) or "no worse"


def table(results: list[Measured]) -> Table:
    """For people."""
    out = Table(title="per output: warp instructions, shared bytes moved and held; share of the roofline as predicted")
    for column in ("operator", "arch", "rows", "whose", "tile", "regs", "spill", "shared", "occ", "tensor", "copies"):
        out.add_column(column)
    for column in ("instr/out", "moved/out", "held/out", "share", "ours is worse in"):
        out.add_column(column, justify="right")
    ours = {(m.operator, m.arch, m.rows): m for m in results if m.who == OURS}
    for key, us in ours.items():
        group = [us, *(m for m in results if (m.operator, m.arch, m.rows) == key and m.who != OURS)]
        for m in group:
            head = (us.operator, us.arch, str(us.rows)) if m is us else ("", "", "")
            if m.fault:
                out.add_row(*head, m.who, m.fault)
                continue
            said = "" if m is us else verdict(us, m)
            style = "red" if said not in ("", "no worse") else None
            out.add_row(
                *head, m.who, m.config, str(m.registers), str(m.spilled), str(m.shared), f"{m.occupancy}/64", m.tensor,
                m.copies, f"{m.instructions:.3g}", f"{m.traffic:.3g}", f"{m.shared_per_output:.3g}",
                f"{100 * m.share:.0f}%", said, style=style,
            )  # fmt: skip
        out.add_section()
    return out


def markdown(results: list[Measured]) -> str:
    """For docs/kernels.md: ours : theirs, a cell for all shapes of a pair, bold where ours is worse."""
    lines = [
        "| operator | arch | beside | rows | instructions | shared bytes moved | held | predicted share |",
        "|" + "---|" * 8,
    ]
    ours = {(m.operator, m.arch, m.rows): m for m in results if m.who == OURS}
    pairs: dict[tuple[str, str, str], list[Measured]] = {}
    for m in results:
        if m.who != OURS and not m.fault:
            pairs.setdefault((m.operator, m.arch, m.who), []).append(m)
    for (operator, arch, who), them in pairs.items():
        both = [(ours[m.operator, m.arch, m.rows], m) for m in them]
        cells = []
        for field in WORSE:
            texts = [_cell(field, us, other) for us, other in both]
            cells.append(texts[0] if len(set(texts)) == 1 else ", ".join(texts))
        lines.append(f"| {operator} | {arch} | {who} | {', '.join(str(m.rows) for m in them)} | {' | '.join(cells)} |")
    return "\n".join(lines)


WORSE = {"instructions": "instructions", "traffic": "moved", "shared_per_output": "held", "share": "share"}
"""Columns, and what a verdict calls them."""


def _cell(field: str, us: Measured, other: Measured) -> str:
    a, b = (getattr(m, field) for m in (us, other))
    text = f"{100 * a:.0f} : {100 * b:.0f}%" if field == "share" else f"{_short(a)} : {_short(b)}"
    return f"**{text}**" if WORSE[field] in verdict(us, other).split(", ") else text


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else f"{value:.1g}"


def main() -> int:
    """Exit status 1 where ours is worse in anything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true", help="fetch the peers' sources into .peers/gpu")
    parser.add_argument("--op", default="", help="operators whose name holds this")
    parser.add_argument("--arch", choices=ARCHS, action="append")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--markdown", action="store_true", help="the compact table of docs/kernels.md")
    parser.add_argument("--width", type=int, default=230, help="of the table, in columns")
    args = parser.parse_args()
    if args.install:
        gpu_peers.install()
        return 0
    if gpu_peers.missing():
        print(f"not there: {', '.join(gpu_peers.missing())}; python bench/gpu_field.py --install", file=sys.stderr)
        return 2
    names = [o.name for o in operators() if args.op.lower() in o.name.lower()]
    if not names:
        parser.error(f"no operator is called {args.op!r}: there are {', '.join(o.name for o in operators())}")
    # Peers look up their device once: processes of their own for each architecture.
    runs = [in_process(compare, [(name, arch) for name in names], args.jobs) for arch in args.arch or ARCHS]
    results: list[Measured] = [m for found in chain(*runs) for m in found]
    if args.markdown:
        print(markdown(results))
    else:
        Console(width=args.width).print(table(results))
    ours = {(m.operator, m.arch, m.rows): m for m in results if m.who == OURS}
    pairs: list[dict[str, Any]] = [
        {**asdict(m), "worse": verdict(ours[m.operator, m.arch, m.rows], m) if m.who != OURS else ""} for m in results
    ]
    print(json.dumps({"versions": gpu_peers.VERSIONS, "kernels": pairs}))
    return int(any(p["worse"] not in ("", "no worse") for p in pairs))


if __name__ == "__main__":
    raise SystemExit(main())
