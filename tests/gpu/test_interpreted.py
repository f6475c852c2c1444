"""Rung 1: every case of every GPU kernel, interpreted exactly, its programs in order and shuffled."""

from __future__ import annotations

import pytest
import torch

from ridgeline.backends.cuda.ladder.accuracy import check, values
from ridgeline.backends.cuda.ladder.interpret import run
from tests.gpu import row_cases


@pytest.mark.parametrize("case", row_cases.CASES, ids=lambda c: c.name)
def test_case(case: object) -> None:
    """Accurate, in bounds, every element written; the same bits in any order of programs."""
    climb = row_cases.build(case, "sm_90")
    before = {id(t): t.clone() for launch in climb.launches for t in launch.args.values() if hasattr(t, "clone")}
    run(climb.launches)
    for expected in climb.expected:
        check(expected)
    first = [e.tensor.clone() for e in climb.expected]
    for launch in climb.launches:
        for name in launch.updates:
            launch.args[name].copy_(before[id(launch.args[name])])
    run(climb.launches, seed=1)
    for expected, bits in zip(climb.expected, first, strict=True):
        assert (
            torch.equal(expected.tensor.view(torch.uint8), bits.view(torch.uint8))
            or (values(expected.tensor) == values(bits)).all()
        )
