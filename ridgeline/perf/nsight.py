"""NVIDIA's Nsight Systems and Nsight Compute: runs them on our own steps and reads what they wrote into our tables.

Formats as NVIDIA documents them: the SQLite export of Nsight Systems, and the raw page of Nsight Compute as CSV.
**Neither tool was at hand when this was written**: the readers are tested on files made after those descriptions.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

from ridgeline.core.errors import RidgelineError
from ridgeline.core.hardware import Peaks
from ridgeline.graph.plan import Plan
from ridgeline.perf.operators import OpRow, OpTable, operator_costs, ordered
from ridgeline.perf.profile_gpu import RANGE, operator_row
from ridgeline.perf.work import Shape

TOOLS = {"nsys": "Nsight Systems", "ncu": "Nsight Compute"}
TIME, BYTES, WARPS = (
    "gpu__time_duration.sum",
    "dram__bytes.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)
"""Metrics asked of Nsight Compute."""
STACK = "Domain:Push/Pop_Range"
"""In the name of the column that holds the ranges a kernel was launched in."""
UNITS = {"n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
PUSH_POP = 59
"""Nsight Systems' number of an event that is a pushed range."""
PLUMBING = {"step", "launch", "finish", "operators", "schedule", "batch", "wait"}
"""Ranges that say less than those within them."""


@dataclass
class Kernels:
    """Kernels launched in one range.

    Attributes:
        seconds: of the device; bytes: from and to its memory, where that was counted.
        warps: share of a multiprocessor's warps active, times the seconds it was seen for (``warp_seconds``).
    """

    count: int = 0
    seconds: float = 0.0
    bytes: float = 0.0
    warps: float = 0.0
    warp_seconds: float = 0.0

    @property
    def occupancy(self) -> float | None:
        """The mean share of warps; None where nobody counted."""
        return self.warps / self.warp_seconds if self.warp_seconds else None


@dataclass
class Recorded:
    """What a tool saw of one shape's steps, all together.

    Attributes:
        steps: how many; 0: the tool does not say. wall: seconds of them on the host; 0: not measured.
    """

    steps: int = 0
    wall: float = 0.0
    operators: dict[str, Kernels] = field(default_factory=dict)

    def at(self, name: str) -> Kernels:
        """Kernels of an operator."""
        return self.operators.setdefault(name, Kernels())


def require_tool(tool: str) -> str:
    """The path of "nsys" or "ncu"; raises RidgelineError where it is not installed."""
    path = shutil.which(tool)
    if path is None:
        raise RidgelineError(f"{tool} is not on PATH: install NVIDIA {TOOLS[tool]}, or leave out --{tool}")
    return path


def commands(tool: str, path: str, child: Sequence[str], folder: Path) -> list[list[str]]:
    """What to run: the tool on a child process, then its export."""
    report = folder / "profile"
    if tool == "nsys":
        record = [path, "profile", "--trace=cuda,nvtx", "--sample=none", "--cpuctxsw=none", "--force-overwrite=true"]
        export = [path, "export", "--type=sqlite", "--force-overwrite=true", f"--output={report}.sqlite"]
        return [[*record, f"--output={report}", *child], [*export, f"{report}.nsys-rep"]]
    # Clocks and caches as they are in a step, not as a comparison of kernels wants them.
    record = [path, "--nvtx", "--profile-from-start", "off", "--clock-control", "none", "--cache-control", "none"]
    record += ["--target-processes", "all", "--metrics", f"{TIME},{BYTES},{WARPS}", "--force-overwrite"]
    export = [path, "--import", f"{report}.ncu-rep", "--csv", "--page", "raw", "--print-units", "base", "--print-fp"]
    return [[*record, "--export", str(report), *child], export]


def record(tool: str, child: Sequence[str], folder: Path) -> dict[str, Recorded]:
    """Runs a child process under a tool and reads its report, by the shapes' titles. Raises RidgelineError."""
    out = ""
    for command in commands(tool, require_tool(tool), child, folder):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RidgelineError(f"{tool} failed with code {done.returncode}: {_reason(done.stdout + done.stderr)}")
        out = done.stdout
    return read_nsys(folder / "profile.sqlite") if tool == "nsys" else read_ncu(out)


def _reason(output: str) -> str:
    """The line of a tool's output that says most."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if any("ERR_NVGPUCTRPERM" in line for line in lines):
        return "reading the GPU's counters is not allowed here: run it as root, or see NVIDIA's ERR_NVGPUCTRPERM page"
    said = [line for line in lines if "error" in line.lower()]
    return (said or lines or ["it said nothing"])[-1]


def read_nsys(path: Path) -> dict[str, Recorded]:
    """Kernels of a SQLite export by the innermost range of their launch, for every range that ``RANGE`` begins.

    Raises RidgelineError for a file without kernels or ranges.
    """
    events = "SELECT n.globalTid, n.start, n.end, COALESCE(n.text, s.value) FROM NVTX_EVENTS n "
    events += "LEFT JOIN StringIds s ON s.id = n.textId WHERE n.eventType = ? AND n.end IS NOT NULL"
    # A correlation is of one process: a thread's number begins with its process's.
    kernels = "SELECT r.globalTid, r.start, k.end - k.start FROM CUPTI_ACTIVITY_KIND_KERNEL k "
    kernels += "JOIN CUPTI_ACTIVITY_KIND_RUNTIME r ON r.correlationId = k.correlationId "
    kernels += "AND r.globalTid / 0x1000000 = k.globalPid / 0x1000000"
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as base:
            ranges = base.execute(events, (PUSH_POP,)).fetchall()
            launched = base.execute(kernels).fetchall()
    except sqlite3.Error as error:
        raise RidgelineError(f"{path} is not an export with kernels and NVTX ranges: {error}") from None
    found: dict[str, Recorded] = {}
    threads = {row[0] for row in ranges}
    for thread in threads:
        mine = [(start, end, name) for tid, start, end, name in ranges if tid == thread and name]
        calls = [(start, seconds) for tid, start, seconds in launched if tid == thread]
        _sweep(mine, calls, found)
    return _need(found, str(path))


def _sweep(ranges: list[tuple[int, int, str]], calls: list[tuple[int, int]], found: dict[str, Recorded]) -> None:
    """Launches of one thread, (when, nanoseconds of the kernel), into the ranges that were open then."""
    # A range opens before what starts with it, and an outer one before the inner one.
    queue = sorted([(start, -end, name, 0) for start, end, name in ranges] + [(at, 1, "", ns) for at, ns in calls])
    open_: list[tuple[int, str]] = []
    for start, minus_end, name, nanoseconds in queue:
        while open_ and open_[-1][0] <= start:
            open_.pop()
        names = [other for _, other in open_]
        title = next((n[len(RANGE) :] for n in names if n.startswith(RANGE)), None)
        if name:
            open_.append((-minus_end, name))
            if title is not None and name == "step":
                here = found.setdefault(title, Recorded())
                here.steps, here.wall = here.steps + 1, here.wall + (-minus_end - start) * 1e-9
        elif title is not None:
            kernels = found.setdefault(title, Recorded()).at(operator_of(names))
            kernels.count, kernels.seconds = kernels.count + 1, kernels.seconds + nanoseconds * 1e-9


def operator_of(names: Sequence[str]) -> str:
    """Of the ranges that a kernel is in, outermost first: the operator, or the innermost that says something."""
    useful = [n for n in names if n not in PLUMBING and not n.startswith((RANGE, "layer "))]
    return useful[-1] if useful else "other kernels"


def read_ncu(text: str) -> dict[str, Recorded]:
    """Kernels of the raw page as CSV, by their range. Raises RidgelineError for a page without what we asked for."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if line.startswith('"ID"') or line.startswith("ID,")), None)
    rows = list(csv.reader(io.StringIO("\n".join(lines[first:])))) if first is not None else []
    if len(rows) < 2:
        raise RidgelineError("Nsight Compute's page holds no kernels: were any launched while it was told to record?")
    head, units = rows[0], rows[1]
    stack = next((i for i, name in enumerate(head) if STACK in name), None)
    if stack is None or TIME not in head:
        raise RidgelineError(f"Nsight Compute's page lacks the column {'of NVTX ranges' if stack is None else TIME}")
    found: dict[str, Recorded] = {}
    for row in rows[2:]:
        if len(row) != len(head):
            continue  # "==PROF==" lines
        names = list(stack_of(row[stack]))
        title = next((n[len(RANGE) :] for n in names if n.startswith(RANGE)), None)
        if title is None:
            continue
        values = {name: _number(row[i], units[i]) for i, name in enumerate(head) if name in (TIME, BYTES, WARPS)}
        kernels = found.setdefault(title, Recorded()).at(operator_of(names))
        seconds, warps = values[TIME] or 0.0, values.get(WARPS)
        kernels.count, kernels.seconds = kernels.count + 1, kernels.seconds + seconds
        kernels.bytes += values.get(BYTES) or 0.0
        if warps is not None:
            kernels.warps, kernels.warp_seconds = kernels.warps + warps / 100 * seconds, kernels.warp_seconds + seconds
    return _need(found, "Nsight Compute's page")


def stack_of(cell: str) -> Iterator[str]:
    """Names in a cell of ranges, each as "domain:name:" and six more fields, outermost first."""
    for entry in re.findall(r'"([^"]*)"', cell):
        domain, _, rest = entry.partition(":")
        if domain == "ridgeline":
            yield rest.split(":")[0]


def _number(text: str, unit: str) -> float | None:
    """A value in seconds, bytes or percent; None for "n/a"."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    match = re.fullmatch(r"([numKMGT]?)(s|second|byte)", unit)
    return value * UNITS[match.group(1)] if match else value


def _need(found: dict[str, Recorded], where: str) -> dict[str, Recorded]:
    if not any(recorded.operators for recorded in found.values()):
        raise RidgelineError(f"{where} holds no kernel in a range of ours: it was not made by ridgeline profile")
    return found


def table_of(
    recorded: Recorded, steps: int, shape: Shape, plan: Plan, most_tokens: int, peaks: Peaks, tool: str
) -> OpTable:
    """The table of a shape.

    Args:
        steps: that were run, where the tool does not count them.
        most_tokens: of one step.
    """
    number = recorded.steps or steps
    costs = operator_costs(plan, shape.loads(most_tokens), peaks)
    rows = []
    for name, kernels in recorded.operators.items():
        measured = {"bytes": kernels.bytes / number} if kernels.bytes else {}
        row = operator_row(name, kernels.count / number, kernels.seconds / number, costs, **measured)
        rows.append(replace(row, occupancy=kernels.occupancy))
    device = sum(row.seconds for row in rows)
    wall = recorded.wall / number if recorded.wall else device
    if wall > device:
        rows.append(OpRow("no kernel running", "host", 1, wall - device))
    notes = ["kernels were launched one by one, not as a graph: launches take longer than in a step"]
    if tool == "ncu":
        notes = ["kernels ran alone, each as often as its counters need: the step is their sum, and GB/s are measured"]
    return OpTable(shape.title, wall, shape.tokens, ordered(rows), peaks, number, number, notes=tuple(notes))


def tables(
    found: Mapping[str, Recorded],
    shapes: Sequence[Shape],
    steps: int,
    plan: Plan,
    most_tokens: int,
    peaks: Peaks,
    tool: str,
) -> list[OpTable]:
    """A table for each shape that a tool has seen. Raises RidgelineError for one that it has not."""
    for shape in shapes:
        if shape.title not in found:
            raise RidgelineError(f"{tool} saw nothing of {shape.title}")
    return [table_of(found[s.title], steps, s, plan, most_tokens, peaks, tool) for s in shapes]
