"""The cache takes what the rest leaves: the bytes counted ahead are those that an executor allocates."""

from __future__ import annotations

import pytest

from ridgeline.backends.cuda.budget import budget_of, cache_blocks
from ridgeline.backends.cuda.emulated import EmulatedDevice
from ridgeline.backends.cuda.executor import CudaExecutor
from ridgeline.backends.cuda.memory import Limits
from ridgeline.core.errors import ConfigError
from tests.gpu.small_model import SIZES, model


@pytest.mark.parametrize(("fmt", "kv_dtype"), [("bf16", "bf16"), ("q4_1", "int8"), ("bf16", "fp8")])
def test_an_executor_whose_cache_fills_the_device_fits(fmt: str, kv_dtype: str) -> None:
    _, plan, weights = model(fmt, kv_dtype)
    context = SIZES["max_blocks_per_slot"] * plan.caches[0].block_size
    limits = Limits.of(plan, **SIZES)
    budget = budget_of(plan, "sm_90", limits, context)
    kept = budget.asked + budget.reserved  # nothing has asked yet, and the emulated device has no driver
    device = EmulatedDevice("sm_90", memory_bytes=budget.total - kept + (1 << 20))
    blocks = cache_blocks(plan, "sm_90", limits, context, device.free_memory() + kept)
    CudaExecutor(plan, weights, device, **SIZES | {"num_blocks": [blocks]})
    slack = 1 << 16  # what the budget may overrate, and the last block that did not fit
    assert 0 <= device.free_memory() <= slack


def test_no_room_is_said_with_the_ledger() -> None:
    _, plan, _ = model("bf16", "bf16")
    with pytest.raises(ConfigError, match="weights .* MiB.*no room for a cache"):
        cache_blocks(plan, "sm_90", Limits.of(plan, **SIZES), 320, 1 << 20)
