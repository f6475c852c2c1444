"""Breaks the CUDA executor on purpose and sees whether the emulated device, the reference or a solo run notices.

    python -m tests.gpu.mutate_executor --sample 150 --seed 1 --jobs 2     so many mutants, evenly spread
    python -m tests.gpu.mutate_executor --only lowering                    modules whose name contains this

Operators on the syntax tree (tests/sim/operators.py) change the executor's modules. In a forked child the changed
module takes the place of the real one; then come tests of the suite, random scripts (scripts.py) and served workloads,
cheapest first (oracles.py), until something fails. Launches that the parent has interpreted are not interpreted again
(remembered.py). Printed are the share of mutants killed, for each module, and the survivors; those known to change
nothing that can be seen are in ``executor_equivalents.py`` with the reason.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a forked child has lost all threads but one
sys.path[:0] = [folder for folder in ("tests",) if folder not in sys.path]  # as pytest has it: invariance, graph

import torch  # noqa: E402

from tests.gpu.executor_equivalents import EQUIVALENT  # noqa: E402
from tests.gpu.remembered import read, remember, write  # noqa: E402
from tests.mutation import (  # noqa: E402
    Verdict,
    allow,
    forget,
    path_of,
    report,
    sample,
    untouched,
    verdicts,
)
from tests.sim.operators import Mutant, mutants  # noqa: E402

PACKAGE = "ridgeline.backends.cuda"
MODULES = tuple(
    f"{PACKAGE}.{name}" for name in ("executor", "beside", "step", "lowering", "memory", "weights", "variants")
)
HOLDERS = (*MODULES, *(f"{PACKAGE}.{name}" for name in ("choices", "compiled", "emulated", "opening")), "tests.gpu.")
"""What must be imported again beside a mutant; the kernels, and what interprets them, stay."""

SECONDS = 240.0  # of processor time: an endless loop, or so much that is no longer what the parent interpreted


def check(mutant: Mutant) -> None:
    """Everything that could notice, a mutant's module in its place."""
    allow(SECONDS)
    forget(HOLDERS)
    remember()
    from tests.gpu.oracles import ORACLES

    for oracle in ORACLES:
        oracle()


def warm() -> None:
    """Interprets in this process, once, what children will ask for."""
    torch.set_num_threads(1)  # a forked child has no other threads to wait for
    remember()
    from tests.gpu.oracles import ORACLES

    for oracle in ORACLES:
        start = time.perf_counter()
        oracle()
        print(f"  {time.perf_counter() - start:6.1f} s  {name_of(oracle)}", flush=True)


def name_of(oracle: Callable[[], None]) -> str:
    """A function's, with what it is bound to."""
    if isinstance(oracle, partial):
        given = [*map(str, oracle.args), *(f"{k}={v}" for k, v in oracle.keywords.items())]
        return f"{oracle.func.__name__}({', '.join(given)})"
    return oracle.__name__


def shown(verdict: Verdict, done: int) -> None:
    """A line for each that lives, or that took too long."""
    m = verdict.mutant
    if not verdict.killed or verdict.late:
        what = "too long" if verdict.late else "survives"
        print(f"{done:5} {what}: {path_of(m.module).name}:{m.line} {m.scope}: {m.before}  ->  {m.after}", flush=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="so many mutants, evenly spread")
    parser.add_argument("--seed", type=int, default=1, help="draws them")
    parser.add_argument("--only", default="", help="modules whose name contains this")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="children at once")
    parser.add_argument("--least", type=float, default=85.0, help="fail below this share killed, in percent")
    parser.add_argument("--keep", type=Path, help="a file of interpreted launches, read first and written at the end")
    options = parser.parse_args()
    everything = [
        m for module in MODULES if options.only in module for m in mutants(module, path_of(module).read_text())
    ]
    chosen = sample([m for m in everything if m.key not in EQUIVALENT], options.sample, options.seed)
    if options.keep:
        read(options.keep)
    try:
        warm()
    finally:
        if options.keep:
            write(options.keep)
    if verdicts([untouched(MODULES[0])], check, 1)[0].killed:
        raise SystemExit("the code as it is does not pass: see python -m pytest tests/gpu")
    found = verdicts(chosen, check, options.jobs, shown)
    alive = sorted((v.mutant for v in found if not v.killed), key=lambda m: (m.module, m.line))
    report(chosen, alive, everything, EQUIVALENT)
    print(f"{sum(v.late for v in found)} of the killed took more than {SECONDS:.0f} s of processor time")
    return int(100 * (len(chosen) - len(alive)) < options.least * len(chosen))


if __name__ == "__main__":
    sys.exit(main())
