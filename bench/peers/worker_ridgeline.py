"""Ridgeline through its public Python API, so that scheduling, sampling and Python are all counted."""

from __future__ import annotations

from serve import Generate, Settings, main


def build(settings: Settings) -> Generate:
    """An ``LLM`` with room for every sequence."""
    from ridgeline import LLM, SamplingParams

    llm = LLM(
        settings.model,
        threads=settings.threads,
        max_num_seqs=settings.max_seqs,
        max_model_len=settings.context,
        prefix_sharing=False,  # what is measured is computing, and a repetition may bring the same prompts
        **settings.options,
    )

    def generate(prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
        params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in counts]
        return [list(result.outputs[0].token_ids) for result in llm.generate(prompts, params)]

    return generate


if __name__ == "__main__":
    main(build)
