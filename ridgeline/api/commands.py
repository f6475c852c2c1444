"""The commands, one function each. What loads a model is imported by the command that does."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ridgeline.api.compile import compile_model
from ridgeline.api.explain import explain
from ridgeline.api.flags import with_flags
from ridgeline.api.kernels import make_app
from ridgeline.api.profile import profile
from ridgeline.core.config import ISAS, EngineConfig
from ridgeline.core.errors import ConfigError, RequestError
from ridgeline.core.types import SamplingParams

if TYPE_CHECKING:
    from ridgeline.api.llm import LLM

Model = Annotated[str, typer.Argument(help="an alias (smollm2) or the path of a GGUF file")]


def run(
    model: Model,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="the text to complete")],
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", help="most tokens to generate")] = 128,
    *,
    engine: dict[str, Any],
    params: dict[str, Any],
) -> None:
    """Complete a prompt, streaming, and say how fast it was."""
    options = _sampling(max_tokens, params)
    if not prompt:
        raise ConfigError("the prompt is empty: give -p some text")
    llm = _load(model, _alone(engine))
    times: list[float] = []
    for delta in llm.stream(prompt, options):
        sys.stdout.write(delta.text)
        sys.stdout.flush()
        times += [time.perf_counter()] * len(delta.token_ids)
    first = _since_process_start() - (time.perf_counter() - times[0])
    print(f"\n\n{_closing_line(llm, len(llm.runtime.tokenizer.encode(prompt)), first, times)}")


def chat(
    model: Model,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", help="most tokens of one answer")] = 512,
    *,
    engine: dict[str, Any],
    params: dict[str, Any],
) -> None:
    """Talk with a model; an empty line or the end of input ends it.

    A talk that has outgrown the context goes on without its oldest turns. The exit code is 1 if the last question read
    from a file or a pipe was refused.
    """
    options = _sampling(max_tokens, params)
    llm = _load(model, _alone(engine))
    messages: list[dict[str, str]] = []
    refused, prompt = False, "> " if sys.stdin.isatty() else ""
    while True:
        try:
            question = input(prompt)
        except EOFError:
            question = ""
        if not question.strip():
            raise typer.Exit(int(refused and not prompt))
        messages.append({"role": "user", "content": question})
        try:
            kept = _fitting(llm, messages, max_tokens)
            deltas = llm.stream(kept, options)
        except RequestError as error:
            print("error:", " ".join(str(error).split()), file=sys.stderr)
            messages.pop()
            refused = True
            continue
        refused = False
        if forgotten := (len(messages) - len(kept)) // 2:
            print(f"(the context is full: turns forgotten, the oldest first: {forgotten})", file=sys.stderr)
        messages = kept
        answer = ""
        for delta in deltas:
            sys.stdout.write(delta.text)
            sys.stdout.flush()
            answer += delta.text
        print()
        messages.append({"role": "assistant", "content": answer})


def _fitting(llm: LLM, messages: list[dict[str, str]], max_tokens: int) -> list[dict[str, str]]:
    """``messages`` without as many of the oldest turns as it takes to leave room for an answer."""
    runtime, limits = llm.runtime, llm.runtime.engine.limits
    most = min(limits.max_len, min(limits.num_blocks) * limits.block_size)
    room = min(max_tokens, most // 4)
    template, kept = runtime.chat_template(), messages
    while len(kept) > 2 and len(template.encode(kept, runtime.tokenizer)) + room > most:
        kept = kept[2:]
    return kept


def bench(
    model: Model,
    prompt: Annotated[int, typer.Option("-p", "--prompt", help="tokens of the prefill test; 0 leaves it out")] = 512,
    generate: Annotated[
        int, typer.Option("-n", "--generate", help="tokens of the decode tests; 0 leaves them out")
    ] = 128,
    batch: Annotated[str, typer.Option("-b", "--batch", help="batch sizes of the decode tests, by commas")] = "1,8,32",
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", help="repetitions of each test")] = 5,
    output: Annotated[
        str, typer.Option("-o", "--output", help="table, or json for one line of it after the table")
    ] = "table",
    *,
    engine: dict[str, Any],
) -> None:
    """Measure a model's speed and its share of this machine's roofline."""
    if output not in ("table", "json"):
        raise ConfigError(f"--output must be table or json, got {output!r}")
    try:
        batches = [int(b) for b in batch.split(",")]
    except ValueError:
        raise ConfigError(f"--batch must be numbers with commas between, such as 1,8,32, got {batch!r}") from None
    if engine.get("device") == "emulated":
        raise ConfigError("the emulated device has no speed to measure: take a GPU, or the cpu backend")
    from ridgeline.api.report import as_json, print_table
    from ridgeline.engine.ledger import render_ledger
    from ridgeline.perf.bench import check_arguments, run_bench

    check_arguments(prompt, generate, batches, repetitions)
    if generate and engine["max_num_seqs"] == EngineConfig.max_num_seqs:  # not what the user asks for
        engine = engine | {"max_num_seqs": max(engine["max_num_seqs"], *batches)}
    llm = _load(model, engine)
    print(render_ledger(llm.runtime.ledger))
    report = run_bench(llm.runtime, prompt, generate, batches, repetitions)
    print_table(llm.runtime, report)
    if output == "json":
        print(as_json(report))


def replay(
    file: Annotated[str, typer.Argument(help="a flight record")],
    model: Annotated[
        str | None, typer.Option("--model", help="alias or path of the model (default: as recorded)")
    ] = None,
    isa: Annotated[
        str | None, typer.Option("--isa", help=f"another instruction set than recorded ({', '.join(ISAS)})")
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", help="CPU threads (default: as recorded)")] = None,
) -> None:
    """Run a flight record again and compare every bit; exit code 0: all the same, 1: not."""
    from ridgeline.api.replay import replay_file

    text, identical = replay_file(file, model, isa, threads)
    print(text)
    if not identical:
        raise typer.Exit(1)


def _alone(engine: dict[str, Any]) -> dict[str, Any]:
    """Options of an engine that only ever decodes one request: int8 activations are fastest for that on every CPU."""
    free = engine["activation_dtype"] == "auto" and engine["backend"] == "cpu" and engine["speculation"] is None
    return engine | {"activation_dtype": "int8"} if free else engine


def _load(model: str, engine: dict[str, Any]) -> LLM:
    from ridgeline.api.llm import LLM

    return LLM(model, **engine)


def _sampling(max_tokens: int, params: dict[str, Any]) -> SamplingParams:
    """Sampling parameters from flags; a bad value is a usage error."""
    try:
        return SamplingParams(max_tokens=max_tokens, **params)
    except RequestError as error:
        raise ConfigError(str(error)) from None


def _since_process_start() -> float:
    """Seconds since the kernel started this process, to a hundredth: imports count too."""
    with open("/proc/self/stat") as stat:
        ticks = int(stat.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _closing_line(llm: LLM, prompt: int, first: float, times: list[float]) -> str:
    """Tokens, time to first token, tokens/s of the decode steps and their share of the roofline."""
    steps = len(times) - 1
    line = f"[{len(times)} tokens, first after {first:.2f} s"
    if steps > 0:
        seconds = times[-1] - times[0]
        line += f", {steps / seconds:.{0 if steps >= seconds else 4}f} tokens/s"
        if llm.config.device != "emulated":
            line += f", {_share(llm, prompt + steps // 2, steps, seconds):.0%} of this machine's roofline"
    return line + "]"


def _share(llm: LLM, context: int, steps: int, seconds: float) -> float:
    """Share of the roofline that ``steps`` of one token at about ``context`` reached.

    A share above 1 says that memory reads more slowly now than it did then: it is looked at again, a few times.
    """
    from ridgeline.graph.cost import Load
    from ridgeline.perf.bench import step_share
    from ridgeline.perf.machine import better, peaks_of

    loads, peaks = [Load.of([(context, 1)])] * steps, peaks_of(llm.runtime, 0.1)
    for _ in range(4):
        if step_share(llm.runtime, peaks, loads, seconds) <= 1:
            break
        peaks = better(peaks, peaks_of(llm.runtime, 0.1))
    return step_share(llm.runtime, peaks, loads, seconds)


def make_command() -> Callable[..., Any]:
    """The whole command line as one callable, which returns the exit code."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="LLM inference at memory speed.")
    app.command("run")(with_flags(run, sampling=True))
    app.command("chat")(with_flags(chat, sampling=True))
    app.command("bench")(with_flags(bench, sampling=False))
    app.command("profile")(with_flags(profile, sampling=False))
    app.command("replay")(replay)
    app.command("explain")(with_flags(explain, sampling=False))
    app.command("compile")(with_flags(compile_model, sampling=False))
    app.add_typer(make_app(), name="kernels")
    app.callback(invoke_without_command=True)(_no_command)
    return typer.main.get_command(app)


def _no_command(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    if version:
        from ridgeline import __version__

        print(f"ridgeline {__version__}")
        raise typer.Exit()
    if context.invoked_subcommand is None:
        raise ConfigError(
            "no command given: run, chat, bench, profile, replay, explain, compile or kernels "
            "(ridgeline --help tells more)"
        )
