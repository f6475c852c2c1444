"""Climbing: the cases of an operator through the rungs, one line each."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from triton.runtime.jit import KernelInterface

from ridgeline.backends.cuda import kernels
from ridgeline.backends.cuda.ladder.climb import Climb
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


@dataclass(frozen=True)
class Place:
    """Where a case is to be found.

    Attributes:
        source: a module, or the path of a Python file, that has ``CASES`` and ``build(case, arch) -> Climb``.
        index, name: of the case.
        kernel: the one whose launches are asked for; None: all.
    """

    source: str
    index: int
    name: str
    kernel: str | None = None

    def build(self, arch: str) -> Climb | None:
        """The case for an architecture; None if it does not launch the kernel."""
        cases = load(self.source)
        built: Climb = cases.build(cases.CASES[self.index], arch)
        names = {launch.kernel.fn.__name__ for launch in built.launches}
        return built if self.kernel is None or self.kernel in names else None


def load(source: str) -> Any:
    """A module by its name or its file; raises ConfigError for a file that cannot be imported."""
    if not source.endswith(".py"):
        return import_module(source)
    name = f"checked_{Path(source).stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, source)
        assert spec and spec.loader
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise ConfigError(f"{source} cannot be imported: {type(error).__name__}: {error}") from error
    return sys.modules[name]


def select(root: Path, wanted: str | None) -> list[Place]:
    """The cases of an operator, those whose name starts with ``wanted``, or those of a kernel, "path/file.py:name".

    Raises ConfigError when there are none.
    """
    if wanted is not None and ".py" in wanted:
        return _select_kernel(root, *wanted.partition(":")[::2])
    chosen = []
    for name, module in case_modules(root).items():
        for index, case in enumerate(import_module(module).CASES):
            if wanted is None or wanted in (name, getattr(case, "op", "")) or case.name.startswith(wanted):
                chosen.append(Place(module, index, str(case.name)))
    if not chosen:
        raise ConfigError(f"no GPU case is called {wanted}: see tests/gpu")
    return chosen


def _select_kernel(root: Path, path: str, kernel: str) -> list[Place]:
    """The cases of a kernel: in tests/gpu for an operator of this package, else in the kernel's own file."""
    file = Path(path).resolve()
    if not file.is_file():
        raise ConfigError(f"{path}: no such file")
    module = load(str(file))
    found = [name for name, value in vars(module).items() if isinstance(value, KernelInterface)]
    if not kernel or kernel not in found:
        what = f"no kernel {kernel}" if kernel else "which kernel?"
        raise ConfigError(f"{path}: {what}; it has {', '.join(found) or 'none'} (path/to/file.py:kernel)")
    if file.parent == Path(kernels.__file__).parent:
        return [Place(m, index, name, kernel) for m, index, name in cases_of(root, file.stem)]
    if not hasattr(module, "CASES") or not hasattr(module, "build"):
        raise ConfigError(
            f"{path}: nothing to run {kernel} with: give it CASES, each with a name, and build(case, arch), which "
            "returns a Climb (ridgeline/backends/cuda/ladder/climb.py), as tests/gpu/row_cases.py has"
        )
    return [Place(str(file), index, str(case.name), kernel) for index, case in enumerate(module.CASES)]


def cases_of(root: Path, op: str) -> list[tuple[str, int, str]]:
    """(module, index, name) of the cases that run an operator's kernels."""
    found = []
    for module in case_modules(root).values():
        cases = import_module(module)
        runs = getattr(cases, "KERNELS_OF", None)
        for index, case in enumerate(cases.CASES):
            if op in (runs(case) if runs else (case.op,)):
                found.append((module, index, str(case.name)))
    return found


def climb(root: Path, wanted: str | None, archs: Sequence[str], rungs: Sequence[str]) -> Iterator[Outcome]:
    """Runs cases on rungs, in order."""
    places = select(root, wanted)
    for arch in archs:
        if "interpret" in rungs:
            yield from filter(None, (_interpret(place, arch) for place in places))
        if "compile" in rungs:
            yield from filter(None, in_process(compile_case, [(place, arch) for place in places]))
        if "gpu" in rungs:
            yield Outcome("all", arch, "gpu", "skipped", "see ridgeline kernels bench, on a machine with a GPU", 0.0)


def _timed(place: Place, arch: str, rung: str, task: Callable[[Climb], str]) -> Outcome | None:
    """What ``task`` says of a case; None for one that does not launch the wanted kernel."""
    start = time.perf_counter()
    try:
        built = place.build(arch)
        if built is None:
            return None
        status, detail = "ok", task(built)
    except (AssertionError, RidgelineError) as error:
        status, detail = "FAILED", " ".join(str(error).split())
    return Outcome(place.name, arch, rung, status, detail, time.perf_counter() - start)


def _interpret(place: Place, arch: str) -> Outcome | None:
    from ridgeline.backends.cuda.ladder.accuracy import check
    from ridgeline.backends.cuda.ladder.interpret import run

    def interpreted(built: Climb) -> str:
        run(built.launches)
        return f"error {max(check(e) for e in built.expected):.2f} of the allowed"

    return _timed(place, arch, "interpret", interpreted)


def compile_case(task: tuple[Place, str]) -> Outcome | None:
    """One case compiled; runs in a process that compiles."""
    place, arch = task

    def compiled(built: Climb) -> str:
        binaries = [compile_launch(launch, arch) for launch in built.launches]
        spilled = sum(b.local_bytes for b in binaries)
        if spilled:
            raise RidgelineError(f"spills {spilled} bytes a thread")
        return ", ".join(f"{b.registers} registers, {b.shared_bytes} bytes shared" for b in binaries)

    return _timed(place, arch, "compile", compiled)


def archs_of(text: str) -> list[str]:
    """ "sm_80,sm_90" as a list; raises ConfigError for others."""
    archs = [a.strip() for a in text.split(",")]
    unknown = [a for a in archs if a not in ARCHS]
    if unknown:
        raise ConfigError(f"{unknown[0]}: kernels are written for {', '.join(ARCHS)}")
    return archs
