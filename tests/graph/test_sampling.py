"""Philox against its authors' vectors, and properties of the reference sampler and executor."""

import numpy as np
import pytest
from graph.small_llama import Driver, config, graph, random_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from ridgeline.backends.reference.executor import ReferenceExecutor
from ridgeline.backends.reference.sampling import gumbel_noise, philox4x32_10, sample, survivors
from ridgeline.core.types import SAMPLING_DTYPE, TokenMasks

# Random123's tests/kat_vectors, "philox4x32 10": counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(w, 16) for w in text.split()]


@pytest.mark.parametrize("counter, key, result", KNOWN)
def test_philox_known_answers(counter, key, result):
    assert philox4x32_10(words(counter), tuple(words(key))).tolist() == words(result)
    assert philox4x32_10([words(counter)] * 3, tuple(words(key))).tolist() == [words(result)] * 3


def test_noise_takes_its_word_from_the_documented_counter():
    noise = gumbel_noise(0x299F31D0A4093822, position=7, sample_index=3, vocab=11)
    for token in (0, 5, 10):
        word = int(philox4x32_10([7, 3, token // 4, 0], (0xA4093822, 0x299F31D0))[token % 4])
        u = ((word >> 8) + 0.5) / 2**24
        assert noise[token] == -np.log(-np.log(u))


def parameters(**values):
    row = np.zeros(1, SAMPLING_DTYPE)
    row["temperature"], row["top_p"], row["num_logprobs"] = 1.0, 1.0, -1
    for name, value in values.items():
        row[name] = value
    return row[0]


logit_rows = st.lists(st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1.0]), min_size=1, max_size=40).map(
    lambda x: np.array(x, np.float32)
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(logit_rows, st.integers(0, 50), st.floats(0.01, 1), st.floats(0, 1))
def test_filters_keep_what_their_definitions_say(logits, top_k, top_p, min_p):
    scaled = logits.astype(np.float64) - logits.max()
    keep = survivors(scaled, top_k, top_p, min_p)
    assert keep[np.argmax(scaled)]
    p = np.exp(scaled)
    by_k = survivors(scaled, top_k, 1.0, 0.0)
    if 0 < top_k < len(logits):
        assert by_k.sum() >= top_k and scaled[by_k].min() == np.sort(scaled)[-top_k]
        assert not (~by_k & (scaled >= scaled[by_k].min())).any()
    else:
        assert by_k.all()
    by_p = survivors(scaled, top_k, top_p, 0.0)
    assert not (by_p & ~by_k).any()
    share = p[by_p].sum() / p[by_k].sum()
    if top_p < 1:
        assert share >= top_p - 1e-9
        last = max(np.flatnonzero(by_p), key=lambda i: (-scaled[i], i))  # least probable, highest id
        assert by_p.sum() == 1 or (p[by_p].sum() - p[last]) / p[by_k].sum() < top_p + 1e-9
    np.testing.assert_array_equal(keep, by_p & (p >= min_p))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(logit_rows, st.integers(0, 2**64 - 1), st.integers(0, 5000), st.floats(0.01, 4), st.integers(0, 9))
def test_a_sample_survives_its_filters_and_repeats(logits, seed, position, temperature, top_k):
    row = parameters(seed=seed, temperature=temperature, top_k=top_k, top_p=0.9, min_p=0.02)
    token = sample(logits, row, position).token
    scaled = (logits.astype(np.float64) - logits.max()) / float(row["temperature"])
    assert survivors(scaled, top_k, float(row["top_p"]), float(row["min_p"]))[token]
    assert sample(logits, row, position).token == token
    assert sample(logits, parameters(temperature=0.0), position).token == int(np.argmax(logits))
    assert logits[sample(logits, parameters(seed=seed, top_k=1), position).token] == logits.max()


def test_ties_go_to_the_lower_id():
    logits = np.array([0.0, 2.0, 2.0, 1.0], np.float32)
    result = sample(logits, parameters(temperature=0.0, num_logprobs=3), 0)
    assert result.token == 1 and result.top_ids.tolist() == [1, 2, 3]


def test_samples_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03])).astype(np.float32)
    n = 4000
    drawn = [sample(logits, parameters(seed=11, temperature=0.5), position).token for position in range(n)]
    expected = np.exp(2 * logits.astype(np.float64))
    expected *= n / expected.sum()
    chi_square = ((np.bincount(drawn, minlength=5) - expected) ** 2 / expected).sum()
    assert chi_square < 18.47  # 4 degrees of freedom, p = 0.001; the draws are fixed


def test_logprobs_are_of_the_raw_logits():
    logits = np.array([1.0, 3.0, 2.0, -5.0], np.float32)
    result = sample(logits, parameters(temperature=0.3, top_k=1, num_logprobs=2), 0)
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    assert result.logprob == pytest.approx(expected[1])
    np.testing.assert_allclose(result.top_logprobs, expected[[1, 2]], rtol=1e-6)
    assert np.isnan(sample(logits, parameters(), 0).logprob)


def executor_and_driver(**options):
    cfg = config(num_layers=1)
    weights = random_weights(cfg, "f32")
    executor = ReferenceExecutor(
        graph(cfg, weights), weights, num_slots=4, num_blocks=[30], max_blocks_per_slot=8, **options
    )
    return executor, Driver(executor, 30)


def test_minus_one_means_what_the_slot_sampled_last():
    _, driver = executor_and_driver()
    output, _ = driver.step([(2, [5, 6, 7]), (0, [9])])
    _, by_reference = driver.step([(0, [-1]), (2, [-1])])
    _, again = executor_and_driver()
    again.step([(2, [5, 6, 7]), (0, [9])])
    _, by_value = again.step([(0, [int(output.token_ids[1])]), (2, [int(output.token_ids[0])])])
    np.testing.assert_array_equal(by_reference, by_value)


def test_a_row_is_sampled_for_the_position_after_it():
    _, driver = executor_and_driver()
    row = np.zeros(1, SAMPLING_DTYPE)
    row[0] = parameters(seed=5, temperature=3.0)
    for length in (3, 1, 1, 1, 1, 1):
        position = driver.lengths.get(0, 0) + length
        output, logits = driver.step([(0, [1] * length)], row)
        assert output.token_ids[0] == sample(logits[0], row[0], position).token


def test_flagged_rows_wait_for_their_mask():
    _, driver = executor_and_driver()
    sampling = np.zeros(2, SAMPLING_DTYPE)
    sampling["num_logprobs"] = [-1, 2]
    sampling["masked"] = [0, 1]
    bits = np.zeros((1, 3), np.uint32)
    bits[0, 70 // 32] = 1 << (70 % 32)
    output, logits = driver.step([(0, [1, 2]), (1, [3])], sampling, TokenMasks(bits))
    assert output.token_ids.tolist() == [int(np.argmax(logits[0])), 70]
    assert np.isnan(output.logprobs[0]) and output.logprobs[1] <= output.top_logprobs[1, 0]
    assert output.top_ids[0].tolist() == [-1, -1] and output.top_ids[1, 0] == np.argmax(logits[1])
    sampling["masked"] = [1, 0]
    with pytest.raises(ValueError, match="mask"):
        driver.step([(0, [1]), (1, [3])], sampling)


def test_a_ticket_is_finished_once():
    executor, driver = executor_and_driver()
    ticket = executor.launch(driver.batch([(0, [1])]))
    executor.finish(ticket)
    with pytest.raises(ValueError, match="ticket"):
        executor.finish(ticket)
