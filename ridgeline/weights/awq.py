"""Weights of AWQ checkpoints in the "gemm" layout, taken apart.

A linear layer [N, K] is three tensors (the layout is that of AutoAWQ's ``WQLinear_GEMM``, which vLLM and transformers
read too, https://github.com/casper-hansen/AutoAWQ):
- qweight: int32 [K, N / 8]. A word holds one value of K for eight neighbouring rows of the weight; bits 4 * i hold row
  ``ORDER[i]`` of the eight.
- qzeros: int32 [K / group, N / 8], in the same order.
- scales: float16 [K / group, N], in plain order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ridgeline.core.errors import ModelFileError, UnsupportedError
from ridgeline.weights.packed import ZeroCodes, along_columns, check_shape, group_of, half_scales, words

BITS = 4

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight rows the i-th four bits of a word belong to."""


def unpack_awq(
    name: str,
    qweight: npt.NDArray[Any],
    qzeros: npt.NDArray[Any],
    scales: npt.NDArray[Any],
    *,
    group: int,
    bits: int = BITS,
    version: str = "gemm",
) -> ZeroCodes:
    """The codes, scales and zeros of one linear layer.

    Args:
        name: of the layer, for errors (``"model.layers.0.mlp.up_proj"``).
        qweight, qzeros, scales: as the module says.
        group: ``q_group_size`` of the checkpoint's configuration (``group_size`` in transformers'); -1: all of K.
        bits, version: ``w_bit`` and ``version`` there.

    Raises:
        UnsupportedError: another number of bits or another layout.
        ModelFileError: tensors that do not fit together.
    """
    if bits != BITS:
        raise UnsupportedError(f"{name}: AWQ of {bits} bits; only 4 bits are known")
    if version.lower() != "gemm":
        raise UnsupportedError(f"{name}: AWQ in the layout {version!r}; only 'gemm' is known")
    packed, packed_zeros = words(f"{name}.qweight", qweight), words(f"{name}.qzeros", qzeros)
    k, n = packed.shape[0], packed.shape[1] * len(ORDER)
    group = group_of(name, group, k)
    if k % group:
        raise ModelFileError(f"{name}.qweight is {qweight.shape}: groups of {group} do not divide its {k} rows")
    why = f"qweight is {qweight.shape} in groups of {group}"
    check_shape(f"{name}.qzeros", qzeros, (k // group, n // len(ORDER)), why)
    check_shape(f"{name}.scales", scales, (k // group, n), why)
    codes, zeros = _rows(packed), _rows(packed_zeros)
    return ZeroCodes(codes, np.ascontiguousarray(half_scales(f"{name}.scales", scales).T), zeros, bits, group)


def _rows(packed: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint8]:
    """[C, N / 8] words to [N, C] codes, rows in plain order."""
    mixed = along_columns(packed, BITS).reshape(len(packed), -1, len(ORDER))
    plain = np.empty_like(mixed)
    plain[:, :, list(ORDER)] = mixed
    return np.ascontiguousarray(plain.reshape(len(packed), -1).T)
