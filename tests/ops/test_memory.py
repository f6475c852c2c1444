"""An executor's memory: what it packed it gives back to the file, what its cache will need is ready."""

from __future__ import annotations

import gc
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from graph.small_llama import Driver, config, random_weights

from ridgeline.backends.cpu.executor import CpuExecutor
from ridgeline.backends.cpu.lowering import plan_target
from ridgeline.core.types import TokenMasks
from ridgeline.graph.plan import compile
from ridgeline.models import llama
from ridgeline.models.load import load_model

MIB = 1 << 20
BLOCKS = 40_000
IN_USE = 32 * MIB
KERNEL = tuple(int(n) for n in os.uname().release.split(".")[:2])


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def grown(before: int, least: int) -> int:
    """Bytes in memory beyond ``before``, once they are ``least`` and have stood still, or after ten seconds."""
    now, still, deadline = resident() - before, 0, time.monotonic() + 10
    while (still < 15 or now < least) and time.monotonic() < deadline:
        time.sleep(0.02)
        last, now = now, resident() - before
        still = 0 if now > last else still + 1
    return now


def make_driver(threads: int) -> Driver:
    """Of an executor whose cache, of 40,000 blocks, nothing has touched."""
    weights = random_weights(config(head_dim=64), "q8_0")
    graph = llama.build(
        config(head_dim=64), {n: w.tensor.format for n, w in weights.items()},
        max_tokens=32, max_rows=8, kv_dtype="bf16", block_size=16,
    )  # fmt: skip
    plan = compile(graph, plan_target("bf16", None))
    sizes = {"num_slots": 2, "num_blocks": [BLOCKS], "max_blocks_per_slot": 2}
    driver = Driver(CpuExecutor(plan, weights, threads=threads, **sizes), BLOCKS, block_size=16)
    block_bytes = plan.caches[0].bytes_per_token * 16
    driver.free = [IN_USE // block_bytes - 1, 0]  # as the pool hands blocks out: from the lowest on
    return driver


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def driver(request: pytest.FixtureRequest) -> Driver:
    """As ``make_driver``, for the executors' numbers of threads."""
    return make_driver(request.param)


@pytest.mark.skipif(KERNEL < (5, 14), reason="MADV_POPULATE_WRITE needs Linux 5.14")
def test_an_idle_executor_has_as_much_cache_ready_as_is_in_use(driver: Driver) -> None:
    before = resident()
    assert grown(before, 0) < MIB, "nothing is fetched before the first step"
    driver.step([(0, [1])])
    driver.step([(1, [2])])
    assert 2 * IN_USE - 4 * MIB < grown(before, 2 * IN_USE - 4 * MIB) < 2 * IN_USE + 8 * MIB
    output, logits = driver.step([(0, [3]), (1, [4])])
    assert len(output.token_ids) == 2
    assert (logits == logits).all()


@pytest.mark.skipif(KERNEL < (5, 14), reason="MADV_POPULATE_WRITE needs Linux 5.14")
def test_nothing_is_fetched_while_a_step_is_open(driver: Driver) -> None:
    driver.step([(0, [1])])
    batch = driver.batch([(1, [2])])
    batch.sampling["masked"] = 1  # waits for its masks
    before = resident()
    ticket = driver.executor.launch(batch)
    assert grown(before, 0) < 8 * MIB
    words = -(-config(head_dim=64).vocab_size // 32)
    driver.executor.finish(ticket, TokenMasks(np.full((1, words), 0xFFFFFFFF, np.uint32)))
    assert grown(before, IN_USE) > IN_USE


def tasks() -> set[str]:
    """This process's threads."""
    return set(os.listdir("/proc/self/task"))


def test_an_executor_that_ends_takes_its_threads_along() -> None:
    """Also one that is about to fetch, or in the middle of it."""
    for wait in (0, 0.01, 0.025, 0.04):
        before = tasks()
        driver = make_driver(2)
        driver.step([(0, [1])])
        driver.step([(1, [2])])  # 64 MiB to fetch
        its = tasks() - before
        assert len(its) == 2  # a worker of the team, and who fetches
        time.sleep(wait)
        del driver
        gc.collect()
        deadline = time.monotonic() + 10  # a thread that was waited for is listed for a moment yet
        while tasks() & its and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not tasks() & its


def of_file(path: Path) -> int:
    """Bytes of this process in memory that are pages of ``path``."""
    mappings = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    return sum(1024 * int(m.split("Rss:")[1].split()[0]) for m in mappings if str(path) in m.split("\n")[0])


@pytest.mark.parametrize("given_back", [False, True])
def test_pages_of_a_mapped_file_are_given_back_as_they_are_packed(
    smollm2_path: Path, tmp_path: Path, given_back: bool
) -> None:
    path = tmp_path / "model.gguf"  # a mapping of its own
    shutil.copy(smollm2_path, path)
    model = load_model(path)
    plan = compile(model.graph(32, 1, "bf16", 16), plan_target("bf16", None))
    mapped = model.file.mapped if given_back else None
    CpuExecutor(plan, model.weights, num_slots=1, num_blocks=[2], max_blocks_per_slot=2, threads=2, mapped=mapped)
    assert (of_file(path) < model.file.size / 10) is given_back
    embedding = model.file.tensors["token_embd.weight"].data
    assert bytes(embedding[:64]) != bytes(64)  # they come back when touched


def test_only_pages_of_the_mapped_file_are_given_back() -> None:
    weights = random_weights(config(head_dim=64), "q8_0")
    for weight in weights.values():
        weight.tensor.data.flags.writeable = False
    copies = {name: weight.tensor.data.copy() for name, weight in weights.items()}
    graph = llama.build(
        config(head_dim=64), {n: w.tensor.format for n, w in weights.items()},
        max_tokens=32, max_rows=8, kv_dtype="bf16", block_size=16,
    )  # fmt: skip
    sizes = {"num_slots": 2, "num_blocks": [4], "max_blocks_per_slot": 2}
    other = np.zeros(4096, np.uint8)
    CpuExecutor(compile(graph, plan_target("bf16", None)), weights, threads=2, mapped=other, **sizes)
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight.tensor.data, copies[name])
