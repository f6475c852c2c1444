"""What Nsight Systems and Compute write, read into our tables: files made here after NVIDIA's own descriptions."""

from __future__ import annotations

import csv
import io
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest

from ridgeline.api.profile import child
from ridgeline.core.config import EngineConfig
from ridgeline.core.errors import RidgelineError
from ridgeline.core.hardware import Peaks, datasheet_of
from ridgeline.perf import nsight
from ridgeline.perf.nsight import BYTES, TIME, WARPS, read_ncu, read_nsys, table_of, tables
from ridgeline.perf.work import Shape
from tests.invariance.small_models import model_of

PEAKS = Peaks(1e12, 1e15, 1e15, 1e14)
PID, TID = 0x0100_0000_0000, 0x0100_0000_0007  # serialized: the thread's number in the low 24 bits
DECODE = "decode, batch 2, context 64"

SCHEMA = """
CREATE TABLE StringIds (id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE CUPTI_ACTIVITY_KIND_KERNEL (start INTEGER NOT NULL, end INTEGER NOT NULL, deviceId INTEGER NOT NULL,
  contextId INTEGER NOT NULL, greenContextId INTEGER, streamId INTEGER NOT NULL, correlationId INTEGER,
  globalPid INTEGER, demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL, mangledName INTEGER,
  launchType INTEGER, cacheConfig INTEGER, registersPerThread INTEGER NOT NULL, gridX INTEGER NOT NULL,
  gridY INTEGER NOT NULL, gridZ INTEGER NOT NULL, blockX INTEGER NOT NULL, blockY INTEGER NOT NULL,
  blockZ INTEGER NOT NULL, staticSharedMemory INTEGER NOT NULL, dynamicSharedMemory INTEGER NOT NULL,
  localMemoryPerThread INTEGER NOT NULL, localMemoryTotal INTEGER NOT NULL, gridId INTEGER NOT NULL,
  sharedMemoryExecuted INTEGER, graphNodeId INTEGER, sharedMemoryLimitConfig INTEGER);
CREATE TABLE CUPTI_ACTIVITY_KIND_RUNTIME (start INTEGER NOT NULL, end INTEGER NOT NULL, eventClass INTEGER NOT NULL,
  globalTid INTEGER, correlationId INTEGER, nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL,
  callchainId INTEGER);
CREATE TABLE NVTX_EVENTS (start INTEGER NOT NULL, end INTEGER, eventType INTEGER NOT NULL, rangeId INTEGER,
  category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER, textId INTEGER,
  domainId INTEGER, uint64Value INTEGER, int64Value INTEGER, doubleValue REAL, uint32Value INTEGER,
  int32Value INTEGER, floatValue REAL, jsonTextId INTEGER, jsonText TEXT, binaryData TEXT);
"""


class Export:
    """A SQLite export under construction."""

    def __init__(self, path: Path) -> None:
        self.path, self.base, self.strings, self.calls = path, sqlite3.connect(path), {}, 0  # type: ignore[var-annotated]
        self.base.executescript(SCHEMA)

    def string(self, text: str) -> int:
        if text not in self.strings:
            self.strings[text] = len(self.strings) + 1
            self.base.execute("INSERT INTO StringIds VALUES (?, ?)", (self.strings[text], text))
        return self.strings[text]

    def range(self, name: str, start: int, end: int, *, registered: bool = True, tid: int = TID) -> None:
        text, text_id = (None, self.string(name)) if registered else (name, None)
        self.base.execute(
            "INSERT INTO NVTX_EVENTS (start, end, eventType, text, textId, globalTid, domainId) "
            "VALUES (?, ?, 59, ?, ?, ?, 1)",
            (start, end, text, text_id, tid),
        )

    def kernel(self, called: int, nanoseconds: int, *, pid: int = PID, tid: int = TID, number: int = 0) -> None:
        self.calls += 1
        number = number or self.calls
        self.base.execute(
            "INSERT INTO CUPTI_ACTIVITY_KIND_RUNTIME VALUES (?,?,0,?,?,?,0,NULL)",
            (called, called + 3, tid, number, self.string("cuLaunchKernelEx")),
        )
        name = self.string("linear_kernel")
        values = (10**6 + called, 10**6 + called + nanoseconds, 0, 1, None, 7, number, pid, name, name, name)
        self.base.execute(
            f"INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL VALUES ({','.join('?' * 28)})",
            (*values, 0, 0, 128, 64, 1, 1, 128, 1, 1, 0, 49152, 0, 0, 1, None, None, None),
        )

    def close(self) -> Path:
        self.base.commit()
        self.base.close()
        return self.path


def exported(tmp_path: Path) -> Path:
    """Two steps of a layer, with a warm-up before them, another thread and another process."""
    export = Export(tmp_path / "profile.sqlite")
    export.base.execute(  # the domain itself, which is no range
        "INSERT INTO NVTX_EVENTS (start, eventType, text, globalTid, domainId) VALUES (0, 75, 'ridgeline', ?, 1)",
        (TID,),
    )
    export.range("step", 10, 90)
    export.range("linear q+k+v", 20, 40)
    export.kernel(25, 999)  # a warm-up: in no shape's range
    export.range(f"profile {DECODE}", 100, 1000)
    for at in (100, 500):
        export.range("step", at, at + 300)
        export.range("launch", at + 1, at + 200)
        export.range("operators", at + 10, at + 150, registered=False)
        export.range("layer 0", at + 10, at + 100)
        export.range("linear q+k+v", at + 10, at + 50)
        export.kernel(at + 20, 40)
        export.kernel(at + 30, 60)
        export.range("attention", at + 50, at + 100)
        export.kernel(at + 50, 20)  # at the very moment one range ends and the next begins
        export.range("sample", at + 160, at + 190)
        export.kernel(at + 170, 7)
    export.kernel(120, 5000, tid=TID + 1)  # of a thread that has no ranges
    export.kernel(121, 5000, pid=PID * 2, tid=PID * 2 + 7, number=2)  # of another process, same correlation
    return export.close()


def test_kernels_of_nsight_systems_by_the_range_that_launched_them(tmp_path: Path) -> None:
    found = read_nsys(exported(tmp_path))
    assert list(found) == [DECODE]
    recorded = found[DECODE]
    assert recorded.steps == 2 and recorded.wall == pytest.approx(600e-9)
    seen = {name: (k.count, round(k.seconds * 1e9)) for name, k in recorded.operators.items()}
    assert seen == {"linear q+k+v": (4, 200), "attention": (2, 40), "sample": (2, 14)}


def test_a_table_of_nsight_systems(tmp_path: Path) -> None:
    plan, _ = model_of("q4_1", "generic")
    (table,) = tables(read_nsys(exported(tmp_path)), [Shape(2, 64)], 9, plan, 64, PEAKS, "nsys")
    rows = {row.name: row for row in table.rows}
    assert table.seconds == pytest.approx(300e-9) and table.steps == 2
    assert rows["linear q+k+v"].calls == 2 and rows["linear q+k+v"].seconds == pytest.approx(100e-9)
    assert rows["linear q+k+v"].bytes > 0 and rows["linear q+k+v"].limit == "memory"
    assert rows["no kernel running"].kind == "host" and rows["no kernel running"].seconds == pytest.approx(173e-9)
    assert table.unattributed == pytest.approx(0, abs=1e-12)
    with pytest.raises(RidgelineError, match="nsys saw nothing of decode, batch 9"):
        tables(read_nsys(exported_again(tmp_path)), [Shape(9, 64)], 9, plan, 64, PEAKS, "nsys")


def exported_again(tmp_path: Path) -> Path:
    (tmp_path / "again").mkdir()
    return exported(tmp_path / "again")


def test_what_is_no_export_is_refused(tmp_path: Path) -> None:
    empty = Export(tmp_path / "empty.sqlite").close()
    with pytest.raises(RidgelineError, match="holds no kernel in a range of ours"):
        read_nsys(empty)
    with closing(sqlite3.connect(tmp_path / "other.sqlite")) as base:
        base.execute("CREATE TABLE x (y)")
    for name in ("other.sqlite", "missing.sqlite"):
        with pytest.raises(RidgelineError, match="is not an export with kernels and NVTX ranges"):
            read_nsys(tmp_path / name)


STACK = "thread Domain:Push/Pop_Range:PL_Type:PL_Value:CLR_Type:Color:Msg_Type:Msg"


def stack(*names: str) -> str:
    """A cell of ranges, as the raw page has it."""
    return "7  " + "  ".join(f'"ridgeline:{name}:none:none:ARGB:0xff0000ff:Registered:{name}"' for name in names)


def page(rows: list[tuple[str, ...]], units: tuple[str, str, str] = ("ns", "byte", "%")) -> str:
    """The raw page as CSV, behind what the profiled program and the tool have said."""
    head = ["ID", "Process ID", "Process Name", "Host Name", STACK, "Kernel Name", "Context", "Stream", "Block Size"]
    head += ["Grid Size", "Device", "CC", BYTES, TIME, WARPS]
    out = io.StringIO()
    write = csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n")
    write.writerow(head)
    write.writerow([""] * 12 + [units[1], units[0], units[2]])
    for number, (names, nanoseconds, count, warps) in enumerate(rows):
        fixed = ["7", "python", "host", names, "linear_kernel", "1", "7", "(128, 1, 1)", "(64, 1, 1)", "0", "9.0"]
        write.writerow([str(number), *fixed, count, nanoseconds, warps])
    return "==PROF== Connected to process 7\n" + out.getvalue() + "==PROF== Disconnected\n"


def test_counters_of_nsight_compute() -> None:
    shape = f"profile {DECODE}"
    text = page(
        [
            (stack("step", "linear q+k+v"), "5000", "1", "1"),  # a warm-up
            (stack(shape, "step", "launch", "operators", "layer 0", "linear q+k+v"), "1,000", "4,096", "50.0"),
            (stack(shape, "step", "launch", "operators", "layer 1", "linear q+k+v"), "3000", "8192", "10.0"),
            (stack(shape, "step", "launch", "operators", "layer 0", "attention"), "2000.5", "n/a", "n/a"),
            (stack(shape, "step", "launch", "sample"), "10", "0", "2"),
            ('7  "<default domain>:linear q+k+v:none:none:none:none:none:none"', "10", "0", "2"),
        ]
    )
    recorded = read_ncu(text)[DECODE]
    linear, attention = recorded.operators["linear q+k+v"], recorded.operators["attention"]
    assert (linear.count, linear.bytes) == (2, 12288) and linear.seconds == pytest.approx(4e-6)
    assert linear.occupancy == pytest.approx((0.5 * 1 + 0.1 * 3) / 4)
    assert attention.occupancy is None and attention.seconds == pytest.approx(2.0005e-6)
    assert set(recorded.operators) == {"linear q+k+v", "attention", "sample"}
    plan, _ = model_of("q4_1", "generic")
    table = table_of(recorded, 2, Shape(2, 64), plan, 64, PEAKS, "ncu")
    row = next(r for r in table.rows if r.name == "linear q+k+v")
    assert row.bytes == 6144 and row.calls == 1 and row.binds == "occupancy"
    assert table.seconds == pytest.approx(sum(r.seconds for r in table.rows))


@pytest.mark.parametrize(
    ("units", "seconds", "count"),
    [(("us", "Kbyte", "%"), 3e-6, 5e3), (("usecond", "Mbyte", "%"), 3e-6, 5e6), (("second", "byte", "%"), 3, 5)],
)
def test_units_are_heeded(units: tuple[str, str, str], seconds: float, count: float) -> None:
    names = stack(f"profile {DECODE}", "attention")
    kernels = read_ncu(page([(names, "3", "5", "20")], units))[DECODE].operators["attention"]
    assert kernels.seconds == pytest.approx(seconds) and kernels.bytes == pytest.approx(count)


def test_a_page_without_what_we_need_is_refused() -> None:
    with pytest.raises(RidgelineError, match="holds no kernels"):
        read_ncu("==WARNING== No kernels were profiled.\n")
    with pytest.raises(RidgelineError, match="lacks the column of NVTX ranges"):
        read_ncu(page([(stack("x"), "1", "1", "1")]).replace("Push/Pop_Range", "Other"))
    with pytest.raises(RidgelineError, match=f"lacks the column {TIME}"):
        read_ncu(page([(stack("x"), "1", "1", "1")]).replace(TIME, "gpu__other.sum"))
    with pytest.raises(RidgelineError, match="no kernel in a range of ours"):
        read_ncu(page([(stack("x"), "1", "1", "1")]))


def tool(folder: Path, name: str, body: str) -> None:
    """A program called ``name`` that the shell runs."""
    path = folder / name
    path.write_text("#!/bin/sh\n" + body)
    path.chmod(0o755)


def test_the_tools_are_driven_and_their_failures_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    (tmp_path / "made.csv").write_text(page([(stack(f"profile {DECODE}", "attention"), "3", "5", "20")]))
    log = tmp_path / "log"
    tool(tmp_path, "ncu", f'echo "$@" >> {log}\ncase "$*" in *--import*) cat {tmp_path}/made.csv;; esac\n')
    assert list(nsight.record("ncu", ["a", "child"], tmp_path)) == [DECODE]
    first, second = log.read_text().splitlines()
    assert first.endswith(f"--export {tmp_path}/profile a child") and "--profile-from-start off" in first
    assert f"--import {tmp_path}/profile.ncu-rep --csv --page raw" in second
    tool(tmp_path, "ncu", 'echo "==ERROR== ERR_NVGPUCTRPERM - no permission"\nexit 1\n')
    with pytest.raises(RidgelineError, match="ncu failed with code 1: reading the GPU's counters is not allowed"):
        nsight.record("ncu", ["child"], tmp_path)
    tool(tmp_path, "nsys", 'echo "Collecting"; echo "error: the child said so" >&2\nexit 3\n')
    with pytest.raises(RidgelineError, match="nsys failed with code 3: error: the child said so"):
        nsight.record("nsys", ["child"], tmp_path)
    exported(tmp_path)
    tool(tmp_path, "nsys", "exit 0\n")
    assert list(nsight.record("nsys", ["child"], tmp_path)) == [DECODE]


def test_a_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RidgelineError, match="ncu is not on PATH: install NVIDIA Nsight Compute"):
        nsight.require_tool("ncu")


def test_the_child_runs_the_same_steps_in_ranges_and_without_graphs() -> None:
    config = EngineConfig(model="m.gguf", backend="cuda", max_num_seqs=64)
    words = child(config, [Shape(0, 128), Shape(1, 64), Shape(8, 64)], 2)
    assert words[:5] == [sys.executable, "-m", "ridgeline", "profile", "m.gguf"]
    line = " ".join(words[5:])
    assert "--only-steps -n 2 -p 128 -b 1,8 --context 64" in line
    assert "--backend cuda" in line and "--max-num-seqs 64" in line
    assert "--nvtx" in words and "--no-cuda-graphs" in words
    assert "-p 0 -b 4" in " ".join(child(config, [Shape(4, 9)], 2))
    assert "-b  " not in " ".join(child(config, [Shape(0, 128)], 2)[5:9])


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA H100 PCIe", 2.0e12),
        ("NVIDIA H200", 4.8e12),
        ("NVIDIA A100-SXM4-40GB", 1.555e12),
        ("NVIDIA A100-SXM4-80GB", 2.039e12),
        ("NVIDIA A100 80GB PCIe", 1.935e12),
    ],
)
def test_datasheets_by_the_drivers_name(name: str, bandwidth: float) -> None:
    assert datasheet_of(name).bandwidth == bandwidth
