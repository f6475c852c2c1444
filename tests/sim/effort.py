"""How much work the seeds may cost: a change that computes more, waits longer or shares less is noticed.

Every answer can be right and the engine slow. So the work of the first ``SEEDS`` seeds is added up and held against
what it was when this was written (``python -m tests.sim.effort`` prints it anew). More of it is an error; a change
that is worth it, or one of the scenarios, records its numbers here.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields

from tests.sim.simulation import Simulation, run
from tests.sim.workload import draw

SEEDS = 300
SLACK = 0.002


@dataclass
class Effort:
    """Totals over many runs.

    Attributes:
        steps, tokens: launched and computed.
        preemptions: requests that had to start again.
        evicted: tokens that were to be computed although another had computed them before.
        built: batches put together from nothing, whereas a step that repeats the last one costs next to nothing.
        missed: sampled tokens that cost a step of their own although the engine speculates.
    """

    steps: int = 0
    tokens: int = 0
    preemptions: int = 0
    evicted: int = 0
    built: int = 0
    missed: int = 0

    def add(self, simulation: Simulation) -> None:
        """Count one run."""
        counts, stats = simulation.model.counts, simulation.engine.stats()
        self.steps += counts.steps
        self.tokens += counts.tokens
        self.preemptions += stats.preemptions
        self.built += counts.built
        records = simulation.oracles.records
        if simulation.scenario.limits.prefix_sharing:
            self.evicted += sum(len(r.case.prompt) - r.hit for r in records)
        if simulation.scenario.limits.speculation:
            self.missed += sum(len(r.request.output_ids) for r in records) - counts.accepted

    def excess(self, recorded: Effort) -> list[str]:
        """What is more than was recorded."""
        pairs = zip(fields(self), astuple(self), astuple(recorded), strict=True)
        return [f"{f.name}: {now}, recorded {then}" for f, now, then in pairs if now > then * (1 + SLACK)]


RECORDED = Effort(steps=12443, tokens=35937, preemptions=139, evicted=25800, built=8720, missed=3830)


def main() -> None:
    """Print what is to be recorded."""
    total = Effort()
    for seed in range(SEEDS):
        total.add(run(draw(seed)))
    print(total)


if __name__ == "__main__":
    main()
