"""What the CUDA executor refuses: by name, and as if it had not been asked."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from ridgeline.backends.cuda.emulated import EmulatedDevice
from ridgeline.backends.cuda.executor import CudaExecutor
from ridgeline.backends.cuda.lowering import Lowering, Sizes
from ridgeline.backends.cuda.variants import over_shapes
from ridgeline.backends.cuda.weights import Vector
from ridgeline.core.errors import RidgelineError, UnsupportedError
from ridgeline.core.types import POOL, SAMPLING_DTYPE, Ticket, TokenMasks
from ridgeline.graph.plan import PlanOp
from tests.gpu.small_model import SIZES, executor, model
from tests.graph.small_llama import Driver


def lowering() -> tuple[Lowering, dict[str, PlanOp]]:
    """Over shapes, and an operator of each kind."""
    _, plan, _ = model("bf16", "bf16", layers=1)
    made = over_shapes(plan, "sm_90", Sizes(32, 4, 8, True), 320)
    return made, {op.op: op for segment in plan.segments for op in segment.ops}


def test_plans_that_no_kernel_runs() -> None:
    made, ops = lowering()
    made.launches(Sizes(4, 2, 2, False))
    matrix, norm, attention = ops["linear"].inputs[1], ops["rms_norm"], ops["attention"]
    bad = [
        (replace(ops["linear"], op="convolve"), "no kernel for operator 'convolve'"),
        (replace(ops["linear"], inputs=(ops["linear"].inputs[0], norm.inputs[1])), "is no matrix"),
        (replace(norm, inputs=(norm.inputs[0], matrix)), "is no vector"),
        (replace(attention, inputs=(attention.inputs[0], attention.inputs[0])), "is no cache"),
        (
            replace(norm, inputs=(replace(norm.inputs[0], shape=(4, 128)), norm.inputs[1])),
            "has 4 rows, expected T or S",
        ),
    ]
    for op, message in bad:
        with pytest.raises(UnsupportedError, match=message):
            made.lower(op)
    assert isinstance(made.weights[norm.inputs[1].name], Vector)


def rows(count: int, **values: Any) -> Any:
    """Sampling parameters."""
    made = np.zeros(count, SAMPLING_DTYPE)
    made["num_logprobs"], made["top_p"] = -1, 1.0
    for name, value in values.items():
        made[name] = value
    return made


def test_what_is_refused_leaves_no_trace() -> None:
    """Masks that do not fit, tickets that are not open, one step too many: then all goes on as without."""
    quiet, made = executor(seed=1, layers=1), executor(seed=2, layers=1)
    first = Driver(quiet, 40, 16)
    bits = np.full((1, 5), 0xFFFFFFFF, np.uint32)
    expected = [first.step([(0, [1, 2])], rows(1, masked=1), TokenMasks(bits))[0], first.step([(1, [5])])[0]]
    assert made.last_logits.shape == (0, 160)
    driver = Driver(made, 40, 16)
    one = made.launch(driver.batch([(0, [1, 2])], rows(1, masked=1)))
    for masks in (None, TokenMasks(np.zeros((0, 5), np.uint32)), TokenMasks(np.full((2, 5), 1, np.uint32))):
        with pytest.raises(RidgelineError, match="1 rows wait for a token mask"):
            made.finish(one, masks)
    with pytest.raises(RidgelineError, match="allows no token"):
        made.finish(one, TokenMasks(np.zeros((1, 5), np.uint32)))
    with pytest.raises(RidgelineError, match="not open"):
        made.finish(Ticket(one.number + 1))
    two = made.launch(driver.batch([(1, [5])]))
    with pytest.raises(RidgelineError, match="2 steps are open"):
        made.launch(Driver(made, 40, 16).batch([(2, [1])]))
    found = [made.finish(one, TokenMasks(bits)), made.finish(two, TokenMasks(np.zeros((0, 5), np.uint32)))]
    with pytest.raises(RidgelineError, match="0 rows wait for a token mask, got 1|not open"):
        made.finish(two, TokenMasks(bits))
    with pytest.raises(RidgelineError, match="larger than the largest step"):
        made.launch(Driver(made, 40, 16).batch([(2, [1] * 33)]))
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a.token_ids, b.token_ids)


def test_pooling_without_a_final_norm() -> None:
    _, plan, weights = model("bf16", "bf16", layers=1)
    made = CudaExecutor(plan, weights, EmulatedDevice(), **SIZES)
    first = Driver(made, 40, 16).step([(1, [1])])[0].token_ids[0]
    for bucket in made._buckets:
        bucket.hidden = None
    with pytest.raises(RidgelineError, match="no final norm"):
        made.launch(Driver(made, 40, 16).batch([(0, [1])], rows(1, target=POOL)))
    driver = Driver(made, 40, 16)
    assert made.finish(made.launch(driver.batch([(0, [1])]))).token_ids[0] == first
