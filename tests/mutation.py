"""What tools that break modules on purpose share: a changed module in place of the real one, each in a forked child.

A child forgets what it had imported of the modules that could hold on to the real one, imports the changed one from a
file of its own, and runs a check; if that raises, or keeps the child busy beyond its limits, the mutant is killed.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import random
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path

from tests.sim.operators import Mutant

ROOT = Path(__file__).parent.parent
MEMORY = 6 << 30
Check = Callable[[Mutant], None]
"""Imports what it needs, a mutant in its place, and raises if it notices."""


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant; ``late``: it was killed for the time it took."""

    mutant: Mutant
    killed: bool
    late: bool


class Finder(importlib.abc.MetaPathFinder):
    """Finds one module in another file."""

    def __init__(self, module: str, path: str) -> None:
        self.module, self.path = module, path

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        """A spec for the module it replaces."""
        if name != self.module:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=SourceFileLoader(name, self.path))


def path_of(module: str) -> Path:
    """A module's file."""
    return ROOT / (module.replace(".", "/") + ".py")


def forget(prefixes: tuple[str, ...]) -> None:
    """Unloads modules whose names begin so: whatever has been imported already would hide a mutant."""
    for name in [n for n in sys.modules if n.startswith(prefixes)]:
        del sys.modules[name]
        package, _, leaf = name.rpartition(".")
        if hasattr(sys.modules.get(package), leaf):
            delattr(sys.modules[package], leaf)


@contextmanager
def replaced(mutant: Mutant) -> Iterator[None]:
    """Within it a mutant's module is imported as changed, from a file: the interpreter of kernels reads it again."""
    sys.dont_write_bytecode = True
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(mutant.source)
        file.flush()
        finder = Finder(mutant.module, file.name)
        sys.meta_path.insert(0, finder)
        yield
        sys.meta_path.remove(finder)


def allow(seconds: float) -> None:
    """Ends this process when it has used so much more processor time, or sleeps, unless this is called again."""
    for number, timer, after in ((signal.SIGPROF, signal.ITIMER_PROF, 1), (signal.SIGALRM, signal.ITIMER_REAL, 20)):
        signal.signal(number, signal.SIG_DFL)
        signal.setitimer(timer, after * seconds)


def _fork(mutant: Mutant, check: Check) -> int:
    """Starts a child for a mutant; returns its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    status = 1
    try:
        with replaced(mutant):
            check(mutant)
        status = 0
    finally:
        os._exit(status)


def verdicts(
    chosen: Sequence[Mutant], check: Check, jobs: int, show: Callable[[Verdict, int], None] | None = None
) -> list[Verdict]:
    """Checks every mutant in a child of its own, ``jobs`` at once; ``show`` is told each, and how many are done."""
    done: list[Verdict] = []
    running: dict[int, Mutant] = {}
    waiting = list(reversed(chosen))
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop()
            running[_fork(mutant, check)] = mutant
        child, status = os.wait()
        late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGPROF, signal.SIGALRM)
        killed = not os.WIFEXITED(status) or os.WEXITSTATUS(status) != 0
        done.append(Verdict(running.pop(child), killed, late))
        if show is not None:
            show(done[-1], len(done))
    return done


def survivors(chosen: Sequence[Mutant], check: Check, jobs: int) -> list[Mutant]:
    """Those of the mutants that the check does not notice."""
    alive = [v.mutant for v in verdicts(chosen, check, jobs) if not v.killed]
    return sorted(alive, key=lambda m: (m.module, m.line))


def untouched(module: str) -> Mutant:
    """No change at all: a check that notices this one says nothing about the others."""
    return Mutant(module, 0, "", "", "", path_of(module).read_text())


def sample(able: Sequence[Mutant], number: int | None, seed: int | None = None) -> list[Mutant]:
    """So many of the mutants, evenly spread; with a seed each drawn from its part of them."""
    if number is None or number >= len(able):
        return list(able)
    rng = random.Random(seed)
    shift = (lambda: 0.0) if seed is None else rng.random
    return [able[int((i + shift()) * len(able) / number)] for i in range(number)]


def report(
    chosen: Sequence[Mutant], alive: Sequence[Mutant], everything: Sequence[Mutant], same: Collection[object]
) -> None:
    """Prints the kill rate of each module and the survivors; ``same``: keys of those known to change nothing."""
    for module in dict.fromkeys(m.module for m in chosen):
        number = sum(m.module == module for m in chosen)
        left = sum(m.module == module for m in alive)
        known = sum(m.module == module and m.key in same for m in everything)
        print(f"{module:35} {number - left:4} of {number:4} killed, {100 * (number - left) / number:5.1f}%"
              + (f"; {known} known to be equivalent" if known else ""))  # fmt: skip
    number = len(chosen)
    print(f"{'all':35} {number - len(alive):4} of {number:4} killed, {100 * (number - len(alive)) / number:5.1f}%")
    for m in alive:
        print(f"  {path_of(m.module).relative_to(ROOT)}:{m.line} {m.scope}: {m.before}  ->  {m.after}")
