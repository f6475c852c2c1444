"""The k most likely tokens of a row and their log probabilities, without a sort.

One program reads a row ten times, after the first from the L2 cache: once for the largest logit and the sum of
exponentials, eight times for the k-th largest key (four bits at a time, as ``sample`` does), once to collect in token
order what is above it and the first of those at it. The k collected are ranked by comparing all pairs.

Roofline: the row's bytes, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ridgeline.backends.cuda.kernels.sample import ordered, threshold
from ridgeline.backends.cuda.launch import CardShape, Config, Launch

CONFIGS: dict[str, Config] = {
    "sm_80": Config({"BLOCK": 1024, "DIGIT_BLOCK": 256}, num_warps=8, num_stages=1, fuse=False),
    "sm_90": Config({"BLOCK": 1024, "DIGIT_BLOCK": 256}, num_warps=8, num_stages=1, fuse=False),
}
MOST = 64
"""Tokens of a row at most, as in ``SamplingParams.logprobs``."""


@triton.jit
def collect(logits, cut, ties, ids, V, BLOCK: tl.constexpr):
    """Stores the tokens above ``cut`` and the first ``ties`` at it, in token order."""
    seen, count = tl.zeros([1], tl.int32), tl.zeros([1], tl.int32)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        key = ordered(tl.load(logits + i, mask=i < V, other=float("-inf")).to(tl.float32))
        tie = (key == cut).to(tl.int32)
        keep = ((key > cut) | ((tie != 0) & (seen + tl.cumsum(tie, axis=0) <= ties))).to(tl.int32)
        tl.store(ids + count + tl.cumsum(keep, axis=0) - 1, i, mask=keep != 0)
        seen += tl.sum(tie, axis=0)
        count += tl.sum(keep, axis=0)


@triton.jit(do_not_specialize=["V", "width"])
def top_logprobs_kernel(
    logits, tokens, ks, top_ids, top_logprobs, logits_stride, ids_stride, logprobs_stride, V, width,
    MOST: tl.constexpr, BLOCK: tl.constexpr, DIGIT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)``."""
    r = tl.program_id(0).to(tl.int64)
    logits, ids, logprobs = logits + r * logits_stride, top_ids + r * ids_stride, top_logprobs + r * logprobs_stride
    j = tl.arange(0, MOST)
    k = tl.minimum(tl.minimum(tl.load(ks + r), width), V)
    k = tl.where(tl.load(tokens + r) >= 0, tl.maximum(k, 0), 0)
    rest, wanted = (j >= k) & (j < width), j < k
    tl.store(ids + j, -1, mask=rest)
    tl.store(logprobs + j, float("nan"), mask=rest)
    if k == 0:
        return
    largest, total = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(logits + i, mask=i < V, other=float("-inf")).to(tl.float32)
        up = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - up) + tl.sum(tl.exp(x - up), axis=0)
        largest = up
    cut, above, _ = threshold(
        logits, logits, logits, logits, logits, largest, largest, tl.zeros([1], tl.uint32),
        tl.zeros([1], tl.float32) + k.to(tl.float32), V, False, False, False, False, DIGIT_BLOCK,
    )  # fmt: skip
    collect(logits, cut, k - above.to(tl.int32), ids, V, BLOCK)
    tl.debug_barrier()  # any thread may have stored what this one reads
    token = tl.load(ids + j, mask=wanted, other=0)
    x = tl.load(logits + token, mask=wanted, other=float("-inf")).to(tl.float32)
    before = (x[None, :] > x[:, None]) | ((x[None, :] == x[:, None]) & (j[None, :] < j[:, None]))
    rank = tl.sum(before.to(tl.int32), axis=1)
    tl.debug_barrier()  # all is read before any is replaced
    tl.store(ids + rank, token, mask=wanted)
    tl.store(logprobs + rank, x - largest - tl.log(total), mask=wanted)


def top_logprobs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    ks: torch.Tensor,
    top_ids: torch.Tensor,
    top_logprobs: torch.Tensor,
    *,
    arch: str = "sm_90",
) -> list[Launch]:
    """The most likely tokens of every row by falling raw logit, the lower token first of equal ones.

    Args:
        logits: [R, V] fp32, bf16 or fp16, as ``sample`` reads them.
        tokens: int32 [R]: what ``sample`` gave; a row of -1 has no log probabilities.
        ks: int32 [R]: how many a row wants; 0 or less: none.
        top_ids, top_logprobs: int32 and fp32 [R, k], k the most that any row wants; -1 and NaN past a row's own.

    Raises:
        ValueError: more than MOST a row, or none.
    """
    width = top_ids.shape[1]
    if not 0 < width <= MOST or top_logprobs.shape != top_ids.shape:
        raise ValueError(f"top_logprobs: {width} tokens a row, from 1 to {MOST}")
    config = CONFIGS[arch]
    args: dict[str, Any] = {
        "logits": logits,
        "tokens": tokens,
        "ks": ks,
        "top_ids": top_ids,
        "top_logprobs": top_logprobs,
        "logits_stride": logits.stride(0),
        "ids_stride": top_ids.stride(0),
        "logprobs_stride": top_logprobs.stride(0),
        "V": logits.shape[1],
        "width": width,
    }
    how = Config({**config.meta, "MOST": MOST}, config.num_warps, config.num_stages, config.fuse)
    return [Launch(top_logprobs_kernel, (logits.shape[0],), args, how, ("top_ids", "top_logprobs"))]


def traffic(launch: Launch, wanted: Sequence[int]) -> int:
    """Bytes that the programs' loads and stores ask for; ``wanted``: how many tokens each row gets."""
    logit, vocab, width = launch.args["logits"].element_size(), launch.args["V"], launch.args["width"]
    return sum(8 + 8 * (width - k) + (10 * vocab * logit + k * (logit + 16) if k else 0) for k in wanted)


def card_shapes(arch: str) -> list[CardShape]:
    """Twenty tokens of the vocabulary of an 8B Llama."""
    shapes, vocab, k = [], 128256, 20
    for rows in (1, 64):
        logits, logprobs = (torch.empty(rows, n, device="meta") for n in (vocab, k))
        tokens, ks, ids = (torch.empty(rows, n, dtype=torch.int32, device="meta") for n in (1, 1, k))
        launches = top_logprobs(logits, tokens[:, 0], ks[:, 0], ids, logprobs, arch=arch)
        moved = rows * (4.0 * vocab + 8 * k)
        shapes.append(
            CardShape(f"k={k} M={rows}", launches, 300.0 * rows * vocab, moved, traffic(launches[0], [k] * rows))
        )
    return shapes
