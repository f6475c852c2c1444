"""Sampling without a full sort: one program reads a row of logits a few times.

Bias, penalties and mask come first; then top-k, top-p and min-p on probabilities after temperature; then the Gumbel
maximum over the survivors. Thresholds are found four bits of the logit's ordered key at a time, by counting (top-k)
or summing probability (top-p) under each of 16 digits. The noise is that of csrc/cpu/kernels/noise.h to the bit:
Philox 4x32-10 (Salmon et al., 2011), the same polynomials, every operation rounded by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ridgeline.backends.cuda.launch import CardShape, Config, Launch, cdiv

CONFIGS: dict[str, Config] = {
    "sm_80": Config({"BLOCK": 2048, "DIGIT_BLOCK": 512}, num_warps=8, num_stages=1, fuse=False),
    "sm_90": Config({"BLOCK": 2048, "DIGIT_BLOCK": 512}, num_warps=8, num_stages=1, fuse=False),
}
PROMPT_BIT = 1 << 30
"""In a count of a token's occurrences: it occurs in the prompt."""


@triton.jit
def log1p_series(f):
    """log(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1], by the series of 2 atanh(f / (2 + f))."""
    s = tl.div_rn(f, 2.0 + f)
    q = s * s
    p = tl.full(f.shape, 0.18181818723678589, tl.float32)
    p = p * q + 0.2222222238779068
    p = p * q + 0.2857142984867096
    p = p * q + 0.4000000059604645
    p = p * q + 0.6666666865348816
    return 2.0 * s + s * q * p


@triton.jit
def log_of(x):
    """log x of a positive normal number."""
    b = x.to(tl.int32, bitcast=True)
    e = (b >> 23) - 127
    m = ((b & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    upper = m > 1.4142135381698608
    m = tl.where(upper, m * 0.5, m)
    e = tl.where(upper, e + 1, e)
    return e.to(tl.float32) * 0.6931471824645996 + log1p_series(m - 1.0)


@triton.jit
def gumbel(w):
    """-log(-log u) with u = (w + 1/2) / 2^24, w below 2^24. Above one half u has 25 bits, but 1 - u is exact."""
    rest = (0x1000000 - w).to(tl.float32) - 0.5
    near = log1p_series(tl.where(w >= 11863283, -rest * 5.9604644775390625e-08, 0.0))
    middle = log1p_series(tl.where(w >= 0x800000, 1.0 - rest * 1.1920928955078125e-07, 0.0)) - 0.6931471824645996
    far = log_of((w.to(tl.float32) + 0.5) * 5.9604644775390625e-08)
    log_u = tl.where(w >= 11863283, near, tl.where(w >= 0x800000, middle, far))
    return -log_of(-log_u)


@triton.jit
def noise(token, seed_low, seed_high, position, sample_index):
    """A token's noise: word token % 4 of the block counted by (position, sample, token / 4, 0)."""
    zero = tl.zeros(token.shape, tl.uint32)
    c0, c1 = zero + position.to(tl.uint32), zero + sample_index.to(tl.uint32)
    c2, c3 = (token // 4).to(tl.uint32), zero
    k0, k1 = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    a, b = zero + 0xD2511F53, zero + 0xCD9E8D57
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(a, c0), a * c0
        high1, low1 = tl.umulhi(b, c2), b * c2
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    lane = token % 4
    word = tl.where(lane == 0, c0, tl.where(lane == 1, c1, tl.where(lane == 2, c2, c3)))
    return gumbel((word >> 8).to(tl.int32))


@triton.jit
def adjusted(
    logits,
    counts,
    bias,
    mask,
    penalties,
    i,
    V,
    PENALTIES: tl.constexpr,
    BIAS: tl.constexpr,
    MASK: tl.constexpr,
):
    """Logits of tokens ``i`` as they are sampled from; -inf for those masked and past the end.

    In the CPU's order: bias, then penalties for repetition, frequency and presence, then the mask.
    """
    live = i < V
    x = tl.load(logits + i, mask=live, other=float("-inf")).to(tl.float32)
    if BIAS:
        x = tl.minimum(x + tl.load(bias + i, mask=live, other=0.0), 3.4028234663852886e38)
    if PENALTIES:
        repetition, presence = tl.load(penalties), tl.load(penalties + 1)
        frequency = tl.load(penalties + 2)
        n = tl.load(counts + i, mask=live, other=0)
        output = n & 0x3FFFFFFF
        y = tl.where(x > 0.0, tl.div_rn(x, repetition + x * 0.0), x * repetition)
        y = y - frequency * output.to(tl.float32)
        y = y - tl.where(output > 0, presence, 0.0)
        x = tl.where(n != 0, tl.minimum(y, 3.4028234663852886e38), x)  # what would be infinite is the largest number
    if MASK:
        words = tl.load(mask + i // 32, mask=live, other=0)
        x = tl.where(((words >> (i % 32)) & 1) != 0, x, float("-inf"))
    return x


@triton.jit
def ordered(x):
    """Keys that compare, as unsigned integers, as the numbers do: both zeros have one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def number_of(key):
    """The number of an ordered key."""
    bits = (key ^ 0x80000000).to(tl.int32, bitcast=True)
    return (bits ^ (bits >> 31 & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def threshold(
    logits, counts, bias, mask, penalties, largest, inverse, floor, need,
    V, PENALTIES: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The key at which tokens, from the largest down, hold ``need``, and what those above it hold.

    ``MASS``: the need is a share of all probability of tokens whose key is not under ``floor``, and what is held is
    probability relative to the largest; else tokens are counted.
    """
    digits = tl.arange(0, 16)
    prefix = tl.zeros([1], tl.uint32)
    above = tl.zeros([1], tl.float32)
    for step in tl.static_range(8):
        shift = 28 - 4 * step
        held = tl.zeros([16], tl.float32)
        for start in range(0, V, BLOCK):
            i = start + tl.arange(0, BLOCK)
            x = adjusted(logits, counts, bias, mask, penalties, i, V, PENALTIES, BIAS, MASK)
            key = ordered(x)
            take = (x > float("-inf")) & (key >= floor)
            if step > 0:
                take &= (key >> (shift + 4)) == (prefix >> (shift + 4))
            weight = tl.where(take, tl.exp((x - largest) * inverse) if MASS else 1.0, 0.0)
            digit = ((key >> shift) & 15).to(tl.int32)
            held += tl.sum(tl.where(digit[:, None] == digits[None, :], weight[:, None], 0.0), axis=0)
        if MASS and step == 0:
            need = need * tl.sum(held, axis=0)
        reached = tl.sum(tl.where(digits[None, :] >= digits[:, None], held[None, :], 0.0), axis=1)
        enough = tl.max(tl.where(above + reached >= need, digits, -1), axis=0)
        least = tl.min(tl.where(held > 0.0, digits, 15), axis=0)  # rounding may leave the whole short of the need
        chosen = tl.maximum(enough, least)
        above += tl.sum(tl.where(digits > chosen, held, 0.0), axis=0)
        prefix = prefix | (chosen << shift).to(tl.uint32)
    return prefix, above, need


@triton.jit
def race(
    logits, counts, bias, mask, penalties, largest, inverse, cut, ties, floor, best,
    seed_low, seed_high, position, sample_index,
    V, PENALTIES: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The Gumbel maximum over tokens above ``cut`` and the first ``ties`` at it, the lower token of equal ones."""
    score = tl.full([1], float("-inf"), tl.float32)
    seen = tl.zeros([1], tl.int32)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        x = adjusted(logits, counts, bias, mask, penalties, i, V, PENALTIES, BIAS, MASK)
        key = ordered(x)
        tie = ((key == cut) & (x > float("-inf"))).to(tl.int32)
        keep = (key > cut) | ((tie != 0) & (seen + tl.cumsum(tie, axis=0) <= ties))
        seen += tl.sum(tie, axis=0)
        z = (x - largest) * inverse
        keep &= (x > float("-inf")) & (z >= floor)
        s = tl.where(keep, z + noise(i, seed_low, seed_high, position, sample_index), float("-inf"))
        top = tl.max(s, axis=0)
        at = tl.min(tl.where(s == top, i, V), axis=0)
        best = tl.where(top > score, at, best)
        score = tl.maximum(score, top)
    return best


@triton.jit(do_not_specialize=["V"])
def sample_kernel(
    logits, slots, counts, bias, mask, penalties, seeds, positions, sample_indices, temperatures, top_ks, top_ps,
    floors, targets, tokens, logprobs, logits_stride, counts_stride, bias_stride, mask_stride,
    V, PENALTIES: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, FILTERS: tl.constexpr,
    BLOCK: tl.constexpr, DIGIT_BLOCK: tl.constexpr,
):  # fmt: skip
    """Samples row ``program_id(0)``: every program reads its row a few times, the later ones from the L2 cache."""
    r = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + r).to(tl.int64)
    logits, mask = logits + r * logits_stride, mask + r * mask_stride
    counts, bias, penalties = counts + slot * counts_stride, bias + slot * bias_stride, penalties + slot * 3
    largest, best = tl.full([1], float("-inf"), tl.float32), tl.full([1], -1, tl.int32)
    raw_largest, raw_sum = tl.full([1], float("-inf"), tl.float32), tl.zeros([1], tl.float32)
    bad = tl.zeros([1], tl.int32)
    for start in range(0, V, BLOCK):
        i = start + tl.arange(0, BLOCK)
        raw = tl.load(logits + i, mask=i < V, other=0.0).to(tl.float32)
        bad += tl.sum((raw - raw != 0.0).to(tl.int32), axis=0)
        x = adjusted(logits, counts, bias, mask, penalties, i, V, PENALTIES, BIAS, MASK)
        top = tl.max(x, axis=0)
        at = tl.min(tl.where(x == top, i, V), axis=0)
        best = tl.where(top > largest, at, best)
        largest = tl.maximum(largest, top)
        up = tl.maximum(raw_largest, tl.max(tl.where(i < V, raw, float("-inf")), axis=0))
        raw_sum = raw_sum * tl.exp(raw_largest - up) + tl.sum(tl.where(i < V, tl.exp(raw - up), 0.0), axis=0)
        raw_largest = up
    temperature = tl.load(temperatures + r)
    target = tl.load(targets + r)
    fine = tl.max(bad, axis=0) == 0
    if fine & (target == 0) & (tl.max(best, axis=0) >= 0) & (temperature >= 1.1754943508222875e-38):
        inverse = tl.div_rn(tl.full([1], 1.0, tl.float32), tl.zeros([1], tl.float32) + temperature)
        cut, ties = tl.zeros([1], tl.uint32), tl.full([1], V, tl.int32)
        if FILTERS:
            k, p = tl.load(top_ks + r), tl.load(top_ps + r)
            if (k > 0) & (k < V):
                cut, above, need = threshold(
                    logits, counts, bias, mask, penalties, largest, inverse, cut,
                    tl.zeros([1], tl.float32) + k.to(tl.float32), V, PENALTIES, BIAS, MASK, False, DIGIT_BLOCK,
                )  # fmt: skip
            if p < 1.0:
                cut, above, need = threshold(
                    logits, counts, bias, mask, penalties, largest, inverse, cut, tl.zeros([1], tl.float32) + p,
                    V, PENALTIES, BIAS, MASK, True, DIGIT_BLOCK,
                )  # fmt: skip
                each = tl.exp((number_of(cut) - largest) * inverse)
                ties = tl.maximum(1, tl.minimum(V, tl.ceil(tl.div_rn(need - above, each)).to(tl.int32)))
        best = race(
            logits, counts, bias, mask, penalties, largest, inverse, cut, ties, tl.load(floors + r), best,
            tl.load(seeds + 2 * r), tl.load(seeds + 2 * r + 1), tl.load(positions + r), tl.load(sample_indices + r),
            V, PENALTIES, BIAS, MASK, BLOCK,
        )  # fmt: skip
    token = tl.where(target > 0, target - 1, tl.max(best, axis=0))
    token = tl.where(fine, token, -1)
    chosen = tl.load(logits + tl.maximum(token, 0)).to(tl.float32)
    logprob = chosen - tl.max(raw_largest, axis=0) - tl.log(tl.max(raw_sum, axis=0))
    tl.store(tokens + r, token)
    tl.store(logprobs + r, tl.where(token >= 0, logprob, float("nan")))


def sample(
    logits: torch.Tensor,
    params: dict[str, torch.Tensor],
    tokens: torch.Tensor,
    logprobs: torch.Tensor,
    *,
    slots: torch.Tensor,
    counts: torch.Tensor | None = None,
    penalties: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    filters: bool = True,
    arch: str = "sm_90",
) -> list[Launch]:
    """Samples a token of every row and gives its log probability among the raw logits.

    Args:
        logits: [R, V] fp32, bf16 or fp16.
        params: of each row: "seeds" int32 [R, 2] (low word, high word), "positions", "sample_indices", "top_ks"
            (0: off) and "targets" (0: sample, t + 1: score t) int32 [R]; "temperatures" (0: greedy), "top_ps" and
            "floors" (the natural logarithm of min_p, or -inf) fp32 [R].
        tokens, logprobs: int32 and fp32 [R]: -1 and NaN where logits are not finite or nothing may be sampled.
        slots: int32 [R]: rows of ``counts``, ``penalties`` and ``bias``.
        counts: int32 [slots, V]: how often a token occurs in the output, plus PROMPT_BIT if it does in the prompt.
        penalties: fp32 [slots, 3]: repetition, presence, frequency; with ``counts``.
        bias: fp32 [slots, V], added to logits.
        mask: int32 [R, ceil(V / 32)]: bit t % 32 of word t / 32 allows token t.
        filters: False: no row has top-k or top-p.

    Raises:
        ValueError: counts without penalties.
    """
    if (counts is None) != (penalties is None):
        raise ValueError("sample: counts and penalties come together")
    config = CONFIGS[arch]
    flags = {"PENALTIES": counts is not None, "BIAS": bias is not None, "MASK": mask is not None, "FILTERS": filters}
    args: dict[str, Any] = {
        "logits": logits,
        "slots": slots,
        "counts": slots if counts is None else counts,
        "bias": logits if bias is None else bias,
        "mask": slots if mask is None else mask,
        "penalties": logits if penalties is None else penalties,
        **params,
        "tokens": tokens,
        "logprobs": logprobs,
        "V": logits.shape[1],
        "logits_stride": logits.stride(0),
        "counts_stride": 0 if counts is None else counts.stride(0),
        "bias_stride": 0 if bias is None else bias.stride(0),
        "mask_stride": 0 if mask is None else mask.stride(0),
    }
    meta = {**config.meta, **flags}
    how = Config(meta, config.num_warps, config.num_stages, config.fuse)
    return [Launch(sample_kernel, (logits.shape[0],), args, how, ("tokens", "logprobs"))]


def traffic(launch: Launch, rows: Sequence[tuple[bool, bool]]) -> int:
    """Bytes that the programs' loads and stores ask for; ``rows``: whether each, sampled, has a top-k and a top-p."""
    meta, logit = launch.config.meta, launch.args["logits"].element_size()
    vocab = launch.args["V"]
    blocks = (cdiv(vocab, meta["BLOCK"]), cdiv(vocab, meta["DIGIT_BLOCK"]))
    each = vocab * (logit + 4 * (meta["PENALTIES"] + meta["BIAS"] + meta["MASK"]))
    passes = [each + 12 * meta["PENALTIES"] * n for n in blocks]  # penalties are read again for each block
    once = vocab * logit + 2 * passes[0] + 3 * 4 + 5 * 4 + 2 * 4 * meta["FILTERS"] + logit + 2 * 4
    return sum(once + 8 * passes[1] * (top_k + top_p) for top_k, top_p in rows)


def card_shapes(arch: str) -> list[CardShape]:
    """The vocabulary of an 8B Llama, with top-k and top-p, and without."""
    shapes = []
    for filters in (False, True):
        for rows in (1, 64):

            def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
                return torch.empty(*shape, dtype=dtype, device="meta")

            ints = {"dtype": torch.int32}
            params = {name: empty(rows, **ints) for name in ("positions", "sample_indices", "top_ks", "targets")}
            params |= {name: empty(rows) for name in ("temperatures", "top_ps", "floors")}
            params["seeds"] = empty(rows, 2, **ints)
            logits, slots = empty(rows, 128256), empty(rows, **ints)
            launches = sample(logits, params, empty(rows, **ints), empty(rows), slots=slots, filters=filters, arch=arch)
            name = f"{'top-k, top-p' if filters else 'temperature'} M={rows}"
            asked = traffic(launches[0], [(filters, filters)] * rows)
            shapes.append(CardShape(name, launches, 60.0 * rows * 128256, 4.0 * rows * 128256, asked))
    return shapes
