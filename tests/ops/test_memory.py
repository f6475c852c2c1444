"""An executor's memory: pages of a file that it has packed it gives back, those its cache will need it has ready."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest
from graph.small_llama import Driver, config, random_weights

from ridgeline.backends.cpu.executor import CpuExecutor
from ridgeline.backends.cpu.lowering import plan_target
from ridgeline.graph.plan import compile
from ridgeline.models import llama
from ridgeline.models.load import load_model

MIB = 1 << 20
BLOCKS = 40_000


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def settled() -> int:
    """``resident`` once it has stood still for a while."""
    before, still = resident(), 0
    while still < 15:
        time.sleep(0.02)
        now = resident()
        still = 0 if now > before else still + 1
        before = now
    return before


@pytest.mark.parametrize("threads", [1, 2])
def test_an_idle_executor_has_as_much_cache_ready_as_is_in_use(threads: int) -> None:
    weights = random_weights(config(head_dim=64), "q8_0")
    graph = llama.build(
        config(head_dim=64), {n: w.tensor.format for n, w in weights.items()},
        max_tokens=32, max_rows=8, kv_dtype="bf16", block_size=16,
    )  # fmt: skip
    plan = compile(graph, plan_target("bf16", None))
    executor = CpuExecutor(plan, weights, num_slots=2, num_blocks=[BLOCKS], max_blocks_per_slot=2, threads=threads)
    driver = Driver(executor, BLOCKS, block_size=16)
    block_bytes = plan.caches[0].bytes_per_token * 16
    in_use = 32 * MIB  # as the pool hands blocks out: from the lowest on
    before = settled()
    driver.free = [in_use // block_bytes - 1, 0]
    driver.step([(0, [1])])
    driver.step([(1, [2])])
    grown = settled() - before
    if grown < in_use / 2 and tuple(map(int, Path("/proc/sys/kernel/osrelease").read_text().split(".")[:2])) < (5, 14):
        pytest.skip("MADV_POPULATE_WRITE needs Linux 5.14")
    assert 2 * in_use - 4 * MIB < grown < 2 * in_use + 8 * MIB
    output, logits = driver.step([(0, [3]), (1, [4])])
    assert len(output.token_ids) == 2
    assert (logits == logits).all()


def of_file(path: Path) -> int:
    """Bytes of this process in memory that are pages of ``path``."""
    mappings = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    return sum(1024 * int(m.split("Rss:")[1].split()[0]) for m in mappings if str(path) in m.split("\n")[0])


@pytest.mark.parametrize("mapped", [False, True])
def test_pages_of_a_mapped_file_are_given_back_as_they_are_packed(smollm2_path: Path, mapped: bool) -> None:
    model = load_model(smollm2_path)
    plan = compile(model.graph(32, 1, "bf16", 16), plan_target("bf16", None))
    CpuExecutor(plan, model.weights, num_slots=1, num_blocks=[2], max_blocks_per_slot=2, threads=2, mapped=mapped)
    assert (of_file(smollm2_path) < model.file.size / 10) is mapped
    assert bytes(model.file.tensors["token_embd.weight"].data[:4]) != bytes(4)  # they come back when touched
    model.file.close()
