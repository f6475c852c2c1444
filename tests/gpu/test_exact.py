"""The interpreter itself: arithmetic bit for bit as torch's, sums that depend on no shape, faults that it must see."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.backends.cuda.ladder import exact
from ridgeline.backends.cuda.ladder.interpret import run
from ridgeline.backends.cuda.ladder.memory import KernelFault
from ridgeline.backends.cuda.launch import Config, Launch
from tests.gpu import toys

N = 256


def launch(kernel: object, writes: tuple[str, ...] = ("out",), updates: tuple[str, ...] = (), **args: object) -> Launch:
    meta = {k: args.pop(k) for k in list(args) if k.isupper()}
    return Launch(kernel, args.pop("grid", (1,)), args, Config(meta), writes, updates)


def random(dtype: torch.dtype, seed: int = 0, n: int = N) -> torch.Tensor:
    return (torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("which", "op"),
    [
        (0, torch.add),
        (1, torch.sub),
        (2, torch.mul),
        (3, torch.div),
        (4, torch.maximum),
        (5, torch.minimum),
        (6, lambda a, b: (a < b).to(a.dtype)),
        (7, lambda a, b: torch.where(a < b, -a, b.abs())),
    ],
)
def test_arithmetic_is_torchs(dtype: torch.dtype, which: int, op: object) -> None:
    a, b = random(dtype), random(dtype, 1)
    out = torch.empty_like(a)
    run([launch(toys.binary, a=a, b=b, out=out, N=N, WHICH=which)])
    assert torch.equal(out, op(a, b))


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16, torch.int32])
@pytest.mark.parametrize("target", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int32])
def test_conversions_are_torchs(source: torch.dtype, target: torch.dtype) -> None:
    x = (random(torch.float32) * 30).to(source)
    if source == torch.int32 and target == torch.float8_e4m3fn:
        pytest.skip("no kernel converts integers to 8-bit floats directly")
    out = torch.zeros(N).to(target)
    run([launch(toys.convert, x=x, out=out, N=N)])
    assert torch.equal(out.view(torch.uint8), x.to(target).view(torch.uint8))


def test_every_bf16_between_two_floats_is_rounded_to_even() -> None:
    bits = np.arange(0x3F7F8000, 0x3F820000, 0x200, dtype=np.uint32)
    x = torch.from_numpy(bits.view(np.float32)[:N].copy())
    out = torch.empty(N, dtype=torch.bfloat16)
    run([launch(toys.convert, x=x, out=out, N=N)])
    assert torch.equal(out, x.to(torch.bfloat16))


def test_large_values_saturate_at_8_bits() -> None:
    x = torch.full((N,), 1e6)
    x[0], x[1], x[2] = -1e6, float("inf"), float("nan")
    out = torch.zeros(N, dtype=torch.float8_e4m3fn)
    run([launch(toys.convert, x=x, out=out, N=N)])
    values = out.to(torch.float32)
    assert values[0] == -448 and values[1] == 448 and values[2].isnan() and (values[3:] == 448).all()


def test_e4m3_encoded_in_integers_is_the_hardwares() -> None:
    """Every number of e4m3, every tie between two, and their neighbours; zeros, infinity, NaN, beyond the range."""
    numbers = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    edges = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2, [449.0, 464.0, 465.0, 1e9, np.inf]])
    near = [np.nextafter(edges.astype(np.float32), np.float32(to)) for to in (-np.inf, np.inf)]
    every = np.concatenate([edges.astype(np.float32), *near, [np.nan, 1e-40]]).astype(np.float32)
    x = torch.from_numpy(np.pad(np.concatenate([every, -every]), (0, 2048 - 2 * len(every))))
    hardware, ours = (torch.zeros(len(x), dtype=t) for t in (torch.float8_e4m3fn, torch.uint8))
    run([launch(toys.convert, x=x, out=hardware, N=len(x)), launch(toys.encode_e4m3, x=x, out=ours, N=len(x))])
    assert torch.equal(hardware.view(torch.uint8), ours)


floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**50), max_value=2.0**50)


@settings(max_examples=300, deadline=None)
@given(floats, floats, floats)
def test_fused_multiply_add_is_rounded_once(x: float, y: float, z: float) -> None:
    a, b, c = (np.array([v], np.float32) for v in (x, y, z))
    true = Fraction(float(a[0])) * Fraction(float(b[0])) + Fraction(float(c[0]))
    got = float(exact.fused_multiply_add(a, b, c)[0])
    below, above = (
        float(np.nextafter(np.float32(got), np.float32(-np.inf))),
        float(np.nextafter(np.float32(got), np.float32(np.inf))),
    )
    error = abs(Fraction(got) - true)
    assert all(error <= abs(Fraction(v) - true) for v in (below, above))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_depend_on_no_other_row(dtype: torch.dtype) -> None:
    a, b = random(dtype, 2, 32 * 64).reshape(32, 64), random(dtype, 3, 64 * 16).reshape(64, 16)
    whole, few = torch.empty(32, 16), torch.empty(16, 16)
    run([launch(toys.product, a=a, b=b, out=whole, M=32, N=16, K=64)])
    run([launch(toys.product, a=a[16:], b=b, out=few, M=16, N=16, K=64)])
    assert torch.equal(whole[16:], few)
    if dtype == torch.float32:  # multiplied as tf32
        a, b = (torch.from_numpy(exact.to_tf32(x.numpy())) for x in (a, b))
    assert (whole.double() - a.double() @ b.double()).abs().max() < 1e-4


def test_int8_products_are_exact() -> None:
    a, b = (torch.randint(-128, 128, (n, m), dtype=torch.int8) for n, m in ((16, 64), (64, 16)))
    out = torch.zeros(16, 16, dtype=torch.int32)
    run([launch(toys.product, a=a, b=b, out=out, M=16, N=16, K=64)])
    assert torch.equal(out, a.int() @ b.int())


def test_sums_maxima_and_scans() -> None:
    x = random(torch.float32, 4)
    out = torch.empty(3 * N)
    run([launch(toys.reductions, x=x, out=out, N=N)])
    assert abs(float(out[0]) - float(x.double().sum())) < 1e-4
    assert torch.equal(out[1:N], x.max().expand(N - 1))
    assert (out[N : 2 * N].double() - x.double().cumsum(0)).abs().max() < 1e-3
    assert torch.equal(out[2 * N :], torch.full((N,), float(x.argmax())))


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (1, "outside"),
        (2, "outside"),
        (3, "were not written"),
        (4, "was never written"),
        (5, "two lanes write one element"),
        (6, "not list as written"),
    ],
)
def test_faults_are_seen(which: int, message: str) -> None:
    x, out = random(torch.float32), torch.empty(N)
    with pytest.raises(KernelFault, match=message):
        run([launch(toys.faulty, x=x, out=out, N=N, WHICH=which)])


def test_a_gap_between_padded_rows_is_outside() -> None:
    padded = torch.zeros(4, 80)[:, :64]
    with pytest.raises(KernelFault, match="outside"):
        run([launch(toys.convert, x=padded, out=torch.empty(N), N=N)])


@pytest.mark.parametrize("released", [True, False])
def test_what_another_program_wrote_needs_a_release(released: bool) -> None:
    partials, count, out = torch.empty(4, N), torch.zeros(1, dtype=torch.int32), torch.empty(N)
    merge = launch(
        toys.last_one_sums,
        ("partials", "out"),
        ("count",),
        partials=partials,
        count=count,
        out=out,
        grid=(4,),
        N=N,
        RELEASE=released,
    )
    if released:
        for seed in range(3):
            count.zero_()
            run([merge], seed)
            assert (out == 6).all()
    else:
        with pytest.raises(KernelFault, match="without a release"):
            run([merge])


def test_programs_that_write_one_element_race() -> None:
    out = torch.empty(N)
    with pytest.raises(KernelFault, match="overwritten"):
        run([launch(toys.convert, x=random(torch.float32), out=out, N=N, grid=(2,))])
