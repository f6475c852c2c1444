"""Weights of GPTQ checkpoints, taken apart.

A linear layer [N, K] is four tensors (the layout is that of AutoGPTQ and its successor GPTQModel, which vLLM and
transformers read too, https://github.com/ModelCloud/GPTQModel). With 32 / bits integers in a word, lowest bits first:
- qweight: int32 [K * bits / 32, N]; the integers of a word are neighbours along K.
- qzeros: int32 [groups, N * bits / 32]; those of a word are neighbours along N.
- scales: float16 (or bfloat16) [groups, N].
- g_idx: int32 [K], the group of each value of K. In order, or, where weights were quantized in order of activations
  (``desc_act``), mixed: then the columns of the codes are sorted by group here, and x has to follow.

**Zeros.** ``checkpoint_format`` "gptq" stores zero - 1, subtracted from the packed word as one number: a zero of 0
borrows from its neighbour, and what restores it is adding 0x11111111 (of 8 bits 0x01010101) to the word. Files without
a zero of 0, which are nearly all, read the same if each integer gets its one by itself. "gptq_v2" stores zeros as they
are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.core.errors import ModelFileError, UnsupportedError
from ridgeline.weights.packed import WORD, ZeroCodes, along_columns, check_shape, group_of, half_scales, words

BITS = (4, 8)

FORMATS = ("gptq", "gptq_v2")


def unpack_gptq(
    name: str,
    qweight: npt.NDArray[Any],
    qzeros: npt.NDArray[Any],
    scales: npt.NDArray[Any],
    g_idx: npt.NDArray[Any] | None = None,
    *,
    bits: int,
    group: int,
    checkpoint_format: str = "gptq",
    sym: bool | None = None,
) -> ZeroCodes:
    """The codes, scales and zeros of one linear layer.

    Args:
        name: of the layer, for errors (``"model.layers.0.mlp.up_proj"``).
        qweight, qzeros, scales, g_idx: as the module says; without g_idx groups are in order.
        bits, group, checkpoint_format: of the checkpoint's configuration; a group of -1 is all of K.
        sym: its ``sym``: True has every zero checked to be the middle.

    Raises:
        UnsupportedError: another number of bits or another layout.
        ModelFileError: tensors that do not fit together.
    """
    if bits not in BITS:
        raise UnsupportedError(f"{name}: GPTQ of {bits} bits; only 4 and 8 bits are known")
    if checkpoint_format not in FORMATS:
        known = " and ".join(map(repr, FORMATS))
        raise UnsupportedError(f"{name}: GPTQ in the layout {checkpoint_format!r}; only {known} are known")
    packed, packed_zeros = words(f"{name}.qweight", qweight), words(f"{name}.qzeros", qzeros)
    per_word = WORD // bits
    k, n = packed.shape[0] * per_word, packed.shape[1]
    group = group_of(name, group, k)
    if n % per_word:
        raise ModelFileError(f"{name}.qweight is {qweight.shape}: zeros fill words, {per_word} do not divide its {n}")
    groups, why = -(-k // group), f"qweight is {qweight.shape} of {bits} bits in groups of {group}"
    check_shape(f"{name}.qzeros", qzeros, (groups, n // per_word), why)
    check_shape(f"{name}.scales", scales, (groups, n), why)
    if checkpoint_format == "gptq":
        packed_zeros = packed_zeros + np.uint32(0xFFFFFFFF // ((1 << bits) - 1))
    codes = np.ascontiguousarray(along_columns(np.ascontiguousarray(packed.T), bits))
    zeros = np.ascontiguousarray(along_columns(packed_zeros, bits).T)
    order = None if g_idx is None else _order(f"{name}.g_idx", g_idx, k, group)
    if order is not None:
        codes = codes[:, order]
    halves = np.ascontiguousarray(half_scales(f"{name}.scales", scales).T)
    found = ZeroCodes(codes, halves, zeros, bits, group, order)
    if sym and not found.centered:
        middle, layout = 1 << (bits - 1), checkpoint_format
        raise ModelFileError(
            f"{name}.qzeros: of a symmetric {layout!r} checkpoint every zero is {middle}; these differ"
        )
    return found


def _order(name: str, g_idx: npt.NDArray[Any], k: int, group: int) -> npt.NDArray[np.int32] | None:
    """Columns sorted by group, those of one group as they come; None where they lie so already."""
    check_shape(name, g_idx, (k,), f"one group for each of {k} columns")
    if g_idx.dtype not in (np.int32, np.int64):
        raise ModelFileError(f"{name} is {g_idx.dtype}, wanted int32")
    plain = np.arange(k) // group
    if np.array_equal(g_idx, plain):
        return None
    order = np.argsort(g_idx, kind="stable")
    if not np.array_equal(g_idx[order], plain):
        raise ModelFileError(f"{name} does not have {group} columns in each group")
    return order.astype(np.int32)
