"""What an executor knows before its first step: sizes of steps, kernel variants, memory and where things lie in it."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend

from ridgeline.backends.cuda.beside import every_launch_beside
from ridgeline.backends.cuda.device import Device
from ridgeline.backends.cuda.emulated import EmulatedDevice
from ridgeline.backends.cuda.executor import CudaExecutor
from ridgeline.backends.cuda.kernels import attention_decode as decode
from ridgeline.backends.cuda.kernels.step import put_cells, resolve
from ridgeline.backends.cuda.launch import Launch
from ridgeline.backends.cuda.lowering import Sizes, workspace_sizes
from ridgeline.backends.cuda.memory import Limits, Upload, allocate_cache, rotary_angles
from ridgeline.backends.cuda.step import Layout
from ridgeline.backends.cuda.variants import buckets, key, over_shapes, reachable
from ridgeline.backends.cuda.weights import Matrix, shapes
from ridgeline.core.errors import RidgelineError, UnsupportedError
from ridgeline.graph.ir import CacheSpec
from ridgeline.graph.plan import Plan
from tests.gpu.plans import PLANS
from tests.gpu.small_model import SIZES, executor, model

FEW = 8  # tokens of a request without a prefill
LIMITS = [(32, 4, 8), (32, 1, 8), (1, 1, 1), (7, 7, 7), (48, 3, 2), (33, 2, 33), (2048, 256, 256), (100, 200, 300)]
KINDS: list[dict[str, Any]] = [
    {"fmt": "bf16", "kv_dtype": "bf16"},
    {"fmt": "q8_0", "kv_dtype": "int8", "windows": (0, 20)},
    {"fmt": "q4_1", "kv_dtype": "bf16", "layers": 1, "changes": (("tied", False),)},
    {"fmt": "f16", "kv_dtype": "f16", "hidden": "f16", "others": (("up", "q4_0"), ("v", "q8_0"))},
]


@pytest.mark.parametrize(("tokens", "requests", "rows"), LIMITS)
def test_every_step_has_a_bucket_and_every_bucket_a_step(tokens: int, requests: int, rows: int) -> None:
    """A step's is the next power of two, or the largest; as many requests and rows as that lets there be."""
    found = buckets(tokens, requests, rows)
    used = set()
    for count, prefills in product(range(1, tokens + 1), (False, True)):
        possible = count > FEW if prefills else count <= FEW * min(requests, count)
        if possible:
            of = min(1 << (count - 1).bit_length(), tokens)
            used.add(Sizes(of, min(of, requests), min(of, rows), prefills))
    assert set(found) >= used and len(set(found)) == len(found)
    assert all(
        b.tokens == tokens for b in set(found) - used
    )  # the last is cut off, and may hold none beyond the others
    assert found == sorted(found, key=lambda b: (b.tokens, b.prefills))


def test_a_step_takes_the_smallest_bucket() -> None:
    made = executor(layers=1)
    for tokens, requests, rows in product(range(1, 33), range(1, 5), range(9)):
        for prefills in (False, True):
            sizes = Sizes(tokens, requests, rows, prefills)
            most = [b.layout.sizes for b in made._buckets]
            able = [b for b in most if b.tokens >= tokens and b.requests >= requests and b.rows >= rows]
            able = [b for b in able if b.prefills == prefills]
            if able:
                assert made.bucket_of(sizes).layout.sizes == min(able, key=lambda b: b.tokens)
    for sizes in (Sizes(33, 1, 1, True), Sizes(1, 5, 1, False), Sizes(1, 1, 9, False)):
        with pytest.raises(RidgelineError, match="larger than the largest step"):
            made.bucket_of(sizes)


def launch_of(table: torch.Tensor, **changes: Any) -> Launch:
    """One that puts no cells, with changed arguments."""
    made = put_cells(torch.zeros(3, 3, dtype=torch.int32), table)[0]
    return Launch(made.kernel, made.grid, {**made.args, **changes}, made.config, made.writes, made.updates)


def test_a_variant_is_what_triton_tells_apart() -> None:
    """Two values of an argument give one key if and only if Triton sees no difference between them."""
    words = torch.zeros(64, dtype=torch.int32)
    words = words[(-words.data_ptr() % 16) // 4 :]
    integers = [0, 1, 2, 7, 15, 16, 17, 32, -1, -16, (1 << 31) - 1, 1 << 31, 1 << 32, -(1 << 31), -(1 << 31) - 1]
    values = [*integers, True, False, 0.5, 1.0, words, words[1:], words[4:], words.view(torch.float32), words.long()]
    values += [words.view(torch.int8)[8:], words.bool()]

    def seen(value: Any) -> Any:
        special = not isinstance(value, (bool, float))
        return native_specialize_impl(BaseBackend, value, False, special, special)

    for a, b in product(values, values):
        one, other = (key(launch_of(words[:30].view(5, 6), table_stride=v)) for v in (a, b))
        assert (one == other) == (seen(a) == seen(b)), (a, b)
    assert key(launch_of(words[:30].view(5, 6), n=1)) == key(launch_of(words[:30].view(5, 6), n=16))
    assert key(launch_of(words[:30].view(5, 6), n=1)) != key(launch_of(words[:30].view(5, 6), n=1 << 31))
    resolved = key(resolve(*[words[:4]] * 4)[0])
    assert resolved != key(put_cells(words[:3].view(1, 3), words[:30].view(5, 6))[0])


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_compiled_ahead_is_what_an_executor_announces(kind: dict[str, Any], arch: str) -> None:
    """No variant more, none less, from shapes alone."""
    context = SIZES["max_blocks_per_slot"] * 16
    for invariant in (True, False):
        made = executor(arch=arch, batch_invariant=invariant, **kind)
        ahead = reachable(made.plan, arch, context, SIZES["num_slots"], invariant)
        device: Any = made.device
        assert {key(launch) for launch in ahead} == device._known
        assert len(ahead) == len(device._known)
        for bucket in made._buckets:
            assert {key(launch) for launch in bucket.launches} <= device._known
        beside = every_launch_beside(made.plan, made._buckets[-1].layout, made.memory.caches, arch)
        assert {key(launch) for launch in beside} <= device._known


def needed(plan: Plan, weights: Any, most: Sizes, context: int, arch: str) -> tuple[int, int]:
    """The most partials and counters that any bucket's operators ask for, counted one by one."""
    partials = counters = 0
    for bucket in buckets(most.tokens, most.requests, most.rows):
        for op in (op for segment in plan.segments for op in segment.ops):
            if op.op == "linear":
                rows = op.inputs[0].shape[0]
                matrix = weights[op.inputs[1].name]
                assert isinstance(matrix, Matrix) and not isinstance(rows, int)
                for count in range(1, (bucket.tokens if rows.name == "T" else bucket.rows) + 1):
                    scratch = matrix.scratch(count)
                    partials, counters = max(partials, scratch.partials), max(counters, scratch.counters)
            if op.op == "attention":
                info = op.inputs[1].cache
                assert info is not None
                few = min(bucket.tokens, FEW * bucket.requests)
                heads = (op.attrs["num_heads"], info.num_kv_heads, info.head_dim)
                shapes_ = decode.workspace(few, bucket.requests, *heads, context, arch)
                first, second, third = (int(np.prod(shape)) for shape in shapes_)
                partials, counters = max(partials, first + second), max(counters, third)
    return partials, counters


@pytest.mark.parametrize("listed", [PLANS[0], PLANS[3], PLANS[4]], ids=lambda p: p.name)
@pytest.mark.parametrize("most", [Sizes(96, 4, 4, True), Sizes(40, 40, 40, True), Sizes(2, 1, 70, True)], ids=str)
def test_the_workspace_is_as_large_as_any_step_needs(listed: Any, most: Sizes) -> None:
    plan, context = listed.plan()
    one_layer = [op for segment in plan.segments for op in segment.ops]
    weights = shapes(plan)
    assert {op.op for op in one_layer} >= {"linear", "attention"}
    for context_ in (context, 256, 64):
        sizes = workspace_sizes(plan, weights, most, context_, "sm_90")
        least = needed(plan, weights, most, context_, "sm_90")
        assert least[0] <= sizes[0] and least[1] <= sizes[1]
        if most.tokens > 64:
            assert sizes == least
    lowering = over_shapes(plan, "sm_90", most, context)
    assert len(lowering.launches(buckets(most.tokens, most.requests, most.rows)[-1])) > 100


@pytest.mark.parametrize("sizes", [Sizes(1, 1, 1, False), Sizes(5, 3, 2, False), Sizes(32, 4, 8, True)], ids=str)
def test_fields_lie_apart_at_multiples_of_16_bytes(sizes: Sizes) -> None:
    layout = Layout(sizes)
    block = torch.zeros(layout.nbytes, dtype=torch.uint8)
    arrays, tensors = layout.arrays(block.numpy()), layout.tensors(block)
    end = 0
    for name, (at, length) in sorted(layout.fields.items(), key=lambda item: item[1]):
        assert at % 4 == 0 and 0 <= at - end < 4, name
        end = at + length
        assert arrays[name].size == tensors[name].numel() == length and arrays[name].shape == tuple(tensors[name].shape)
    assert 0 <= layout.nbytes - 4 * end < 16
    for number, (name, array) in enumerate(arrays.items()):
        array[:] = number + 1
        assert (tensors[name] == number + 1).all(), name
    lengths = {"fed": sizes.tokens, "positions": sizes.tokens, "slots": sizes.requests, "targets": sizes.rows}
    lengths |= {"query_starts": sizes.requests + 1, "row_starts": sizes.requests + 1, "seeds": 2 * sizes.rows}
    assert {name: layout.fields[name][1] for name in lengths} == lengths


def cache_bytes(plan: Plan) -> int:
    """Of every block of every group, and of the block tables."""
    blocks = sum(SIZES["num_blocks"][0] * spec.block_size * spec.bytes_per_token for spec in plan.caches)
    return blocks + len(plan.caches) * 4 * SIZES["num_slots"] * SIZES["max_blocks_per_slot"]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_device_holds_what_the_ledger_says(kind: dict[str, Any]) -> None:
    """Weights, cache, arena, workspace and angles, and little besides."""
    made = executor(**kind)
    device: Any = made.device
    context = SIZES["max_blocks_per_slot"] * 16
    weights = made.weights_bytes
    assert weights == sum(weight.nbytes() for weight in shapes(made.plan).values())
    sizes = workspace_sizes(made.plan, made.memory.weights, made.memory.limits.largest, context, "sm_90")
    assert 0 <= made.workspace_bytes - 4 * sum(sizes) <= 32
    head_dim = made.plan.caches[0].head_dim
    listed = weights + cache_bytes(made.plan) + made.plan.arena_bytes + made.workspace_bytes + 4 * context * head_dim
    inputs = Layout(Sizes(32, 4, 8, True)).nbytes
    between = inputs + 4 * (32 + 32 + 4 + 3 * 8 + 2 * 8 * 64)  # tokens, their numbers, last tokens, results, best
    places = 2 * (inputs + 4096)
    held = sum(device.live.values())
    assert 0 <= held - listed - between - places <= 16 * len(made.memory.weights) + 64
    assert device.free_memory() == (1 << 30) - held


def test_a_cache_is_empty_and_of_a_kind_that_kernels_read() -> None:
    _, plan, _ = model("bf16", "bf16")
    limits, device = Limits.of(plan, 4, [40], 20), EmulatedDevice()
    assert (limits.tokens, limits.rows, limits.largest) == (32, 8, Sizes(32, 4, 8, True))
    assert Limits.of(plan, 99, [40], 20).largest == Sizes(32, 32, 8, True)
    for dtype, size in (("bf16", 2), ("f16", 2), ("int8", 1), ("fp8", 1)):
        spec = CacheSpec((0, 1, 2), "full", 0, 16, dtype, 2, 32)
        cache = allocate_cache(spec, 5, limits, device)
        assert tuple(cache.k.shape) == tuple(cache.v.shape) == (3, 5, 2, 16, 32)
        assert cache.k.element_size() == size and cache.k.data_ptr() != cache.v.data_ptr()
        assert tuple(cache.tables.shape) == (4, 20) and not cache.tables.any()
        assert (cache.k_scales is not None) == (cache.v_scales is not None) == (dtype == "int8")
        if cache.k_scales is not None and cache.v_scales is not None:
            assert cache.k_scales.shape == cache.v_scales.shape == cache.k.shape[:-1]
            assert cache.k_scales.data_ptr() != cache.v_scales.data_ptr()
    with pytest.raises(UnsupportedError, match="keeps no f32 cache"):
        allocate_cache(CacheSpec((0,), "full", 0, 16, "f32", 2, 32), 5, limits, device)


def test_memory_that_grows_is_given_back_and_grows_seldom() -> None:
    made = executor(layers=1)
    device: Any = made.device
    held, before = len(device.live), set(device.live)
    seen = set()
    for size in range(100, 20_000, 100):
        found = made.memory.grown("some", size, made._compute)
        seen.add(found.data_ptr())
        assert len(found) >= size and found.data_ptr() in device.live and len(device.live) == held + 1
        assert made.memory.grown("some", size - 50, made._compute).data_ptr() == found.data_ptr()
    assert len(seen) <= 10 and len(device.live.keys() - before) == 1


@pytest.mark.parametrize("piece", [16, 64, 100, 1 << 20])
@pytest.mark.parametrize("seed", range(3))
def test_uploads_arrive_whole_whatever_their_pieces(piece: int, seed: int) -> None:
    device = EmulatedDevice(seed=seed)
    stream = device.stream()
    upload = Upload(device, stream, piece)
    rng = np.random.default_rng(seed)
    tensors = [torch.from_numpy(rng.standard_normal(shape).astype(np.float32)) for shape in (1, 5, 25, (3, 40))]
    tensors += [tensors[3].T, tensors[3].to(torch.bfloat16), torch.arange(7, dtype=torch.uint8)]
    there = [upload.place(tensor) for tensor in tensors]
    assert len(device._host_buffers) == 2
    stream.record().synchronize()
    for tensor, copy in zip(tensors, there, strict=True):
        assert copy.dtype == tensor.dtype and copy.shape == tensor.shape and torch.equal(copy, tensor)


@pytest.mark.parametrize("factors", [None, (1.0,) * 8 + (4.0,) * 8])
def test_rotary_angles_are_those_of_float64(factors: tuple[float, ...] | None) -> None:
    _, plan, _ = model("bf16", "bf16", layers=1, changes=(("rope_freq_factors", factors), ("rope_theta", 500.0)))
    device: Device = EmulatedDevice()
    stream = device.stream()
    cos, sin = rotary_angles(plan, 50, Upload(device, stream))
    stream.record().synchronize()
    for position, pair in product((0, 1, 49), (0, 1, 15)):
        angle = position / 500.0 ** (2 * pair / 32) / (1.0 if factors is None else factors[pair])
        assert cos[position, pair] == np.float32(np.cos(angle)) and sin[position, pair] == np.float32(np.sin(angle))
    assert cos.shape == sin.shape == (50, 16)


def test_two_rotary_embeddings_are_refused() -> None:
    _, plan, weights = model("bf16", "bf16")
    ops = [op for segment in plan.segments for op in segment.ops if op.op == "rope_kv_write"]
    attrs: Any = ops[1].attrs
    kept = dict(attrs)
    attrs["theta"] = 1.0
    try:
        with pytest.raises(UnsupportedError, match="one rotary embedding, not 2"):
            CudaExecutor(plan, weights, EmulatedDevice(), **SIZES)
    finally:
        attrs.update(kept)
