"""OpenVINO GenAI: its continuous batching pipeline on the IR made from the GGUF."""

from __future__ import annotations

from serve import Generate, Settings, main

BLOCK = 32  # tokens in one of its CPU cache blocks


def build(settings: Settings) -> Generate:
    """A pipeline with room for every sequence, 512 tokens a step, no prefix cache."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.num_kv_blocks = settings.max_seqs * (-(-settings.context // BLOCK) + 1)
    scheduler.max_num_batched_tokens = 512
    scheduler.max_num_seqs = settings.max_seqs
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = False
    pipeline = genai.ContinuousBatchingPipeline(
        settings.model, scheduler, "CPU", {"INFERENCE_NUM_THREADS": settings.threads}
    )

    def wanting(count: int) -> genai.GenerationConfig:
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = count, True, False
        return config

    def generate(prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
        inputs = [ov.Tensor(np.array([ids], dtype=np.int64)) for ids in prompts]
        results = pipeline.generate(inputs, [wanting(count) for count in counts])
        return [[int(token) for token in result.m_generation_ids[0]] for result in results]

    return generate


if __name__ == "__main__":
    main(build)
