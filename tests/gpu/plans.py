"""The plans whose kernel variants continuous integration compiles and climbs: what people serve, by its shape alone."""

from __future__ import annotations

from dataclasses import dataclass

from ridgeline.core.config import EngineConfig
from ridgeline.core.formats import F32, FORMATS
from ridgeline.engine.planning import plan_for_cuda
from ridgeline.graph.plan import Plan
from ridgeline.models import llama
from ridgeline.models.description import Description
from ridgeline.models.llama import LlamaConfig

LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    context_length=8192,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    tied=False,
)
SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_layers=30,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    context_length=8192,
    rms_norm_eps=1e-5,
    rope_theta=100000.0,
    tied=True,
)


@dataclass(frozen=True)
class Listed:
    """A model as it is served.

    Attributes:
        stored: the format of its matrices.
        kv_dtype: of its cache.
    """

    name: str
    config: LlamaConfig
    stored: str
    kv_dtype: str = "bf16"

    def plan(self) -> tuple[Plan, int]:
        """The plan for 256 requests and 2,048 tokens a step, and the longest sequence."""
        entries = llama.weight_entries(self.config)
        formats = {n: FORMATS[self.stored] if len(e.shape) == 2 else F32 for n, e in entries.items()}
        described = Description(self.name, llama, self.config, formats, entries)
        options = EngineConfig(
            backend="cuda", max_num_seqs=256, max_num_batched_tokens=2048, kv_dtype=self.kv_dtype, max_sampled_rows=256
        )
        return plan_for_cuda(described, options)


PLANS = (
    Listed("llama-8b-bf16", LLAMA_8B, "bf16"),
    Listed("llama-8b-f16", LLAMA_8B, "f16", "f16"),
    Listed("llama-8b-q4_0-fp8", LLAMA_8B, "q4_0", "fp8"),
    Listed("smollm2-q4_1", SMOLLM2, "q4_1"),
    Listed("smollm2-q8_0-int8", SMOLLM2, "q8_0", "int8"),
)
