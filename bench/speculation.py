"""n-gram speculation beside plain decoding: batch 1, greedy, the same tokens, alternating in one run.

    python bench/speculation.py [--repetitions 3] [--quick] [--set copying|ordinary] [--show]

Two sets of prompts (bench/tasks.py): answers that copy from their prompt, where speculation must be worth 1.4x, and
ordinary ones, where it must cost at most 5%. Times are those of decoding, from the first token to the last; an
answer counts up to where it begins to repeat itself with a period under 64 tokens. The last line is JSON. Exit
status 1: an answer differs from plain decoding, or a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import tasks
from peers.client import NOISY, EngineError, observe, spread, wait_quiet
from rich.console import Console
from rich.table import Table

from ridgeline import LLM, SamplingParams

BARS = {"copying": 1.4, "ordinary": 0.95}
LOOP_PERIOD = 64  # an answer that repeats itself at a shorter distance does not count
LOOP_LENGTH = 16  # tokens repeated that make a loop, if the period is not longer
LEAST = 32  # tokens of an answer that counts: below, its time is a matter of chance


@dataclass
class Task:
    """One prompt and what came of it.

    Attributes:
        prompt: token ids.
        answer: the tokens that count; all of plain decoding's are ``answer`` and ``dropped`` looping ones.
        plain, drafted: seconds from the first token to the last, by repetition.
        proposed, accepted, steps: drafts and decode steps of a speculated run.
    """

    prompt: list[int]
    answer: list[int] = field(default_factory=list)
    dropped: int = 0
    plain: list[float] = field(default_factory=list)
    drafted: list[float] = field(default_factory=list)
    proposed: int = 0
    accepted: int = 0
    steps: int = 0


def loop_start(tokens: list[int]) -> int:
    """Index from which ``tokens`` repeat what they said under LOOP_PERIOD tokens before; their number if never."""
    first = len(tokens)
    for period in range(1, LOOP_PERIOD):
        run = 0
        for at in range(period, first):
            run = run + 1 if tokens[at] == tokens[at - period] else 0
            if run >= max(period, LOOP_LENGTH):
                first = at - run + 1
                break
    return first


def decode(llm: LLM, task: Task, most: int) -> tuple[list[int], float]:
    """(tokens, seconds from the first to the last) of a greedy answer."""
    engine = llm.runtime.engine
    params = SamplingParams(temperature=0, max_tokens=most)
    request = engine.make_request(task.prompt, params, cache_salt=object())
    engine.submit([request])
    while not request.output_ids:
        engine.step()
    start = time.perf_counter()
    while request.finish_reason is None:
        engine.step()
    return request.output_ids, time.perf_counter() - start


def prepare(llm: LLM, prompts: list[str], most: int) -> list[Task]:
    """The tasks, each with the part of its plain answer that counts."""
    chat, tokenizer = llm.runtime.chat_template(), llm.runtime.tokenizer
    prepared = []
    for prompt in prompts:
        task = Task(chat.encode([{"role": "user", "content": prompt}], tokenizer))
        tokens, _ = decode(llm, task, most)
        task.answer = tokens[: loop_start(tokens)]
        task.dropped = len(tokens) - len(task.answer)
        prepared.append(task)
    return prepared


def measure(plain: LLM, drafting: LLM, chosen: list[Task], options: argparse.Namespace) -> float:
    """Time every task with both; the most cores that others took during a pass over all of them.

    Raises EngineError when the tokens differ.
    """
    own = {"plain": plain, "drafted": drafting}
    disturbed = 0.0
    for repetition in range(options.repetitions):

        def once(repetition: int = repetition) -> dict[str, list[float]]:
            seconds: dict[str, list[float]] = {"plain": [], "drafted": []}
            for number, task in enumerate(chosen):
                names = list(own) if (repetition + number) % 2 else list(own)[::-1]
                for name in names:
                    stats = own[name].runtime.engine.stats()
                    before = (stats.steps, stats.drafts_proposed, stats.drafts_accepted)
                    tokens, spent = decode(own[name], task, len(task.answer))
                    if tokens != task.answer:
                        raise EngineError(f"{name} decoding gives other tokens: {tokens} instead of {task.answer}")
                    seconds[name].append(spent)
                    if name == "drafted":
                        task.proposed = stats.drafts_proposed - before[1]
                        task.accepted = stats.drafts_accepted - before[2]
                        task.steps = stats.steps - before[0] - -(-len(task.prompt) // 512)
            return seconds

        wait_quiet(options.patience)
        seconds, foreign = observe(once, lambda: 0.0)
        if foreign > NOISY:
            again, calmer = observe(once, lambda: 0.0)
            if calmer < foreign:
                seconds, foreign = again, calmer
        disturbed = max(disturbed, foreign)
        for task, a, b in zip(chosen, seconds["plain"], seconds["drafted"], strict=True):
            task.plain.append(a)
            task.drafted.append(b)
    return disturbed


def summarize(chosen: list[Task], options: argparse.Namespace) -> dict[str, Any]:
    """Speed of a set: over all its tokens, by repetition, and by task."""
    repetitions = range(options.repetitions)
    plain = [sum(t.plain[r] for t in chosen) for r in repetitions]
    drafted = [sum(t.drafted[r] for t in chosen) for r in repetitions]
    decoded = sum(len(t.answer) - 1 for t in chosen)
    by_task = [spread([a / b for a, b in zip(t.plain, t.drafted, strict=True)])["median"] for t in chosen]
    steps, proposed = sum(t.steps for t in chosen), sum(t.proposed for t in chosen)
    return {
        "tasks": len(chosen),
        "tokens": decoded,
        "dropped_looping": sum(t.dropped for t in chosen),
        "plain_tokens_per_s": spread([decoded / s for s in plain]),
        "drafted_tokens_per_s": spread([decoded / s for s in drafted]),
        "ratio": spread([a / b for a, b in zip(plain, drafted, strict=True)]),
        "ratio_by_task": spread(by_task),
        "by_task": by_task,
        "tokens_per_step": decoded / steps,
        "drafts_proposed": proposed,
        "acceptance": sum(t.accepted for t in chosen) / max(1, proposed),
        "ms_per_step": {"plain": 1e3 * min(plain) / decoded, "drafted": 1e3 * min(drafted) / steps},
    }


def show(result: dict[str, Any], console: Console) -> None:
    """The table: a row for each set."""
    table = Table(title=f"n-gram speculation, batch 1, {result['threads']} threads", show_lines=True)
    for heading in ("", "plain tok/s", "drafted tok/s", "ratio", "by task", "bar", "tokens a step", "accepted"):
        table.add_column(heading, justify="left" if not heading else "right")

    def cell(stats: dict[str, float], digits: int) -> str:
        return f"{stats['median']:.{digits}f}\n[dim]{stats['min']:.{digits}f} to {stats['max']:.{digits}f}[/]"

    for name, entry in result["sets"].items():
        table.add_row(
            f"{name}\n[dim]{entry['tasks']} tasks, {entry['tokens']} tokens[/]",
            cell(entry["plain_tokens_per_s"], 0),
            cell(entry["drafted_tokens_per_s"], 0),
            cell(entry["ratio"], 2),
            cell(entry["ratio_by_task"], 2),
            f">= {BARS[name]}",
            f"{entry['tokens_per_step']:.2f}",
            f"{entry['acceptance']:.0%}\n[dim]of {entry['drafts_proposed']}[/]",
        )
    console.print(table)
    console.print(f"[dim]others took {result['foreign_cores']:.2f} cores at most[/]")
    for line in result["missed"]:
        console.print(f"[red]missed:[/] {line}")


def print_answers(llm: LLM, name: str, chosen: list[Task], console: Console) -> None:
    """Every prompt's end and answer, with its ratio."""
    for number, task in enumerate(chosen):
        ratio = spread([a / b for a, b in zip(task.plain, task.drafted, strict=True)])["median"]
        console.print(
            f"\n{name} {number}: {ratio:.2f}x, {len(task.answer)} tokens in {task.steps} steps, "
            f"{task.accepted} of {task.proposed} drafts accepted, {task.dropped} looping tokens dropped\n",
            llm.runtime.tokenizer.decode(task.answer),
            markup=False,
            highlight=False,
        )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=list(BARS), help="one of the two (default: both)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, help="default 3, quick 1")
    parser.add_argument("--quick", action="store_true", help="one repetition: a rough answer")
    parser.add_argument("--tokens", type=int, default=256, help="most tokens of an answer")
    parser.add_argument("--drafts", type=int, help="num_draft_tokens (default: the engine's)")
    parser.add_argument("--show", action="store_true", help="print the answers")
    parser.add_argument("--patience", type=float, default=2.0, help="seconds to wait for a quiet machine, each time")
    options = parser.parse_args()
    options.repetitions = options.repetitions or (1 if options.quick else 3)
    return options


def main() -> int:
    """Measure; 0 when every bar is met."""
    options = arguments()
    log, console = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 120)
    common: dict[str, Any] = {"threads": options.threads, "max_num_seqs": 1, "max_model_len": 2048}
    plain = LLM("smollm2", **common)
    drafts = {"num_draft_tokens": options.drafts} if options.drafts else {}
    drafting = LLM("smollm2", speculation="ngram", **common, **drafts)
    result: dict[str, Any] = {"threads": options.threads, "repetitions": options.repetitions, "sets": {}, "missed": []}
    result["foreign_cores"] = 0.0
    for name in [options.set] if options.set else list(BARS):
        prepared = prepare(plain, getattr(tasks, name)(), options.tokens)
        chosen = [task for task in prepared if len(task.answer) >= LEAST]
        log.print(f"[dim]{name}: {len(chosen)} of {len(prepared)} answers are long enough before they loop[/]")
        try:
            foreign = measure(plain, drafting, chosen, options)
        except EngineError as error:
            log.print(str(error), style="red", markup=False)
            return 1
        result["foreign_cores"] = max(result["foreign_cores"], foreign)
        result["sets"][name] = entry = summarize(chosen, options)
        if entry["ratio"]["median"] < BARS[name]:
            result["missed"].append(f"{name}: {entry['ratio']['median']:.2f}, the bar is {BARS[name]}")
        if options.show:
            print_answers(plain, name, chosen, console)
    show(result, console)
    print(json.dumps(result))
    return 1 if result["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
