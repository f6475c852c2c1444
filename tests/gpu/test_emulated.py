"""The emulated device finds what could go wrong on a real one, whatever order it happened to run things in."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ridgeline.backends.cuda.emulated import DeviceFault, EmulatedDevice
from ridgeline.backends.cuda.kernels.gather import gather
from ridgeline.backends.cuda.launch import Launch
from ridgeline.backends.cuda.variants import key

SEEDS = range(5)


def floats(device: EmulatedDevice, count: int) -> torch.Tensor:
    return device.memory(4 * count).view(torch.float32)


def rows(device: EmulatedDevice, table: torch.Tensor, out: torch.Tensor) -> list[Launch]:
    """Copies the rows of a table."""
    index = device.memory(4 * len(table), zeros=True).view(torch.int32)
    return gather(table, index, out)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_round_trip_through_two_streams(seed: int) -> None:
    device = EmulatedDevice(seed=seed)
    compute, copies = device.stream(), device.stream()
    table, out = floats(device, 32).view(2, 16), floats(device, 32).view(2, 16)
    host = device.host(128)
    host.write().view(np.float32)[:] = np.arange(32)
    copies.copy_in(table, host)
    compute.wait(copies.record())
    compute.launch(rows(device, table, out))
    compute.copy_out(host, out)
    done = compute.record()
    done.synchronize()
    assert np.array_equal(host.read().view(np.float32), np.tile(np.arange(16), 2))


@pytest.mark.parametrize("seed", SEEDS)
def test_work_of_two_streams_needs_an_event(seed: int) -> None:
    device = EmulatedDevice(seed=seed)
    compute, copies = device.stream(), device.stream()
    table, out, host = floats(device, 16).view(1, 16), floats(device, 16).view(1, 16), device.host(64)
    copies.copy_in(table, host)
    with pytest.raises(DeviceFault, match="no event orders them"):
        compute.launch(rows(device, table, out))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_host_waits_before_it_reads_or_writes(seed: int) -> None:
    device = EmulatedDevice(seed=seed)
    stream, memory, host, other = device.stream(), floats(device, 16), device.host(64), device.host(64)
    stream.copy_in(memory, host)
    with pytest.raises(DeviceFault, match="still reads"):
        host.write()
    stream.copy_out(other, memory)
    with pytest.raises(DeviceFault, match="without having waited"):
        other.read()
    stream.record().synchronize()
    host.write()
    other.read()


def test_a_write_behind_the_devices_back_is_found() -> None:
    device = EmulatedDevice(seed=1)
    stream, memory, host = device.stream(), floats(device, 16), device.host(64)
    kept = host.write()
    stream.copy_in(memory, host)
    kept[3] += 1
    with pytest.raises(DeviceFault, match="while a copy that reads it"):
        stream.record().synchronize()


def test_memory_given_back_is_not_touched() -> None:
    device = EmulatedDevice()
    stream = device.stream()
    table, out = floats(device, 16), floats(device, 16).view(1, 16)
    launches = rows(device, table.view(1, 16), out)
    graph = stream.capture(launches)
    stream.copy_in(table, device.host(64))
    stream.replay(graph)
    device.free(table.view(torch.uint8))
    with pytest.raises(DeviceFault, match="given back"):
        stream.replay(graph)
    with pytest.raises(DeviceFault, match="given back"):
        stream.launch(launches)
    with pytest.raises(DeviceFault, match="not allocated"):
        stream.copy(out, torch.zeros(1, 16))


def test_new_memory_holds_garbage_and_work_runs_late() -> None:
    device = EmulatedDevice(seed=3)
    stream, memory = device.stream(), floats(device, 64)
    assert torch.isnan(memory).all()
    host = device.host(16)
    late = 0
    for _ in range(16):
        target = floats(device, 4)
        stream.copy_in(target, host)
        late += int(torch.isnan(target).any())
    assert late > 8


def test_a_variant_that_nobody_announced_is_an_error() -> None:
    device = EmulatedDevice()
    stream, table, out = device.stream(), floats(device, 32).view(2, 16), floats(device, 32).view(2, 16)
    stream.copy_in(table, device.host(128))
    launches = rows(device, table, out)
    device.ready({key(launches[0])})
    stream.launch(launches)
    with pytest.raises(DeviceFault, match="compiled after ready"):
        stream.launch(rows(device, table[:, :8], floats(device, 16).view(2, 8)))
