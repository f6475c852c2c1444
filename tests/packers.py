"""Writers of AWQ's and GPTQ's tensors, one integer after another, from the formats' definitions."""

from __future__ import annotations

import numpy as np

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Of eight neighbouring rows, which four bits of the word the i-th one is in."""


def put(words: np.ndarray, row: int, column: int, at: int, value: int) -> None:
    """Sets bits of one word of an int32 tensor."""
    words.view(np.uint32)[row, column] |= np.uint32(int(value) << at)


def awq(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray) -> dict[str, np.ndarray]:
    """codes [N, K]; zeros, scales [N, groups]: as AutoAWQ's GEMM writes a layer."""

    def packed(integers: np.ndarray) -> np.ndarray:
        n, width = integers.shape
        words = np.zeros((width, n // 8), np.int32)
        for row in range(n):
            for k in range(width):
                put(words, k, row // 8, 4 * AWQ_PLACES[row % 8], integers[row, k])
        return words

    return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales.T.astype(np.float16)}


def gptq(
    codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, bits: int, version: str = "gptq"
) -> dict[str, np.ndarray]:
    """codes [N, K], columns as the model has them; zeros, scales [N, groups]: as GPTQModel writes a layer."""
    (n, k), groups, per_word = codes.shape, zeros.shape[1], 32 // bits
    qweight, qzeros = np.zeros((k // per_word, n), np.int32), np.zeros((groups, n // per_word), np.int32)
    for row in range(n):
        for column in range(k):
            put(qweight, column // per_word, row, bits * (column % per_word), codes[row, column])
        for g in range(groups):
            put(qzeros, g, row // per_word, bits * (row % per_word), zeros[row, g])
    if version == "gptq":
        one = sum(1 << at for at in range(0, 32, bits))
        for word in np.nditer(qzeros, op_flags=[["readwrite"]]):  # type: ignore[call-overload]
            word[...] = np.array((int(word) - one) % (1 << 32), np.uint32).view(np.int32)
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales.T.astype(np.float16)}
