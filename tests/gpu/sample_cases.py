"""Sampling: rows of every kind in one launch, against the reference sampler."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch

from ridgeline.backends.cuda.kernels.sample import PROMPT_BIT, sample
from ridgeline.backends.cuda.kernels.top_logprobs import top_logprobs
from ridgeline.backends.cuda.ladder.climb import Climb, Expected
from ridgeline.backends.reference import sampling as reference
from ridgeline.core.types import SAMPLING_DTYPE


@dataclass(frozen=True)
class SampleCase:
    """Rows of random logits.

    Attributes:
        vocab: V.
        kind: which parameters vary, several joined by "+".
        sharp: standard deviation of the logits.
        levels: distinct values of the logits, so that there are ties; 0: as they come.
    """

    vocab: int
    kind: str
    sharp: float = 3.0
    levels: int = 0
    rows: int = 6
    op: str = "sample"

    def has(self, *kinds: str) -> bool:
        """Whether any of these varies; "all" is the filters and what changes logits."""
        varied = self.kind.split("+")
        return any(kind in varied for kind in kinds)

    @property
    def name(self) -> str:
        """For test ids."""
        return f"sample-{self.rows}x{self.vocab}-{self.kind}-{self.sharp:g}" + (
            f"-{self.levels}" if self.levels else ""
        )


@dataclass(frozen=True)
class TopCase:
    """Rows of random logits and the k best of each.

    Attributes:
        vocab, sharp, levels, rows: as in SampleCase.
        k: of the row that wants most.
        dtype: of the logits.
    """

    vocab: int
    k: int
    levels: int = 0
    rows: int = 20
    dtype: torch.dtype = torch.float32
    op: str = "top_logprobs"

    @property
    def name(self) -> str:
        """For test ids."""
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.op}-{self.rows}x{self.vocab}-k{self.k}-levels{self.levels}-{kind}"


TOP_CASES = [TopCase(40, 5), TopCase(300, 20, 3), TopCase(5, 8), TopCase(1, 1, rows=1), TopCase(2500, 64, rows=1)]
TOP_CASES += [TopCase(600, 33, rows=1, dtype=torch.bfloat16), TopCase(100, 3, 1, dtype=torch.float16)]


CASES: list[SampleCase | TopCase] = [
    SampleCase(v, kind, rows=rows)
    for v, rows in ((100, 6), (3000, 3))
    for kind in ("greedy", "temperature", "top_k", "top_p", "min_p")
]
CASES += [SampleCase(700, kind, levels=5) for kind in ("top_k", "top_p", "greedy")]
CASES += [SampleCase(300, kind) for kind in ("all", "penalties", "bias", "mask", "target", "bad")]
CASES += [
    SampleCase(2049, "all", sharp=0.3, rows=2),
    SampleCase(1, "temperature"),
    SampleCase(2048, "top_p", sharp=30.0, rows=3),
]
CASES += [SampleCase(60, "penalties", sharp=0.5, rows=24), SampleCase(60, "all", sharp=0.5, rows=16)]
CASES += [SampleCase(40, kind, sharp=0.3, rows=32) for kind in ("top_k", "top_p")]
CASES += [
    SampleCase(90, kind) for kind in ("mask+top_k", "penalties+bias", "penalties+bias+top_p", "penalties+bias+mask")
]
CASES += [SampleCase(400, "bits", rows=16), SampleCase(30, "ulps", rows=16)]


def _parameters(case: SampleCase, rng: np.random.Generator) -> np.ndarray:
    rows = np.zeros(case.rows, SAMPLING_DTYPE)
    rows["temperature"] = 0.0 if case.kind == "greedy" else rng.choice([0.5, 1.0, 1.7], case.rows)
    rows["seed"] = rng.integers(0, 2**63, case.rows, dtype=np.uint64)
    rows["sample_index"] = rng.integers(0, 4, case.rows)
    rows["top_p"] = 1.0
    if case.kind in ("bits", "ulps"):
        rows["temperature"] = 1.0
    if case.has("top_k", "ulps", "all"):
        rows["top_k"] = rng.integers(0, min(60, case.vocab), case.rows)
    if case.has("top_p", "all"):
        rows["top_p"] = rng.choice([0.1, 0.5, 0.9, 0.99, 1.0], case.rows)
    if case.has("min_p", "all"):
        rows["min_p"] = rng.choice([0.0, 0.01, 0.2], case.rows)
    if case.kind == "target":
        rows["target"] = rng.integers(0, case.vocab + 1, case.rows)
    return rows


CASES += TOP_CASES


def best(x: np.ndarray, k: int) -> np.ndarray:
    """The k best of a row: by falling logit, the lower token first."""
    return np.argsort(-x, kind="stable")[:k]


def build_top(case: TopCase, arch: str, only: int | None = None) -> Climb:
    """Rows want k, k - 1, ... of the best, and k again; the second has no token, and none of them."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    index = np.arange(case.rows) if only is None else np.array([only])
    logits = 3 * rng.standard_normal((case.rows, case.vocab)).astype(np.float32)
    if case.levels:  # zeros of both signs are equal
        logits = np.round(logits * case.levels / 6)
    padded = torch.full((len(index), case.vocab + 8), float("nan"), dtype=case.dtype)
    padded[:, : case.vocab] = torch.from_numpy(logits[index])
    ks = (case.k - index % 7).astype(np.int32)
    tokens = np.where(index == 1, -1, 0).astype(np.int32)
    ids, scores = torch.zeros(len(index), case.k, dtype=torch.int32), torch.zeros(len(index), case.k)
    given = torch.from_numpy(tokens), torch.from_numpy(ks)
    launches = top_logprobs(padded[:, : case.vocab], *given, ids, scores, arch=arch)
    truth, expected = np.full((len(index), case.k), -1.0), []
    for r, x in enumerate(padded[:, : case.vocab].to(torch.float64).numpy()):
        order = best(x, max(int(ks[r]), 0)) if tokens[r] >= 0 else np.zeros(0, np.int64)
        truth[r, : len(order)] = order
        answer = x[order] - x.max() - np.log(np.exp(x - x.max()).sum())
        plain = (answer + cost_of_logprobs(x[None].astype(np.float32))).astype(np.float32)
        expected.append(Expected(scores[r, : len(order)], answer, plain))
    return Climb(launches, (Expected(ids, truth, truth.astype(np.float32), exact=True), *expected))


def build(case: SampleCase | TopCase, arch: str, only: int | None = None) -> Climb:
    """``only``: the row to sample alone."""
    if isinstance(case, TopCase):
        return build_top(case, arch, only)
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    rows, positions = _parameters(case, rng), rng.integers(0, 1000, case.rows).astype(np.int32)
    logits = (case.sharp * rng.standard_normal((case.rows, case.vocab))).astype(np.float32)
    if case.levels:
        logits = np.round(logits * case.levels / case.sharp / 4).astype(np.float32)
    if case.kind == "bad":
        logits[0, 7], logits[1, 9], logits[2, :] = np.nan, np.inf, -np.inf  # each of them refused
    if case.kind == "ulps":  # neighbouring numbers on both sides of 0, which only the last digit of a key tells apart
        steps = rng.permuted(np.tile(np.arange(case.vocab, dtype=np.int32), (case.rows, 1)), axis=1)
        logits = (np.float32(0.5).view(np.int32) + steps).view(np.float32) * rng.choice([-1, 1], (case.rows, 1))
        logits = logits.astype(np.float32)
    if case.kind == "bits":  # every score is a rounding error from 0: the winner is told by the noise's last bits
        noises = [noise(r, int(p), case.vocab) for r, p in zip(rows, positions, strict=True)]
        logits = -np.stack(noises)
    state = _State(case, rng)
    index = np.arange(case.rows) if only is None else np.array([only])
    expected = [reference_of(case, logits[r], rows[r], int(positions[r]), state, int(r)) for r in index]
    tokens, logprobs = torch.zeros(len(index), dtype=torch.int32), torch.zeros(len(index))
    seeds = np.stack([rows["seed"] & 0xFFFFFFFF, rows["seed"] >> 32], axis=1).astype(np.uint32).view(np.int32)
    with np.errstate(divide="ignore"):
        floors = np.log(rows["min_p"].astype(np.float64)).astype(np.float32)
    columns = {
        "seeds": seeds,
        "positions": positions,
        "sample_indices": rows["sample_index"],
        "temperatures": rows["temperature"],
        "top_ks": rows["top_k"],
        "top_ps": rows["top_p"],
        "floors": floors,
        "targets": rows["target"],
    }
    launches = sample(
        torch.from_numpy(logits[index]),
        {name: torch.from_numpy(np.ascontiguousarray(column[index])) for name, column in columns.items()},
        tokens,
        logprobs,
        slots=torch.from_numpy(state.slots[index]),
        **state.tensors(index),
        filters=case.has("top_k", "top_p", "ulps", "all"),
        arch=arch,
    )
    truth = np.array([t for t, _ in expected], np.float64)
    scores = np.array([p for _, p in expected], np.float64)
    plain = (scores + cost_of_logprobs(logits[index])).astype(np.float32)
    results = [Expected(tokens, truth, truth.astype(np.float32), exact=True)]
    if case.kind != "bad":
        results.append(Expected(logprobs, scores, plain))
    return Climb(launches, tuple(results))


def cost_of_logprobs(logits: np.ndarray) -> float:
    """What float32 costs a log probability, by all tokens of the rows: the chosen ones are too few to tell."""
    if not np.isfinite(logits).all():
        return 0.0
    both = []
    for t in (np.float64, np.float32):
        x = logits.astype(t)
        shifted = x - x.max(axis=1, keepdims=True)
        both.append(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True, dtype=t)))
    return float(np.abs(both[0] - both[1]).max())


class _State:
    """What slots hold: counts, penalties, bias; and the rows' masks."""

    def __init__(self, case: SampleCase, rng: np.random.Generator) -> None:
        self.has = case.has
        self.slots = rng.permutation(case.rows).astype(np.int32)
        self.counts = rng.integers(0, 3, (case.rows, case.vocab)) * (rng.random((case.rows, case.vocab)) < 0.3)
        self.in_prompt = rng.random((case.rows, case.vocab)) < 0.2
        self.penalties = np.stack([rng.choice([1.0, 1.3], case.rows), *rng.normal(0, 0.5, (2, case.rows))], axis=1)
        self.penalties = self.penalties.astype(np.float32)
        self.bias = rng.normal(0, 2, (case.rows, case.vocab)).astype(np.float32)
        self.allowed = rng.random((case.rows, case.vocab)) < 0.3
        self.allowed[:, 5 % case.vocab] = True

    def tensors(self, index: np.ndarray) -> dict[str, torch.Tensor]:
        """As the launcher takes them."""
        given: dict[str, torch.Tensor] = {}
        if self.has("penalties", "all"):
            marked = self.counts + self.in_prompt * PROMPT_BIT
            given["counts"] = torch.from_numpy(marked.astype(np.int32))
            given["penalties"] = torch.from_numpy(self.penalties)
        if self.has("bias", "all"):
            given["bias"] = torch.from_numpy(self.bias)
        if self.has("mask", "all"):
            bits = np.zeros((len(index), -(-self.allowed.shape[1] // 32) * 32), np.uint8)
            bits[:, : self.allowed.shape[1]] = self.allowed[index]
            words = np.packbits(bits, axis=1, bitorder="little").view(np.uint32)
            given["mask"] = torch.from_numpy(words.view(np.int32))
        return given

    def adjust(self, x: np.ndarray, row: int) -> np.ndarray:
        """Logits of a row in float32, one rounding an operation, as both samplers make them."""
        slot = self.slots[row]
        if self.has("bias", "all"):
            x = x + self.bias[slot]
        if self.has("penalties", "all"):
            repetition, presence, frequency = self.penalties[slot]
            seen = (self.counts[slot] > 0) | self.in_prompt[slot]
            y = np.where(x > 0, x / repetition, x * repetition)
            y = y - frequency * self.counts[slot].astype(np.float32)
            x = np.where(seen, y - np.where(self.counts[slot] > 0, presence, np.float32(0)), x)
        return x.astype(np.float32)


def reference_of(
    case: SampleCase, logits: np.ndarray, row: np.void, position: int, state: _State, index: int
) -> tuple[int, float]:
    """Token and log probability of a row."""
    asked = row.copy()
    asked["num_logprobs"] = 0
    if not np.isfinite(logits).all():
        return -1, float("nan")
    if case.kind == "bits":
        z = logits - logits.max()
        token = int(np.argmax(z + noise(row, position, case.vocab)))
        x = logits.astype(np.float64)
        return token, float(x[token] - x.max() - np.log(np.exp(x - x.max()).sum()))
    allowed = state.allowed[index] if case.has("mask", "all") else None
    sampled = reference.sample(logits, asked, position, allowed, state.adjust(logits, index))
    return sampled.token, sampled.logprob


F32 = np.float32


def noise(row: np.void, position: int, vocab: int) -> np.ndarray:
    """csrc/cpu/kernels/noise.h in numpy: float32, one rounding an operation."""
    quads = np.arange(-(-vocab // 4), dtype=np.uint64)
    counter = np.zeros((len(quads), 4), np.uint64)
    counter[:, 0], counter[:, 1], counter[:, 2] = position, row["sample_index"], quads
    key = (int(row["seed"]) & 0xFFFFFFFF, int(row["seed"]) >> 32)
    w = (reference.philox4x32_10(counter, key).reshape(-1)[:vocab] >> np.uint32(8)).astype(np.int64)
    rest = (0x1000000 - w).astype(F32) - F32(0.5)
    near = _log1p(-rest * F32(2.0**-24))
    middle = _log1p(F32(1) - rest * F32(2.0**-23)) - F32(0.69314718)
    far = _log((w.astype(F32) + F32(0.5)) * F32(2.0**-24))
    log_u = np.where(w >= 11863283, near, np.where(w >= 0x800000, middle, far))
    return -_log(-log_u)


def _log1p(f: np.ndarray) -> np.ndarray:
    s = f / (F32(2) + f)
    q = s * s
    p = F32(2 / 11)
    for term in (2 / 9, 2 / 7, 2 / 5, 2 / 3):
        p = p * q + F32(term)
    return F32(2) * s + s * q * p


def _log(x: np.ndarray) -> np.ndarray:
    b = x.view(np.int32)
    m = (b & 0x7FFFFF | 0x3F800000).view(F32)
    upper = m > F32(1.41421356)
    e = (b >> 23) - 127 + upper
    return e.astype(F32) * F32(0.69314718) + _log1p(np.where(upper, m * F32(0.5), m) - F32(1))
