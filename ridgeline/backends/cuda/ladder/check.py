"""Climbing: the cases of an operator through the rungs, one line each."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ridgeline.backends.cuda.ladder.compile import compile_launch, in_process
from ridgeline.backends.cuda.launch import ARCHS
from ridgeline.core.errors import ConfigError, RidgelineError

RUNGS = ("interpret", "compile", "gpu")
"""The executed PTX of rung 3 will come between the last two."""


@dataclass(frozen=True)
class Outcome:
    """One case on one rung.

    Attributes:
        status: "ok", "FAILED" or "skipped".
        detail: the share of the allowed error, what failed, or why it was skipped.
    """

    case: str
    arch: str
    rung: str
    status: str
    detail: str
    seconds: float


def case_modules(root: Path) -> dict[str, str]:
    """The modules that hold cases, by name; raises ConfigError outside a checkout."""
    folder = root / "tests" / "gpu"
    found = {p.stem.removesuffix("_cases"): f"tests.gpu.{p.stem}" for p in sorted(folder.glob("*_cases.py"))}
    if not found:
        raise ConfigError(f"no cases in {folder}: run this in a checkout of the repository")
    return found


def select(root: Path, wanted: str | None) -> list[tuple[str, int, str]]:
    """(module, index, name) of the cases whose name or module starts with ``wanted``."""
    chosen = []
    for name, module in case_modules(root).items():
        for index, case in enumerate(import_module(module).CASES):
            if wanted is None or wanted in (name, getattr(case, "op", "")) or case.name.startswith(wanted):
                chosen.append((module, index, str(case.name)))
    if not chosen:
        raise ConfigError(f"no GPU case is called {wanted}: see tests/gpu")
    return chosen


def climb(root: Path, wanted: str | None, archs: Sequence[str], rungs: Sequence[str]) -> Iterator[Outcome]:
    """Runs cases on rungs, in order."""
    cases = select(root, wanted)
    for arch in archs:
        if "interpret" in rungs:
            for module, index, name in cases:
                yield _timed(name, arch, "interpret", lambda m=module, i=index, a=arch: _interpret(m, i, a))
        if "compile" in rungs:
            yield from in_process(compile_cases, [(m, i, n, arch) for m, i, n in cases])
        if "gpu" in rungs:
            yield Outcome("all", arch, "gpu", "skipped", "see ridgeline kernels bench, on a machine with a GPU", 0.0)


def _timed(name: str, arch: str, rung: str, task: Any) -> Outcome:
    start = time.perf_counter()
    try:
        status, detail = "ok", task()
    except (AssertionError, RidgelineError) as error:
        status, detail = "FAILED", " ".join(str(error).split())
    return Outcome(name, arch, rung, status, detail, time.perf_counter() - start)


def _interpret(module: str, index: int, arch: str) -> str:
    from ridgeline.backends.cuda.ladder.accuracy import check
    from ridgeline.backends.cuda.ladder.interpret import run

    cases = import_module(module)
    built = cases.build(cases.CASES[index], arch)
    run(built.launches)
    return f"error {max(check(e) for e in built.expected):.2f} of the allowed"


def compile_cases(task: tuple[str, int, str, str]) -> Outcome:
    """One case compiled; runs in a process that compiles."""
    module, index, name, arch = task

    def compiled() -> str:
        cases = import_module(module)
        binaries = [compile_launch(launch, arch) for launch in cases.build(cases.CASES[index], arch).launches]
        spilled = sum(b.local_bytes for b in binaries)
        if spilled:
            raise RidgelineError(f"spills {spilled} bytes a thread")
        return ", ".join(f"{b.registers} registers, {b.shared_bytes} bytes shared" for b in binaries)

    return _timed(name, arch, "compile", compiled)


def archs_of(text: str) -> list[str]:
    """ "sm_80,sm_90" as a list; raises ConfigError for others."""
    archs = [a.strip() for a in text.split(",")]
    unknown = [a for a in archs if a not in ARCHS]
    if unknown:
        raise ConfigError(f"{unknown[0]}: kernels are written for {', '.join(ARCHS)}")
    return archs
