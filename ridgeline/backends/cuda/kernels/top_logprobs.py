"""The most likely tokens of a row and their log probabilities, without a sort of the vocabulary.

The key of the k-th largest logit is found as sampling finds its top-k (``sample.threshold``); one more walk takes what
lies above it and, of equal ones, the lower tokens; these few are then put in order by counting who is larger.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ridgeline.backends.cuda.kernels.sample import ordered, threshold
from ridgeline.backends.cuda.launch import CardShape, Config, Launch

MOST = 64
"""Tokens of a row: as many as ``SamplingParams.logprobs`` may ask for."""

CONFIG = Config({"BLOCK": 1024, "DIGIT_BLOCK": 512, "MOST": MOST}, num_warps=8, num_stages=1, fuse=False)


@triton.jit(do_not_specialize=["V"])
def top_logprobs_kernel(
    logits, wanted, ids, logprobs, logits_stride, V,
    BLOCK: tl.constexpr, DIGIT_BLOCK: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)``; what it does not ask for is -1 and 0."""
    r = tl.program_id(0).to(tl.int64)
    row, ids, logprobs = logits + r * logits_stride, ids + r * MOST, logprobs + r * MOST
    place = tl.arange(0, MOST)
    tl.store(ids + place, tl.full([MOST], -1, tl.int32))
    tl.store(logprobs + place, tl.zeros([MOST], tl.float32))
    k = tl.minimum(tl.minimum(tl.load(wanted + r), V), MOST)
    if k <= 0:
        return
    largest, total = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    bad = tl.zeros([1], tl.int32)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(row + i, mask=i < V, other=0.0).to(tl.float32)
        bad += tl.sum((x - x != 0.0).to(tl.int32), axis=0)
        up = tl.maximum(largest, tl.max(tl.where(i < V, x, float("-inf")), axis=0))
        total = total * tl.exp(largest - up) + tl.sum(tl.where(i < V, tl.exp(x - up), 0.0), axis=0)
        largest = up
    if tl.max(bad, axis=0) > 0:
        return
    cut, above, need = threshold(
        row, wanted, row, wanted, row, largest, largest, tl.zeros([1], tl.uint32),
        tl.zeros([1], tl.float32) + k.to(tl.float32), V, False, False, False, False, DIGIT_BLOCK,
    )  # fmt: skip
    ties = (need - above).to(tl.int32)
    met, taken = tl.zeros([1], tl.int32), tl.zeros([1], tl.int32)
    tl.debug_barrier()  # the marks above come before what replaces them
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = tl.load(row + i, mask=i < V, other=0.0).to(tl.float32)
        key = ordered(x)
        tie = ((key == cut) & (i < V)).to(tl.int32)
        keep = ((key > cut) & (i < V)) | ((tie != 0) & (met + tl.cumsum(tie, axis=0) <= ties))
        met += tl.sum(tie, axis=0)
        at = taken + tl.cumsum(keep.to(tl.int32), axis=0) - 1
        tl.store(ids + at, i, mask=keep)
        tl.store(logprobs + at, x, mask=keep)
        taken += tl.sum(keep.to(tl.int32), axis=0)
    tl.debug_barrier()
    live = place < k
    id, x = tl.load(ids + place, mask=live, other=-1), tl.load(logprobs + place, mask=live, other=0.0)
    key = tl.where(live, ordered(x), 0)
    larger = (key[None, :] > key[:, None]) | ((key[None, :] == key[:, None]) & (id[None, :] < id[:, None]))
    rank = tl.sum((larger & live[None, :]).to(tl.int32), axis=1)
    tl.debug_barrier()
    tl.store(ids + rank, id, mask=live)
    tl.store(logprobs + rank, x - largest - tl.log(total), mask=live)


def top_logprobs(logits: torch.Tensor, wanted: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> list[Launch]:
    """The most likely tokens of every row, falling, the lower token of equal ones first.

    Args:
        logits: [R, V] fp32, bf16 or fp16: raw, before penalties, temperature and filters.
        wanted: int32 [R]: how many of each row; none for 0 or less.
        ids, logprobs: int32 and fp32 [R, MOST]: -1 and 0 beyond those, and where logits are not finite.
    """
    args: dict[str, Any] = {"logits": logits, "wanted": wanted, "ids": ids, "logprobs": logprobs}
    args |= {"logits_stride": logits.stride(0), "V": logits.shape[1]}
    return [Launch(top_logprobs_kernel, (logits.shape[0],), args, CONFIG, ("ids", "logprobs"))]


def card_shapes(arch: str) -> list[CardShape]:
    """The vocabulary of an 8B Llama."""
    shapes = []
    for rows in (1, 64):

        def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device="meta")

        logits, floats = empty(rows, 128256, dtype=torch.float32), empty(rows, MOST, dtype=torch.float32)
        launches = top_logprobs(logits, empty(rows), empty(rows, MOST), floats)
        shapes.append(CardShape(f"M={rows}", launches, 20.0 * rows * 128256, 4.0 * rows * 128256))
    return shapes
