"""Runs seeds of the simulation: a range of them, or on and on.

    python -m tests.sim.soak --seed 17              one seed; a failure prints the whole trace
    python -m tests.sim.soak --from 1000 --count 500
    python -m tests.sim.soak                        until stopped or failed, from a seed that the clock gives

A failing seed is shrunk: as many of its requests are left out as can be, and one line repeats what is left.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from dataclasses import replace

from tests.sim.simulation import run
from tests.sim.workload import Scenario, draw


def failure(scenario: Scenario) -> BaseException | None:
    """What goes wrong in a scenario, if anything does."""
    try:
        run(scenario)
    except Exception as error:
        return error
    return None


def kept(scenario: Scenario, keep: list[int] | None) -> Scenario:
    """A scenario with those of its cases whose numbers are in ``keep``."""
    return scenario if keep is None else replace(scenario, cases=[c for c in scenario.cases if c.number in keep])


def shrink(scenario: Scenario) -> Scenario:
    """The same failure, or another, with as few cases as can be."""
    smaller = True
    while smaller:
        smaller = False
        for case in scenario.cases:
            less = replace(scenario, cases=[c for c in scenario.cases if c is not case])
            if failure(less) is not None:
                scenario, smaller = less, True
                break
    return scenario


def report(seed: int, scenario: Scenario) -> str:
    """Lines that name a failure and how to see it again."""
    small = shrink(scenario)
    error = failure(small)
    again = f"python -m tests.sim.soak --seed {seed}"
    if len(small.cases) < len(scenario.cases):
        again += " --keep " + ",".join(str(c.number) for c in small.cases)
    return f"seed {seed}: {type(error).__name__}: {error}\nagain: {again}"


def one(seed: int, keep: list[int] | None) -> int:
    """Run one seed and show what it is and what goes wrong."""
    scenario = kept(draw(seed), keep)
    print(f"{scenario.limits}\n{scenario.rules} eos {sorted(scenario.eos_ids)} lazy {scenario.lazy} "
          f"hash bits {scenario.hash_bits} faults {scenario.faults} jumps {scenario.jumps}")  # fmt: skip
    for case in scenario.cases:
        print(case)
    error = failure(scenario)
    if error is None:
        print("passed")
        return 0
    traceback.print_exception(error)
    return 1


def many(first: int, count: int | None) -> int:
    """Run seeds from ``first`` on; stops at the first failure."""
    began = shown = time.monotonic()
    seed = first
    try:
        while count is None or seed < first + count:
            scenario = draw(seed)
            if failure(scenario) is not None:
                print(report(seed, scenario))
                return 1
            seed += 1
            now = time.monotonic()
            if now - shown > 5:
                shown = now
                print(f"{seed - first} seeds from {first}, {(seed - first) / (now - began):.0f} a second", flush=True)
    except KeyboardInterrupt:
        print()
    print(f"{seed - first} seeds passed, {(seed - first) / (time.monotonic() - began):.0f} a second")
    return 0


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="run this one")
    parser.add_argument("--keep", help="of that seed, only these cases (numbers, commas between)")
    parser.add_argument("--from", dest="first", type=int, help="first seed")
    parser.add_argument("--count", type=int, help="so many seeds, instead of on and on")
    options = parser.parse_args()
    if options.seed is not None:
        keep = None if options.keep is None else [int(n) for n in options.keep.split(",") if n]
        return one(options.seed, keep)
    first = options.first if options.first is not None else time.time_ns() // 1_000_000
    return many(first, options.count)


if __name__ == "__main__":
    sys.exit(main())
