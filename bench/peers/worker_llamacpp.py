"""llama.cpp: one context, continuous batches through ``llama_decode``."""

from __future__ import annotations

from pathlib import Path

from serve import Generate, Settings, main


def build(settings: Settings) -> Generate:
    """A context with one stream of ``context`` cells per sequence, flash attention on."""
    from llama_lib import LlamaCpp

    engine = LlamaCpp(
        Path(settings.options["source"]),
        Path(settings.model),
        threads=settings.threads,
        max_seqs=settings.max_seqs,
        context=settings.max_seqs * settings.context,
        flash="on",
    )

    def generate(prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
        (count,) = set(counts)
        return engine.generate(prompts, count)

    return generate


if __name__ == "__main__":
    main(build)
