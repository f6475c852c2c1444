# ruff: noqa: E501 (keys are source text)
"""Mutants of GPU kernels that change nothing which can be seen, each with the reason.

The key is (operator, function, changed text, new text), so that it holds while lines move.
"""

from __future__ import annotations

Key = tuple[str, str, str, str]

REASONS: dict[str, list[Key]] = {
    "a product's factors change places, and a * b = b * a exactly": [
        ("attention_decode", "fold", "add(l_all, before, l, now)", "add(before, l_all, l, now)"),
        ("attention_decode", "fold", "add(l_all, before, l, now)", "add(l_all, before, now, l)"),
        (
            "attention_decode",
            "fold",
            "add(o_all, before[:, None], o, tl.broadcast_to(now[:, None], o.shape))",
            "add(o_all, before[:, None], tl.broadcast_to(now[:, None], o.shape), o)",
        ),
        (
            "attention_prefill",
            "merge",
            "add(o1_all, before[:, None], o1, tl.broadcast_to(now[:, None], o1.shape))",
            "add(before[:, None], o1_all, o1, tl.broadcast_to(now[:, None], o1.shape))",
        ),
        (
            "attention_prefill",
            "attend",
            "tl.fma(1.0 / (tl.exp2(s * cap_scale) + 1.0), -2.0, 1.0)",
            "tl.fma(-2.0, 1.0 / (tl.exp2(s * cap_scale) + 1.0), 1.0)",
        ),
    ],
    "what a masked lane holds is selected away, or reaches no element that is stored": [
        ("attention_decode", "attend_turned", "0 in other=0", "1"),
        ("attention_prefill", "find_tile", "0 in other=0", "1"),
        (
            "attention_prefill",
            "attend",
            "tl.load(table + keys // PAGE, mask=seen, other=0)",
            "tl.load(table + keys // PAGE, mask=seen)",
        ),
        ("attention_prefill", "attend", "0 in other=0", "1"),
        (
            "attention_prefill",
            "find_tile",
            "tl.load(query_starts + b, mask=b < requests, other=0)",
            "tl.load(query_starts + b, mask=b < requests)",
        ),
        (
            "linear_int8",
            "linear_int8_kernel",
            "tl.load(x_scale + rows, mask=rows < M, other=0.0)",
            "tl.load(x_scale + rows, mask=rows < M)",
        ),
        (
            "linear_int8",
            "linear_int8_kernel",
            "tl.load(w_scale + columns, mask=columns < N, other=0.0)",
            "tl.load(w_scale + columns, mask=columns < N)",
        ),
        (
            "linear_fp8",
            "linear_fp8_kernel",
            "tl.load(w_scale + columns, mask=columns < N, other=0.0)",
            "tl.load(w_scale + columns, mask=columns < N)",
        ),
    ],
    "a second part of a head has no columns or at least 16": [
        ("attention_prefill", "attend", "0 in D2 > 0", "1"),
    ],
    "rows are computed again to free registers, and are the same": [
        (
            "attention_prefill",
            "prefill_kernel",
            "rows = (index - (first * GROUP // BLOCK_M + request)) * BLOCK_M + tl.arange(0, BLOCK_M)",
            "pass",
        ),
    ],
    "keys past a row's position are masked: more of them are read, for nothing": [
        (
            "attention_prefill",
            "prefill_kernel",
            "(tile * BLOCK_M + BLOCK_M - 1) // GROUP",
            "(tile * BLOCK_M + BLOCK_M - 1) * GROUP",
        ),
    ],
    "a second part of a head that is not there is computed from the first and stored nowhere": [
        ("attention_prefill", "merge", "V2 > 0", "V2 >= 0"),
        ("attention_decode", "decode_kernel", "0 in D2 > 0", "1"),
    ],
    "both are false where a group has parts": [
        (
            "linear_fp8",
            "_group",
            "_sum(x, w, x_scale, w_scale, row, column, start, min(start + LENGTH, steps), M, N, K, stride_x, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, SPECIALIZE, TMA, EVEN_K, DECODE, CODES, BLOCKED)",
            "_sum(x, w, x_scale, w_scale, row, column, start, min(start + LENGTH, steps), M, N, K, stride_x, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, SPECIALIZE, TMA, EVEN_K, BLOCKED, DECODE)",
        ),
    ],
    "which operand comes first changes no bit, and the interpreter knows no warp specialization": [
        (
            "linear_fp8",
            "_group",
            "_sum(x, w, x_scale, w_scale, row, column, start, min(start + LENGTH, steps), M, N, K, stride_x, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, SPECIALIZE, TMA, EVEN_K, DECODE, CODES, BLOCKED)",
            "_sum(x, w, x_scale, w_scale, row, column, start, min(start + LENGTH, steps), M, N, K, stride_x, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, SPECIALIZE, SWAP, TMA, EVEN_K, DECODE, CODES, BLOCKED)",
        ),
        (
            "linear_fp8",
            "linear_fp8_kernel",
            "_group(y, x, w, x_scale, w_scale, row, column, part * length, steps, M, N, K, stride_x, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, SPECIALIZE, TMA, EVEN_K, DECODE, CODES, BLOCKED, SPLIT, PARTS, PART)",
            "_group(y, x, w, x_scale, w_scale, row, column, part * length, steps, M, N, K, stride_x, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, SPECIALIZE, SWAP, TMA, EVEN_K, DECODE, CODES, BLOCKED, SPLIT, PARTS, PART)",
        ),
    ],
    "a hint to the compiler": [
        ("attention_prefill", "prefill_kernel", "True in volatile=True", "False"),
        (
            "linear",
            "linear_kernel",
            "accumulate(x, w, row, column, first, min(first + length, steps), M, N, K, stride_x, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, SPECIALIZE, TMA, EVEN_K)",
            "accumulate(x, w, row, column, first, min(first + length, steps), M, N, K, stride_x, stride_w, BLOCK_M, BLOCK_N, BLOCK_K, SPECIALIZE, SWAP, TMA, EVEN_K)",
        ),
    ],
    "one part is a loop over one part": [("linear_fp8", "_group", "1 in PARTS == 1", "0")],
    "bits 12 and bits 16 of a float hold the same code": [
        ("linear_quantized", "_part", "BITS == 4", "BITS != 4"),
        ("linear_quantized", "_part", "0 in part % 2 == 0", "1"),
    ],
    "scales + columns = columns + scales": [
        (
            "linear_quantized",
            "_sum",
            "_pair(codes, above, scales, columns, N, step, tile * HELD, BLOCK_N, HALF, WIDTH, BITS, PARTS, OFFSET, BOOK_LOW, BOOK_HIGH, a.dtype)",
            "_pair(codes, above, columns, scales, N, step, tile * HELD, BLOCK_N, HALF, WIDTH, BITS, PARTS, OFFSET, BOOK_LOW, BOOK_HIGH, a.dtype)",
        ),
    ],
    "counters + tile = tile + counters": [
        ("linear", "linear_kernel", "arrive(counters, tile, SPLIT)", "arrive(tile, counters, SPLIT)"),
        ("linear_fp8", "linear_fp8_kernel", "arrive(counters, tile, SPLIT)", "arrive(tile, counters, SPLIT)"),
        ("linear_int8", "linear_int8_kernel", "arrive(counters, tile, SPLIT)", "arrive(tile, counters, SPLIT)"),
    ],
    "what lanes past the end hold is neither stored nor counted": [
        ("step", "put_cells_kernel", "0 in other=0", "1"),
        (
            "step",
            "copy_blocks_kernel",
            "tl.load(at + source * block_stride + i, mask=i < N)",
            "tl.load(at + source * block_stride + i)",
        ),
        ("step", "resolve_kernel", "1 in -1", "2"),
        (
            "step",
            "resolve_kernel",
            "tl.load(token_slots + t, mask=live, other=-1)",
            "tl.load(token_slots + t, mask=live)",
        ),
        ("step", "settle_kernel", "1 in -1", "2"),
        ("step", "settle_kernel", "tl.load(mine, mask=first < end, other=-1)", "tl.load(mine, mask=first < end)"),
        ("step", "adjust_kernel", "tl.load(cells + 4 * i, mask=live, other=0)", "tl.load(cells + 4 * i, mask=live)"),
        ("step", "adjust_kernel", "0 in other=0", "1"),
    ],
    "0 / r = 0 * r, and counting reads neither of the two arguments that change places": [
        ("sample", "adjusted", "x > 0.0", "x >= 0.0"),
        (
            "sample",
            "sample_kernel",
            "threshold(logits, counts, bias, mask, penalties, largest, inverse, cut, tl.zeros([1], tl.float32) + k.to(tl.float32), V, PENALTIES, BIAS, MASK, False, DIGIT_BLOCK)",
            "threshold(logits, counts, bias, mask, penalties, largest, cut, inverse, tl.zeros([1], tl.float32) + k.to(tl.float32), V, PENALTIES, BIAS, MASK, False, DIGIT_BLOCK)",
        ),
    ],
    "int32 to uint32 keeps the bits either way": [
        ("sample", "ordered", "True in bitcast=True", "False"),
    ],
}

EQUIVALENT: frozenset[Key] = frozenset(key for keys in REASONS.values() for key in keys)
