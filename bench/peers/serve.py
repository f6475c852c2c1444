"""The worker's side of a comparison: one engine in one process, JSON lines on stdin and stdout.

Standard library only: it is imported inside every peer's environment. The parent may stop the
process (SIGSTOP) between requests, so that an idle engine costs the busy one nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import workload

Generate = Callable[[list[list[int]], list[int]], list[list[int]]]
"""(prompts, tokens wanted of each) -> the tokens generated for each."""


@dataclass(frozen=True)
class Settings:
    """What the parent asks of an engine.

    Attributes:
        model: file or directory, in the engine's own format.
        threads: compute threads.
        max_seqs: most requests side by side.
        context: most tokens (prompt and output) of one request.
        options: the rest, by engine.
    """

    model: str
    threads: int
    max_seqs: int
    context: int
    options: dict[str, Any]


def peak_rss_mb() -> float:
    """This process's peak resident memory in MB (10^6 bytes), as the kernel counts it."""
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError("the kernel does not report VmHWM")


def checked(generate: Generate, prompts: list[list[int]], count: int | list[int]) -> tuple[list[list[int]], float]:
    """Run one request set; (tokens, seconds). Raises unless every prompt got exactly its ``count`` tokens."""
    counts = [count] * len(prompts) if isinstance(count, int) else count
    start = time.perf_counter()
    tokens = generate(prompts, counts)
    seconds = time.perf_counter() - start
    lengths = [len(row) for row in tokens]
    if lengths != counts:
        raise RuntimeError(f"asked for {counts} tokens of {len(prompts)} prompts, got {lengths}")
    return tokens, seconds


def main(build: Callable[[Settings], Generate]) -> None:
    """Entry point of a worker script: ``worker.py MODE SETTINGS_JSON``.

    ``serve`` answers requests until stdin ends. ``once`` is a whole life in one go: it reports the
    moment of the first token, then fills a request's context and reports the peak memory.
    """
    # The protocol keeps the real stdout; whatever libraries print goes to stderr.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    mode, settings = sys.argv[1], Settings(**json.loads(sys.argv[2]))

    def send(message: dict[str, Any]) -> None:
        channel.write(json.dumps(message) + "\n")

    generate = build(settings)
    if mode == "once":
        checked(generate, [workload.prompt("first", 16)], 1)
        send({"first": True})
        out = settings.context // 4
        checked(generate, [workload.prompt("memory", settings.context - out)], out)
        send({"peak_rss_mb": peak_rss_mb()})
    else:
        send({"ready": True})
        for line in sys.stdin:
            request = json.loads(line)
            tokens, seconds = checked(generate, request["prompts"], request["count"])
            send({"tokens": tokens, "seconds": seconds})
    channel.flush()
    # Skip interpreter teardown: several engines hang or crash in it, and nothing is left to report.
    os._exit(0)
