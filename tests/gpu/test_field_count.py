"""What ``bench/gpu_field.py`` counts, on machine code written by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from gpu_count import Runs, issued, moved, operand_bytes, operations_of, skips  # noqa: E402


def listing(*instructions: str) -> str:
    """As cuobjdump prints it, 16 bytes each."""
    return "\n".join(f"        /*{16 * i:04x}*/    {text} ;" for i, text in enumerate(instructions))


FLAT = listing(
    "MOV R1, R2",
    "HMMA.16816.F32.BF16 R4, R8, R12, R4",
    "@P0 BRA 0x50",
    "STG.E.128 [R2.64], R4",
    "STG.E.128 [R2.64+0x10], R4",
    "IADD3 R1, R1, 0x1, RZ",
    "@P1 BRA 0x10",
    "EXIT",
)
"""A loop over tiles and K together: the stores of a tile's end are jumped over in every other step."""


SPECIALIZED = listing(
    "@P0 BRA 0x40",
    "UTMALDG.2D [UR4], [UR6]",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2",
    "@P1 BRA 0x10",
    "@P2 BRA 0x80",
    "HGMMA.64x128x16.F32.BF16 R4, gdesc[UR4], R4",
    "@P3 BRA 0x50",
    "EXIT",
    "HGMMA.64x128x16.F32.BF16 R4, gdesc[UR4], R4",
    "@P4 BRA 0x80",
    "EXIT",
)
"""Three groups of four warps: one loads, two multiply half a tile each."""


@pytest.mark.parametrize(
    ("opcode", "operations"),
    [("HMMA.16816.F32.BF16", 4096), ("IMMA.16832.S8.S8", 8192), ("HGMMA.64x128x16.F32.BF16", 65536)],
)
def test_operations_are_a_warps(opcode: str, operations: int) -> None:
    assert operations_of(opcode) == operations


def test_a_loop_runs_until_its_products_are_done() -> None:
    steps, warps, tiles = 10, 4, 3
    runs = Runs(tiles, operations=4096.0 * steps * warps * tiles)
    assert skips(FLAT) == [(2, 5)]
    # Four instructions a step; MOV, two stores and EXIT once a tile.
    assert issued(FLAT, warps, runs) == warps * tiles * (4 * steps + 4)


def test_what_follows_the_arrival_is_the_last_parts_alone() -> None:
    code = listing("MOV R1, R2", "ATOMG.E.ADD R3, [R2.64], R1", "LDG.E R4, [R2.64]", "STG.E [R2.64], R4", "EXIT")
    assert issued(code, 2, Runs(8, parts=4)) == 2 * 8 * (2 + 3 / 4)


def test_ways_that_part_for_good_are_weighed() -> None:
    code = listing("MOV R1, R2", "@P0 BRA 0x40", "STG.E [R2.64], R4", "EXIT", "MOV R1, R3", "MOV R2, R3", "EXIT")
    assert issued(code, 1, Runs(10, branch=0.8)) == pytest.approx(10 * (2 + 0.8 * 2 + 0.2 * 3))


def test_specialized_groups_run_their_own_loops() -> None:
    """Ten steps of a 128 x 128 tile: 3 instructions of the loading group, 2 of each other, and the rest once."""
    steps, groups = 10, 4
    runs = Runs(jobs=1, operations=steps * 2.0 * 128 * 128 * 16)
    assert issued(SPECIALIZED, 12, runs) == groups * (steps * (3 + 2 + 2) + 4)


PARTS = listing(
    "MOV R1, R2",  # a tile
    "MOV R3, RZ",  # a part
    "HMMA.16816.F32.BF16 R4, R8, R12, R4",  # a step
    "@P0 BRA 0x20",
    "FADD R20, R20, R4",
    "@P1 BRA 0x10",
    "STG.E.128 [R2.64], R20",
    "@P2 EXIT",
    "BRA 0x0",
    "BRA 0x90",
    "NOP",
)
"""A loop over steps in one over parts of K in one over tiles, and what pads the end."""


def test_what_is_around_the_steps_runs_once_a_part() -> None:
    steps, warps, tiles, parts = 12, 4, 3, 2
    runs = Runs(tiles, operations=4096.0 * steps * warps * tiles, passes=parts)
    # Two instructions a step, three a part; MOV, the store, EXIT and the branch once a tile.
    assert issued(PARTS, warps, runs) == warps * tiles * (2 * steps + 3 * parts + 4)


def test_bytes_moved_are_those_of_shared_memory_and_of_spills() -> None:
    code = listing(
        "LDS.64 R4, [R2]", "STS.128 [R2], R4", "LDSM.16.M88.4 R4, [R2]", "LDGSTS.E.BYPASS.128 [R2], [R4.64]",
        "LDL R4, [R1]", "STL.64 [R1], R4", "LDG.E.128 R4, [R2.64]", "EXIT",
    )  # fmt: skip
    assert moved(code, 2, Runs(5)) == 2 * 5 * (256 + 512 + 512 + 512 + 128 + 256)


def test_what_is_copied_ahead_of_a_loop_is_not_copied_at_its_end() -> None:
    code = listing(
        "LDGSTS.E.BYPASS.128 [R2], [R4.64]",
        "HMMA.16816.F32.BF16 R4, R8, R12, R4",
        "@P1 LDGSTS.E.BYPASS.128 [R2], [R4.64]",
        "@P0 BRA 0x10",
        "EXIT",
    )
    assert moved(code, 1, Runs(1, operations=4096.0 * 7)) == 7 * 512


@pytest.mark.parametrize(
    ("opcode", "operands", "size"),
    [
        ("HGMMA.64x128x16.F32.BF16", " R4, gdesc[UR4], R4", (64 + 128) * 16 * 2),
        ("HGMMA.64x128x16.F32.BF16", " R4, R40, gdesc[UR4], R4, gsb0", 128 * 16 * 2),
        ("QGMMA.64x64x32.F32.E4M3.E4M3", " R4, gdesc[UR4], R4", (64 + 64) * 32),
        ("HMMA.16816.F32.BF16", " R4, R8, R12, R4", 0),
    ],
)
def test_hopper_reads_operands_from_shared_memory(opcode: str, operands: str, size: int) -> None:
    assert operand_bytes(opcode, operands) == size


def test_a_warp_groups_operands_are_read_once() -> None:
    code = listing("HGMMA.64x128x16.F32.BF16 R4, gdesc[UR4], R4", "@P0 BRA 0x0", "EXIT")
    runs = Runs(1, operations=10 * 2.0 * 64 * 128 * 16)
    assert moved(code, 4, runs) == 10 * (64 + 128) * 16 * 2
