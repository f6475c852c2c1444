"""Every pass: random inputs through the graph before and after, on the reference executor."""

import numpy as np
import pytest
from graph.small_llama import Driver, config, graph, random_steps, random_weights

from ridgeline.backends.reference.executor import ReferenceExecutor
from ridgeline.core.formats import F32, Q8_0
from ridgeline.graph.builder import GraphBuilder
from ridgeline.graph.cost import Load
from ridgeline.graph.passes import (
    FUSIONS,
    dead_code,
    fuse_add_norm,
    fuse_quantize,
    fuse_silu_mul,
    graph_cost,
    hoist_row_selection,
    merge_projections,
    quantize_activations,
    run_passes,
)
from ridgeline.graph.target import ALL_FUSIONS, Target, cpu_target, cuda_target

MODELS = {
    "q4_1, head q8_0": (config(), "q4_1", {"embed": "q8_0"}),
    "mixed formats": (config(), "q4_0", {"v": "q8_0", "up": "q4_1", "down": "bf16"}),
    "norm read in two dtypes": (config(), "q8_0", {"v": "f32", "gate": "bf16"}),
    "f32, mlp not a multiple of 16": (config(intermediate_size=40, tied=False), "f32", {}),
    "one layer, no grouping, untied": (config(num_layers=1, num_kv_heads=4, tied=False), "bf16", {}),
}


def logits_of(g, weights, dtype=np.float64, seed=1):
    """Logits of a few random mixed steps, stacked."""
    executor = ReferenceExecutor(g, weights, num_slots=3, num_blocks=[40], max_blocks_per_slot=16, dtype=dtype)
    driver = Driver(executor, 40)
    vocab = g.outputs["logits"].shape[1]
    return np.concatenate([driver.step(work)[1] for work in random_steps(seed, vocab)])


def error(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("model", MODELS)
def test_each_fusion_leaves_logits_as_they_were(model):
    cfg, fmt, override = MODELS[model]
    weights = random_weights(cfg, fmt, override=override)
    g = graph(cfg, weights)
    before = logits_of(g, weights)
    for name, run in FUSIONS.items():
        g = run(g)
        assert error(logits_of(g, weights), before) < 1e-6, name  # logits are handed out in float32


@pytest.mark.parametrize("hidden", ["bf16", "f16"])
def test_narrow_activations_cost_only_their_rounding(hidden):
    weights = random_weights(config(), "q4_1")
    g = graph(config(), weights, hidden)
    narrow, reports = run_passes(g, cuda_target(hidden, hidden))
    assert reports[-1].name == "narrow_activations"
    wide = [v for n in narrow.nodes for v in n.outputs if v.dtype == "f32"]
    assert wide == [narrow.outputs["logits"]]
    assert {v.dtype for n in narrow.nodes for v in n.outputs} == {"f32", hidden, "cache"}
    lost = error(logits_of(narrow, weights), logits_of(g, weights))
    assert 0 < lost < (0.1 if hidden == "bf16" else 0.01)


@pytest.mark.parametrize("model", MODELS)
def test_each_fusion_alone(model):
    cfg, fmt, override = MODELS[model]
    weights = random_weights(cfg, fmt, override=override)
    before = logits_of(graph(cfg, weights), weights)
    for name, run in FUSIONS.items():
        assert error(logits_of(run(graph(cfg, weights)), weights), before) < 1e-6, name


@pytest.mark.parametrize("model", MODELS)
def test_fusing_quantization_changes_no_bit(model):
    cfg, fmt, override = MODELS[model]
    weights = random_weights(cfg, fmt, override=override)
    target = cpu_target("f32")
    unfused, _ = run_passes(
        graph(cfg, weights), Target("t", target.activation, target.fusions - {"fuse_quantize"}, "f32")
    )
    fused = fuse_quantize.run(unfused)
    assert len(fused.nodes) < len(unfused.nodes) or fmt == "f32"
    np.testing.assert_array_equal(logits_of(fused, weights, np.float32), logits_of(unfused, weights, np.float32))


def test_quantized_activations_cost_only_their_rounding():
    cfg = config()
    weights = random_weights(cfg, "q8_0")
    g = graph(cfg, weights)
    after = quantize_activations.run(g, {"q8_0": "q8"})
    assert all(n.inputs[0].dtype == "q8" for n in after.nodes if n.op == "linear")
    assert [n.op for n in after.nodes].count("quantize") == cfg.num_layers * 4 + 1  # q, k, v share; gate, up too
    difference = error(logits_of(after, weights), logits_of(g, weights))
    assert 0 < difference < 0.05
    assert quantize_activations.run(g, {"f32": "q8"}).nodes == g.nodes


def test_llama_compiles_to_eight_operators_a_layer():
    cfg = config(num_layers=3, head_dim=32)
    weights = random_weights(cfg, "q4_1", override={"embed": "q8_0"})
    after, reports = run_passes(graph(cfg, weights), cpu_target("f32"))
    layer = ["linear", "rope_kv_write", "attention", "linear", "add_rms_norm", "linear", "linear", "add_rms_norm"]
    last = layer[:3] + ["select_rows", "linear", "select_rows"] + layer[4:]
    assert [n.op for n in after.nodes] == ["embed", "rms_norm", *layer, *layer, *last, "linear"]
    assert {r.name for r in reports} == ALL_FUSIONS | {"quantize_activations", "dead_code"}
    assert sum(r.operators_saved for r in reports) == len(graph(cfg, weights).nodes) - len(after.nodes)
    merged = [v.info for v in after.weights.values() if len(v.info.parts) > 1]
    assert {(len(i.parts), i.interleave) for i in merged} == {(3, 0), (2, 16)}
    assert all("quantize" in r.name or "operators" in r.describe(Load.of([(0, 8)])) for r in reports)


def test_attention_leaves_quantizing_heads_that_groups_would_straddle_to_an_operator():
    cfg = config(num_layers=1, head_dim=16)
    after, _ = run_passes(graph(cfg, random_weights(cfg, "q4_1")), cpu_target("f32"))
    attention = next(n for n in after.nodes if n.op == "attention")
    assert attention.attrs["quantize"] is None
    assert [n.op for n in after.nodes].count("quantize") == 1


def test_differing_formats_are_joined_by_concat_and_silu_mul():
    cfg = config(num_layers=1, head_dim=32)
    weights = random_weights(cfg, "q4_0", override={"v": "q8_0", "up": "q4_1"})
    after, _ = run_passes(graph(cfg, weights), cpu_target("f32"))
    ops = [n.op for n in after.nodes]
    assert ops.count("concat") == 1 and ops.count("rope_kv_write") == 1 and ops.count("silu_mul") == 1
    assert not set(ops) & {"split", "rope", "kv_write", "mul", "silu", "add", "quantize"}
    assert next(n for n in after.nodes if n.op == "silu_mul").attrs["quantize"] == "q8"


def test_hoisting_saves_the_head_for_rows_not_sampled():
    cfg = config()
    g = graph(cfg, random_weights(cfg, "q8_0"))
    load = Load.of([(0, 50)])
    after = hoist_row_selection.run(g)
    per_row = sum(n.inputs[1].shape[0] * n.inputs[1].shape[1] for n in g.nodes if n.op == "linear")
    first_layer_and_qkv = 64 * (128 + 64) + 3 * 64 * 96 + 64 * 128
    assert graph_cost(g, load).dot_ops - graph_cost(after, load).dot_ops == 2 * 49 * (per_row - first_layer_and_qkv)
    head = after.nodes[-1]
    assert head.op == "linear" and head.inputs[0].shape[0].name == "S"
    attention = [i for i, n in enumerate(after.nodes) if n.op == "attention"][-1]
    assert all(v.shape[0].name == "S" for n in after.nodes[attention + 1 :] for v in n.outputs)


def tiny(build):
    """A graph over x = embed(tokens) [T, 32] with weights a, b [32, 32]."""
    g = GraphBuilder(8, 4)
    x = g.embed(g.token_ids, g.weight("table", (10, 32), F32))
    a, b = g.weight("a", (32, 32), Q8_0), g.weight("b", (32, 32), Q8_0)
    return build(g, x, a, b)


def test_a_selection_stays_below_a_value_read_elsewhere():
    def build(g, x, a, b):
        y = g.linear(x, a)
        return g.build(logits=g.select_rows(y, g.sample_rows), other=y)

    after = hoist_row_selection.run(tiny(build))
    assert [n.op for n in after.nodes] == ["embed", "linear", "select_rows"]


def test_a_gate_read_twice_is_not_fused():
    def build(g, x, a, b):
        gate = g.linear(x, a)
        return g.build(logits=g.silu(gate) * g.linear(x, b) + gate)

    after = fuse_silu_mul.run(merge_projections.run(tiny(build)))
    assert not any(n.attrs.get("epilogue") for n in after.nodes)
    assert [n.op for n in after.nodes] == ["embed", "linear", "split", "silu_mul", "add"]


def test_up_times_silu_gate_is_the_same_pattern():
    def build(g, x, a, b):
        return g.build(logits=g.linear(x, b) * g.silu(g.linear(x, a)))

    after = fuse_silu_mul.run(merge_projections.run(tiny(build)))
    assert [n.op for n in after.nodes] == ["embed", "linear"]
    assert after.nodes[-1].inputs[1].info.parts == ("a", "b")  # gate first, whichever was written first


def test_a_weight_used_twice_is_not_merged():
    def build(g, x, a, b):
        return g.build(logits=g.linear(x, a) + g.linear(x, b), other=g.linear(g.silu(x), a))

    after = merge_projections.run(tiny(build))
    assert set(after.weights) == {"table", "a", "b"}


def test_a_sum_keeps_its_other_readers():
    def build(g, x, a, b):
        total = x + g.linear(x, a)
        h = g.rms_norm(total, g.weight("w", (32,), F32), 1e-5)
        return g.build(logits=total + h)

    after = fuse_add_norm.run(tiny(build))
    assert [n.op for n in after.nodes] == ["embed", "linear", "add_rms_norm", "add"]
    assert after.nodes[-1].inputs == after.nodes[-2].outputs


def test_a_value_also_read_in_f32_is_not_quantized_at_its_source():
    def build(g, x, a, b):
        h = g.rms_norm(x, g.weight("w", (32,), F32), 1e-5)
        return g.build(logits=g.linear(h, a) + h)

    quantized = quantize_activations.run(tiny(build), {"q8_0": "q8"})
    assert [n.op for n in fuse_quantize.run(quantized).nodes] == [n.op for n in quantized.nodes]


def test_a_value_that_is_an_output_is_not_quantized_at_its_source():
    def build(g, x, a, b):
        h = g.rms_norm(x, g.weight("w", (32,), F32), 1e-5)
        return g.build(logits=g.linear(h, a), hidden=h)

    after = fuse_quantize.run(quantize_activations.run(tiny(build), {"q8_0": "q8"}))
    assert [n.op for n in after.nodes] == ["embed", "rms_norm", "quantize", "linear"]
    assert after.outputs["hidden"].dtype == "f32"


def test_dead_code_goes_and_cache_writes_stay():
    def build(g, x, a, b):
        g.silu(g.linear(x, b))
        return g.build(logits=g.linear(x, a))

    after = dead_code.run(tiny(build))
    assert [n.op for n in after.nodes] == ["embed", "linear"] and "b" not in after.weights
    cfg = config()
    g = dead_code.run(graph(cfg, random_weights(cfg, "f32")))
    assert [n.op for n in g.nodes].count("kv_write") == cfg.num_layers


@pytest.mark.parametrize("attrs", [{"epsilon": 1e-5}, {}])
def test_unknown_and_missing_attributes_are_named(attrs):
    g = GraphBuilder(8, 4)
    x = g.embed(g.token_ids, g.weight("table", (10, 32), F32))
    with pytest.raises(ValueError, match="eps"):
        g.emit("rms_norm", (x, g.weight("w", (32,), F32)), attrs)


def test_shape_mistakes_are_found_where_they_are_made():
    g = GraphBuilder(8, 4)
    x = g.embed(g.token_ids, g.weight("table", (10, 32), F32))
    with pytest.raises(ValueError, match="bad"):
        g.linear(x, g.weight("bad", (32, 31), F32))
    with pytest.raises(ValueError):
        g.add(x, g.linear(x, g.weight("narrow", (16, 32), F32)))
