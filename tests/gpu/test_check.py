"""``ridgeline kernels check``: what it finds to run, and what it says of a kernel from anywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from ridgeline.backends.cuda.ladder.check import climb, select
from ridgeline.core.errors import ConfigError

ROOT = Path(__file__).parents[2]

FILE = """
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ridgeline.backends.cuda.ladder.climb import Climb, Expected
from ridgeline.backends.cuda.launch import Config, Launch


@triton.jit
def double(x, out, N, BLOCK: tl.constexpr, STEP: tl.constexpr):
    i = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    tl.store(out + i, 2.0 * tl.load(x + i, mask=i < N), mask=i < N)


@triton.jit
def unused(x):
    pass


@dataclass(frozen=True)
class Case:
    name: str
    step: int


CASES = [Case("whole", 16), Case("overlapping", 12), Case("gaps", 20)]


def build(case, arch):
    x = torch.arange(40.0)
    out = torch.empty(40)
    args = {"x": x, "out": out, "N": 40}
    launch = Launch(double, (3,), args, Config({"BLOCK": 16, "STEP": case.step}), ("out",))
    twice = 2 * x.numpy()
    return Climb([launch], (Expected(out, twice.astype("f8"), twice, exact=True),))
"""


@pytest.fixture
def kernel_file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / f"{request.node.name}.py"
    path.write_text(FILE)
    return path


def test_a_kernel_in_a_file_brings_its_own_cases(kernel_file: Path) -> None:
    outcomes = list(climb(ROOT, f"{kernel_file}:double", ["sm_80"], ["interpret", "compile"]))
    said = {(o.case, o.rung): (o.status, o.detail) for o in outcomes}
    assert len(outcomes) == 6
    assert {said[case, "compile"][0] for case in ("whole", "overlapping", "gaps")} == {"ok"}
    assert said["whole", "interpret"][0] == "ok"
    assert (
        said["overlapping", "interpret"][0] == "FAILED" and "without a release" in said["overlapping", "interpret"][1]
    )
    assert said["gaps", "interpret"][0] == "FAILED" and "were not written" in said["gaps", "interpret"][1]


def test_cases_that_do_not_launch_a_kernel_are_left_out(kernel_file: Path) -> None:
    assert list(climb(ROOT, f"{kernel_file}:unused", ["sm_80"], ["interpret"])) == []


def test_an_operators_kernel_takes_the_operators_cases() -> None:
    places = select(ROOT, str(ROOT / "ridgeline/backends/cuda/kernels/gated.py") + ":gated_kernel")
    assert {p.source for p in places} == {"tests.gpu.row_cases"}
    assert {p.name for p in places} > {p.name for p in select(ROOT, "gated")}
    assert all(p.build("sm_80") for p in places[:2])


def test_what_cannot_be_run_is_said_in_one_line(kernel_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        select(ROOT, "missing.py:kernel")
    with pytest.raises(ConfigError, match="which kernel"):
        select(ROOT, str(kernel_file))
    with pytest.raises(ConfigError, match="no kernel other; it has double, unused"):
        select(ROOT, f"{kernel_file}:other")
    broken = tmp_path / "broken_kernels.py"
    broken.write_text("import nothing_of_this_name\n")
    with pytest.raises(ConfigError, match="cannot be imported: ModuleNotFoundError"):
        select(ROOT, f"{broken}:kernel")
    with pytest.raises(ConfigError, match="nothing to run copy|CASES"):
        bare = tmp_path / "bare_kernels.py"
        bare.write_text(FILE.split("@dataclass")[0])
        select(ROOT, f"{bare}:double")
    with pytest.raises(ConfigError, match="no GPU case is called"):
        select(ROOT, "no_such_operator")
