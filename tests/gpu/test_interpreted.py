"""Rung 1: every case of every GPU kernel, interpreted exactly, its programs in order and shuffled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ridgeline.backends.cuda.ladder.accuracy import check
from ridgeline.backends.cuda.ladder.interpret import run
from tests.gpu import attention_cases, linear_cases, row_cases, sample_cases, step_cases

MODULES = (row_cases, linear_cases, attention_cases, sample_cases, step_cases)
CASES = [(module, case) for module in MODULES for case in module.CASES]
BOTH = (linear_cases, attention_cases)  # of which the architectures have different kernels
BUILDS = [(m, c, "sm_90") for m, c in CASES] + [(m, c, "sm_80") for m, c in CASES[::3] if m in BOTH]
BUILDS += [(row_cases, c, "sm_80") for c in row_cases.CASES if "-fp8-" in c.name]  # encoded there in integers
"""``ridgeline kernels check`` runs every case for both."""


@pytest.mark.parametrize(("module", "case", "arch"), BUILDS, ids=[f"{c.name}-{arch}" for _, c, arch in BUILDS])
def test_case(module: Any, case: Any, arch: str) -> None:
    """Accurate, in bounds, every element written; the same bits in any order of programs."""
    climb = module.build(case, arch)
    ordered = (
        not any(launch.updates for launch in climb.launches) and len(case.name) % 4
    )  # a quarter of the simple ones
    before = {id(t): t.clone() for launch in climb.launches for t in launch.args.values() if hasattr(t, "clone")}
    run(climb.launches)
    for expected in climb.expected:
        check(expected)
    if ordered:
        return
    first = [e.tensor.clone() for e in climb.expected]
    for launch in climb.launches:
        for name in launch.updates:
            launch.args[name].copy_(before[id(launch.args[name])])
    run(climb.launches, seed=1)
    for expected, kept in zip(climb.expected, first, strict=True):
        assert torch.equal(bits(expected.tensor), bits(kept))


ROW_WISE = [(m, c) for m, c in CASES if m not in (attention_cases, step_cases) and 1 < c.rows < 20]  # test_attention.py


@pytest.mark.parametrize(("module", "case"), ROW_WISE, ids=[case.name for _, case in ROW_WISE])
def test_a_row_alone_has_the_same_bits(module: Any, case: Any) -> None:
    """``batch_invariant``: what a row gives depends on no other row."""
    whole, row = module.build(case, "sm_90"), case.rows - 1
    alone = module.build(case, "sm_90", only=row)
    for climb in (whole, alone):
        run(climb.launches)
    for one, all_rows in zip(alone.expected, whole.expected, strict=True):
        if len(one.tensor) == 1:  # a cache keeps its size
            assert torch.equal(bits(one.tensor), bits(all_rows.tensor[row : row + 1]))


def bits(x: torch.Tensor) -> torch.Tensor:
    """What a tensor holds, NaN included, as comparable integers."""
    return x.contiguous().view(torch.uint8)
