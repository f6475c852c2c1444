"""Memory, plan, cost and roofline."""

import numpy as np
import pytest
from graph.small_llama import Driver, config, graph, random_steps, random_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.backends.reference.cache import StepContext
from ridgeline.backends.reference.executor import ReferenceExecutor
from ridgeline.backends.reference.ops import run_op
from ridgeline.core.formats import F32, Q4_1
from ridgeline.core.hardware import DATASHEET, Peaks
from ridgeline.graph.builder import GraphBuilder
from ridgeline.graph.cost import Cost, Load, total
from ridgeline.graph.ir import bound, row_bytes
from ridgeline.graph.memory import ALIGNMENT, Lifetime, align, place
from ridgeline.graph.plan import compile
from ridgeline.graph.roofline import roofline
from ridgeline.graph.target import cpu_target, cuda_target, naive_target

lifetimes = st.lists(
    st.tuples(st.integers(0, 20), st.integers(0, 10), st.integers(0, 5000)).map(
        lambda t: Lifetime(t[0], t[0] + t[1], t[2])
    ),
    max_size=40,
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(lifetimes)
def test_no_two_live_buffers_overlap(blocks):
    offsets, end = place(dict(enumerate(blocks)))
    for i, a in enumerate(blocks):
        assert offsets[i] % ALIGNMENT == 0 and offsets[i] + a.size <= end
        for j, b in enumerate(blocks[:i]):
            together = a.first <= b.last and b.first <= a.last
            apart = offsets[i] + a.size <= offsets[j] or offsets[j] + b.size <= offsets[i]
            assert not together or apart
    assert end <= sum(align(b.size) for b in blocks)
    at_once = [sum(b.size for b in blocks if b.first <= t <= b.last) for t in range(32)]
    assert end >= max(at_once)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(2, 200), st.integers(1, 4096))
def test_a_chain_reuses_two_buffers(length, size):
    _, end = place({i: Lifetime(i, i + 1, size) for i in range(length)})
    assert end == 2 * align(size)


def run_in_arena(plan, weights, batch, tables, caches):
    """One step whose every value lives in the arena, as bytes; returns the logits."""
    arena = np.full(plan.arena_bytes, 0xA5, np.uint8)
    context = StepContext.of(batch, tables)
    sizes = {"T": len(batch.token_ids), "S": len(batch.sample_rows)}

    def rows(value):
        buffer = plan.buffers[value.id]
        count = sizes[value.shape[0].name]
        whole = arena[buffer.offset : buffer.offset + count * buffer.row_bytes].reshape(count, -1)
        data = whole[:, : row_bytes(value)].view(np.int32 if value.dtype == "i32" else np.float32)
        return data[:, 0] if len(value.shape) == 1 else data

    for name in ("token_ids", "positions", "sample_rows"):
        rows(plan.inputs[name])[:] = getattr(batch, name)
    for op in plan.segments[0].ops:
        inputs = [
            weights[v] if v.dtype == "weight" else caches[v.cache.layer] if v.cache else rows(v).copy()
            for v in op.inputs
        ]
        for value, result in zip(op.outputs, run_op(op.op, inputs, op.attrs, context=context), strict=True):
            if value.dtype != "cache":
                rows(value)[:] = result
    return rows(plan.outputs["logits"]).copy()


@pytest.mark.parametrize("mlp", [96, 40])
def test_values_survive_in_the_arena_until_they_are_read(mlp):
    cfg = config(intermediate_size=mlp)
    weights = random_weights(cfg, "f32")
    plan = compile(graph(cfg, weights), cpu_target("f32"))
    executor = ReferenceExecutor(plan, weights, num_slots=3, num_blocks=[40], max_blocks_per_slot=16)
    driver = Driver(executor, 40)
    for work in random_steps(3, cfg.vocab_size):
        batch = driver.batch(work)
        executor.finish(executor.launch(batch))
        caches = {v.cache.layer: c for v, c in executor._caches.items()}  # rewriting the same tokens is harmless
        logits = run_in_arena(plan, executor._weights, batch, executor._tables, caches)
        np.testing.assert_array_equal(logits, executor.last_logits)


@pytest.mark.parametrize("target", [naive_target("bf16"), cpu_target("bf16")])
def test_every_activation_has_an_aligned_place(target):
    cfg = config()
    weights = random_weights(cfg, "q4_1", override={"embed": "q8_0"})
    plan = compile(graph(cfg, weights, "bf16"), target)
    values = {v for op in plan.segments[0].ops for v in (*op.inputs, *op.outputs)}
    values = {v for v in values if v.dtype not in ("weight", "cache")} | {plan.outputs["logits"]}
    for value in values:
        buffer = plan.buffers[value.id]
        assert buffer.offset % 64 == 0 and buffer.row_bytes >= row_bytes(value)
        assert len(value.shape) == 1 or buffer.row_bytes % 64 == 0
        assert buffer.offset + buffer.row_bytes * bound(buffer.rows) <= plan.arena_bytes
    quantized = {row_bytes(v) for v in values if v.dtype == "q8"}
    assert quantized == ({48 * 2, 48 * 3} if target.name == "cpu" else set())


def test_an_operator_never_writes_over_what_the_one_before_reads_or_writes():
    """A thread may start an operator while another is still in the one before: no barrier guards a private row."""
    cfg = config()
    plan = compile(graph(cfg, random_weights(cfg, "q4_1", override={"embed": "q8_0"}), "bf16"), cpu_target("bf16"))
    ops = plan.segments[0].ops

    def places(values):
        buffers = [plan.buffers[v.id] for v in values if v.dtype not in ("weight", "cache")]
        return [(b.offset, b.offset + b.row_bytes * bound(b.rows)) for b in buffers]

    for before, op in zip(ops, ops[1:], strict=False):
        for start, end in places(op.outputs):
            for other_start, other_end in places((*before.inputs, *before.outputs)):
                assert end <= other_start or other_end <= start, (before.op, op.op)


def test_a_residual_stream_stays_where_it_is():
    cfg = config(num_layers=4)
    weights = random_weights(cfg, "q4_1", override={"embed": "q8_0"})

    def sums(target):
        plan = compile(graph(cfg, weights, "bf16"), target)
        ops = [op for op in plan.segments[0].ops if op.op == "add_rms_norm"]
        return [plan.buffers[op.outputs[0].id].offset for op in ops]

    *inner, before_mlp, last = sums(cpu_target("bf16"))  # the last layer's MLP has the sampled rows alone
    assert len(inner) == 6 and len(set(inner)) == 1 and before_mlp == last != inner[0]
    assert len(set(sums(cuda_target("bf16", "f32")))) > 1, "only where the target says so"


@pytest.mark.parametrize("reader", ["another operator", "an output"])
def test_a_sum_that_is_read_again_is_not_written_over(reader):
    g = GraphBuilder(8, 4)
    norm, table = g.weight("norm", (32,), F32), g.weight("table", (10, 32), F32)
    x = g.embed(g.token_ids, table)
    first, _ = g.emit("add_rms_norm", (x, x, norm), {"eps": 1e-5})
    second, y = g.emit("add_rms_norm", (first, x, norm), {"eps": 1e-5})
    kept = {"first": first} if reader == "an output" else {}
    logits = y if kept else g.add(y, first)
    plan = compile(g.build(logits=logits, second=second, **kept), cpu_target("f32"))
    assert plan.buffers[first.id].offset != plan.buffers[second.id].offset


def test_an_output_made_early_is_never_overwritten():
    g = GraphBuilder(8, 4)
    early = x = g.embed(g.token_ids, g.weight("table", (10, 32), F32))
    for _ in range(4):
        x = g.silu(x)
    plan = compile(g.build(logits=x, early=early), naive_target())
    size, start = 8 * 32 * 4, plan.buffers[early.id].offset
    others = [plan.buffers[v.id].offset for op in plan.segments[0].ops[1:] for v in op.outputs]
    assert len(others) == 4 and all(abs(offset - start) >= size for offset in others)


def test_a_cache_of_another_dtype_than_the_targets_is_refused():
    cfg = config()
    with pytest.raises(ValueError, match="bf16"):
        compile(graph(cfg, random_weights(cfg, "f32"), "f32"), cpu_target("bf16"))


def test_a_decode_step_reads_every_weight_byte_once():
    cfg = config(num_layers=3)
    weights = random_weights(cfg, "q4_1", override={"embed": "q8_0"})
    plan = compile(graph(cfg, weights, "bf16"), cpu_target("bf16"))
    stored = sum(w.tensor.data.size for w in weights.values())
    row = weights["embed"].tensor.format.row_bytes(cfg.hidden_size)
    cost = plan.cost(Load.of([(99, 1)]))
    assert cost.weight_bytes == stored + row
    assert cost.kv_read == 100 * plan.caches[0].bytes_per_token == 100 * 3 * 2 * 2 * 16 * 2
    assert cost.kv_written == plan.caches[0].bytes_per_token
    matrices = sum(w.tensor.shape[0] * w.tensor.shape[1] for w in weights.values() if len(w.tensor.shape) == 2)
    assert cost.dot["int8"] == 2 * matrices
    assert cost.dot["bf16"] == 4 * 100 * cfg.num_heads * cfg.head_dim * cfg.num_layers


def test_an_int8_cache_counts_its_codes_and_a_scale_per_token_and_head():
    cfg = config(num_layers=3)
    plan = compile(graph(cfg, random_weights(cfg, "q8_0"), "int8"), cpu_target("int8"))
    assert plan.caches[0].bytes_per_token == 3 * 2 * 2 * (16 + 4)
    cost = plan.cost(Load.of([(99, 1)]))
    assert cost.kv_read == 100 * plan.caches[0].bytes_per_token and cost.kv_written == plan.caches[0].bytes_per_token


def test_a_gpu_multiplies_in_its_queries_type_whatever_the_cache_holds():
    cfg = config()
    weights = random_weights(cfg, "f32")
    costs = {}
    for kv_dtype in ("bf16", "f16", "fp8", "int8"):
        plan = compile(graph(cfg, weights, kv_dtype), cuda_target(kv_dtype))
        costs[kv_dtype] = plan.cost(Load.of([(99, 1)]))
        assert plan.caches[0].bytes_per_token == {"fp8": 1, "int8": 1.25}.get(kv_dtype, 2) * 2 * 2 * 16 * cfg.num_layers
    assert len({cost.dot["bf16"] for cost in costs.values()}) == 1
    assert all("int8" not in cost.dot for cost in costs.values())
    assert costs["bf16"].convert_ops < costs["fp8"].convert_ops == costs["int8"].convert_ops


def test_the_cost_of_a_quantized_linear():
    g = GraphBuilder(8, 4)
    x = g.embed(g.token_ids, g.weight("table", (10, 64), F32))
    built = g.build(logits=g.linear(x, g.weight("w", (48, 64), Q4_1)))
    plan = compile(built, cpu_target("f32"))
    quantize, linear = plan.segments[0].ops[1:]
    load = Load(5, 5, 1, 5, 15)
    # Per output and group of 32: a multiply-add of the scale and one of the minimum; each code unpacked once.
    assert linear.cost(load) == Cost(
        {"int8": 2.0 * 5 * 48 * 64}, 4 * 5 * 48 * 2, 48 * 64, 48 * 2 * 20, 0, 0, 5 * (2 * 48), 5 * 48 * 4
    )
    assert quantize.cost(load).act_written == linear.cost(load).act_read


def test_load_counts_causal_pairs():
    load = Load.of([(10, 3), (0, 4), (5, 1)])
    assert (load.tokens, load.rows, load.requests) == (8, 3, 3)
    assert load.kv_tokens_read == 13 + 4 + 6
    assert load.attn_pairs == (11 + 12 + 13) + (1 + 2 + 3 + 4) + 6


def test_a_step_that_samples_nothing_does_not_pay_for_the_head():
    cfg = config()
    plan = compile(graph(cfg, random_weights(cfg, "q8_0")), cpu_target("f32"))
    chunk, sampled = Load(32, 0, 1, 32, 528), Load(32, 1, 1, 32, 528)
    head = plan.segments[0].ops[-1]
    assert head.cost(chunk) == Cost()
    assert plan.cost(sampled).weight_bytes - plan.cost(chunk).weight_bytes > head.cost(sampled).weight_bytes


def test_costs_add_up():
    a, b = Cost({"int8": 2.0}, 1, 2, 3, 4, 5, 6, 7), Cost({"f32": 1.0}, 1, 1, 1, 1, 1, 1, 1)
    assert total([a, b]).plus(b, -1) == Cost({"int8": 2.0, "f32": 0.0}, 1, 2, 3, 4, 5, 6, 7)
    assert a.bytes_read == 3 + 4 + 6 and a.bytes_written == 5 + 7 and a.streamed_bytes == 3 + 4


def test_roofline_names_what_binds():
    peaks = Peaks(bandwidth=100.0, int8=1000.0, bf16=500.0, f32=250.0)
    memory = roofline(Cost({"int8": 1000.0}, weight_bytes=150, kv_read=50), peaks)
    assert (memory.seconds, memory.binds) == (2.0, "memory")
    compute = roofline(Cost({"int8": 1000.0, "bf16": 1000.0, "f32": 500.0}, weight_bytes=200), peaks)
    assert (compute.seconds, compute.binds, compute.memory_seconds) == (5.0, "compute", 2.0)
    assert all(p.int8 >= p.bf16 >= p.f32 > p.bandwidth > 0 for p in DATASHEET.values())
