"""What a listed plan can launch: a closed set, that compiles without spills, and that rung 1 has climbed."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from ridgeline.backends.cuda.compiled import Order, compile_order
from ridgeline.backends.cuda.ladder.check import case_modules
from ridgeline.backends.cuda.ladder.compile import in_process
from ridgeline.backends.cuda.launch import ARCHS, Launch
from ridgeline.backends.cuda.lowering import Sizes
from ridgeline.backends.cuda.variants import buckets, key, over_shapes, reachable
from tests.gpu.plans import PLANS, Listed

SHAPES = frozenset(
    {"N", "HALF", "HALF_BLOCK", "Q_HEADS", "KV_HEADS", "KV_BLOCK", "V", "GROUP", "BLOCK", "ROWS", "SPLIT"}
)
"""Constants that are a model's sizes; all others choose what a kernel does."""


def behaviour(launch: Launch) -> tuple[Any, ...]:
    """What of a variant decides which code runs, whatever a model's sizes."""
    function, config = launch.kernel.fn, launch.config
    return (
        function.__module__,
        function.__name__,
        *sorted((k, str(v)) for k, v in config.meta.items() if k not in SHAPES),
    )


@cache
def launches_of(listed: Listed, arch: str) -> list[Launch]:
    """The variants of a plan."""
    plan, context = listed.plan()
    return reachable(plan, arch, context, 256)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("listed", PLANS, ids=lambda p: p.name)
def test_no_step_asks_for_another_variant(listed: Listed, arch: str) -> None:
    """Steps that fill no bucket would not either: what a bucket pads hangs on no size in between."""
    plan, context = listed.plan()
    known = {key(launch) for launch in launches_of(listed, arch)}
    lowering = over_shapes(plan, arch, Sizes(2048, 256, 256, True), context)
    for tokens, requests, rows in ((1, 1, 1), (3, 2, 3), (17, 5, 17), (65, 64, 65), (100, 7, 99), (777, 256, 255)):
        for prefills in (False, True):
            sizes = Sizes(tokens, requests, rows, prefills)
            assert {key(launch) for launch in lowering.launches(sizes)} <= known


@pytest.mark.parametrize("listed", PLANS, ids=lambda p: p.name)
def test_a_decode_layer_takes_eight_launches(listed: Listed) -> None:
    plan, context = listed.plan()
    lowering = over_shapes(plan, "sm_90", Sizes(2048, 256, 256, True), context)
    decode = next(b for b in buckets(2048, 256, 256) if b.tokens == 64 and not b.prefills)
    outside = 5  # embedding, first norm, row selection, last norm's share, head
    assert len(lowering.launches(decode)) <= 8 * len(plan.caches[0].layers) + outside


def test_every_variant_compiles_without_spills() -> None:
    orders = {}
    for arch in ARCHS:
        for listed in PLANS:
            orders |= {(arch, key(launch)): Order.of(launch, arch) for launch in launches_of(listed, arch)}
    found = list(in_process(compile_order, orders.values(), len(os.sched_getaffinity(0))))
    assert [(one.kernel, one.error or one.local_bytes) for one in found if one.error or one.local_bytes] == []


def test_rung_one_climbs_what_plans_can_launch() -> None:
    climbed: dict[str, set[tuple[Any, ...]]] = {arch: set() for arch in ARCHS}
    for module in case_modules(Path(__file__).parents[2]).values():
        cases = import_module(module)
        for case in cases.CASES:
            for arch in ARCHS:
                climbed[arch] |= {behaviour(launch) for launch in cases.build(case, arch).launches}
    for arch in ARCHS:
        missing = {behaviour(launch) for p in PLANS for launch in launches_of(p, arch)} - climbed[arch]
        assert missing == set()
