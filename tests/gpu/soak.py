"""Random small models on the emulated device, beside numpy: a range of seeds, or on and on.

    python -m tests.gpu.soak --seed 17              one seed; a failure prints where
    python -m tests.gpu.soak --from 1000 --count 5
    python -m tests.gpu.soak                        until stopped or failed, from a seed that the clock gives

A seed draws a model (formats, cache, windows, shape), an architecture and the order of the device's streams. It is
asked for a script of steps (scripts.py) and serves requests through the engine; every step of what runs alone is
repeated in numpy (shadow.py), and what runs together has the same bits.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from random import Random
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
sys.path[:0] = [folder for folder in ("tests",) if folder not in sys.path]  # as pytest has it: graph, invariance

from tests.gpu import small_model  # noqa: E402
from tests.gpu.remembered import clear, remember  # noqa: E402
from tests.gpu.runs import long, script, serve  # noqa: E402

small_model.SIZES |= {"num_blocks": [100], "max_blocks_per_slot": 50}
LONGEST = 700  # tokens: attention then merges parts of several chunks of keys


def draw(seed: int) -> dict[str, Any]:
    """A small model, as ``small_model.model`` takes it."""
    rng = Random(seed)
    hidden = rng.choice(["bf16", "bf16", "f16"])
    fmt = rng.choice(["bf16", "f16", "q4_0", "q4_1", "q8_0"])
    windows = rng.choice([(), (), (0, 20), (9, 0), (20, 20), (33,)])
    formats = ["bf16", "f16", "f32", "q4_0", "q4_1", "q8_0"]
    others = [(name, rng.choice(formats)) for name in ("v", "up", "down", "embed")]
    heads = rng.choice([(4, 2), (4, 4), (4, 1), (6, 2), (8, 2)])
    changes: dict[str, Any] = {"num_heads": heads[0], "num_kv_heads": heads[1], "tied": rng.random() < 0.5}
    changes |= {"intermediate_size": rng.choice([96, 192, 256]), "vocab_size": rng.choice([160, 150, 203])}
    changes |= {"rope_freq_factors": rng.choice([None, tuple(1.0 + i / 4 for i in range(16))])}
    return {
        "fmt": fmt,
        "kv_dtype": rng.choice([hidden, "int8", "fp8"]),
        "hidden": hidden,
        "layers": len(windows) or rng.choice([1, 2]),
        "windows": windows,
        "others": tuple(other for other in others if rng.random() < 0.25),
        "changes": tuple(sorted(changes.items())),
    }


def run(seed: int) -> int:
    """Raises AssertionError where anything differs; returns the steps."""
    clear()
    kind, rng = draw(seed), Random(seed + 1)
    script(seed, kind, rng.randint(4, 10), rng.choice(["sm_80", "sm_90"]))
    changes = {"max_tokens": rng.choice([7, 20, 32]), "max_open_steps": rng.choice([1, 2])}
    changes |= {"speculation": rng.choice([None, "ngram"]), "ngram_min": 1, "prefix_sharing": rng.random() < 0.8}
    steps = serve(seed, kind, rng.randint(1, 4), **changes)
    if len(set(kind["windows"])) < 2 and rng.random() < 0.25:
        steps += long(seed, kind, rng.randint(250, LONGEST), rng.choice(["sm_80", "sm_90"]))
    return steps


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="run this one")
    parser.add_argument("--from", dest="first", type=int, help="first seed")
    parser.add_argument("--count", type=int, help="so many seeds, instead of on and on")
    options = parser.parse_args()
    first = next((n for n in (options.seed, options.first) if n is not None), time.time_ns() // 1_000_000)
    last = first + 1 if options.seed is not None else None if options.count is None else first + options.count
    seed = first
    remember()
    try:
        while last is None or seed < last:
            try:
                steps = run(seed)
            except Exception as error:
                traceback.print_exception(error)
                print(f"seed {seed}: {draw(seed)}\nagain: python -m tests.gpu.soak --seed {seed}")
                return 1
            seed += 1
            print(f"seed {seed - 1}: {steps} steps served", flush=True)
    except KeyboardInterrupt:
        print()
    print(f"{seed - first} seeds passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
