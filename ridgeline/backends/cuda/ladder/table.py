"""The cards of all kernels as one table that is kept in the repository, and what counts as a regression of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

from ridgeline.backends.cuda.ladder.card import Card, Prediction, card_of, predict
from ridgeline.backends.cuda.ladder.compile import compile_launch, in_process
from ridgeline.backends.cuda.ladder.sass import base
from ridgeline.backends.cuda.launch import ARCHS

KERNELS = "ridgeline.backends.cuda.kernels"
COLUMNS = (
    "kernel",
    "arch",
    "shape",
    "registers",
    "spilled",
    "shared",
    "warps",
    "occupancy",
    "tensor",
    "copies",
    "widths",
    "instructions",
    "classes",
    "per_tensor",
    "per_output",
    "traffic",
    "waves",
    "bound",
    "roofline",
)


@dataclass(frozen=True)
class Row:
    """One shape of one kernel on one architecture; every field as it is printed."""

    kernel: str
    arch: str
    shape: str
    registers: str
    spilled: str
    shared: str
    warps: str
    occupancy: str
    tensor: str
    copies: str
    widths: str
    instructions: str
    classes: str
    per_tensor: str
    per_output: str
    traffic: str
    waves: str
    bound: str
    roofline: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What names a row."""
        return self.kernel, self.arch, self.shape


def names() -> list[str]:
    """The operators that have a kernel file."""
    folder = Path(str(import_module(KERNELS).__file__)).parent
    return sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")


def _counted(counter: Counter[str] | Counter[int]) -> str:
    return " ".join(f"{n}x{key}" for key, n in sorted(counter.items(), key=lambda item: str(item[0]))) or "-"


def _classes(counter: Counter[str]) -> str:
    return " ".join(f"{n} {name.replace(' ', '-')}" for name, n in counter.most_common()) or "-"


def _row(op: str, card: Card, prediction: Prediction) -> Row:
    tensor: Counter[str] = Counter()
    for opcode, n in card.tensor.items():
        tensor[".".join(opcode.split(".")[:2])] += n
    return Row(
        kernel=op,
        arch=card.arch,
        shape=prediction.shape,
        registers=str(card.registers),
        spilled=str(card.local_bytes),
        shared=str(card.shared_bytes),
        warps=str(card.num_warps),
        occupancy=f"{card.occupancy}/64",
        tensor=_counted(tensor),
        copies=_counted(card.copies),
        widths=_counted(card.widths),
        instructions=str(sum(card.classes.values())),
        classes=_classes(card.classes),
        per_tensor=f"{card.per_tensor:.1f}",
        per_output=f"{prediction.per_output:.1f}",
        traffic=f"{prediction.traffic:.2f}",
        waves=f"{prediction.waves:.2f}",
        bound=prediction.bound,
        roofline=f"{100 * prediction.roofline_share:.0f}%",
    )


def rows_of(task: tuple[str, str]) -> list[Row]:
    """The rows of one operator on one architecture; compiles, so it runs in a process that does."""
    op, arch = task
    module = import_module(f"{KERNELS}.{op}")
    rows = []
    for shape in module.card_shapes(arch):
        cards = [card_of(compile_launch(launch, arch)) for launch in shape.launches]
        prediction = predict(shape, cards, getattr(module, "KIND", "bf16"))
        rows.append(_row(op, max(cards, key=lambda c: sum(c.loop.classes.values())), prediction))
    return rows


def make(ops: Sequence[str], archs: Sequence[str] = ARCHS, workers: int = 2) -> list[Row]:
    """Compiles every card shape of some operators."""
    return [row for rows in in_process(rows_of, [(op, arch) for op in ops for arch in archs], workers) for row in rows]


def render(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(asdict(row)[c] for c in COLUMNS) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def read(text: str) -> list[Row]:
    """The rows of a Markdown page that holds such a table."""
    rows = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == len(COLUMNS) and cells[1] in ARCHS:
            rows.append(Row(**dict(zip(COLUMNS, cells, strict=True))))
    return rows


def regressions(before: Sequence[Row], now: Sequence[Row]) -> list[str]:
    """What got worse, a line each: a spill, a lost tensor-core or copy instruction, an occupancy step, a lost row."""
    known = {row.key: row for row in before}
    lines = []
    for row in now:
        old = known.get(row.key)
        name = " ".join(row.key)
        if old is None:
            lines.append(f"{name}: not in the table: ridgeline kernels cards --write")
            continue
        if int(row.spilled) > int(old.spilled):
            lines.append(f"{name}: spills {row.spilled} bytes, {old.spilled} before")
        for field in ("tensor", "copies"):
            lost = _kinds(getattr(old, field)) - _kinds(getattr(row, field))
            if lost:
                lines.append(f"{name}: no {', '.join(sorted(lost))} any more")
        if int(row.occupancy.split("/")[0]) < int(old.occupancy.split("/")[0]):
            lines.append(f"{name}: occupancy {row.occupancy}, {old.occupancy} before")
    return lines


def _kinds(cell: str) -> set[str]:
    return {base(item.split("x", 1)[1]) for item in cell.split() if "x" in item}
