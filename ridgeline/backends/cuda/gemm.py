"""What every matrix product shares: the order of tiles, the split over K, and what follows the sum.

A product y = x @ w.T is cut into tiles of [BLOCK_M rows of x, BLOCK_N rows of w] and, along K, into ``SPLIT`` parts
of whole steps of BLOCK_K. **Where parts begin is a function of (N, K, format) alone**, and every variant adds in one
order: within a part the tensor core adds its instructions in ascending K into one fp32 accumulator that starts at
zero; parts are then added one after another, ``((p0 + p1) + p2) + p3``. Few rows compute the parts in different
programs and the last one to arrive adds them; many rows compute them one after another in one program.

Bits therefore do not depend on M, resting on three things:
- on one architecture every variant uses the same instruction (HMMA.16816 on sm_80, HGMMA of K 16 on sm_90: never
  mma.sync there, whose internal alignment of addends may differ). Few rows on sm_90 swap the operands (wgmma needs 64
  rows on its first), and a * b = b * a exactly;
- an instruction computes an output element from its row, its column and its accumulator alone, wherever in the tile
  the element lies and whatever the tile's width;
- rows and columns past the edge are zeros or repetitions that reach no stored element, and K past the edge adds
  exact zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ridgeline.backends.cuda.launch import CardShape, Config, Launch, cdiv

SMS = {"sm_80": 108, "sm_90": 132}
"""Streaming multiprocessors of an A100 and of an H100 SXM (NVIDIA's architecture white papers)."""

MANY = 1 << 62
"""Rows without a bound: the last tile of a table."""

GROUP_M = 8
"""Row tiles that take turns before the next column tile: their x and w stay in the second-level cache."""

SPLIT_COLUMNS = 64
"""Columns of a tile that the split over K counts with: those of the few-row configurations."""

SPLIT_PROGRAMS = 256
"""Programs wanted of a few-row product: about two for each multiprocessor, so that all of them read weights."""

MOST_SPLIT_ROWS = 64
"""Up to here the parts of a split over K are computed side by side; beyond, rows alone make enough programs."""


@dataclass(frozen=True)
class Tile:
    """A row of a configuration table.

    Attributes:
        rows: it serves products of at most so many rows.
        block_m, block_n, block_k: rows of x, rows of w and the step along K of one program.
        num_warps, num_stages: as Triton takes them.
        per_sm: programs that fit on a multiprocessor at once, by registers and shared memory.
        swap: w is the tensor core's first operand.
        specialize: one warp group loads while two others multiply, half a tile each (sm_90; num_warps 4 only).
    """

    rows: int
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    per_sm: int
    swap: bool = False
    specialize: bool = False

    def config(self, **meta: Any) -> Config:
        """The configuration of a kernel of this tile; ``meta`` adds to its constants."""
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}
        flags = {"SWAP": self.swap, "SPECIALIZE": self.specialize, "GROUP": GROUP_M}
        return Config({**blocks, **flags, **meta}, self.num_warps, self.num_stages)


def split_k(n: int, k: int, block_k: int, least: int = 256) -> int:
    """Parts along K of a product with ``n`` columns: a function of the weight alone.

    Args:
        least: values of K that a part has at least.
    """
    steps, parts = cdiv(k, block_k), 1
    while parts < 8 and cdiv(n, SPLIT_COLUMNS) * parts < SPLIT_PROGRAMS and k >= 2 * parts * least:
        parts *= 2
    return cdiv(steps, cdiv(steps, parts))  # no part is empty


@dataclass(frozen=True)
class Scratch:
    """What a product needs beside its operands.

    Attributes:
        partials: float32 elements, whatever they hold.
        counters: int32 elements, zero before the first launch; every launch leaves them zero.
    """

    partials: int
    counters: int

    def tensors(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A workspace and counters of this size, for a backend, a test or a card to hand to launches."""
        zeros = torch.zeros(self.counters, dtype=torch.int32, device=device)
        return torch.empty(self.partials, dtype=torch.float32, device=device), zeros


def scratch(m: int, n: int, split: int) -> Scratch:
    """Scratch of a product of ``m`` rows and ``n`` columns; none where parts are not computed side by side."""
    if split == 1 or m > MOST_SPLIT_ROWS:
        return Scratch(0, 0)
    return Scratch(split * m * n, cdiv(n, SPLIT_COLUMNS) * cdiv(m, 16))


@dataclass(frozen=True)
class Epilogue:
    """What follows the sum, in this order, in fp32, before the one rounding to the output's dtype.

    Attributes:
        bias: [N], added to each row.
        silu_mul: silu(gate) * up of columns that alternate every 16 (``graph/ir.py``, INTERLEAVE): N / 2 remain.
        residual: [M, N or N / 2], rows contiguous, added last; not the output's own memory.
    """

    bias: torch.Tensor | None = None
    silu_mul: bool = False
    residual: torch.Tensor | None = None

    def args(self) -> dict[str, Any]:
        """Those arguments of a kernel that are there."""
        found: dict[str, Any] = {}
        if self.bias is not None:
            found["bias"] = self.bias
        if self.residual is not None:
            found |= {"residual": self.residual, "stride_residual": self.residual.stride(0)}
        return found


def pick(table: tuple[Tile, ...], m: int, regular: bool, out: torch.Tensor, roomy: bool = False) -> Tile:
    """The first tile of a table that serves ``m`` rows, or one that single addresses leave registers for.

    Args:
        regular: rows begin where wide copies can. If not, every element is loaded by itself, and the registers that
            takes leave room for small tiles only: the last but two of the table, over more warps.
        out: of which, where its rows do not line up, every element is stored by itself.
        roomy: or the last but one.
    """
    if not regular:
        tile = table[-2 if roomy and m > table[-3].rows else -3]
        return replace(tile, block_n=64, num_warps=8, num_stages=2, per_sm=1)
    if out.stride(0) % 16 and m > table[-3].rows:
        return replace(table[-2], block_n=64, num_warps=8, per_sm=1)
    return next(tile for tile in table if m <= tile.rows)


def regular(x: torch.Tensor, w: torch.Tensor, k: int, arch: str) -> bool:
    """Whether every copy can be 16 bytes wide: by rows' strides, and, without descriptors, by the mask along K."""
    aligned = all(t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in (x, w))
    # Triton knows of an integer argument only whether 16 divides it.
    return aligned and (arch == "sm_90" or all(size % 16 == 0 for size in (k, x.stride(0), w.stride(0))))


@dataclass(frozen=True)
class Product:
    """One product to launch: everything but its operands.

    Attributes:
        split: parts along K.
        sums: of what type partial sums are: float32 or int32.
    """

    kernel: Any
    arch: str
    m: int
    n: int
    k: int
    tile: Tile
    split: int
    sums: torch.dtype = torch.float32

    def launch(
        self,
        args: dict[str, Any],
        out: torch.Tensor,
        workspace: torch.Tensor | None,
        counters: torch.Tensor | None,
        **meta: Any,
    ) -> Launch:
        """The launch of a kernel whose arguments follow this folder's names.

        Args:
            args: operands and what they need.
            workspace, counters: as ``scratch`` says; None where it asks for nothing.
        """
        needed = scratch(self.m, self.n, self.split)
        tiles = cdiv(self.m, self.tile.block_m) * cdiv(self.n, self.tile.block_n)
        args = {**args, "out": out, "M": self.m, "N": self.n, "K": self.k, "stride_out": out.stride(0)}
        writes: tuple[str, ...] = ("out",)
        updates: tuple[str, ...] = ()
        if needed.partials:
            if workspace is None or counters is None or workspace.numel() < needed.partials:
                raise ValueError(f"this product needs scratch: {needed}")
            args |= {"workspace": workspace[: needed.partials].view(self.sums), "counters": counters[:tiles]}
            writes, updates = ("out", "workspace"), ("counters",)
        jobs = tiles * (self.split if needed.partials else 1)
        config = self.tile.config(SPLIT=self.split, PARALLEL=needed.partials > 0, **meta)
        grid = (min(jobs, SMS[self.arch] * self.tile.per_sm),)
        return Launch(self.kernel, grid, args, config, writes, updates)


def operands(x: torch.Tensor, w: torch.Tensor, tile: Tile, tma: bool, parts: int = 1) -> dict[str, Any]:
    """x and w as a kernel takes them: descriptors, x's boxes ``parts`` * block_k wide, or pointers; rows' strides."""
    strides = {"stride_x": x.stride(0), "stride_w": w.stride(0)}
    if not tma or tile.specialize:
        return {"x": x, "w": w, **strides}
    boxes = {"x": (x, [tile.block_m, parts * tile.block_k]), "w": (w, [tile.block_n, tile.block_k])}
    made = {name: TensorDescriptor(t, list(t.shape), list(t.stride()), box) for name, (t, box) in boxes.items()}
    return {**made, **strides}


def check(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, after: Epilogue) -> None:
    """Raises ValueError for operands that do not make a product."""
    if x.dtype != w.dtype or w.shape[1] != x.shape[1]:
        raise ValueError(f"x {x.dtype} {tuple(x.shape)} by w {w.dtype} {tuple(w.shape)}")
    if any(t.stride(1) != 1 for t in (x, w, out)):
        raise ValueError("rows must be contiguous")
    check_shapes(x.shape[0], w.shape[0], out, after)


def check_shapes(m: int, n: int, out: torch.Tensor, after: Epilogue) -> None:
    """Raises ValueError for an output, or for tensors of what follows the sum, that do not fit [m, n]."""
    if after.silu_mul and n % 32:
        raise ValueError(f"gate and up take turns every 16 rows: N is a multiple of 32, not {n}")
    shape = (m, n // 2 if after.silu_mul else n)
    if tuple(out.shape) != shape:
        raise ValueError(f"the output is {tuple(out.shape)}, wanted {shape}")
    if after.bias is not None and (tuple(after.bias.shape) != (n,) or after.bias.stride(0) != 1):
        raise ValueError(f"the bias is {tuple(after.bias.shape)}, wanted {(n,)}, contiguous")
    if after.residual is not None and (tuple(after.residual.shape) != shape or after.residual.stride(1) != 1):
        raise ValueError(f"the residual is {tuple(after.residual.shape)}, wanted {shape}, rows contiguous")


def check_scales(
    x_scale: torch.Tensor, x_shape: tuple[int, ...], w_scale: torch.Tensor, w_shape: tuple[int, ...]
) -> None:
    """Raises ValueError for scales that are not contiguous fp32 of these shapes."""
    for name, scale, shape in (("x", x_scale, x_shape), ("w", w_scale, w_shape)):
        if tuple(scale.shape) != shape or scale.dtype != torch.float32 or not scale.is_contiguous():
            raise ValueError(f"scales of {name}: {scale.dtype} {tuple(scale.shape)}, wanted float32 {shape}")


LLAMA_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
"""(N, K) of the projections of a layer: hidden 4096, intermediate 14336, 32 heads and 8 KV heads of 128."""

CARD_ROWS = (1, 64, 4096)

CardLaunches = Callable[[int, int, int, Epilogue, torch.Tensor, str], list[Launch]]
"""From M, N, K, what follows the sum, the output and the architecture."""


def llama_shapes(make: CardLaunches, arch: str, weight_bytes: float, input_bytes: float) -> list[CardShape]:
    """Each projection at each number of rows, over tensors on the meta device; outputs and residuals in bf16.

    Args:
        weight_bytes, input_bytes: of one element of w and of x, scales included.
    """
    shapes = []
    for name, (n, k) in LLAMA_8B.items():
        gate = name == "gate_up"
        for m in CARD_ROWS:
            width = n // 2 if gate else n
            out = torch.empty(m, width, dtype=torch.bfloat16, device="meta")
            residual = torch.empty_like(out) if name in ("o", "down") else None
            launches = make(m, n, k, Epilogue(silu_mul=gate, residual=residual), out, arch)
            moved = n * k * weight_bytes + m * k * input_bytes + m * width * (4.0 if residual is not None else 2.0)
            asked = traffic(launches[0], weight_bytes, input_bytes)
            padded, tile = 2.0 * k, launches[0].config.meta
            for size, block in ((m, tile["BLOCK_M"]), (n, tile["BLOCK_N"])):
                padded *= cdiv(size, block) * block
            shapes.append(CardShape(f"{name} M={m}", launches, 2.0 * m * n * k, moved, asked, padded))
    return shapes


def traffic(launch: Launch, weight_bytes: float, input_bytes: float) -> float:
    """Bytes that the programs' loads and stores ask for: x again for each column tile, w for each row tile.

    ``weight_bytes``, ``input_bytes``: of one element, scales included. A bias is left out.
    """
    meta, args = launch.config.meta, launch.args
    m, n, k = args["M"], args["N"], args["K"]
    down, across = cdiv(m, meta["BLOCK_M"]), cdiv(n, meta["BLOCK_N"])
    # Without descriptors rows past the edge repeat earlier ones, and are read all the same.
    x_rows, w_rows = (m, n) if meta["TMA"] else (down * meta["BLOCK_M"], across * meta["BLOCK_N"])
    operands = k * (across * x_rows * input_bytes + down * w_rows * weight_bytes)
    ends = sum(args[name].numel() * args[name].element_size() for name in ("out", "residual") if name in args)
    parts = 8 * meta["SPLIT"] * m * n + 4 * down * across if meta["PARALLEL"] else 0
    return float(operands + ends + parts)


@triton.jit
def tile_origin(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """First row and first column of a tile: GROUP row tiles take turns, so that neighbours share operands."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP * tiles_n)
    first = group * GROUP
    height = min(tiles_m - first, GROUP)
    within = tile % (GROUP * tiles_n)
    return (first + within % height) * BLOCK_M, (within // height) * BLOCK_N


@triton.jit
def addresses(base, first, count, stride, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Addresses of [BLOCK rows, BLOCK_K]; rows past ``count`` repeat earlier ones, so that no load leaves the tensor.

    A row's offset is 64 bits wide: the head of a large vocabulary has more than 2^31 elements.
    """
    rows = (first + tl.arange(0, BLOCK)) % count
    return base + rows.to(tl.int64)[:, None] * stride + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def described(x, rows, K, stride, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """x [rows, K], described by the program: the compiler halves its boxes for a specialized loop, never a host's."""
    return tl.make_tensor_descriptor(x, [rows, K], [stride, 1], [ROWS, BLOCK_K])


@triton.jit
def accumulate(
    x,
    w,
    row,
    column,
    first,
    last,
    M,
    N,
    K,
    stride_x,
    stride_w,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    SPECIALIZE: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACC: tl.constexpr = tl.float32,
):
    """[BLOCK_M, BLOCK_N] of ACC, fp32 or int32: the sum over the steps first .. last - 1 of K, in order, from zero.

    x and w: descriptors (TMA) or pointers.
    """
    if SWAP:
        acc = tl.zeros([BLOCK_N, BLOCK_M], ACC)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    if TMA:
        for step in tl.range(first, last, warp_specialize=SPECIALIZE):
            a = x.load([row, step * BLOCK_K])
            b = w.load([column, step * BLOCK_K])
            if SWAP:
                acc = tl.dot(b, a.T, acc, out_dtype=ACC)
            else:
                acc = tl.dot(a, b.T, acc, out_dtype=ACC)
    else:
        x_at = addresses(x, row, M, stride_x, BLOCK_M, BLOCK_K)
        w_at = addresses(w, column, N, stride_w, BLOCK_N, BLOCK_K)
        for step in range(first, last):
            k = step * BLOCK_K
            if EVEN_K:
                a = tl.load(x_at + k)
                b = tl.load(w_at + k)
            else:
                inside = (k + tl.arange(0, BLOCK_K) < K)[None, :]
                a = tl.load(x_at + k, mask=inside, other=0.0)
                b = tl.load(w_at + k, mask=inside, other=0.0)
            if SWAP:
                acc = tl.dot(b, a.T, acc, out_dtype=ACC)
            else:
                acc = tl.dot(a, b.T, acc, out_dtype=ACC)
    if SWAP:
        acc = tl.trans(acc)
    return acc


@triton.jit
def gated(y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """silu(gate) * up: [ROWS, COLUMNS] with 16 columns of gate and 16 of up in turn to [ROWS, COLUMNS / 2]."""
    blocks = tl.permute(tl.reshape(y, [ROWS, COLUMNS // 32, 2, 16]), [0, 1, 3, 2])
    gate, up = tl.split(blocks)
    # exp(-gate) of a very negative gate is infinite, and gate / inf is the right zero.
    return tl.reshape(gate / (1.0 + tl.exp(-gate)) * up, [ROWS, COLUMNS // 2])


@triton.jit
def _halves(y, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of [ROWS, COLUMNS]."""
    return tl.split(tl.permute(tl.reshape(y, [ROWS, 2, COLUMNS // 2]), [0, 2, 1]))


@triton.jit
def _finish(
    y,
    out,
    bias,
    residual,
    row,
    column,
    M,
    N,
    stride_out,
    stride_residual,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SILU_MUL: tl.constexpr,
):
    columns = column + tl.arange(0, BLOCK_N)
    if bias is not None:
        y += tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    if SILU_MUL:
        y = gated(y, BLOCK_M, BLOCK_N)
        columns = column // 2 + tl.arange(0, BLOCK_N // 2)
        N = N // 2
    rows = row + tl.arange(0, BLOCK_M)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    if residual is not None:
        at = rows.to(tl.int64)[:, None] * stride_residual + columns[None, :]
        y += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    at = rows.to(tl.int64)[:, None] * stride_out + columns[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def epilogue(
    y,
    out,
    bias,
    residual,
    row,
    column,
    M,
    N,
    stride_out,
    stride_residual,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SILU_MUL: tl.constexpr,
):
    """Adds the bias, gates, adds the residual, rounds once and stores: y is fp32 [BLOCK_M, BLOCK_N].

    A wide tile goes in quarters: beside its sums, registers hold only a quarter of its addresses and residuals.
    """
    if BLOCK_N > 128:
        WIDTH: tl.constexpr = BLOCK_N // 4
        left, right = _halves(y, BLOCK_M, BLOCK_N)
        for side in tl.static_range(2):
            first, second = _halves(right if side else left, BLOCK_M, BLOCK_N // 2)
            for quarter in tl.static_range(2):
                part = second if quarter else first
                at = column + (2 * side + quarter) * WIDTH
                _finish(part, out, bias, residual, row, at, M, N, stride_out, stride_residual, BLOCK_M, WIDTH, SILU_MUL)
    else:
        _finish(y, out, bias, residual, row, column, M, N, stride_out, stride_residual, BLOCK_M, BLOCK_N, SILU_MUL)


@triton.jit
def put_part(y, workspace, part, row, column, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Stores one part of a tile in the workspace, [SPLIT, M, N] of fp32 or int32."""
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    at = (part * M + rows).to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(workspace + at, y, mask=(rows < M)[:, None] & (columns < N)[None, :])


@triton.jit
def arrive(counters, tile, SPLIT: tl.constexpr):
    """True for the last of SPLIT programs to call it for a tile; it finds every part stored and resets the counter."""
    tl.debug_barrier()  # all threads' stores come before the one thread's atomic, which releases them
    before = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
    last = before == SPLIT - 1
    if last:
        tl.store(counters + tile, 0)
    return last


@triton.jit
def sum_parts(workspace, row, column, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr):
    """The parts of a tile, added in order: [BLOCK_M, BLOCK_N].

    Loads go to the second-level cache (.cg): the first level does not see what other multiprocessors wrote.
    """
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    at = workspace + rows.to(tl.int64)[:, None] * N + columns[None, :]
    y = tl.zeros([BLOCK_M, BLOCK_N], workspace.dtype.element_ty)
    for part in range(SPLIT):
        y += tl.load(at + (part * M).to(tl.int64) * N, mask=inside, other=0, cache_modifier=".cg")
    return y
