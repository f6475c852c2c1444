"""The Python API over the simulated executor: vLLM's shapes, defaults, streaming, refusals."""

from __future__ import annotations

import sys
import threading
from typing import Any

import numpy as np
import pytest

import ridgeline
from ridgeline import LLM, ConfigError, EngineConfig, RequestError, RidgelineError, SamplingParams
from ridgeline.api.commands import _alone
from ridgeline.core.config import parse_bytes
from ridgeline.core.formats import FORMATS
from ridgeline.engine.planning import activation_dtype, cache_dtype
from tests.api.sim_runtime import EOS, LIMITS, expected, sim_runtime
from tests.sim.model import logprob, state_row
from tests.sim.small import hidden_states, solo


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> LLM:
    """An LLM whose runtime is the simulated executor and the ASCII tokenizer."""
    runtime = sim_runtime()
    monkeypatch.setattr("ridgeline.api.llm.load_runtime", lambda config: runtime)
    return LLM("any")


SEEDED = SamplingParams(seed=11, max_tokens=9)


def test_prompts_one_or_several_texts_or_token_ids(llm: LLM) -> None:
    for prompts, each in [
        ("abc", ["abc"]),
        ([97, 98], [[97, 98]]),
        (["abc", "x y", "zz", "q", "five", "six"], ["abc", "x y", "zz", "q", "five", "six"]),
        ([[1, 2], [5]], [[1, 2], [5]]),
        ([], []),
    ]:
        results = llm.generate(prompts, SEEDED)
        assert len(results) == len(each)
        for result, prompt in zip(results, each, strict=True):
            tokens, reason = expected(prompt, SEEDED)
            (output,) = result.outputs
            assert result.prompt == (prompt if isinstance(prompt, str) else None)
            assert result.prompt_token_ids == (list(prompt.encode()) if isinstance(prompt, str) else prompt)
            assert (output.index, output.token_ids, output.finish_reason) == (0, tokens, reason)
            assert output.text == "".join(chr(t) for t in tokens if t >= 32)
            assert output.logprobs is None


def test_prompts_in_the_form_of_mappings(llm: LLM) -> None:
    text, ids = {"prompt": "abc"}, {"prompt_token_ids": [97, 98], "prompt": "ignored beside the ids"}
    results = llm.generate([text, ids, "abc"], SEEDED)
    assert results == llm.generate(["abc", [97, 98], "abc"], SEEDED)
    assert [llm.generate(one, SEEDED) for one in (text, ids)] == [[r] for r in results[:2]]
    assert [p for d in llm.stream(ids, SEEDED) for p in d.token_ids] == results[1].outputs[0].token_ids


def test_parameters_one_for_each_and_defaults_as_vllm(llm: LLM) -> None:
    params = [SamplingParams(seed=1, max_tokens=2), SamplingParams(seed=2, max_tokens=5, ignore_eos=True)]
    results = llm.generate(["a", "a"], params)
    assert [r.outputs[0].token_ids for r in results] == [expected("a", p)[0] for p in params]
    assert len(llm.generate([[40]], SamplingParams(ignore_eos=True))[0].outputs[0].token_ids) == 16
    with pytest.raises(RequestError, match="2 prompts came with 1"):
        llm.generate(["a", "b"], [SEEDED])
    with pytest.raises(RequestError, match="must be SamplingParams, got dict"):
        llm.generate("a", {"max_tokens": 3})  # type: ignore[arg-type]


def test_streams_run_side_by_side_and_join_to_the_whole(llm: LLM) -> None:
    params = SamplingParams(seed=5, max_tokens=12, ignore_eos=True)
    one, other = llm.stream("first", params), llm.stream("second", params)
    pieces: tuple[list[Any], list[Any]] = ([], [])
    for a, b in zip(one, other, strict=True):
        pieces[0].append(a)
        pieces[1].append(b)
    for prompt, deltas in zip(("first", "second"), pieces, strict=True):
        whole = llm.generate(prompt, params)[0].outputs[0]
        assert "".join(map(str, deltas)) == whole.text
        assert [t for d in deltas for t in d.token_ids] == whole.token_ids
        assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + ["length"]


def test_a_stream_dropped_by_a_failure_beside_it_says_so(llm: LLM) -> None:
    stream = llm.stream("abc", SamplingParams(max_tokens=20, ignore_eos=True))
    next(stream)
    executor: Any = llm.runtime.engine._executor
    executor.error, executor.fail_at = RidgelineError("broken"), executor.launches + 2
    with pytest.raises(RidgelineError, match="broken"):
        llm.generate("other", SEEDED)
    with pytest.raises(RidgelineError, match="dropped"):
        list(stream)


def test_a_stream_closed_amid_a_step_leaves_after_it(llm: LLM) -> None:
    stream = llm.stream("abc", SamplingParams(max_tokens=20, ignore_eos=True))
    next(stream)
    executor: Any = llm.runtime.engine._executor
    launch = executor.launch

    def launch_and_collect(batch: Any) -> Any:  # as the garbage collector may at any time
        stream.close()
        return launch(batch)

    executor.launch = launch_and_collect
    try:
        assert llm.generate("abc", SEEDED)[0].outputs[0].token_ids == expected("abc", SEEDED)[0]
    finally:
        del executor.launch
    assert llm.runtime.engine.num_held_blocks == 0
    llm.runtime.engine.check()


def test_a_stream_that_another_threads_steps_serve_tells_all(llm: LLM) -> None:
    params = SamplingParams(seed=5, max_tokens=12, ignore_eos=True, logprobs=1)
    whole = llm.generate("first", params)[0].outputs[0]
    engine, stop = llm.runtime.engine, threading.Event()

    def keep_stepping() -> None:
        while not stop.is_set():
            engine.step()

    other, interval = threading.Thread(target=keep_stepping), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # the two threads meet everywhere
    other.start()
    try:
        for _ in range(50):
            deltas = list(llm.stream("first", params))
            assert "".join(d.text for d in deltas) == whole.text
            assert [t for d in deltas for t in d.token_ids] == whole.token_ids
            assert [s for d in deltas for s in d.logprobs or []] == whole.logprobs
            assert [d.finish_reason for d in deltas] == [None] * (len(deltas) - 1) + ["length"]
    finally:
        stop.set()
        other.join()
        sys.setswitchinterval(interval)


def test_a_streams_news_wait_for_the_step_under_way(llm: LLM) -> None:
    engine = llm.runtime.engine
    request = engine.make_request(list(b"first"), SamplingParams(seed=5, max_tokens=4, ignore_eos=True), stream=True)
    text: Any = request.text
    entered, go_on = threading.Event(), threading.Event()

    class Held:
        """The text, which takes a token only once it may go on: the token is with the request by then."""

        def push(self, token: int, may_stop: bool) -> bool:
            entered.set()
            go_on.wait(10)
            return bool(text.push(token, may_stop))

        def __getattr__(self, name: str) -> Any:
            return getattr(text, name)

    request.text = Held()  # type: ignore[assignment]
    engine.submit([request])
    other = threading.Thread(target=engine.step)
    other.start()
    assert entered.wait(10) and len(request.output_ids) == 1
    threading.Timer(0.05, go_on.set).start()
    told, ids, _, _ = engine.news(request, 0)
    other.join()
    assert ids[0] >= 32 and told == "".join(map(chr, ids))
    engine.abort(request)


def test_a_closed_stream_holds_nothing(llm: LLM) -> None:
    stream = llm.stream("abc", SEEDED)
    next(stream)
    assert llm.runtime.engine.has_work
    stream.close()  # type: ignore[attr-defined]
    assert not llm.runtime.engine.has_work
    llm.runtime.engine.check()


def test_stop_strings_end_the_text_and_are_not_part_of_it(llm: LLM) -> None:
    params = SamplingParams(seed=4, max_tokens=30, ignore_eos=True)
    text = llm.generate("go", params)[0].outputs[0].text
    stop = text[6:8]
    output = llm.generate("go", SamplingParams(seed=4, max_tokens=30, ignore_eos=True, stop=stop))[0].outputs[0]
    assert output.text == text[: text.index(stop)] and output.finish_reason == "stop"
    streamed = llm.stream("go", SamplingParams(seed=4, max_tokens=30, ignore_eos=True, stop=[stop]))
    assert "".join(d.text for d in streamed) == output.text


def test_chat_goes_through_the_template(llm: LLM) -> None:
    talk = [{"role": "user", "content": "hi"}]
    ids = [*b"hi", 2]
    assert llm.chat(talk, SEEDED)[0].outputs[0].token_ids == expected(ids, SEEDED)[0]
    several = llm.chat([talk, [{"role": "user", "content": "yo"}]], SEEDED)
    assert [r.prompt_token_ids for r in several] == [ids, [*b"yo", 2]]
    assert [t for d in llm.stream(talk, SEEDED) for t in d.token_ids] == expected(ids, SEEDED)[0]
    with pytest.raises(RequestError, match="no messages"):
        llm.chat([])


def test_one_bad_prompt_stops_all_before_anything_runs(llm: LLM) -> None:
    for bad, message in [("", "prompt is empty"), ([], "prompt is empty"), ("x" * 64, "context is 64")]:
        with pytest.raises(RequestError, match=message):
            llm.generate(["good", bad], SEEDED)
        assert not llm.runtime.engine.has_work
    for wrong in (3, {"prompt": 3}, ["x", {"prompt_token_ids": 3}], ["x", 3]):
        with pytest.raises(RequestError, match="must be a text"):
            llm.generate(wrong, SEEDED)  # type: ignore[arg-type]


def test_what_is_no_prompt_and_no_conversation_is_refused(llm: LLM) -> None:
    message = {"role": "user", "content": "hi"}
    for wrong in (message, "hi", b"hi", 3, None, [None], ["hi"], [message, None], [[message], None], [[message], "hi"]):
        with pytest.raises(RequestError, match="messages must be a list"):
            llm.chat(wrong, SEEDED)  # type: ignore[arg-type]
    for wrong in (3, None, b"hi", {1, 2}):
        with pytest.raises(RequestError, match="prompt must be a text"):
            llm.stream(wrong, SEEDED)  # type: ignore[arg-type]
    for wrong in (message, [message], {"prompt": "hi", "multi_modal_data": {}}):
        with pytest.raises(RequestError, match="a prompt has no '(role|multi_modal_data)'"):
            llm.generate(wrong, SEEDED)
    for wrong in ({}, {"prompt": None}):
        with pytest.raises(RequestError, match="are missing"):
            llm.generate(wrong, SEEDED)
    for wrong in ({"prompt": [message]}, {"prompt_token_ids": [message]}):  # no conversation either
        with pytest.raises(RequestError, match="flat list of integers"):
            llm.stream(wrong, SEEDED)
    with pytest.raises(RequestError, match="got a text"):
        llm.generate({"prompt_token_ids": "hi"}, SEEDED)
    with pytest.raises(RequestError, match="a prompt has no 'role'"):
        llm.stream(message, SEEDED)
    for wrong in (b"hi", bytearray(b"hi"), [b"hi"], None, {"prompt": b"hi"}):
        with pytest.raises(RequestError, match="must be a text"):
            llm.generate(wrong, SEEDED)  # type: ignore[arg-type]
    assert not llm.runtime.engine.has_work


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-1, 1e39, 10**400, float("nan"), float("inf"), "hot", 1j, True]),
        ("top_k", [-2, 2**31, 1.5]),
        ("stop", [3, b"x", ["ok", 3], [""], {"a": 1}]),
        ("stop_token_ids", [3, "12", [1.5], [[1]], {1: 2}]),
        ("ignore_eos", ["yes", 1, None]),
        ("prompt_logprobs", [-1, 65, 1.5, True]),
        ("n", [0, -1, 1.5, True, None, 2**16 + 1]),
        ("repetition_penalty", [0, -1, float("nan"), float("inf"), "high"]),
        ("presence_penalty", [-2.1, 2.1, float("nan"), None]),
        ("frequency_penalty", [-2.1, 2.1, float("nan"), None]),
        ("logit_bias", [[1], {"a": 1}, {1: 101}, {1: float("nan")}, {1: "x"}]),
        ("bad_words", ["word", 3, [""], [[]], [[1.5]], [3]]),
        ("min_tokens", [-1, 17, 1.5, None]),
    ],
)
def test_sampling_parameters_that_cannot_work(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(RequestError, match=f"^{name} must be"):
            SamplingParams(**{name: value})


def test_sampling_parameters_of_other_types_that_can() -> None:
    params = SamplingParams(
        temperature=np.float32(0.5), top_k=np.int64(3), stop=["a"], stop_token_ids=np.array([4, 5]), ignore_eos=True
    )
    assert params.stop == ("a",) and params.stop_token_ids == (4, 5)
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()


def test_greedy_samples_are_all_the_same_and_so_refused() -> None:
    with pytest.raises(RequestError, match="^n must be 1 at temperature 0"):
        SamplingParams(n=2, temperature=0)


def test_several_samples_of_a_prompt(llm: LLM) -> None:
    params = SamplingParams(n=3, seed=4, max_tokens=6, ignore_eos=True)
    outputs = llm.generate(["hello", "abc"], params)
    for prompt, output in zip(["hello", "abc"], outputs, strict=True):
        assert [o.index for o in output.outputs] == [0, 1, 2]
        for o in output.outputs:
            ids = list(prompt.encode())
            assert o.token_ids == solo(ids, params, LIMITS.vocab_size, LIMITS.max_len, EOS, o.index)[0]


def test_prompt_logprobs_leave_the_first_token_out(llm: LLM) -> None:
    ids = list(b"some longer prompt than a step has rows")
    output = llm.generate([ids], SamplingParams(prompt_logprobs=0, seed=1, max_tokens=2, n=2))[0]
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    expected = [logprob(hidden, token) for hidden, token in zip(hidden_states(ids), ids[1:], strict=False)]
    for token, value, entry in zip(ids[1:], expected, output.prompt_logprobs[1:], strict=True):
        assert entry is not None and entry[token].logprob == pytest.approx(value)
    assert llm.generate("a", SEEDED)[0].prompt_logprobs is None


def test_embeddings(llm: LLM) -> None:
    outputs = llm.embed(["abcdefgh", "b"])
    states = np.array([state_row(h) for h in hidden_states(list(b"abcdefgh"))])
    assert outputs[0].embedding == (states.sum(axis=0) / 8).tolist() and len(outputs) == 2
    assert llm.embed("abcdefgh", pooling="last")[0].embedding == states[-1].tolist()
    with pytest.raises(RequestError, match="pooling must be 'mean' or 'last'"):
        llm.embed("a", pooling="max")
    with pytest.raises(RequestError, match="did you mean 'pooling'"):
        llm.embed("a", poling="mean")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {128: 1.0}}, "logit_bias names token id 128"),
        ({"bad_words": [[128]]}, "bad_words names token id 128"),
        ({"stop_token_ids": [5, 128]}, "stop_token_ids names token id 128"),
        ({"bad_words": ["word"]}, "bad_words as texts need a tokenizer"),
    ],
)
def test_tokens_that_are_not_are_refused(llm: LLM, params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        llm.generate("a", SamplingParams(**params))


def test_a_stream_is_one_completion(llm: LLM) -> None:
    for params in (SamplingParams(n=2), SamplingParams(prompt_logprobs=1)):
        with pytest.raises(RequestError, match="LLM.stream gives one completion"):
            llm.stream("a", params)


def test_stop_strings_wait_for_min_tokens(llm: LLM) -> None:
    params = {"seed": 4, "max_tokens": 30, "ignore_eos": True}
    ids, text = [], ""
    ids = expected("go", SamplingParams(**params))[0]
    text = "".join(chr(i) for i in ids if i >= 32)
    stop = text[2]
    number = next(n for n in range(len(ids)) if chr(ids[n]) == stop) + 1
    output = llm.generate("go", SamplingParams(**params, stop=stop, min_tokens=number))[0].outputs[0]
    assert len(output.token_ids) > number


def test_interrupt_in_the_middle_leaves_a_usable_llm(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    executor: Any = llm.runtime.engine._executor
    executor.error, executor.fail_at = KeyboardInterrupt(), executor.launches + 3
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["a", "b"], SamplingParams(ignore_eos=True))
    assert not llm.runtime.engine.has_work
    assert llm.generate("abc", SEEDED)[0].outputs[0].token_ids == expected("abc", SEEDED)[0]


def test_unknown_arguments_raise_with_a_hint(llm: LLM) -> None:
    with pytest.raises(RequestError, match="did you mean 'sampling_params'"):
        llm.generate("a", sampling_parms=SEEDED)
    with pytest.raises(RequestError, match="did you mean 'max_tokens'"):
        SamplingParams(max_token=3)
    with pytest.raises(ConfigError, match="did you mean 'threads'"):
        LLM("any", thread=2)


def test_closed(llm: LLM) -> None:
    with llm as same:
        assert same is llm
        stream = llm.stream("abc", SamplingParams(ignore_eos=True))
        next(stream)
    with pytest.raises(RequestError, match="closed"):
        next(stream)
    with pytest.raises(RequestError, match="closed"):
        llm.generate("a")


def test_public_names_come_when_asked_for() -> None:
    assert {"LLM", "SamplingParams", "__version__"} <= set(dir(ridgeline))
    assert all(getattr(ridgeline, name) is not None for name in ridgeline.__all__)
    with pytest.raises(AttributeError, match="no attribute 'LMM'"):
        ridgeline.LMM  # noqa: B018


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"threads": 0}, "threads must be an integer of at least 1"),
        ({"threads": True}, "threads must be an integer"),
        ({"kv_dtype": "int3"}, "kv_dtype must be one of auto"),
        ({"kv_dtype": "fp8"}, "the cpu backend keeps no fp8 cache: kv_dtype int8"),
        ({"block_size": 48}, "block_size must divide 256"),
        ({"max_num_seqs": 64, "max_num_batched_tokens": 32}, "at least max_num_seqs"),
        ({"model": ""}, "model must be"),
        ({"isa": "mmx"}, "isa must be one of"),
        ({"threads": 1025}, "threads must be at most 1024"),
        ({"num_kv_blocks": 2**31}, "num_kv_blocks must be at most"),
        ({"max_num_batched_tokens": 2**63}, "max_num_batched_tokens must be at most"),
        ({"seed": 2**64}, "seed must be at most"),
        ({"max_open_steps": 2}, "the cpu backend runs one step at a time"),
        ({"max_open_steps": 3}, "max_open_steps must be at most 2"),
        ({"max_sampled_rows": 8}, "max_sampled_rows .8. must be at least max_num_seqs"),
        ({"speculation": "medusa"}, "speculation must be one of ngram"),
        ({"ngram_min": 5}, "ngram_min .5. must be at most ngram_max"),
        ({"prefix_sharing": 1}, "prefix_sharing must be True or False"),
        ({"max_queued_requests": 0}, "max_queued_requests must be an integer of at least 1"),
        ({"kv_cache_bytes": "2 apples"}, "kv_cache_bytes must be a size such as 512MiB"),
        ({"kv_cache_bytes": "1GiB", "num_kv_blocks": 3}, "give one of them"),
        ({"backend": "reference", "threads": 2}, "the reference backend takes no threads"),
        ({"backend": "reference", "isa": "generic"}, "the reference backend takes no isa"),
        ({"activation_dtype": "fp8"}, "activation_dtype must be one of auto, int8, bf16"),
        ({"backend": "cuda", "activation_dtype": "int8"}, "the cuda backend takes no activation_dtype"),
    ],
)
def test_options_that_cannot_work(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(**values)


def test_pool_and_context_sizes() -> None:
    config = EngineConfig(max_num_seqs=4, block_size=16)
    assert config.model_len(8192) == 8192
    assert config.pool_blocks(8192) == 512  # 4 x 2048 tokens, which is one whole context as well
    assert EngineConfig(max_num_seqs=1).pool_blocks(8192) == 512  # one sequence at full length fits
    assert EngineConfig(max_num_seqs=2, max_model_len=100).pool_blocks(8192) == 14
    assert EngineConfig(num_kv_blocks=9).pool_blocks(8192) == 9
    assert (
        EngineConfig(backend="cuda").fills_the_gpu and not EngineConfig(backend="cuda", num_kv_blocks=9).fills_the_gpu
    )
    assert not EngineConfig(backend="cuda", device="emulated").fills_the_gpu and not EngineConfig().fills_the_gpu
    assert EngineConfig(kv_cache_bytes="1.5MiB").pool_blocks(8192, 2**18) == 6
    assert EngineConfig(kv_cache_bytes=2**20).pool_blocks(8192, 2**18) == 4
    assert parse_bytes("x", "2 GB") == 2 * 10**9 and parse_bytes("x", "17") == 17
    with pytest.raises(ConfigError, match="gives 0 blocks"):
        EngineConfig(kv_cache_bytes="1KiB").pool_blocks(8192, 2**18)
    assert EngineConfig().sampled_rows() == 64
    assert EngineConfig(speculation="ngram").sampled_rows() == 256
    assert EngineConfig(max_num_seqs=1, max_num_batched_tokens=8).sampled_rows() == 8
    with pytest.raises(ConfigError, match="context is 512"):
        EngineConfig(max_model_len=513).model_len(512)
    with pytest.raises(ConfigError, match="KV blocks, above"):
        EngineConfig(max_num_seqs=2**30, max_num_batched_tokens=2**30).pool_blocks(8192)


def test_activations_are_the_fastest_for_batches_unless_one_request_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RIDGELINE_ISA", raising=False)
    chosen = {isa: activation_dtype(EngineConfig(isa=isa)) for isa in ("generic", "avx2", "avx512", "amx")}
    assert chosen == {"generic": "int8", "avx2": "int8", "avx512": "int8", "amx": "bf16"}
    assert activation_dtype(EngineConfig(isa="amx", activation_dtype="int8")) == "int8"
    assert cache_dtype(EngineConfig(isa="amx"), 64, [FORMATS["q4_1"]]) == "int8"
    assert cache_dtype(EngineConfig(isa="amx", activation_dtype="int8"), 64, [FORMATS["q4_1"]]) == "bf16"
    with pytest.raises(ConfigError, match="bf16 needs AMX and this engine's instruction set is avx512"):
        activation_dtype(EngineConfig(isa="avx512", activation_dtype="bf16"))
    flags = {"activation_dtype": "auto", "backend": "cpu", "speculation": None}
    assert _alone(flags)["activation_dtype"] == "int8"
    for other in ({"backend": "cuda"}, {"speculation": "ngram"}, {"activation_dtype": "bf16"}):
        assert _alone(flags | other) == flags | other


def test_isa_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIDGELINE_ISA", "generic")
    assert EngineConfig().isa == "generic"
    assert EngineConfig(isa="avx512").isa == "avx512"
    assert EngineConfig(backend="reference").isa is None
    monkeypatch.delenv("RIDGELINE_ISA")
    assert EngineConfig().isa is None
