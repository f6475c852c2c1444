"""The Python API on the embedded model and the native kernels."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from ridgeline import LLM, RequestError, SamplingParams
from ridgeline.core.errors import ModelFileError, RidgelineError, UnsupportedError
from ridgeline.models.load import Model, load_model

PROMPTS = ["The capital of France is", "2, 4, 6, 8,", "Once upon a time there was a " * 12, "A"]
PARAMS = [
    SamplingParams(temperature=0, max_tokens=12),
    SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=20),
    SamplingParams(temperature=1.0, top_k=40, min_p=0.02, seed=4, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=16, logprobs=3),
]


@pytest.fixture(scope="module")
def llm(smollm2_path: Path) -> Iterator[LLM]:
    with LLM(str(smollm2_path)) as model:
        yield model


def test_it_knows_capitals(llm: LLM) -> None:
    assert llm.generate(PROMPTS[0], PARAMS[0])[0].outputs[0].text.startswith(" Paris")
    answer = llm.chat([{"role": "user", "content": "Which city is the capital of Japan?"}], PARAMS[0])[0].outputs[0]
    assert "Tokyo" in answer.text and answer.finish_reason == "stop"


def test_results_depend_on_neither_batch_nor_chunks_nor_threads(llm: LLM, smollm2_path: Path) -> None:
    together = [r.outputs[0] for r in llm.generate(PROMPTS, PARAMS)]
    assert together == [llm.generate(p, s)[0].outputs[0] for p, s in zip(PROMPTS, PARAMS, strict=True)]
    with LLM(str(smollm2_path), threads=1, max_num_seqs=2, max_num_batched_tokens=7) as other:
        assert together == [r.outputs[0] for r in other.generate(PROMPTS, PARAMS)]


def test_threads_that_share_it_get_what_they_would_alone(llm: LLM) -> None:
    alone = [llm.generate(p, s)[0].outputs[0] for p, s in zip(PROMPTS, PARAMS, strict=True)]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for _ in range(3):
            shared = pool.map(lambda p, s: llm.generate(p, s)[0].outputs[0], PROMPTS, PARAMS)
            assert list(shared) == alone


FORKED = """
import asyncio, os, sys, threading, time
from ridgeline import AsyncLLM, LLM, SamplingParams
params = SamplingParams(temperature=0, max_tokens=4)
llm, shared = LLM(sys.argv[1], threads=2), AsyncLLM(sys.argv[1], threads=2, max_num_seqs=1)
text = llm.generate("The sea", params)[0].outputs[0].text
stream = llm.stream("The sea", params)
next(stream)
long = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
other = threading.Thread(target=lambda: llm.generate("The sea", long))
other.start()
time.sleep(0.05)  # it holds the engine's lock nearly all of the time
child = os.fork()
if child == 0:
    for use in (lambda: llm.generate("The sea", params), lambda: asyncio.run(shared.generate("The sea", params))):
        try:
            use()
        except Exception as error:
            print(type(error).__name__, flush=True)
    del stream
    with LLM(sys.argv[1], threads=2) as own:
        assert own.generate("The sea", params)[0].outputs[0].text == text
    sys.exit(3)  # which lets go of the parent's models, whose threads are not here
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
other.join()
assert llm.generate("The sea", params)[0].outputs[0].text == text
shared.close()
"""


def test_a_fork_is_told_to_load_its_own(smollm2_path: Path) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED, str(smollm2_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "ForkedError\nForkedError\n"


def test_streamed_text_is_the_text(llm: LLM) -> None:
    for prompt, params in zip(PROMPTS, PARAMS, strict=True):
        whole = llm.generate(prompt, params)[0].outputs[0]
        deltas = list(llm.stream(prompt, params))
        assert "".join(d.text for d in deltas) == whole.text
        assert [t for d in deltas for t in d.token_ids] == whole.token_ids


def test_logprobs_hold_the_sampled_token_and_the_best(llm: LLM) -> None:
    output = llm.generate(PROMPTS[3], PARAMS[3])[0].outputs[0]
    assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
    for token, entry in zip(output.token_ids, output.logprobs, strict=True):
        ranked = sorted(entry.values(), key=lambda e: -e.logprob)
        assert len(entry) == 3 and [e.rank for e in ranked] == [1, 2, 3]
        assert entry[token].rank == 1, "greedy takes the most likely"
        assert all(e.logprob <= 0 for e in ranked)
    assert (
        "".join(entry[t].decoded_token for t, entry in zip(output.token_ids, output.logprobs, strict=True))
        == output.text
    )


def test_bans_that_leave_no_token_say_so(llm: LLM) -> None:
    banned = SamplingParams(bad_words=[[i] for i in range(llm.runtime.engine.limits.vocab_size)], max_tokens=2)
    with pytest.raises(RidgelineError, match="bad_words leave no token"):
        llm.generate("a", banned)


def test_a_prompt_beyond_the_context_is_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(RequestError, match="context is 8192"):
        llm.generate(["short", "word " * 8200], PARAMS[0])
    assert not llm.runtime.engine.has_work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert' is not supported"),
        ({"tokenizer.ggml.pre": "no such"}, "no such"),
    ],
)
def test_what_is_wrong_with_a_tokenizer_names_the_file_once(
    smollm2_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], message: str
) -> None:
    def changed(path: Path) -> Model:
        model = load_model(path)
        return replace(model, metadata={**model.metadata, **changes})

    monkeypatch.setattr("ridgeline.engine.load.load_model", changed)
    with pytest.raises(UnsupportedError, match=message) as caught:
        LLM(str(smollm2_path))
    assert str(caught.value).count(str(smollm2_path)) == 1


def test_what_is_wrong_with_a_weight_names_the_file_once(smollm2_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(path: Path) -> Model:
        model = load_model(path)
        weight = next(w for w in model.weights.values() if w.tensor.name == "blk.3.ffn_up.weight")
        data = weight.tensor.data.copy()
        data[:2] = 0xFF  # the first group's float16 scale: NaN
        bad = replace(weight, tensor=replace(weight.tensor, data=data))
        return replace(model, weights={name: bad if w is weight else w for name, w in model.weights.items()})

    monkeypatch.setattr("ridgeline.engine.load.load_model", damaged)
    with pytest.raises(ModelFileError, match="blk.3.ffn_up.weight.*NaN") as caught:
        LLM(str(smollm2_path))
    assert str(caught.value).count(str(smollm2_path)) == 1
