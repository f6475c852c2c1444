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
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np

os.environ["TRITON_INTERPRET"] = "1"

import torch  # noqa: E402, F401  (imported before the fork, so that children need not)

from ridgeline.backends.cuda.ladder import table  # noqa: E402
from ridgeline.backends.cuda.ladder.check import cases_of  # noqa: E402
from ridgeline.backends.cuda.launch import ARCHS  # noqa: E402
from tests.gpu.equivalents import EQUIVALENT  # noqa: E402
from tests.mutation import allow, forget, survivors, untouched  # noqa: E402
from tests.sim.operators import Mutant, mutants  # noqa: E402

ROOT = Path(__file__).parents[2]
SHARED = {"linear_quantized": ("ridgeline.backends.cuda.codes",)}
"""Modules beside an operator's own whose functions its kernels are made of, and that no other operator stands for."""
CASE_SECONDS = 60.0  # of processor time


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
    found: list[Mutant] = []
    for module in (f"{table.KERNELS}.{op}", *SHARED.get(op, ())):
        source = Path(str(importlib.import_module(module).__file__)).read_text()
        names = kernels_of(source)
        found += [*mutants(module, source, names), *dropped_keywords(module, source, names)]
    return found


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


def check(mutant: Mutant, op: str, cases: Sequence[tuple[str, int, str]]) -> None:
    """Climbs every case of the operator; raises where one notices."""
    allow(CASE_SECONDS)
    forget((table.KERNELS, *chain.from_iterable(SHARED.values()), "tests.gpu."))
    importlib.import_module(mutant.module)
    from ridgeline.backends.cuda.ladder import accuracy
    from ridgeline.backends.cuda.ladder.interpret import run

    for name, index, arch in cases:
        allow(CASE_SECONDS)
        loaded = importlib.import_module(name)
        climb = loaded.build(loaded.CASES[index], arch)
        run(climb.launches)
        for expected in climb.expected:
            accuracy.check(expected)
    for holds in invariants(op):
        allow(CASE_SECONDS)
        holds()


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
        notice = partial(check, op=op, cases=cases)
        if not survivors([untouched(module)], notice, 1):
            sys.exit(f"{op}: its cases fail without a change")
        alive = survivors(chosen, notice, options.jobs)
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
