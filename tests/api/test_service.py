"""The engine's thread by itself: how often it calls into a loop, and what a job is told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ridgeline import SamplingParams
from ridgeline.engine.service import EngineService, Event, Job
from tests.api.sim_runtime import LIMITS, expected, sim_runtime


class Counting:
    """A loop that counts the calls into it and makes them at once."""

    def __init__(self) -> None:
        self.calls = 0

    def call_soon_threadsafe(self, callback: Callable[..., object], *args: Any) -> None:
        self.calls += 1
        callback(*args)


class Recorder(Job):
    """A job that keeps its events."""

    def __init__(self, *args: Any, **values: Any) -> None:
        super().__init__(*args, **values)
        self.events: list[Event] = []
        self.ended = threading.Event()

    def receive(self, event: Event) -> None:
        self.events.append(event)
        if event.ends:
            self.ended.set()


def test_a_step_is_one_call_into_a_loop_whatever_the_number_of_requests() -> None:
    limits = replace(LIMITS, max_requests=16, max_tokens=64, num_blocks=[256])
    runtime = sim_runtime(limits)
    loop = Counting()
    params = [SamplingParams(seed=n, max_tokens=30, ignore_eos=True) for n in range(16)]
    jobs = [Recorder([runtime.engine.make_request([97], p, stream=True)], loop, stream=True) for p in params]
    service = EngineService(runtime.engine, max_undelivered_tokens=1000)
    service.call(lambda engine: [service._submit(job) for job in jobs])
    for job in jobs:
        job.ended.wait()
    steps = service.call(lambda engine: engine.stats().steps).result()
    service.close()
    assert loop.calls <= steps == 30
    for job, p in zip(jobs, params, strict=True):
        assert [t for e in job.events for t in e.token_ids] == expected([97], p, limits)[0]
        assert [e.ends for e in job.events] == [False] * 29 + [True], "one last event, at the end"
