"""Breaks the control plane on purpose and sees whether the simulation notices.

    python -m tests.sim.mutate                      every mutant of every module
    python -m tests.sim.mutate --sample 60          so many of them, evenly spread
    python -m tests.sim.mutate --only kvcache       modules whose name contains this
    python -m tests.sim.mutate --faults             the classic faults alone

Each mutant runs in a forked child in which its module is replaced in memory, against the seeds of the simulation, up
to the first that fails, and then the work that all seeds cost against what is recorded. A child that a seed keeps busy
for too long is killed too: that is an endless loop. Printed are the share of mutants killed, for each module, and the
survivors; those known to change nothing that can be seen are in ``equivalents.py`` with the reason.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial

import numpy as np

import ridgeline.core.types  # noqa: F401  (imported before the fork, so that children need not)
from tests.mutation import allow, forget, path_of, report, sample, survivors, untouched
from tests.sim.equivalents import EQUIVALENT
from tests.sim.faults import FAULTS
from tests.sim.operators import Mutant, mutants

WHOLE = (
    "ridgeline.kvcache.block_pool",
    "ridgeline.kvcache.prefix",
    "ridgeline.kvcache.cache",
    "ridgeline.scheduler.budget",
    "ridgeline.scheduler.ngram",
    "ridgeline.scheduler.plan",
    "ridgeline.scheduler.queue",
    "ridgeline.scheduler.scheduler",
    "ridgeline.scheduler.sequence",
)
OUTPUTS = {
    "ridgeline.engine.engine": frozenset(
        f"Engine.{name}"
        for name in (
            "submit", "abort", "step", "_finish_oldest", "_accept_decodes", "_accept_token", "_accept_chunk",
            "_accept_drafts", "_draft", "_drop_all",
        )
    ),
    "ridgeline.engine.request": frozenset(
        [f"Request.{name}" for name in ("accept", "take_scores", "pool", "end", "fail", "slot_start")] + ["_scored"]
    ),
}  # fmt: skip
"""Of these modules, what handles a step's output."""

SEEDS = 300
FAULT_SEEDS = 3000  # a classic fault must not survive; one shows in but a few of these
SEED_SECONDS = 4.0  # of processor time; a seed takes a hundredth of a second


def check(mutant: Mutant, seeds: Sequence[int]) -> None:
    """Run the seeds, and compare the work that all cost with what is recorded; raises where either is wrong."""
    allow(SEED_SECONDS)
    forget(("ridgeline.engine", "ridgeline.kvcache", "ridgeline.scheduler", "tests.sim."))
    from tests.sim.effort import RECORDED, SEEDS, Effort
    from tests.sim.simulation import run
    from tests.sim.workload import draw

    total = Effort()
    for seed in seeds:
        allow(SEED_SECONDS)
        total.add(run(draw(seed)))
        if seed == SEEDS - 1 and seeds[0] == 0 and total.excess(RECORDED):
            raise AssertionError("more work than recorded")


def all_mutants(only: str = "") -> list[Mutant]:
    """Every mutant of the control plane."""
    found: list[Mutant] = []
    for module in WHOLE:
        if only in module:
            found += mutants(module, path_of(module).read_text())
    for module, scopes in OUTPUTS.items():
        if only in module:
            found += mutants(module, path_of(module).read_text(), scopes)
    return found


def classic() -> list[Mutant]:
    """The classic faults, as mutants; raises ValueError when the code that one of them breaks is gone."""
    found = []
    for fault in FAULTS:
        source = path_of(fault.module).read_text()
        if source.count(fault.before) != 1:
            raise ValueError(f"{fault.name}: {fault.module} does not contain once: {fault.before!r}")
        changed = source.replace(fault.before, fault.after)
        line = source[: source.index(fault.before)].count("\n") + 1
        found.append(Mutant(fault.module, line, fault.name, fault.before, fault.after, changed))
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="so many mutants, evenly spread")
    parser.add_argument("--only", default="", help="modules whose name contains this")
    parser.add_argument("--seeds", type=int, help=f"seeds that a mutant must survive ({SEEDS}; faults: {FAULT_SEEDS})")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="children at once")
    parser.add_argument("--faults", action="store_true", help="the classic faults alone")
    parser.add_argument("--least", type=float, default=90.0, help="fail below this share killed, in percent")
    options = parser.parse_args()
    np.zeros(1)
    everything = classic() if options.faults else all_mutants(options.only)
    able = [m for m in everything if m.key not in EQUIVALENT]
    chosen = everything if options.faults else sample(able, options.sample)
    notice = partial(check, seeds=range(options.seeds or (FAULT_SEEDS if options.faults else SEEDS)))
    if not survivors([untouched(WHOLE[0])], notice, 1):
        raise SystemExit("the code as it is does not pass: see python -m tests.sim.soak --from 0, tests.sim.effort")
    alive = survivors(chosen, notice, options.jobs)
    report(chosen, alive, everything, EQUIVALENT)
    least = 100.0 if options.faults else options.least
    return int(100 * (len(chosen) - len(alive)) < least * len(chosen))


if __name__ == "__main__":
    sys.exit(main())
