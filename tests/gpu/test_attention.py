"""Attention on the first rung: the same bits whatever a row is computed beside, in whichever pieces and kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ridgeline.backends.cuda.kernels import attention_decode, attention_prefill, rope_kv, sample, top_logprobs
from ridgeline.backends.cuda.ladder.interpret import run
from ridgeline.backends.cuda.ladder.memory import Guard
from ridgeline.backends.cuda.launch import Launch
from tests.gpu import row_cases, sample_cases
from tests.gpu.attention_cases import KERNELS, MIXED, SPLITS, PagedCase, launches_of, numbers, step_of

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
    for op, start, end in (
        ("attention_prefill", 5, 280),
        ("attention_decode", 250, 262),
        ("attention_decode", 299, 300),
    ):
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


def test_a_mixed_batch() -> None:
    """Long requests by one kernel, short ones by the other: each row is written once, with the bits it has alone."""
    step = step_of(MIXED, numbers(MIXED))
    launches, out = launches_of(step, "sm_90"), step.args["out"]
    written = []
    for launch in launches:
        out.fill_(float("nan"))
        run([launch])
        rows = ~out.isnan()
        assert torch.equal(rows.any(dim=(1, 2)), rows.all(dim=(1, 2)))
        written.append(rows.any(dim=(1, 2)).int())
    assert (written[0] + written[1]).tolist() == [1] * len(out)
    assert written[0].tolist() == [int(new > MIXED.split) for _, new in MIXED.requests for _ in range(new)]
    both = bits(MIXED, numbers(MIXED))
    for op in KERNELS:
        np.testing.assert_array_equal(bits(replace(MIXED, op=op, split=0), numbers(MIXED)), both)


@pytest.mark.parametrize("case", SPLITS, ids=[c.name for c in SPLITS])
def test_how_many_share_the_chunks(case: PagedCase) -> None:
    """One program, two or one for each chunk: the same bits."""
    data = numbers(case)
    np.testing.assert_array_equal(bits(case, data), bits(replace(case, splits=0), data))


@pytest.mark.parametrize("dim", [8, 40, 72, 112, 144, 224, 320])
def test_a_head_size_is_refused(dim: int) -> None:
    with pytest.raises(ValueError, match=f"head size of {dim}; supported are 16, .*, 64, 80, 96, 128"):
        launches_of(step_of(PagedCase("attention_prefill", 1, 1, dim, "bf16", ((0, 1),))), "sm_90")


def asked(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of the live lanes of a launch's loads and stores."""
    total = 0

    def counted(name: str) -> None:
        real = getattr(Guard, name)

        def access(self: Guard, region: Any, addresses: Any, item: int, atomic: bool = False) -> None:
            nonlocal total
            total += 0 if atomic else addresses.size * item
            real(self, region, addresses, item, **({"atomic": atomic} if atomic else {}))

        monkeypatch.setattr(Guard, name, access)

    with monkeypatch.context() as monkeypatch:
        counted("load")
        counted("store")
        run([launch])
    return total


TRAFFIC = [
    replace(MIXED, op=op, split=split, head_dim=dim, cache=cache, window=window)
    for op in KERNELS
    for split, dim, cache, window in ((4, 32, "", None), (0, 96, "int8", 100), (0, 192, "fp8", None))
]


@pytest.mark.parametrize("case", TRAFFIC, ids=[c.name for c in TRAFFIC])
def test_traffic_of_attention(case: PagedCase, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = launches_of(step_of(case), "sm_90")[0 if case.op == "attention_prefill" else -1]
    traffic = {"attention_prefill": attention_prefill, "attention_decode": attention_decode}[case.op].traffic
    assert asked(launch, monkeypatch) == traffic(launch, case.requests)


@pytest.mark.parametrize("kind", ["bf16", "int8", "fp8"])
def test_traffic_of_rope(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (launch,) = row_cases.build(row_cases.GpuCase("rope_kv", 3, 80, kind, "bf16", (10, 3)), "sm_90").launches
    assert asked(launch, monkeypatch) == rope_kv.traffic(launch)


@pytest.mark.parametrize("kind", ["temperature", "top_k", "top_p"])
def test_traffic_of_sampling(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (launch,) = sample_cases.build(sample_cases.SampleCase(2100, kind, rows=2), "sm_90").launches
    filters = [(int(k) > 0, float(p) < 1) for k, p in zip(launch.args["top_ks"], launch.args["top_ps"], strict=True)]
    assert asked(launch, monkeypatch) == sample.traffic(launch, filters)


def test_traffic_of_top_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    case = sample_cases.TopCase(700, 9, rows=3)
    (launch,) = sample_cases.build(case, "sm_90").launches
    assert asked(launch, monkeypatch) == top_logprobs.traffic(launch, [9, 0, 7])
