"""What is laid side by side: operators in the shapes of an 8B Llama, ours and the peers' calls of the same work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from ridgeline.backends.cuda.launch import CardShape, Launch, cdiv

HIDDEN, MLP, HEADS, KV_HEADS, DIM, CONTEXT, PAGE = 4096, 14336, 32, 8, 128, 4096, 16
CHUNK = 256
"""Keys of a partial of our decode kernel."""
ROWS = (1, 64, 4096)
QKV = (6144, 4096)
"""(N, K) of the product that is compared: no residual and no gate, which the peers' products do not have."""

Calls = Callable[[str, int], Any]
"""Launches from an architecture and a number of rows: ours as a list, a peer's by calling its launcher."""


@dataclass(frozen=True)
class Peer:
    """A peer's call of an operator.

    Attributes:
        name: "vLLM batch-invariant", ...
        call: calls its launcher with an architecture and rows.
        tile: rows, columns of a program's output and tensor-core operations of a launch, as for ``Operator``.
        loops: how often each loop of a row kernel runs, in code order.
        outputs: elements written of some rows, where they are not the operator's.
        branch: share of programs that take the first of two ways.
        passes: how often a job of a product enters its loop over K.
    """

    name: str
    call: Calls
    tile: Callable[[Launch, int], tuple[float, float]]
    loops: tuple[float, ...] = ()
    outputs: Callable[[int], float] | None = None
    branch: Callable[[Launch], float] = lambda _: 1.0
    passes: Callable[[Launch], float] = lambda _: 1.0


@dataclass(frozen=True)
class Operator:
    """An operator, ours and theirs.

    Attributes:
        shapes: rows.
        us: our launches, returned. A tile is the elements of a program's output and the operations of the tensor cores
            over the grid, padding included; 0 where it uses none.
        outputs, operations, moved: elements written, operations and bytes at least, of some rows.
        kind: whose peak counts.
        only: architectures, if not both.
    """

    name: str
    us: Peer
    peers: tuple[Peer, ...]
    outputs: Callable[[int], float]
    operations: Callable[[int], float]
    moved: Callable[[int], float]
    shapes: tuple[int, ...] = ROWS
    kind: str = "bf16"

    def shape(self, rows: int, launches: list[Launch], padded: float) -> CardShape:
        """As the prediction takes it: the same operations and bytes, whoever computes them, and what fills up tiles."""
        return CardShape(f"M={rows}", launches, self.operations(rows), self.moved(rows), padded=padded or None)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor of which nothing is allocated."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def ints(*shape: int) -> torch.Tensor:
    """The same in int32."""
    return empty(*shape, dtype=torch.int32)


def floats(*shape: int) -> torch.Tensor:
    """The same in fp32."""
    return empty(*shape, dtype=torch.float32)


def op(name: str) -> Any:
    """Our kernel's module."""
    return import_module(f"ridgeline.backends.cuda.kernels.{name}")


def row_tile(columns: int, rows: str = "", block: str = "") -> Callable[[Launch, int], tuple[float, float]]:
    """The tile of a row kernel: some rows of ``columns``, or one ``block`` of a row."""

    def tile(launch: Launch, _: int) -> tuple[float, float]:
        meta = launch.config.meta
        return (meta[rows] if rows else 1) * (min(columns, meta[block]) if block else columns), 0.0

    return tile


def product_tile(n: int, k: int, m: str, columns: str, split: str = "") -> Callable[[Launch, int], tuple[float, float]]:
    """The tile of a product, and its operations with rows and columns padded to whole tiles."""

    def tile(launch: Launch, rows: int) -> tuple[float, float]:
        meta = launch.config.meta
        height, width = meta[m], meta[columns]
        return height * width, 2.0 * cdiv(rows, height) * height * cdiv(n, width) * width * k

    return tile


# --- norms, gates, rotation -------------------------------------------------------------------------------------


def our_norm(rows: int, residual: bool, center: bool = False) -> list[Launch]:
    """RMSNorm, with the residual added first; LayerNorm."""
    x, weight, out = empty(rows, HIDDEN), empty(HIDDEN), empty(rows, HIDDEN)
    extra: dict[str, Any] = {"delta": empty(rows, HIDDEN), "total": empty(rows, HIDDEN)} if residual else {}
    if center:
        extra |= {"center": True, "bias": empty(HIDDEN)}
    return list(op("norm").norm(x, weight, out, eps=1e-5, **extra))


def our_gate(function: str) -> Calls:
    """The gate of an MLP."""

    def call(arch: str, rows: int) -> Any:
        gate, up, out = (empty(rows, MLP) for _ in range(3))
        return op("gated").gated(gate, up, out, function=function, arch=arch)

    return call


def liger(module: str, function: str) -> Any:
    """A function of Liger's."""
    return getattr(import_module(f"liger_kernel.ops.{module}"), function)


def flash_norm(rows: int, residual: bool) -> Any:
    """flash-attn's RMSNorm."""
    call = import_module("flash_attn.ops.triton.layer_norm")._layer_norm_fwd
    return call(
        empty(rows, HIDDEN), empty(HIDDEN), None, 1e-5, residual=empty(rows, HIDDEN) if residual else None,
        is_rms_norm=True,
    )  # fmt: skip


def vllm_norm(rows: int) -> Any:
    """vLLM's batch-invariant RMSNorm."""
    module = import_module("vllm.model_executor.determinism.batch_invariant")
    return module.rms_norm_batch_invariant(empty(rows, HIDDEN), empty(HIDDEN), 1e-5)


def our_rope(arch: str, rows: int) -> list[Launch]:
    """Rotation of queries and keys, and the write of keys and values to the cache."""
    return list(next(s.launches for s in op("rope_kv").card_shapes(arch) if s.name == f"M={rows}"))


def liger_rope(rows: int) -> Any:
    """Liger's, in place, of queries and keys."""
    q, k = (empty(1, rows, heads, DIM).transpose(1, 2) for heads in (HEADS, KV_HEADS))
    return liger("rope", "rope_forward")(q, k, floats(1, rows, DIM), floats(1, rows, DIM))


def flash_rope(rows: int) -> Any:
    """flash-attn's, a launch for queries and one for keys."""
    call = import_module("flash_attn.ops.triton.rotary").apply_rotary
    cos, sin = floats(rows, DIM // 2), floats(rows, DIM // 2)
    return [call(empty(1, rows, heads, DIM), cos, sin, inplace=True) for heads in (HEADS, KV_HEADS)]


def rope_tile(launch: Launch, _: int) -> tuple[float, float]:
    """Heads of a program times their size."""
    meta = launch.config.meta
    heads = meta.get("HEADS") or meta.get("BLOCK_H", 0) * meta.get("BLOCK_M", 0) or HEADS + KV_HEADS
    return heads * DIM, 0.0


def rope_share(launch: Launch) -> float:
    """Share of our programs that rotate queries: all of a token's but the one with its keys and values."""
    return 1 - 1 / launch.grid[1]


# --- products ---------------------------------------------------------------------------------------------------


def ours_of(name: str) -> Calls:
    """The card's launches of a product."""
    return lambda arch, rows: next(s.launches for s in op(name).card_shapes(arch) if s.name.endswith(f"qkv M={rows}"))


def our_fp8_row(arch: str, rows: int) -> list[Launch]:
    """FP8 with a scale for each row of x and of w."""
    module, (n, k) = op("linear_fp8"), QKV
    x, w = (empty(r, k, dtype=torch.float8_e4m3fn) for r in (rows, n))
    workspace, counters = module.linear_fp8_scratch(rows, n, k, "row", arch).tensors("meta")
    scratch = {"workspace": workspace, "counters": counters}
    out = empty(rows, n)
    return list(module.linear_fp8(x, w, floats(rows), floats(n), out, arch, scaling="row", **scratch))


def vllm_matmul(rows: int) -> Any:
    """vLLM's batch-invariant product; the weight lies [N, K]."""
    n, k = QKV
    module = import_module("vllm.model_executor.determinism.batch_invariant")
    return module.matmul_persistent(empty(rows, k), empty(n, k).t())


def vllm_scaled(rows: int, dtype: torch.dtype) -> Any:
    """vLLM's product of int8 or FP8 with a scale for each row and column."""
    n, k = QKV
    name = "vllm.model_executor.layers.quantization.compressed_tensors.triton_scaled_mm"
    x, w = empty(rows, k, dtype=dtype), empty(n, k, dtype=dtype).t()
    return import_module(name).triton_scaled_mm(x, w, floats(rows, 1), floats(n, 1), torch.bfloat16)


def vllm_block(rows: int) -> Any:
    """vLLM's product of FP8 with scales of blocks."""
    n, k = QKV
    module = import_module("vllm.model_executor.layers.quantization.utils.fp8_utils")
    x, w = (empty(r, k, dtype=torch.float8_e4m3fn) for r in (rows, n))
    scales = floats(rows, k // 128), floats(n // 128, k // 128)
    return module.w8a8_triton_block_scaled_mm(x, w, *scales, [128, 128], torch.bfloat16)


def vllm_w4a16(rows: int) -> Any:
    """vLLM's product of 4-bit codes with zeros in groups of 128."""
    n, k = QKV
    module = import_module("vllm.model_executor.kernels.linear.mixed_precision.triton_w4a16")
    zeros, codes = ints(k // 128, n // 8), ints(k, n // 8)
    return module._triton_w4a16_gemm_impl(empty(rows, k), codes, empty(k // 128, n), zeros, 128)


def vllm_awq(rows: int) -> Any:
    """vLLM's AWQ product, in fp16, with the eight parts along K that it is called with."""
    n, k = QKV
    half = torch.float16
    module = import_module("vllm.model_executor.layers.quantization.awq_triton")
    scales, zeros = empty(k // 128, n, dtype=half), ints(k // 128, n // 8)
    return module.awq_gemm_triton(empty(rows, k, dtype=half), ints(k, n // 8), scales, zeros, 8)


# --- attention --------------------------------------------------------------------------------------------------


def our_prefill(arch: str, _: int) -> list[Launch]:
    """A prompt of 4,096 tokens."""
    return list(op("attention_prefill").card_shapes(arch)[0].launches)


def our_decode(arch: str, rows: int) -> list[Launch]:
    """One token of some requests at a context of 4,096."""
    return list(next(s.launches for s in op("attention_decode").card_shapes(arch) if s.name == f"M={rows} D={DIM}"))


def causal(tokens: int, height: int, width: int) -> float:
    """Query-key pairs of a causal prompt, whole tiles counted: ``height`` tokens by ``width`` keys."""
    return sum(float(height * cdiv(min(first + height, tokens), width) * width) for first in range(0, tokens, height))


def prefill_tile(tokens: str, keys: str, group: int = 1) -> Callable[[Launch, int], tuple[float, float]]:
    """Rows of a program (``group`` heads of each token) times the head size; operations of causal tiles."""

    def tile(launch: Launch, rows: int) -> tuple[float, float]:
        height, width = launch.config.meta[tokens], launch.config.meta[keys]
        return height * DIM, 4.0 * DIM * HEADS * causal(rows, height // group, width)

    return tile


def decode_tile(rows: str, heads: int) -> Callable[[Launch, int], tuple[float, float]]:
    """Rows of a program, padding included; ``heads`` of them are some request's."""

    def tile(launch: Launch, requests: int) -> tuple[float, float]:
        height = launch.config.meta[rows]
        return heads * DIM, 4.0 * DIM * requests * (HEADS // heads) * height * CONTEXT

    return tile


def flash_prefill(rows: int) -> Any:
    """flash-attn's Triton forward pass: it knows neither grouped heads nor pages."""
    q, k, v = (empty(1, rows, HEADS, DIM) for _ in range(3))
    return import_module("flash_attn.flash_attn_triton")._flash_attn_forward(q, k, v, causal=True)


def vllm_unified(requests: int, tokens: int, context: int) -> Any:
    """vLLM's unified attention over pages, as its backend calls it: 16 segments below 16 requests of one token."""
    module = import_module("vllm.v1.attention.ops.triton_unified_attention")
    count = requests * tokens
    k, v = (empty(requests * context // PAGE, PAGE, KV_HEADS, DIM) for _ in range(2))
    segments = {
        "seq_threshold_3D": 128 // KV_HEADS,
        "num_par_softmax_segments": 16,
        "softmax_segm_output": floats(count, HEADS, 16, DIM),
        "softmax_segm_max": floats(count, HEADS, 16),
        "softmax_segm_expsum": floats(count, HEADS, 16),
    }
    q, out = empty(count, HEADS, DIM), empty(count, HEADS, DIM)
    table = ints(requests, context // PAGE)
    return module.unified_attention(
        q, k, v, out, ints(requests + 1), tokens, ints(requests), context, DIM**-0.5, True, (-1, -1), table, 0,
        None, floats(1), floats(1), **segments,
    )  # fmt: skip


def vllm_prefix(rows: int) -> Any:
    """vLLM's prefix prefill: queries over the step's own keys, then over cached ones; here there are none cached."""
    module = import_module("vllm.v1.attention.ops.prefix_prefill")
    k_cache = empty(rows // PAGE, KV_HEADS, DIM // 8, PAGE, 8)
    v_cache = empty(rows // PAGE, KV_HEADS, DIM, PAGE)
    q, k, v = empty(rows, HEADS, DIM), empty(rows, KV_HEADS, DIM), empty(rows, KV_HEADS, DIM)
    return module.context_attention_fwd(
        q, k, v, empty(rows, HEADS, DIM), "auto", k_cache, v_cache, ints(1, rows // PAGE), ints(2), ints(1), rows,
        rows, floats(1), floats(1), sm_scale=DIM**-0.5,
    )  # fmt: skip


def vllm_decode(rows: int) -> Any:
    """vLLM's split decode (it serves its MLA backend), with 8 parts of a request."""
    module = import_module("vllm.v1.attention.ops.triton_decode_attention")
    k, v = (empty(rows * CONTEXT // PAGE, PAGE, KV_HEADS, DIM) for _ in range(2))
    q, out = empty(rows, HEADS, DIM), empty(rows, HEADS, DIM)
    return module.decode_attention_fwd(
        q, k, v, out, floats(rows, HEADS), ints(rows, CONTEXT // PAGE), ints(rows), floats(rows, HEADS, 8, DIM + 1),
        8, DIM**-0.5, PAGE, k_scale=floats(1), v_scale=floats(1),
    )  # fmt: skip


def in_turn(launch: Launch) -> float:
    """Parts along K that one program of ours adds up."""
    meta = launch.config.meta
    if "BITS" in meta:  # 4 bits: the first is ahead of the loop over parts
        return float(max(1, meta["SPLIT"] - 1) if not meta["PARALLEL"] else 1)
    if "int8" in launch.kernel.__name__:  # exact: only programs side by side take parts
        return 1.0
    return float(meta.get("PARTS", 1) * (1 if meta["PARALLEL"] else meta["SPLIT"]))


def _product(name: str, ours: Calls, peers: tuple[Peer, ...], weight: float, x: float, kind: str = "bf16") -> Operator:
    n, k = QKV
    us = Peer("", ours, product_tile(n, k, "BLOCK_M", "BLOCK_N"), passes=in_turn)
    return Operator(
        name, us, peers, lambda m: m * n,
        lambda m: 2.0 * m * n * k, lambda m: n * k * weight + m * k * x + 2.0 * m * n, kind=kind,
    )  # fmt: skip


def _rows(name: str, us: Peer, peers: tuple[Peer, ...], columns: int, moved: float, work: float) -> Operator:
    return Operator(name, us, peers, lambda m: m * columns, lambda m: work * m * columns, lambda m: moved * m * columns)


def operators() -> list[Operator]:
    """Everything that is compared."""
    whole, sizes = row_tile(HIDDEN), product_tile(*QKV, "BLOCK_SIZE_M", "BLOCK_SIZE_N")
    norm_tile = row_tile(HIDDEN, "ROWS")
    gate_tile = row_tile(MLP, block="BLOCK")
    added = (
        Peer("Liger", lambda a, m: liger("fused_add_rms_norm", "fused_add_rms_norm_forward")(
            empty(m, HIDDEN), empty(m, HIDDEN), empty(HIDDEN), 1e-5, 0.0, "llama"), whole),
        Peer("flash-attn", lambda a, m: flash_norm(m, True), whole),
    )  # fmt: skip
    plain = (
        Peer("Liger", lambda a, m: liger("rms_norm", "rms_norm_forward")(
            empty(m, HIDDEN), empty(HIDDEN), 1e-5, 0.0, "llama", None), whole),
        Peer("flash-attn", lambda a, m: flash_norm(m, False), whole),
        Peer("vLLM batch-invariant", lambda a, m: vllm_norm(m), whole, (4, 4)),
    )  # fmt: skip
    layer = (
        Peer("Liger", lambda a, m: liger("layer_norm", "layer_norm_forward")(
            empty(m, HIDDEN), empty(HIDDEN), empty(HIDDEN), 1e-5), whole),
    )  # fmt: skip
    silu = (Peer("Liger", lambda a, m: liger("swiglu", "swiglu_forward")(empty(m, MLP), empty(m, MLP)), row_tile(MLP)),)
    gelu = (Peer("Liger", lambda a, m: liger("geglu", "geglu_forward")(empty(m, MLP), empty(m, MLP)), row_tile(MLP)),)
    rope = (
        Peer("Liger", lambda a, m: liger_rope(m), rope_tile),
        Peer("flash-attn", lambda a, m: flash_rope(m), rope_tile),
    )
    fp8 = torch.float8_e4m3fn
    ways: dict[str, Any] = {"outputs": lambda m: m * (HEADS + 2 * KV_HEADS) * DIM, "branch": rope_share}
    return [
        _rows("RMSNorm + residual", Peer("", lambda a, m: our_norm(m, True), norm_tile), added, HIDDEN, 8.0, 5.0),
        _rows("RMSNorm", Peer("", lambda a, m: our_norm(m, False), norm_tile), plain, HIDDEN, 4.0, 4.0),
        _rows("LayerNorm", Peer("", lambda a, m: our_norm(m, False, True), norm_tile), layer, HIDDEN, 4.0, 6.0),
        _rows("SiLU gate", Peer("", our_gate("silu"), gate_tile), silu, MLP, 6.0, 6.0),
        _rows("GELU gate", Peer("", our_gate("gelu_tanh"), gate_tile), gelu, MLP, 6.0, 10.0),
        _rows("rotary", Peer("", our_rope, rope_tile, **ways), rope, (HEADS + KV_HEADS) * DIM, 4.0, 3.0),
        _product("bf16 product", ours_of("linear"), (
            Peer("vLLM batch-invariant", lambda a, m: vllm_matmul(m), sizes),), 2.0, 2.0),
        _product("int8 product", ours_of("linear_int8"), (
            Peer("vLLM scaled_mm", lambda a, m: vllm_scaled(m, torch.int8), sizes),), 1.0, 1.0, "int8"),
        _product("FP8 product, rows", our_fp8_row, (
            Peer("vLLM scaled_mm", lambda a, m: vllm_scaled(m, fp8), sizes),), 1.0, 1.0, "fp8"),
        _product("FP8 product, blocks", ours_of("linear_fp8"), (
            Peer("vLLM block", lambda a, m: vllm_block(m), sizes),), 1.0, 1.0, "fp8"),
        _product("4-bit product", ours_of("linear_quantized"), (
            Peer("vLLM w4a16", lambda a, m: vllm_w4a16(m), product_tile(*QKV, "BLOCK_M", "BLOCK_N")),
            Peer("vLLM AWQ", lambda a, m: vllm_awq(m), sizes)), 0.5, 2.0),
        *attention(),
    ]  # fmt: skip


def attention() -> list[Operator]:
    """Prefill and decode."""
    group = HEADS // KV_HEADS
    prefill = (
        Peer("flash-attn", lambda a, m: flash_prefill(m), prefill_tile("BLOCK_M", "BLOCK_N")),
        Peer("vLLM unified", lambda a, m: vllm_unified(1, m, m), prefill_tile("BLOCK_M", "TILE_SIZE", group)),
        Peer("vLLM prefix", lambda a, m: vllm_prefix(m), prefill_tile("BLOCK_M", "BLOCK_N")),
    )
    decode = (
        Peer("vLLM unified", lambda a, m: vllm_unified(m, 1, CONTEXT), decode_tile("BLOCK_M", group)),
        Peer("vLLM decode", lambda a, m: vllm_decode(m), decode_tile("BLOCK_H", group)),
    )
    return [
        Operator(
            "attention prefill", Peer("", our_prefill, prefill_tile("BLOCK_M", "BLOCK_N", group)), prefill,
            lambda m: m * HEADS * DIM,
            lambda m: 4.0 * HEADS * DIM * m * (m + 1) / 2, lambda m: m * 4.0 * (HEADS + KV_HEADS) * DIM,
            (CONTEXT,),
        ),
        Operator(
            "attention decode", Peer("", our_decode, decode_tile("BLOCK_M", group)), decode, lambda m: m * HEADS * DIM,
            lambda m: 4.0 * m * HEADS * DIM * CONTEXT, lambda m: m * 4.0 * (CONTEXT * KV_HEADS + HEADS) * DIM,
            (1, 64),
        ),
    ]  # fmt: skip
