"""What the flight recorder adds to a step of the control plane, over an executor that is a stub.

    python bench/recorder.py [--repetitions 9] [--sizes 1,32,256]

Engines with and without a recorder of 64 steps take turns, 200 steps each; each number is the median over the
repetitions of the mean microseconds of a step in which every running request decodes a token. The last line is JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time

from control import make_engine, start

from ridgeline.engine.engine import Engine
from ridgeline.engine.recorder import FlightRecorder

STEPS, KEPT = 200, 64


def prepare(running: int, recorded: bool, repetitions: int) -> Engine:
    """An engine whose requests all decode, its ring full."""
    engine = make_engine(running, STEPS * (repetitions + 1))
    if recorded:
        engine._recorder = FlightRecorder(KEPT, engine.limits)
    start(engine, running, stream=False)
    for _ in range(2 * KEPT):
        engine.step()
    return engine


def measure(engine: Engine) -> float:
    """Mean microseconds of a step, of this process's own CPU time."""
    gc.collect()
    begin = time.process_time()
    for _ in range(STEPS):
        engine.step()
    return (time.process_time() - begin) / STEPS * 1e6


def main() -> None:
    """Prints one table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--sizes", default="1,32,256")
    args = parser.parse_args()
    results = {}
    print(f"{'running':>8}{'without, us':>14}{'with, us':>12}{'more, us':>12}")
    for running in map(int, args.sizes.split(",")):
        engines = [prepare(running, recorded, args.repetitions) for recorded in (False, True)]
        times = [[measure(engine) for engine in engines] for _ in range(args.repetitions)]
        without, with_it = (statistics.median(column) for column in zip(*times, strict=True))
        more = statistics.median(b - a for a, b in times)
        results[running] = {"without_us": without, "with_us": with_it, "more_us": more}
        print(f"{running:>8}{without:>14.1f}{with_it:>12.1f}{more:>12.2f}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
