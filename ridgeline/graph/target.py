"""What a backend can do: the dtypes its linears read and the fusions it has kernels for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One way of running a graph.

    Attributes:
        name: for messages.
        activation: weight format name -> dtype of the activations that multiply it ("q8", "bf16", "f32");
            formats not named take "f32".
        fusions: names of passes whose results the backend can run.
        kv_dtype: what the cache holds: "bf16", "f16", "f32", "int8" or "fp8".
        hidden: dtype of activations between operators: "f32", or "bf16" or "f16" where kernels round what they store,
            and a matrix's numbers before they multiply it.
        in_place: operators that may write their first output over their first input: each row is read before it is
            written, by the thread that writes it. For a residual stream fewer bytes pass through the caches.
    """

    name: str
    activation: Mapping[str, str]
    fusions: frozenset[str]
    kv_dtype: str
    hidden: str = "f32"
    in_place: frozenset[str] = frozenset()


ALL_FUSIONS = frozenset(
    {
        "hoist_row_selection",
        "merge_projections",
        "fuse_silu_mul",
        "fuse_rope_kv_write",
        "fuse_add_norm",
        "fuse_quantize",
    }
)


def cpu_target(kv_dtype: str, activation_dtype: str = "int8") -> Target:
    """Int8 activations for integer weights, bf16 for bf16, float32 for the rest; every fusion.

    With ``activation_dtype`` "bf16" (AMX) bf16 ones for integer weights too, which are then rounded to bf16 as they
    are multiplied.
    """
    integers = "q8" if activation_dtype == "int8" else activation_dtype
    activation = {"q8_0": integers, "q4_0": integers, "q4_1": integers, "bf16": "bf16"}
    return Target("cpu", activation, ALL_FUSIONS, kv_dtype, in_place=frozenset({"add_rms_norm"}))


def cuda_target(kv_dtype: str, hidden: str = "bf16") -> Target:
    """Sixteen-bit activations that every weight format multiplies as it is; every fusion but int8 activations'."""
    return Target("cuda", {}, ALL_FUSIONS - {"fuse_quantize"}, kv_dtype, hidden)


def naive_target(kv_dtype: str = "f32") -> Target:
    """The graph as the model wrote it."""
    return Target("naive", {}, frozenset(), kv_dtype)
