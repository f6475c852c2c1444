"""Weights of codes, packed as kernels read them, and as the numbers they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ridgeline.backends.cuda.codes import pack, pack_scales
from ridgeline.weights.awq import unpack_awq
from ridgeline.weights.gptq import unpack_gptq
from tests import packers

KINDS = (
    "4-32-middle", "4-32-minimum", "4-64-zero", "4-128-zero", "8-32-middle", "8-64-minimum", "8-128-zero",
    "5-32-middle", "5-64-minimum", "5-16-zero", "6-16-middle", "6-128-zero", "4-32-codebook", "4-16-minimum",
    "4-128-middle", "8-64-middle",  # a word of scales holds one and nothing
)  # fmt: skip
"""Bits, group, offset."""

FILES = ("awq-32", "awq-128", "gptq-4-32-v2", "gptq-4-64-mixed", "gptq-8-128-mixed")
"""AWQ and its group; GPTQ, its bits, its group and, of both, its newer format or its order of activations."""

BOOK = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""IQ4_NL's (ggml, ``ggml-common.h``)."""


def scales_of(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Small positive numbers."""
    return (0.01 + 0.02 * rng.random(shape)).astype(np.float32)


@dataclass(frozen=True)
class Codes:
    """A quantized weight.

    Attributes:
        numbers: [N, K] float64, columns as x has them.
        order: what ``gather_columns`` takes x through first.
        how: keywords of the launchers.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    numbers: np.ndarray
    how: dict[str, Any]
    order: torch.Tensor | None = None

    @classmethod
    def of(cls, kind: str, n: int, k: int, rng: np.random.Generator) -> Codes:
        """Random codes, scales and offsets of one of ``KINDS`` or ``FILES``."""
        if kind in FILES:
            return cls._of_file(kind, n, k, rng)
        bits, group, offset = (t(v) for t, v in zip((int, int, str), kind.split("-"), strict=True))
        groups, middle = -(-k // group), 1 << (bits - 1)
        codes = rng.integers(0, 1 << bits, (n, k)).astype(np.uint8)
        scales = scales_of(rng, (n, groups)).astype(np.float16)
        zeros = rng.integers(0, 1 << bits, (n, groups))
        offsets = (zeros if offset == "zero" else -middle * scales_of(rng, (n, groups))).astype(np.float16)
        s, o = (np.repeat(t.astype(np.float64), group, axis=1)[:, :k] for t in (scales, offsets))
        c = np.array(BOOK, np.float64)[codes] if offset == "codebook" else codes.astype(np.float64)
        less = {"middle": float(middle), "zero": o}.get(offset, 0.0)
        how = {"group": group, "bits": bits, "offset": offset}
        if offset in ("middle", "codebook"):
            how |= {"codebook": BOOK} if offset == "codebook" else {}
            return cls._packed(codes, scales, None, (c - less) * s, how)
        return cls._packed(codes, scales, offsets, (c - less) * s + (o if offset == "minimum" else 0.0), how)

    @classmethod
    def _of_file(cls, kind: str, n: int, k: int, rng: np.random.Generator) -> Codes:
        """The whole way: written as a checkpoint has it, taken apart, packed."""
        family, *rest = kind.split("-")
        bits, group = (4, int(rest[0])) if family == "awq" else (int(rest[0]), int(rest[1]))
        at = np.arange(k) // group
        if "mixed" in rest:
            at = rng.permutation(at)
        codes, zeros = rng.integers(0, 1 << bits, (n, k)), rng.integers(0, 1 << bits, (n, at.max() + 1))
        scales = scales_of(rng, zeros.shape).astype(np.float16)
        if family == "awq":
            found = unpack_awq("w", **packers.awq(codes, zeros, scales), group=group)
        else:
            version = "gptq_v2" if "v2" in rest else "gptq"
            tensors = packers.gptq(codes, zeros, scales, bits, version) | {"g_idx": at.astype(np.int32)}
            found = unpack_gptq("w", **tensors, bits=bits, group=group, checkpoint_format=version)
        numbers = (codes - zeros[:, at]) * scales[:, at].astype(np.float64)
        how = {"group": group, "bits": bits, "offset": "zero"}
        order = None if found.order is None else torch.from_numpy(found.order)
        return cls._packed(found.codes, found.scales, found.zeros.astype(np.float16), numbers, how, order)

    @classmethod
    def _packed(
        cls,
        codes: np.ndarray,
        scales: np.ndarray,
        offsets: np.ndarray | None,
        numbers: np.ndarray,
        how: dict[str, Any],
        order: torch.Tensor | None = None,
    ) -> Codes:
        k, form = codes.shape[1], (how["group"], how["bits"])
        added = None if offsets is None else torch.from_numpy(offsets)
        words = pack_scales(torch.from_numpy(scales), added, k, *form, how["offset"])
        return cls(pack(torch.from_numpy(codes), *form), words, numbers, how, order)
