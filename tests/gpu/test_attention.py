"""Attention on the first rung: the same bits whatever a row is computed beside, in whichever pieces and kernel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ridgeline.backends.cuda.ladder.interpret import run
from tests.gpu.attention_cases import KERNELS, PagedCase, launches_of, numbers, step_of

Data = tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]
WHOLE = PagedCase("attention_prefill", 6, 2, 64, "bf16", ((0, 531),), scale_up=2.0)
SHORT = PagedCase("attention_prefill", 2, 1, 32, "bf16", ((0, 300),), scale_up=2.0)


def bits(case: PagedCase, data: Data, arch: str = "sm_90", seed: int | None = None) -> np.ndarray:
    """The output rows of a case, of given numbers, as integers."""
    step = step_of(case, data)
    run(launches_of(step, arch), seed)
    result: np.ndarray = step.args["out"].contiguous().view(torch.int16).numpy()
    return result


def piece(data: Data, start: int, end: int) -> Data:
    """Of one request: its context up to ``end``."""
    q, k, v = ([x[0][:end]] for x in data)
    return q, k, v


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("window", [None, 100])
def test_pieces_and_kernels(arch: str, window: int | None) -> None:
    """A prompt in one piece, in chunks, and its last tokens by the decode kernel, one or some at a time."""
    case = replace(WHOLE, window=window)
    data = numbers(case)
    whole = bits(case, data, arch)
    for op, cuts in (
        ("attention_prefill", ((0, 7), (7, 250), (250, 400), (400, 531))),
        ("attention_decode", ((0, 1), (16, 17), (255, 256), (256, 257), (500, 505), (510, 531), (530, 531))),
    ):
        for start, end in cuts:
            part = replace(case, op=op, requests=((start, end - start),))
            np.testing.assert_array_equal(bits(part, piece(data, start, end), arch), whole[start:end])


@pytest.mark.parametrize("cache", ["int8", "fp8"])
def test_pieces_over_8_bits(cache: str) -> None:
    """The same over a quantized cache, whose codes are the same in every piece."""
    case = replace(SHORT, cache=cache)
    data = numbers(case)
    whole = bits(case, data)
    for op, start, end in (("attention_prefill", 5, 280), ("attention_decode", 250, 262), ("attention_decode", 299, 300)):
        part = replace(case, op=op, requests=((start, end - start),))
        np.testing.assert_array_equal(bits(part, piece(data, start, end)), whole[start:end])


@pytest.mark.parametrize("op", KERNELS)
def test_beside_others(op: str) -> None:
    """Each request of a batch, in any order of programs, gives the bits it gives alone."""
    case = PagedCase(op, 4, 2, 96, "bf16", ((0, 3), (260, 1), (511, 2), (40, 21), (0, 0), (700, 1)), window=300)
    data = numbers(case)
    together = bits(case, data, seed=3)
    start = 0
    for i, request in enumerate(case.requests):
        if request[1]:
            alone = bits(replace(case, requests=(request,)), ([data[0][i]], [data[1][i]], [data[2][i]]))
            np.testing.assert_array_equal(together[start : start + request[1]], alone)
        start += request[1]


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_every_head_size(arch: str, dim: int) -> None:
    """Prefill and decode agree where a head is split in parts, and where values are split over programs."""
    case = PagedCase("attention_prefill", 3, 1, dim, "f16", ((270, 5),), soft_cap=30.0)
    data = numbers(case)
    np.testing.assert_array_equal(bits(case, data, arch), bits(replace(case, op="attention_decode"), data, arch))
