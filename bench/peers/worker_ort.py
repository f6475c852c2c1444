"""ONNX Runtime GenAI, int4: static batches (it has no continuous batching of its own)."""

from __future__ import annotations

from serve import Generate, Settings, main


def build(settings: Settings) -> Generate:
    """The model with its intra-op pool set to the wanted threads; a generator per request set."""
    import json

    import numpy as np
    import onnxruntime_genai as genai

    config = genai.Config(settings.model)
    session = {"intra_op_num_threads": settings.threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = genai.Model(config)

    def generate(prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
        (count,) = set(counts)
        (length,) = {len(ids) for ids in prompts}  # equal lengths: padding would cost it time
        params = genai.GeneratorParams(model)
        # min_length is its way of ignoring end of text.
        params.set_search_options(
            batch_size=len(prompts),
            max_length=length + count,
            min_length=length + count,
            do_sample=False,
            num_beams=1,
        )
        generator = genai.Generator(model, params)
        generator.append_tokens(np.array(prompts, dtype=np.int32))
        for _ in range(count):
            generator.generate_next_token()
        return [[int(token) for token in generator.get_sequence(i)[length:]] for i in range(len(prompts))]

    return generate


if __name__ == "__main__":
    main(build)
