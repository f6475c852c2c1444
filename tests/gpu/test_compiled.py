"""Rung 2: every kernel compiles for both architectures, without spills, and its card has not got worse."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from ridgeline.backends.cuda.ladder import table
from ridgeline.backends.cuda.ladder.sass import parse

PAGE = Path(__file__).parents[2] / "docs" / "gpu-cards.md"


@pytest.fixture(scope="module")
def rows() -> list[table.Row]:
    """The cards of every kernel, compiled now."""
    return table.make(table.names())


def test_no_card_got_worse(rows: list[table.Row]) -> None:
    kept = table.read(PAGE.read_text())
    assert {row.key for row in kept} == {row.key for row in rows}
    assert not table.regressions(kept, rows)


def test_nothing_spills(rows: list[table.Row]) -> None:
    assert [row.key for row in rows if row.spilled != "0"] == []


def test_a_regression_is_named(rows: list[table.Row]) -> None:
    row = rows[0]
    fields = {c: getattr(row, c) for c in table.COLUMNS}
    before = table.Row(**{**fields, "tensor": "4xHMMA.16816", "copies": "2xLDGSTS", "occupancy": "65/64"})
    after = table.Row(**{**fields, "tensor": "-", "copies": "-", "spilled": "8"})
    lines = table.regressions([before], [after])
    assert len(lines) == 4 and all(" ".join(row.key) in line for line in lines)


def test_machine_code_is_read() -> None:
    code = ["MOV R1, R2", "@!P0 HMMA.16816.F32.BF16 R0, R1, R2, R3", "FADD R1, R2, R3", "@P1 BRA 0xfff0", "EXIT"]
    lines = [f"        /*{0xFFE0 + 16 * i:04x}*/                   {text} ;  /* 0x00 */" for i, text in enumerate(code)]
    lines += ["        /*10030*/                   BRA 0x10030;  /* 0x00 */", "        /*10040*/      NOP;  /* 0x00 */"]
    read = parse("\n".join(["        Function : f", *lines, "        /* 0x000fe20000000f00 */"]))
    assert read.hot_loop() == (1, 3) and len(read.opcodes) == 5
    assert read.classes(1, 3) == Counter({"tensor": 1, "float": 1, "branch": 1})
