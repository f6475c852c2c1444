"""The native sampler against the reference, over logits chosen freely: the graph is an embedding alone, so the
logits of token id t are row t of its table."""

from __future__ import annotations

import numpy as np
import pytest
from ops.lone import LoneGraph, NativeGraph, batch_of, with_sampling
from ops.sampling_rows import CLOSE, is_close_call, random_rows, rows_of

from ridgeline.backends.cpu import _native
from ridgeline.backends.reference.sampling import gumbel_noise, sample

ISAS = _native.available_isas()


class Sampler:
    """Rows of logits on the native executor, one request per call."""

    def __init__(self, logits: np.ndarray, isa: str, threads: int = 2) -> None:
        self.logits = np.ascontiguousarray(logits, np.float32)
        rows, vocab = logits.shape
        graph = LoneGraph(rows, rows)
        output = graph.activation("logits", self.logits)
        self.native = NativeGraph(
            graph.build(logits=output), graph.values, isa=isa, threads=threads, blocks=512, vocab=max(rows, vocab)
        )
        assert vocab >= rows, "token ids name rows"
        self.updates = [(0, i, i) for i in range(512)]

    def __call__(self, sampling: np.ndarray, first: int = 0, masks: np.ndarray | None = None) -> tuple[np.ndarray, ...]:
        """(tokens, logprobs, top ids, top logprobs) of every row; row i is at position first + i."""
        self.native.launch(with_sampling(batch_of([(0, first, range(len(self.logits)))], self.updates), sampling))
        tokens, _, logprobs, top_ids, top_logprobs, _ = self.native.native.finish(masks)
        return tokens, logprobs, top_ids, top_logprobs


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("vocab", [64, 255, 1003, 5000, 16001])
@pytest.mark.parametrize("isa", ISAS)
def test_agrees_with_the_reference(isa: str, vocab: int, ties: bool) -> None:
    """Vocabularies around the groups of 256 tokens whose maxima are noted; ``ties``: of few different logits."""
    rng = np.random.default_rng(vocab)
    count, differing = 60, 0
    logits = rng.standard_normal((count, vocab)).astype(np.float32) * rng.choice([1, 4, 12], (count, 1))
    if ties:
        logits = np.round(logits * 2) / 2
    sampler = Sampler(logits, isa)
    for first in (0, 4000):
        rows = random_rows(count, rng)
        tokens, logprobs, top_ids, top_logprobs = sampler(rows, first)
        for i in range(count):
            expected = sample(sampler.logits[i], rows[i], first + i + 1)
            if tokens[i] != expected.token:
                differing += 1
                assert rows["temperature"][i] > 0
                assert is_close_call(sampler.logits[i], rows[i], first + i + 1, tokens[i], expected.token, None), i
                continue
            np.testing.assert_allclose(logprobs[i], expected.logprob, rtol=1e-6, atol=2e-6)
            k = len(expected.top_ids)
            np.testing.assert_array_equal(top_ids[i, :k], expected.top_ids)
            np.testing.assert_allclose(top_logprobs[i, :k], expected.top_logprobs, rtol=1e-6, atol=2e-6)
            assert (top_ids[i, k:] == -1).all() and np.isnan(top_logprobs[i, k:]).all()
    assert differing <= 1, "close calls are rare"


@pytest.mark.parametrize("isa", ISAS)
def test_the_random_stream_is_the_reference_one(isa: str) -> None:
    """With equal logits the token is the largest noise of the stream: 2048 draws of 256 words, of which one
    disagreement (two noises within fp32 of each other) is allowed."""
    sampler = Sampler(np.zeros((256, 256), np.float32), isa)
    rng = np.random.default_rng(0)
    wrong = 0
    for first in range(0, 2048, 256):
        rows = rows_of(256, seed=rng.integers(0, 2**64, 256, np.uint64), sample_index=rng.integers(0, 2**31, 256))
        tokens = sampler(rows, first)[0]
        for i in range(256):
            noise = gumbel_noise(int(rows["seed"][i]), first + i + 1, int(rows["sample_index"][i]), 256)
            best = int(np.argmax(noise))
            assert noise[best] - noise[tokens[i]] < CLOSE
            wrong += int(best != tokens[i])
    assert wrong <= 1


@pytest.mark.parametrize("isa", ISAS)
def test_masks_allow_only_their_tokens(isa: str) -> None:
    rng = np.random.default_rng(1)
    count, vocab = 40, 203
    sampler = Sampler(rng.standard_normal((count, vocab)) * 3, isa)
    rows = random_rows(count, rng)
    rows["masked"] = np.arange(count) % 3 != 0
    allowed = rng.random((count, vocab)) < np.linspace(0.02, 1, count)[:, None]
    allowed[:, 77] = True
    padded = np.pad(allowed, ((0, 0), (0, -vocab % 32)))
    bits = np.packbits(padded, axis=1, bitorder="little").view("<u4")[rows["masked"] == 1]
    tokens, logprobs, *_ = sampler(rows, 0, bits)
    for i in range(count):
        mask = allowed[i] if rows["masked"][i] else None
        expected = sample(sampler.logits[i], rows[i], i + 1, mask)
        assert mask is None or mask[tokens[i]]
        if tokens[i] != expected.token:
            assert is_close_call(sampler.logits[i], rows[i], i + 1, tokens[i], expected.token, mask)
        else:
            np.testing.assert_allclose(logprobs[i], expected.logprob, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_ties_go_to_the_lower_id(isa: str) -> None:
    logits = np.zeros((6, 40), np.float32)
    logits[:, [7, 19, 33]] = 5.0
    rows = rows_of(6, temperature=[0, 0, 1, 1, 1, 1], top_k=[0, 0, 1, 2, 0, 0], top_p=[1, 1, 1, 1, 0.01, 0.9])
    rows["seed"], rows["num_logprobs"] = np.arange(6), [5, 1, -1, -1, -1, 4]
    tokens, _, top_ids, _ = Sampler(logits, isa)(rows)
    expected = [sample(logits[i], rows[i], i + 1) for i in range(6)]
    assert tokens.tolist() == [e.token for e in expected]
    assert tokens[:2].tolist() == [7, 7] and set(tokens[2:4]) <= {7, 19, 33} and tokens[4] == 7
    assert top_ids[0].tolist() == [7, 19, 33, 0, 1]


@pytest.mark.parametrize("top_k", [0, 3000])
@pytest.mark.parametrize("isa", ISAS)
def test_top_p_ends_inside_a_large_tie_at_the_right_token(isa: str, top_k: int) -> None:
    """4,000 equal logits, of which the first fifth survive: no other token may ever be drawn, and each of those can."""
    logits = np.zeros((64, 4000), np.float32)
    logits[:, 2000:] = [[0.0], [1e-30], [-1e-30], [-20.0]] * 16
    kept = np.repeat([800, 800, 800, 400], 16).reshape(4, 16).T.ravel()
    rows = rows_of(64, top_p=0.2, top_k=top_k, seed=np.arange(64))
    tokens = Sampler(logits, isa)(rows)[0]
    assert sum(tokens != [sample(logits[i], rows[i], i + 1).token for i in range(64)]) <= 1
    tied = np.arange(64) % 4 != 1  # 1e-30 more is no tie: the upper half comes first
    assert (tokens[tied] < kept[tied]).all() and (tokens[~tied] >= 2000).all() and (tokens[~tied] < 2800).all()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("isa", ISAS)
def test_extreme_temperatures(isa: str, sign: float) -> None:
    """Nearly none is the largest logit, however the division overflows; a huge one is the noise alone."""
    rng = np.random.default_rng(2)
    logits = sign * (5 + np.abs(rng.standard_normal((8, 100)))).astype(np.float32)
    sampler = Sampler(np.concatenate([logits] * 2), isa)
    cold = [1e-38, 1e-40, 1e-30, 1e-6] * 2
    rows = rows_of(16, temperature=[*cold, *[1e30] * 8], seed=np.arange(16), top_p=[1, 1, 1, 1, 0.9, 0.9, 0.9, 0.9] * 2)
    tokens = sampler(rows)[0]
    assert tokens[:8].tolist() == logits.argmax(axis=1).tolist()
    hot = [int(np.argmax(gumbel_noise(i, i + 1, 0, 100))) for i in range(8, 12)]
    assert tokens[8:12].tolist() == hot


@pytest.mark.parametrize("temperature", [0.02, 1e-3, 1e-5])
@pytest.mark.parametrize("isa", ISAS)
def test_noise_is_not_rounded_away_at_low_temperatures(isa: str, temperature: float) -> None:
    """Logits of about 20 that differ by a few temperatures: the noise, not the division, decides."""
    rng = np.random.default_rng(3)
    logits = (20 + temperature * rng.standard_normal((64, 64))).astype(np.float32)
    rows = rows_of(64, temperature=temperature, seed=np.arange(64))
    tokens = Sampler(logits, isa)(rows)[0]
    differ = 0
    for i in range(64):
        expected = sample(logits[i], rows[i], i + 1).token
        if tokens[i] != expected:
            assert is_close_call(logits[i], rows[i], i + 1, tokens[i], expected, None)
            differ += 1
    assert differ <= 1


@pytest.mark.parametrize("isa", ISAS)
def test_logits_that_are_no_numbers_give_no_token(isa: str) -> None:
    logits = np.random.default_rng(4).standard_normal((6, 50)).astype(np.float32)
    logits[0, 0] = logits[2, 49] = logits[3, 17] = np.nan
    logits[5] = np.nan
    rows = rows_of(6, temperature=[0, 0, 1, 1, 1, 0], top_k=[0, 0, 3, 0, 0, 0], num_logprobs=2)
    tokens, logprobs, top_ids, _ = Sampler(logits, isa)(rows)
    bad = [0, 2, 3, 5]
    assert (tokens[bad] == -1).all() and np.isnan(logprobs[bad]).all() and (top_ids[bad] == -1).all()
    assert tokens[1] == logits[1].argmax() and tokens[4] == sample(logits[4], rows[4], 5).token


@pytest.mark.parametrize("isa", ISAS)
def test_a_token_does_not_depend_on_the_rows_beside_it_or_on_threads(isa: str) -> None:
    rng = np.random.default_rng(5)
    logits, rows = rng.standard_normal((30, 300)).astype(np.float32), random_rows(30, rng)
    expected = Sampler(logits, isa, threads=1)(rows)
    for threads in (2, 3):
        for a, b in zip(expected, Sampler(logits, isa, threads=threads)(rows), strict=True):
            np.testing.assert_array_equal(a, b)
    alone = [Sampler(logits[i : i + 1], isa, threads=1)(rows[i : i + 1], i)[0][0] for i in range(30)]
    assert expected[0].tolist() == alone


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("isa", ISAS)
def test_a_mask_that_allows_nothing_gives_no_token(isa: str, temperature: float) -> None:
    """Token 0 would be a token the mask forbids."""
    sampler = Sampler(np.zeros((2, 40), np.float32), isa)
    rows = rows_of(2, temperature=temperature, masked=1)
    bits = np.zeros((2, 2), np.uint32)
    bits[1, 0] = 1 << 9
    try:
        tokens = sampler(rows, 0, bits)[0].tolist()
    except ValueError as error:
        assert "mask" in str(error)
    else:
        assert tokens == [-1, 9]
