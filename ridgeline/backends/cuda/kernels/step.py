"""What surrounds a step's operators: block tables kept up to date, blocks copied, tokens fed back, samples settled.

Small kernels over int32 that let a step begin while the one before it is still under way: the host never has to see a
token before it launches the next step.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ridgeline.backends.cuda.launch import CardShape, Config, Launch, cdiv

WARPS = 4
BLOCK = 1024
"""Elements of a program that copies or clears."""


@triton.jit(do_not_specialize=["n"])
def put_cells_kernel(cells, table, n, table_stride, BLOCK: tl.constexpr):
    """table[cells[i, 0], cells[i, 1]] = cells[i, 2]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    row = tl.load(cells + 3 * i, mask=live, other=0).to(tl.int64)
    column = tl.load(cells + 3 * i + 1, mask=live, other=0)
    tl.store(table + row * table_stride + column, tl.load(cells + 3 * i + 2, mask=live, other=0), mask=live)


def put_cells(cells: torch.Tensor, table: torch.Tensor) -> list[Launch]:
    """Changed cells of a block table.

    Args:
        cells: int32 [n, 3]: row, column, value; no place twice.
        table: int32 [rows, columns].
    """
    n = cells.shape[0]
    args = {"cells": cells, "table": table, "n": n, "table_stride": table.stride(0)}
    return [Launch(put_cells_kernel, (cdiv(n, 128),), args, Config({"BLOCK": 128}, WARPS, 1), (), ("table",))]


@triton.jit
def copy_blocks_kernel(copies, cache, layer_stride, block_stride, N: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of one block in one layer."""
    copy, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    source = tl.load(copies + 2 * copy).to(tl.int64)
    destination = tl.load(copies + 2 * copy + 1).to(tl.int64)
    i = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    at = cache + layer * layer_stride
    value = tl.load(at + source * block_stride + i, mask=i < N)
    tl.store(at + destination * block_stride + i, value, mask=i < N)


def copy_blocks(copies: torch.Tensor, cache: torch.Tensor) -> list[Launch]:
    """Copies whole blocks in every layer of a cache group: copy-on-write of forked requests.

    Args:
        copies: int32 [n, 2]: source and destination; no destination is another copy's source or destination.
        cache: [layers, blocks, ...], the dimensions from the third on contiguous.
    """
    if cache.dtype == torch.float8_e4m3fn:  # sm_80 has no such type; to a copy, codes are bytes
        cache = cache.view(torch.uint8)
    layers, elements = cache.shape[0], cache[0, 0].numel()
    args = {"copies": copies, "cache": cache, "layer_stride": cache.stride(0), "block_stride": cache.stride(1)}
    grid = (copies.shape[0], layers, cdiv(elements, BLOCK))
    return [Launch(copy_blocks_kernel, grid, args, Config({"N": elements, "BLOCK": BLOCK}, WARPS, 1), (), ("cache",))]


@triton.jit(do_not_specialize=["n"])
def resolve_kernel(fed, token_slots, last_tokens, token_ids, n, BLOCK: tl.constexpr):
    """token_ids[t] = fed[t], or what its slot sampled last where that is -1; 0 where no slot has it."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = t < n
    token = tl.load(fed + t, mask=live, other=0)
    slot = tl.load(token_slots + t, mask=live, other=-1)
    last = tl.load(last_tokens + slot, mask=live & (token < 0) & (slot >= 0), other=0)
    tl.store(token_ids + t, tl.where(token < 0, last, token), mask=live)


def resolve(
    fed: torch.Tensor, token_slots: torch.Tensor, last_tokens: torch.Tensor, token_ids: torch.Tensor
) -> list[Launch]:
    """A step's tokens, those included that only the device knows.

    Args:
        fed, token_slots, token_ids: int32 [T]; a slot of -1 is padding.
        last_tokens: int32 [slots].
    """
    n = fed.shape[0]
    args = {"fed": fed, "token_slots": token_slots, "last_tokens": last_tokens, "token_ids": token_ids, "n": n}
    return [Launch(resolve_kernel, (cdiv(n, 128),), args, Config({"BLOCK": 128}, WARPS, 1), ("token_ids",))]


@triton.jit
def settle_kernel(tokens, targets, sample_rows, row_starts, query_starts, slots, token_ids, accepted, last_tokens):
    """One request: which of its rows stand, and what its slot sampled last."""
    b = tl.program_id(0)
    first, end = tl.load(row_starts + b), tl.load(row_starts + b + 1)
    beyond = tl.load(query_starts + b + 1)
    mine = last_tokens + tl.load(slots + b)
    last = tl.load(mine, mask=first < end, other=-1)  # padding has no rows, and no slot of its own
    stands = 1
    for r in range(first, end):
        token = tl.load(tokens + r)
        sampled = tl.load(targets + r) == 0
        after = tl.load(sample_rows + r) + 1
        follows = tl.load(token_ids + after, mask=after < beyond, other=-1)
        tl.store(accepted + r, tl.where(sampled, stands, 1))
        last = tl.where(sampled & (stands != 0) & (token >= 0), token, last)
        agrees = (after >= beyond) | (follows == token)
        stands = tl.where(sampled & ~agrees, 0, stands)
    tl.store(mine, last, mask=first < end)


def settle(
    tokens: torch.Tensor,
    targets: torch.Tensor,
    sample_rows: torch.Tensor,
    row_starts: torch.Tensor,
    query_starts: torch.Tensor,
    slots: torch.Tensor,
    token_ids: torch.Tensor,
    accepted: torch.Tensor,
    last_tokens: torch.Tensor,
) -> list[Launch]:
    """Accepts samples up to the first that is not the draft after it (``StepOutput.accepted``).

    Args:
        tokens, targets, sample_rows, accepted: int32 [S]: what was sampled, 0 where a row was sampled at all, the
            row's token, and 1 where its sample stands.
        row_starts, query_starts: int32 [B + 1]: request b owns rows and tokens from [b] to [b + 1].
        slots: int32 [B]; token_ids: int32 [T]; last_tokens: int32 [slots].
    """
    args = {
        "tokens": tokens,
        "targets": targets,
        "sample_rows": sample_rows,
        "row_starts": row_starts,
        "query_starts": query_starts,
        "slots": slots,
        "token_ids": token_ids,
        "accepted": accepted,
        "last_tokens": last_tokens,
    }
    grid = (slots.shape[0],)
    return [Launch(settle_kernel, grid, args, Config({}, 1, 1), (), ("accepted", "last_tokens"))]


@triton.jit
def clear_kernel(counts, bias, V: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK tokens of one row."""
    at = tl.program_id(0).to(tl.int64) * V
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(counts + at + i, tl.zeros([BLOCK], tl.int32), mask=i < V)
    tl.store(bias + at + i, tl.zeros([BLOCK], tl.float32), mask=i < V)


@triton.jit(do_not_specialize=["n"])
def adjust_kernel(cells, counts, bias, n, V: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK entries, each a token of some row."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = i < n
    at = tl.load(cells + 4 * i, mask=live, other=0).to(tl.int64) * V + tl.load(cells + 4 * i + 1, mask=live, other=0)
    tl.store(counts + at, tl.load(cells + 4 * i + 2, mask=live, other=0), mask=live)
    tl.store(bias + at, tl.load(cells + 4 * i + 3, mask=live, other=0).to(tl.float32, bitcast=True), mask=live)


def adjust(cells: torch.Tensor, counts: torch.Tensor, bias: torch.Tensor) -> list[Launch]:
    """Rows of token counts and of logit bias from a list of the tokens that have any.

    Args:
        cells: int32 [n, 4]: row, token, its count (``sample.PROMPT_BIT`` included), the bits of its bias; no token of
            a row twice.
        counts, bias: int32 and fp32 [rows, V], contiguous, written whole.
    """
    (rows, vocab), n = counts.shape, cells.shape[0]
    both = {"counts": counts, "bias": bias}
    clear = Config({"V": vocab, "BLOCK": BLOCK}, WARPS, 1)
    launches = [Launch(clear_kernel, (rows, cdiv(vocab, BLOCK)), both, clear, ("counts", "bias"))]
    if n:
        put = Config({"V": vocab, "BLOCK": 128}, WARPS, 1)
        args = {"cells": cells, **both, "n": n}
        launches.append(Launch(adjust_kernel, (cdiv(n, 128),), args, put, (), ("counts", "bias")))
    return launches


def card_shapes(arch: str) -> list[CardShape]:
    """Blocks of an 8B Llama copied, and the tokens of 64 requests settled."""

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    cache = empty(64, 1024, 8, 16, 128, dtype=torch.bfloat16)
    copied: Any = 8 * 64 * cache[0, 0].numel() * 4
    rows = {"tokens": empty(64), "targets": empty(64), "sample_rows": empty(64), "accepted": empty(64)}
    each = {"row_starts": empty(65), "query_starts": empty(65), "slots": empty(64), "last_tokens": empty(256)}
    return [
        CardShape("copy 8 blocks", copy_blocks(empty(8, 2), cache), 0.0, copied),
        CardShape("settle M=64", settle(**rows, **each, token_ids=empty(64)), 0.0, 64.0 * 40),
    ]
