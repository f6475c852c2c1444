"""Breaks GPU kernels on purpose and sees whether the first rung notices.

    python -m tests.gpu.mutate [OP] [--sample N] [--jobs 2]

Operators on the syntax tree (tests/sim/operators.py, and masks and fill values left out) change the kernels of a file;
the changed file takes the place of the real one in a forked child, which climbs that operator's cases, for both
architectures where their kernels differ, and then checks that bits hang on nothing beside a row, until something
fails. Printed are the share of mutants killed and the survivors; those known to change nothing are in
``equivalents.py`` with the reason.
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import importlib.util
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path

import numpy as np

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402, F401  (imported before the fork, so that children need not)

from ridgeline.backends.cuda.ladder import table  # noqa: E402
from ridgeline.backends.cuda.ladder.check import cases_of  # noqa: E402
from ridgeline.backends.cuda.launch import ARCHS  # noqa: E402
from tests.gpu.equivalents import EQUIVALENT  # noqa: E402
from tests.sim.operators import Mutant, mutants  # noqa: E402

ROOT = Path(__file__).parents[2]
CASE_SECONDS, MEMORY = 60.0, 6 << 30


def kernels_of(source: str) -> frozenset[str]:
    """Names of the functions that Triton compiles."""
    tree = ast.parse(source)
    return frozenset(
        n.name
        for n in tree.body
        if isinstance(n, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in n.decorator_list)
    )


def dropped_keywords(module: str, source: str, names: frozenset[str]) -> Iterator[Mutant]:
    """``mask`` and ``other`` of every load and store, left out one by one."""
    tree = ast.parse(source)
    for function in (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name in names):
        for call in (n for n in ast.walk(function) if isinstance(n, ast.Call)):
            for keyword in [k for k in call.keywords if k.arg in ("mask", "other")]:
                before, kept = ast.unparse(call), list(call.keywords)
                call.keywords = [k for k in kept if k is not keyword]
                yield Mutant(
                    module, call.lineno, function.name, before, ast.unparse(call), ast.unparse(copy.deepcopy(tree))
                )
                call.keywords = kept


def mutants_of(op: str) -> list[Mutant]:
    """Every mutant of an operator's kernels."""
    module = f"{table.KERNELS}.{op}"
    source = Path(str(importlib.import_module(module).__file__)).read_text()
    names = kernels_of(source)
    return [*mutants(module, source, names), *dropped_keywords(module, source, names)]


def invariants(op: str) -> list[Callable[[], None]]:
    """What must hold of an operator's bits beside its cases, as tests of the suite check it."""
    if op.startswith("attention"):
        from tests.gpu import test_attention as attention

        beside = partial(attention.test_beside_others, op)
        return [beside, *(partial(attention.test_pieces_and_kernels, arch, 100) for arch in ARCHS)]
    if op.startswith("linear"):
        from tests.gpu import test_linear as linear

        mine = [kind for of, kind in linear.KINDS if of == op]
        same = linear.test_parts_side_by_side_or_one_after_another
        return [partial(same, op, kind, arch) for kind in mine for arch in ARCHS]
    return []


def build_names(op: str) -> list[tuple[str, int, str]]:
    """(module, index, architecture) of the cases that run an operator's kernels."""
    both = op.startswith(("attention", "linear"))
    found = [(module, index) for module, index, _ in cases_of(ROOT, op)]
    return [(m, i, arch) for arch in (ARCHS[::-1] if both else ARCHS[1:]) for m, i in found]


def survive(mutant: Mutant, op: str, cases: Sequence[tuple[str, int, str]]) -> int:
    """In a child of its own: 0 when no case notices, 1 when one does."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for name in list(sys.modules):  # whatever has been imported already would hide the mutant
        if name.startswith((table.KERNELS, "tests.gpu.")):
            del sys.modules[name]
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:  # the interpreter reads the source again
        file.write(mutant.source)
        file.flush()
        try:
            importlib.import_module(table.KERNELS)
            spec = importlib.util.spec_from_loader(mutant.module, SourceFileLoader(mutant.module, file.name))
            assert spec and spec.loader
            module = importlib.util.module_from_spec(spec)
            sys.modules[mutant.module] = module
            spec.loader.exec_module(module)
            from ridgeline.backends.cuda.ladder.accuracy import check
            from ridgeline.backends.cuda.ladder.interpret import run

            for name, index, arch in cases:
                signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
                loaded = importlib.import_module(name)
                climb = loaded.build(loaded.CASES[index], arch)
                run(climb.launches)
                for expected in climb.expected:
                    check(expected)
            for holds in invariants(op):
                signal.setitimer(signal.ITIMER_REAL, CASE_SECONDS)
                holds()
        except BaseException:
            return 1
    return 0


def fork(mutant: Mutant, op: str, cases: Sequence[tuple[str, int, str]]) -> int:
    """Starts a child for a mutant; returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os._exit(survive(mutant, op, cases))
    return child


def survivors(chosen: Sequence[Mutant], op: str, cases: Sequence[tuple[str, int, str]], jobs: int) -> list[Mutant]:
    """Those of the mutants that no case notices."""
    alive: list[Mutant] = []
    running: dict[int, Mutant] = {}
    waiting = list(reversed(chosen))
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            running[fork(mutant, op, cases)] = mutant
        child, status = os.wait()
        mutant = running.pop(child)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            alive.append(mutant)
    return sorted(alive, key=lambda m: m.line)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("op", nargs="?", help="an operator; all if none")
    parser.add_argument("--sample", type=int, default=0, help="mutants of each operator, evenly spread; 0: all")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    total = killed = known = 0
    for op in [options.op] if options.op else table.names():
        module = f"{table.KERNELS}.{op}"
        chosen, cases = mutants_of(op), build_names(op)
        if options.sample and options.sample < len(chosen):
            chosen = [chosen[int(i)] for i in np.linspace(0, len(chosen) - 1, options.sample)]
        source = Path(str(importlib.import_module(module).__file__)).read_text()
        if not survivors([Mutant(module, 0, "", "", "", source)], op, cases, 1):
            sys.exit(f"{op}: its cases fail without a change")
        alive = survivors(chosen, op, cases, options.jobs)
        same = [m for m in alive if (op, m.scope, m.before, m.after) in EQUIVALENT]
        total, killed, known = total + len(chosen), killed + len(chosen) - len(alive), known + len(same)
        print(
            f"{op}: {len(chosen) - len(alive)} of {len(chosen)} killed, {len(same)} known to change nothing", flush=True
        )
        for mutant in alive:
            mark = "=" if mutant in same else " "
            print(f"  {mark} {mutant.scope}:{mutant.line}: {mutant.before}  ->  {mutant.after}", flush=True)
    print(f"{killed} of {total} killed, {known} equivalent: {100 * killed / (total - known):.1f}% of the others")


if __name__ == "__main__":
    main()
