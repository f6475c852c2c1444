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
import importlib.abc
import importlib.util
import os
import resource
import signal
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import numpy as np

import ridgeline.core.types  # noqa: F401  (imported before the fork, so that children need not)
from tests.sim.equivalents import EQUIVALENT
from tests.sim.faults import FAULTS
from tests.sim.operators import Mutant, mutants

ROOT = Path(__file__).parent.parent.parent
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
SEED_SECONDS = 4.0  # of processor time; a seed takes a hundredth of a second
MEMORY = 4 * 2**30


def path_of(module: str) -> Path:
    """A module's file."""
    return ROOT / (module.replace(".", "/") + ".py")


class Replacement(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from given source instead of its file."""

    def __init__(self, module: str, source: str) -> None:
        self.module, self.source = module, source

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        """A spec for the module it replaces."""
        return importlib.util.spec_from_loader(name, self) if name == self.module else None

    def exec_module(self, module: ModuleType) -> None:
        """Run the given source."""
        exec(compile(self.source, f"<mutant of {self.module}>", "exec"), module.__dict__)


def survive(mutant: Mutant, seeds: Sequence[int]) -> int:
    """In a child of its own: 0 when the simulation notices nothing, 1 when it does."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, SEED_SECONDS)
    for name in list(sys.modules):  # whatever has been imported already would hide the mutant
        if name.startswith(("ridgeline.engine", "ridgeline.kvcache", "ridgeline.scheduler", "tests.sim.")):
            del sys.modules[name]
    sys.meta_path.insert(0, Replacement(mutant.module, mutant.source))
    try:
        from tests.sim.effort import RECORDED, SEEDS, Effort
        from tests.sim.simulation import run
        from tests.sim.workload import draw

        total = Effort()
        for seed in seeds:
            signal.setitimer(signal.ITIMER_PROF, SEED_SECONDS)
            total.add(run(draw(seed)))
            if seed == SEEDS - 1 and seeds[0] == 0 and total.excess(RECORDED):
                return 1
    except BaseException:
        return 1
    return 0


def fork(mutant: Mutant, seeds: Sequence[int]) -> int:
    """Start a child for a mutant; returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os._exit(survive(mutant, seeds))
    return child


def survivors(chosen: Sequence[Mutant], seeds: Sequence[int], jobs: int) -> list[Mutant]:
    """Those of the mutants that the simulation does not notice."""
    alive: list[Mutant] = []
    running: dict[int, Mutant] = {}
    waiting = list(reversed(chosen))
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            running[fork(mutant, seeds)] = mutant
        child, status = os.wait()
        mutant = running.pop(child)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            alive.append(mutant)
    return sorted(alive, key=lambda m: (m.module, m.line))


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


def sample(everything: Sequence[Mutant], number: int | None) -> list[Mutant]:
    """So many mutants, evenly spread, none of them known to be equivalent."""
    able = [m for m in everything if m.key not in EQUIVALENT]
    if number is None or number >= len(able):
        return able
    return [able[i * len(able) // number] for i in range(number)]


def untouched() -> Mutant:
    """No change at all: a simulation that notices this one says nothing about the others."""
    module = WHOLE[0]
    return Mutant(module, 1, "", "", "", path_of(module).read_text())


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


def report(chosen: Sequence[Mutant], alive: Sequence[Mutant], everything: Sequence[Mutant]) -> None:
    """Print the kill rate of each module and the survivors."""
    for module in dict.fromkeys(m.module for m in chosen):
        number = sum(m.module == module for m in chosen)
        left = sum(m.module == module for m in alive)
        same = sum(m.module == module and m.key in EQUIVALENT for m in everything)
        print(f"{module:35} {number - left:4} of {number:4} killed, {100 * (number - left) / number:5.1f}%"
              + (f"; {same} known to be equivalent" if same else ""))  # fmt: skip
    number = len(chosen)
    print(f"{'all':35} {number - len(alive):4} of {number:4} killed, {100 * (number - len(alive)) / number:5.1f}%")
    for m in alive:
        print(f"  {path_of(m.module).relative_to(ROOT)}:{m.line} {m.scope}: {m.before}  ->  {m.after}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="so many mutants, evenly spread")
    parser.add_argument("--only", default="", help="modules whose name contains this")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="seeds that a mutant must survive")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="children at once")
    parser.add_argument("--faults", action="store_true", help="the classic faults alone")
    parser.add_argument("--least", type=float, default=90.0, help="fail below this share killed, in percent")
    options = parser.parse_args()
    np.zeros(1)
    everything = classic() if options.faults else all_mutants(options.only)
    chosen = everything if options.faults else sample(everything, options.sample)
    seeds = range(options.seeds)
    if not survivors([untouched()], seeds, 1):
        raise SystemExit("the code as it is does not pass: see python -m tests.sim.soak --from 0, tests.sim.effort")
    alive = survivors(chosen, seeds, options.jobs)
    report(chosen, alive, everything)
    least = 100.0 if options.faults else options.least
    return int(100 * (len(chosen) - len(alive)) < least * len(chosen))


if __name__ == "__main__":
    sys.exit(main())
