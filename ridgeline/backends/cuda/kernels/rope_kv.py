"""Rotary embedding (Su et al., 2021; half-split pairs) of queries and keys, and the write to the paged cache.

One program rotates some query heads of a token; one more rotates its keys and writes them and its values. The cache
holds bf16 or fp16, float8_e4m3fn with one scale a tensor, or int8 with a scale for every token and head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ridgeline.backends.cuda import e4m3
from ridgeline.backends.cuda.launch import CardShape, Config, Launch, cdiv, next_power_of_2

CONFIGS: dict[str, Config] = {
    "sm_80": Config({"HEADS": 16, "STEP": 8}, num_warps=2, num_stages=1),
    "sm_90": Config({"HEADS": 16, "STEP": 8}, num_warps=2, num_stages=1),
}
"""Query heads of a program, and how many it rotates at once: with 2 warps, 16 bytes a thread of 8 heads of 128."""

FEW, FEW_CONFIG = 16, Config({"HEADS": 2, "STEP": 2}, num_warps=1, num_stages=1)
"""So few tokens would leave most of the device idle: more and smaller programs."""

PLAIN, INT8, FP8, FP8_CODES = 0, 1, 2, 3
"""What the cache holds. FP8_CODES: FP8, encoded here, where the architecture has no such conversion."""


@triton.jit
def write_head(cache, scales, at, scale_at, low, high, half, live, one_live, tensor_scale, KIND: tl.constexpr):
    """Stores both halves of some heads, [heads, half] each, as the cache keeps them."""
    if KIND == 1:
        both = tl.where(live, tl.maximum(tl.abs(low), tl.abs(high)), 0.0)
        largest = tl.max(both, axis=1, keep_dims=True)
        factor = tl.where(largest > 0.0, 127.0 / largest, 0.0)
        low = (low * factor + 12582912.0) - 12582912.0  # 1.5 * 2^23: rounds to the nearest even integer
        high = (high * factor + 12582912.0) - 12582912.0
        tl.store(scales + scale_at, largest / 127.0, mask=one_live)
    if KIND >= 2:
        low, high = low / tensor_scale, high / tensor_scale
    if KIND == 3:
        low, high = e4m3.encode(low), e4m3.encode(high)
    tl.store(cache + at, low.to(cache.dtype.element_ty), mask=live)
    tl.store(cache + at + half, high.to(cache.dtype.element_ty), mask=live)


@triton.jit
def rope_kv_kernel(
    qkv,
    cos,
    sin,
    positions,
    token_slots,
    block_tables,
    q_out,
    k_cache,
    v_cache,
    k_scales,
    v_scales,
    k_tensor_scale,
    v_tensor_scale,
    qkv_stride,
    q_stride,
    table_stride,
    block_stride,
    head_stride,
    token_stride,
    scale_block_stride,
    scale_head_stride,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    STEP: tl.constexpr,
    PAGE: tl.constexpr,
    KIND: tl.constexpr,
):
    """Program (t, part): query heads of token t, or, as the last part, its keys and values.

    Every row of the tile loads the angles for itself, from the first-level cache: a row of them spread over the tile
    goes through shared memory and three barriers.
    """
    t = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    position = tl.load(positions + t).to(tl.int64)
    c = tl.arange(0, HALF_BLOCK)[None, :]
    inside = c < HALF
    rows = tl.arange(0, STEP)[:, None]
    angles = position * HALF + tl.broadcast_to(c, STEP, HALF_BLOCK)
    cosine = tl.load(cos + angles, mask=inside)
    sine = tl.load(sin + angles, mask=inside)
    row = qkv + t * qkv_stride
    if part < tl.cdiv(Q_HEADS, HEADS):
        for step in tl.static_range(0, HEADS, STEP):
            h = part * HEADS + step + rows
            live = (h < Q_HEADS) & inside
            a = tl.load(row + h * (2 * HALF) + c, mask=live).to(tl.float32)
            b = tl.load(row + h * (2 * HALF) + HALF + c, mask=live).to(tl.float32)
            to = q_out + t * q_stride + h * (2 * HALF) + c
            tl.store(to, (a * cosine - b * sine).to(q_out.dtype.element_ty), mask=live)
            tl.store(to + HALF, (b * cosine + a * sine).to(q_out.dtype.element_ty), mask=live)
    else:
        slot = tl.load(token_slots + t).to(tl.int64)
        block = tl.load(block_tables + slot * table_stride + position // PAGE, mask=slot >= 0, other=0).to(tl.int64)
        inner = position % PAGE
        for step in range(0, KV_HEADS, STEP):
            h = step + rows
            one_live = (h < KV_HEADS) & (slot >= 0)  # a padding token writes nothing
            live = one_live & inside
            at = block * block_stride + h * head_stride + inner * token_stride + c
            scale_at = block * scale_block_stride + h * scale_head_stride + inner
            k = row + Q_HEADS * (2 * HALF) + h * (2 * HALF) + c
            a = tl.load(k, mask=live).to(tl.float32)
            b = tl.load(k + HALF, mask=live).to(tl.float32)
            low, high = a * cosine - b * sine, b * cosine + a * sine
            write_head(k_cache, k_scales, at, scale_at, low, high, HALF, live, one_live, k_tensor_scale, KIND)
            v = k + KV_HEADS * (2 * HALF)
            low = tl.load(v, mask=live).to(tl.float32)
            high = tl.load(v + HALF, mask=live).to(tl.float32)
            write_head(v_cache, v_scales, at, scale_at, low, high, HALF, live, one_live, v_tensor_scale, KIND)


def rope_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    token_slots: torch.Tensor,
    block_tables: torch.Tensor,
    q_out: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None,
    tensor_scales: tuple[float, float] = (1.0, 1.0),
    arch: str = "sm_90",
) -> list[Launch]:
    """Rotates q and k of every token and writes k and v at its slot and position.

    Args:
        qkv: [T, (heads + 2 * kv_heads) * head_dim] bf16, fp16 or fp32.
        cos, sin: fp32 [positions, head_dim / 2].
        positions, token_slots: int32 [T]; a token of slot -1 is rotated and not written.
        block_tables: int32 [slots, blocks of a request].
        q_out: [T, heads, head_dim].
        k_cache, v_cache: [blocks, kv_heads, page, head_dim], of equal strides.
        scales: of an int8 cache: fp32 [blocks, kv_heads, page] for keys and for values.
        tensor_scales: of a float8_e4m3fn cache: what is stored is k / scale.

    Raises:
        ValueError: an int8 cache without scales.
    """
    tokens, heads, dim = q_out.shape
    kind = {torch.int8: INT8, torch.float8_e4m3fn: FP8}.get(k_cache.dtype, PLAIN)
    if kind == INT8 and scales is None:
        raise ValueError("rope_kv: an int8 cache needs scales")
    if kind == FP8 and arch == "sm_80":
        kind, k_cache, v_cache = FP8_CODES, k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    k_scales, v_scales = scales or (cos, cos)
    config = FEW_CONFIG if tokens <= FEW else CONFIGS[arch]
    args: dict[str, Any] = {
        "qkv": qkv,
        "cos": cos,
        "sin": sin,
        "positions": positions,
        "token_slots": token_slots,
        "block_tables": block_tables,
        "q_out": q_out,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k_scales": k_scales,
        "v_scales": v_scales,
        "k_tensor_scale": tensor_scales[0],
        "v_tensor_scale": tensor_scales[1],
        **_strides(qkv, q_out, block_tables, k_cache, scales),
    }
    meta = {**_sizes(heads, dim, k_cache, kind), **config.meta}
    grid = (tokens, cdiv(heads, config.meta["HEADS"]) + 1)
    updates = ("k_cache", "v_cache") + (("k_scales", "v_scales") if scales else ())
    return [Launch(rope_kv_kernel, grid, args, Config(meta, config.num_warps, config.num_stages), ("q_out",), updates)]


def _sizes(heads: int, dim: int, cache: torch.Tensor, kind: int) -> dict[str, int]:
    _, kv_heads, page, _ = cache.shape
    return {
        "Q_HEADS": heads,
        "KV_HEADS": kv_heads,
        "HALF": dim // 2,
        "HALF_BLOCK": next_power_of_2(dim // 2),
        "PAGE": page,
        "KIND": kind,
    }


def _strides(
    qkv: torch.Tensor,
    q_out: torch.Tensor,
    tables: torch.Tensor,
    cache: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor] | None,
) -> dict[str, int]:
    return {
        "qkv_stride": qkv.stride(0),
        "q_stride": q_out.stride(0),
        "table_stride": tables.stride(0),
        "block_stride": cache.stride(0),
        "head_stride": cache.stride(1),
        "token_stride": cache.stride(2),
        "scale_block_stride": scales[0].stride(0) if scales else 0,
        "scale_head_stride": scales[0].stride(1) if scales else 0,
    }


def traffic(launch: Launch) -> int:
    """Bytes that the programs' loads and stores ask for: each program of a token reads its angles."""
    meta, args = launch.config.meta, launch.args
    dim, kv = 2 * meta["HALF"], 2 * meta["KV_HEADS"]
    stored: int = args["k_cache"].element_size()
    angles = launch.grid[1] * (4 + 4 * dim * meta["STEP"])
    rotated = meta["Q_HEADS"] * dim * args["q_out"].element_size()
    written = kv * (dim * stored + 4 * (meta["KIND"] == INT8))
    read = (meta["Q_HEADS"] + kv) * dim * args["qkv"].element_size() + 8
    asked: int = launch.grid[0] * (angles + read + rotated + written)
    return asked


def card_shapes(arch: str) -> list[CardShape]:
    """An 8B Llama's layer over a bf16 cache of 16-token pages."""
    shapes = []
    for rows in (1, 64, 4096):

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        ints = {"dtype": torch.int32}
        launches = rope_kv(
            empty(rows, 48 * 128),
            empty(8192, 64, dtype=torch.float32),
            empty(8192, 64, dtype=torch.float32),
            empty(rows, **ints),
            empty(rows, **ints),
            empty(256, 512, **ints),
            empty(rows, 32, 128),
            empty(32768, 8, 16, 128),
            empty(32768, 8, 16, 128),
            arch=arch,
        )
        moved = rows * (2 * 48 * 128 * 2 + 2 * 64 * 4)
        shapes.append(CardShape(f"M={rows}", launches, 3.0 * rows * 40 * 128, moved, traffic(launches[0])))
    return shapes
