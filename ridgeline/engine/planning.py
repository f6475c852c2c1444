"""Plans of a model that is described and not loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ridgeline.core.config import EngineConfig
from ridgeline.core.errors import ConfigError
from ridgeline.core.formats import FORMATS, WeightFormat
from ridgeline.graph.plan import Plan, compile
from ridgeline.graph.target import cuda_target
from ridgeline.models.description import Description


def hidden_dtype(formats: set[str]) -> str:
    """What a GPU keeps activations in: fp16 for matrices all in fp16, else bf16, which holds the range of any."""
    return "f16" if formats == {"f16"} else "bf16"


def activation_dtype(config: EngineConfig) -> str:
    """What multiplies quantized weights on the cpu backend, "int8" or "bf16"; "auto" is the fastest.

    Processors with AMX multiply bf16 on tiles, at the price of unpacking weights to bf16, which even a lone row pays:
    int8 decodes a request alone 1.4 times as fast there, and bf16 everything else (docs/perf-log.md). What an engine
    has room for does not enter, or a request's bits would hang on it.

    Raises ConfigError where bf16 is asked for and the instruction set has no tiles.
    """
    from ridgeline.backends.cpu.lowering import best_activation_dtype, best_isa

    best = best_activation_dtype(config.isa)
    if config.activation_dtype == "bf16" and best != "bf16":
        raise ConfigError(
            "activation_dtype bf16 needs AMX and this engine's instruction set is "
            f"{config.isa or best_isa()}: leave it out, or take int8"
        )
    return best if config.activation_dtype == "auto" else config.activation_dtype


def cache_dtype(config: EngineConfig, head_dim: int, formats: Iterable[WeightFormat]) -> str:
    """What the KV cache holds; "auto" is the fastest that costs less quality than the weights' own rounding.

    bf16 activations leave quantized weights room for a cache of 8 bits; it is the faster one where its products fit
    the tiles of AMX.

    Args:
        head_dim: of the model.
        formats: of its matrices.
    """
    if config.kv_dtype != "auto" or config.backend == "cuda":
        return "bf16" if config.kv_dtype == "auto" else config.kv_dtype
    if config.backend == "reference":
        return "f32"
    quantized = any(form.kind != "float" for form in formats)
    return "int8" if quantized and head_dim % 64 == 0 and activation_dtype(config) == "bf16" else "bf16"


def plan_for_cpu(model: Description, config: EngineConfig) -> Plan:
    """The plan that the cpu backend would run."""
    from ridgeline.backends.cpu.lowering import plan_target

    kv_dtype = cache_dtype(config, model.config.head_dim, model.formats.values())
    graph = model.graph(config.max_num_batched_tokens, config.sampled_rows(), kv_dtype, config.block_size)
    return compile(graph, plan_target(kv_dtype, config.isa, activation_dtype(config)))


def plan_for_cuda(model: Description, config: EngineConfig) -> tuple[Plan, int]:
    """The plan that the cuda backend would run, and the longest sequence in tokens.

    Matrices of floats count as what the GPU keeps them in, that of the activations.
    """
    kv_dtype = "bf16" if config.kv_dtype == "auto" else config.kv_dtype  # whatever the config's backend
    matrices = {name for name, entry in model.entries.items() if len(entry.shape) == 2}
    hidden = hidden_dtype({model.formats[name].name for name in matrices})
    kept = {
        name: FORMATS[hidden] if name in matrices and form.kind == "float" else form
        for name, form in model.formats.items()
    }
    model = replace(model, formats=kept)
    graph = model.graph(config.max_num_batched_tokens, config.sampled_rows(), kv_dtype, config.block_size)
    plan = compile(graph, cuda_target(kv_dtype, hidden))
    length = config.model_len(model.config.context_length)
    return plan, -(-length // config.block_size) * config.block_size
