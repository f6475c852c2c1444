"""Matrix products: the same bits on either side of every change of configuration, and what launchers refuse."""

from __future__ import annotations

import pytest
import torch

from ridgeline.backends.cuda.codes import Offset, pack, pack_scales, packed_shapes
from ridgeline.backends.cuda.gemm import MOST_SPLIT_ROWS, Epilogue, split_k, traffic
from ridgeline.backends.cuda.kernels.gather import gather_columns
from ridgeline.backends.cuda.kernels.linear import linear, linear_scratch
from ridgeline.backends.cuda.kernels.linear_fp8 import linear_fp8
from ridgeline.backends.cuda.kernels.linear_quantized import linear_quantized
from ridgeline.backends.cuda.ladder.interpret import run
from ridgeline.backends.cuda.launch import ARCHS, cdiv
from tests.gpu.codes import BOOK
from tests.gpu.linear_cases import LinearCase, build

KINDS = (
    ("linear", "bf16"),
    ("linear", "f16"),
    ("linear_int8", "int8"),
    ("linear_fp8", "row"),
    ("linear_fp8", "block"),
    ("linear_quantized", "4-128-zero"),
    ("linear_quantized", "8-32-middle"),
    ("linear_quantized", "5-32-middle"),
    ("linear_quantized", "6-16-middle"),
    ("linear_quantized", "4-32-codebook"),
    ("linear_quantized", "gptq-4-64-mixed"),
)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("op", "kind"), KINDS)
def test_parts_side_by_side_or_one_after_another(op: str, kind: str, arch: str) -> None:
    """Many rows add the parts of K in one program, one row in several: the bits are the same."""
    least = 2080 if (op, kind) == ("linear_fp8", "row") else 1040
    for k in (least, 64 * (least // 64 + 1)) if op == "linear_fp8" else (least,):  # the second in whole words
        case = LinearCase(op, MOST_SPLIT_ROWS + 1, 32, k, kind)
        whole = build(case, arch)
        meta = whole.launches[-1].config.meta
        assert meta["SPLIT"] > 1 and not meta["PARALLEL"]
        run(whole.launches)
        for row in (0, MOST_SPLIT_ROWS):
            alone = build(case, arch, only=row)
            assert alone.launches[-1].config.meta["PARALLEL"]
            run(alone.launches, seed=row)
            assert torch.equal(alone.expected[0].tensor[0], whole.expected[0].tensor[row])


@pytest.mark.parametrize(("k", "split", "parts"), [(1040, 1, 2), (2080, 2, 2), (4112, 3, 2)])
def test_fp8_parts_in_groups(k: int, split: int, parts: int) -> None:
    """Parts of K are added in groups, groups to each other, whatever tile and however many programs."""
    made = {rows: build(LinearCase("linear_fp8", rows, 32, k, "row"), "sm_90") for rows in (2, 40, 80)}
    steps = set()
    for rows, case in made.items():
        meta = case.launches[-1].config.meta
        assert (meta["SPLIT"], meta["PARTS"]) == (split, parts) and meta["PARALLEL"] == (split > 1 and rows < 80)
        steps.add(meta["BLOCK_K"])
        run(case.launches, seed=rows)
        for row in (0, rows - 1):
            alone = build(LinearCase("linear_fp8", rows, 32, k, "row"), "sm_90", only=row)
            run(alone.launches)
            assert torch.equal(alone.expected[0].tensor[0], case.expected[0].tensor[row])
    assert len(steps) == 2


@pytest.mark.parametrize("k", [1, 64, 511, 512, 4096, 4160, 14336])
@pytest.mark.parametrize("n", [1, 64, 4096, 6144, 28672])
def test_no_part_is_empty(n: int, k: int) -> None:
    """A part without steps would store nothing, and the sum of the parts would read what is not there."""
    for block in (64, 128):
        steps, parts = cdiv(k, block), split_k(n, k, block)
        assert (parts - 1) * cdiv(steps, parts) < steps


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("rows", "n", "k"), [(3, 96, 1024), (40, 130, 128), (80, 64, 1024)])
def test_traffic_is_what_the_programs_ask_for(rows: int, n: int, k: int, arch: str) -> None:
    (launch,) = build(LinearCase("linear", rows, n, k, "bf16", "bf16", ("residual",)), arch).launches
    assert run([launch]) == traffic(launch, 2.0, 2.0)


def test_launchers_refuse_what_is_no_product() -> None:
    def bf16(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    x, w, out = bf16(2, 64), bf16(48, 64), bf16(2, 48)
    with pytest.raises(ValueError, match="multiple of 32"):
        linear(x, w, bf16(2, 24), "sm_90", after=Epilogue(silu_mul=True))
    with pytest.raises(ValueError, match="the output is"):
        linear(x, w, bf16(3, 48), "sm_90")
    with pytest.raises(ValueError, match="rows must be contiguous"):
        linear(x, bf16(64, 48).T, out, "sm_90")
    with pytest.raises(ValueError, match="the residual is"):
        linear(x, w, out, "sm_90", after=Epilogue(residual=bf16(2, 24)))
    with pytest.raises(ValueError, match="needs scratch"):
        linear(bf16(2, 4096), bf16(48, 4096), out, "sm_90")
    assert linear_scratch(2, 48, 4096).partials > 0 == linear_scratch(MOST_SPLIT_ROWS + 1, 48, 4096).partials
    shapes = packed_shapes(48, 64, 32)
    codes, scales = (
        torch.empty(s, dtype=t, device="meta") for s, t in zip(shapes, (torch.uint8, torch.int32), strict=True)
    )
    with pytest.raises(ValueError, match="in groups of 24"):
        linear_quantized(x, codes, scales, out, "sm_90", group=24)
    with pytest.raises(ValueError, match="codes of 3 bits"):
        linear_quantized(x, codes, scales, out, "sm_90", group=32, bits=3)
    with pytest.raises(ValueError, match="scales are"):  # a zero of each group takes half of a word
        linear_quantized(x, codes, scales, out, "sm_90", group=32, offset="zero")
    with pytest.raises(ValueError, match="wanted contiguous words"):
        linear_quantized(x, codes, scales.float(), out, "sm_90", group=32)
    with pytest.raises(ValueError, match="words of 16 bits"):
        odd = torch.empty(48, 65, dtype=torch.uint8, device="meta")[:, :64]
        linear_quantized(x, odd, scales, out, "sm_90", group=32)
    with pytest.raises(ValueError, match="without a codebook"):
        linear_quantized(x, codes, scales, out, "sm_90", group=32, offset="codebook")
    with pytest.raises(ValueError, match="with a codebook"):
        linear_quantized(x, codes, scales, out, "sm_90", group=32, codebook=BOOK)
    for book in (BOOK[1:], (*BOOK[1:], 128)):
        with pytest.raises(ValueError, match="16 signed bytes"):
            linear_quantized(x, codes, scales, out, "sm_90", group=32, offset="codebook", codebook=book)
    with pytest.raises(ValueError, match="codes are"):
        linear_quantized(x, codes, scales, out, "sm_90", group=32, bits=5)
    with pytest.raises(ValueError, match="scales are"):
        linear_quantized(x, codes, scales[:1], out, "sm_90", group=32)
    with pytest.raises(ValueError, match="columns"):
        gather_columns(x, torch.empty(63, dtype=torch.int32), torch.empty_like(x))


LAYOUTS = [
    (4, 16, 16, 4), (4, 32, 32, 4), (4, 128, 32, 4), (5, 16, 16, 16), (5, 64, 16, 16), (6, 16, 16, 8), (6, 32, 16, 8),
    (8, 16, 16, 2), (8, 32, 32, 2), (8, 128, 32, 2),
]  # fmt: skip


@pytest.mark.parametrize(("bits", "group", "half", "parts"), LAYOUTS)
def test_codes_lie_as_documented(bits: int, group: int, half: int, parts: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 300), dtype=torch.uint8)
    packed = pack(codes, group, bits)
    assert tuple(packed.shape) == packed_shapes(3, 300, group, bits)[0]
    step_bytes, values = bits * half * parts // 8, packed.shape[1] * 8 // bits
    assert packed.shape[1] % step_bytes == 0 and values - 300 < half * parts
    padded = torch.nn.functional.pad(codes, (0, values - 300))
    words = packed[:, 0::2].int() | packed[:, 1::2].int() << 8
    for k in range(values):
        (step, within), j = divmod(k, parts * half), k % half
        part, tiles = within // half, words[:, step * step_bytes // 2 :]
        if bits == 8:
            assert torch.equal(tiles[:, j] >> 8 * part & 255, padded[:, k])
            continue
        low = tiles[:, ((bits > 4) + part // 4) * half + j] >> 4 * (part % 4) & 15
        above = tiles[:, j] >> part * (bits - 4) & (1 << bits - 4) - 1
        assert torch.equal(low | above << 4, padded[:, k])


@pytest.mark.parametrize("offset", ["middle", "minimum", "zero", "codebook"])
@pytest.mark.parametrize(("bits", "group", "half", "parts"), LAYOUTS)
def test_scales_lie_as_documented(bits: int, group: int, half: int, parts: int, offset: Offset) -> None:
    scales, offsets = (torch.rand(3, cdiv(300, group)).half() for _ in range(2))
    stored = offset in ("minimum", "zero")
    words = pack_scales(scales, offsets if stored else None, 300, group, bits, offset)
    assert tuple(words.shape) == packed_shapes(3, 300, group, bits, offset)[1] and words.dtype == torch.int32
    halves = words.view(torch.int16).view(torch.float16).reshape(len(words), 3, 2)  # low half first
    for g in range(2 * len(words)):
        one = halves[g, :, 0] if stored or group >= half * parts else halves[g // 2, :, g % 2]
        assert torch.equal(one, scales[:, g] if g < scales.shape[1] else torch.zeros(3).half())
        if stored:
            assert torch.equal(halves[g, :, 1], offsets[:, g] if g < scales.shape[1] else torch.zeros(3).half())
        elif group >= half * parts:
            assert not halves[g, :, 1].any()
        if g + 1 == len(words) and (stored or group >= half * parts):
            break


def test_scales_that_do_not_fit_are_refused() -> None:
    scales = torch.ones(3, 10).half()
    for offset, offsets in (("zero", None), ("minimum", None), ("middle", scales), ("codebook", scales)):
        with pytest.raises(ValueError, match=f"'{offset}' with"):
            pack_scales(scales, offsets, 300, 32, 4, offset)
    for wrong in (scales[:, :9], torch.ones(3, 11).half(), scales.bfloat16()):
        with pytest.raises(ValueError, match="scales are"):
            pack_scales(wrong, None, 300, 32)
        with pytest.raises(ValueError, match="are torch"):
            pack_scales(scales, wrong, 300, 32, 4, "zero")


def test_fp8_that_begins_between_words() -> None:
    """On sm_80 such operands are read by bytes: the same bits as from where a word begins."""
    rng, outs = torch.Generator().manual_seed(7), []
    x, w = (torch.randn(rows, 128, generator=rng).to(torch.float8_e4m3fn) for rows in (3, 32))
    ones = torch.ones(1)
    for offset in (0, 2):
        moved = torch.zeros(3 * 128 + 64, dtype=torch.uint8)[offset : offset + 384].reshape(3, 128)
        moved.copy_(x.view(torch.uint8))
        outs.append(torch.full((3, 32), float("nan")))
        launches = linear_fp8(moved.view(torch.float8_e4m3fn), w, ones, ones, outs[-1], "sm_80")
        assert launches[0].config.meta["CODES"] == (1 if offset else 4)
        run(launches)
    assert torch.equal(*outs) and not outs[0].isnan().any()
