"""The production engine over the simulated model: thousands of seeds, planted faults, and a sample of mutants.

A failure prints the line that repeats it. More of each: ``make soak``, ``make mutate``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.mutation import report, survivors, untouched
from tests.sim.effort import RECORDED, Effort
from tests.sim.effort import SEEDS as EFFORT_SEEDS
from tests.sim.equivalents import EQUIVALENT
from tests.sim.mutate import FAULT_SEEDS, WHOLE, check, classic
from tests.sim.simulation import run
from tests.sim.soak import failure
from tests.sim.soak import report as failed
from tests.sim.workload import draw

SEEDS, PART = FAULT_SEEDS, 250
ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("first", range(0, SEEDS, PART))
def test_every_stream_equals_its_solo_run_and_all_invariants_hold(first: int) -> None:
    for seed in range(first, first + PART):
        scenario = draw(seed)
        if failure(scenario) is not None:
            pytest.fail(failed(seed, scenario), pytrace=False)


def test_the_seeds_cost_no_more_work_than_before() -> None:
    total = Effort()
    for seed in range(EFFORT_SEEDS):
        total.add(run(draw(seed)))
    assert not total.excess(RECORDED), f"{total.excess(RECORDED)}: see tests/sim/effort.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="mutants run in forked children")
def test_classic_faults_are_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    faults = classic()
    assert len(faults) >= 10
    assert survivors([untouched(WHOLE[0])], partial(check, seeds=range(50)), 1), "the code as it is is noticed"
    alive = survivors(faults, partial(check, seeds=range(SEEDS)), jobs=len(os.sched_getaffinity(0)))
    report(faults, alive, faults, EQUIVALENT)
    assert not alive, capsys.readouterr().out


RUN = """
from tests.sim.simulation import run
from tests.sim.workload import draw
for seed in range(60):
    simulation = run(draw(seed))
    print(seed, simulation.step, simulation.model.counts, [r.request.output_ids for r in simulation.oracles.records])
"""


def test_a_seed_gives_the_same_run_whatever_the_hash_seed() -> None:
    def output(hash_seed: str) -> str:
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", RUN], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert output("1") == output("2") != ""
