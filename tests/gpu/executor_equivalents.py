# ruff: noqa: E501 (keys are source text)
"""Mutants of the CUDA executor that change nothing which can be seen, each with the reason.

The key is (module, function, changed text, new text), so that it holds while lines move.
"""

from __future__ import annotations

Key = tuple[str, str, str, str]

REASONS: dict[str, list[Key]] = {
    "of a shape on the meta device, how long it is: a variant's key reads its type and its address": [
        ("beside", "every_launch_beside", "ints(1, 2)", "ints(2, 1)"),
        (
            "beside",
            "every_launch_beside",
            "update_cache(cache, ints(1, 3), ints(1, 2))",
            "update_cache(cache, ints(1, 2), ints(1, 3))",
        ),
        ("beside", "every_launch_beside", "ints(1, 3)", "ints(3, 1)"),
        ("beside", "every_launch_beside", "1 in ints(1, 3)", "2"),
        ("beside", "every_launch_beside", "2 in ints(2, 3)", "1"),
        ("beside", "every_launch_beside", "2 in ints(2, vocab)", "1"),
        ("beside", "every_launch_beside", "2 in ints(2, vocab)", "3"),
        ("beside", "every_launch_beside", "4 in ints(1, 4)", "3"),
        ("variants", "over_shapes", "1 in max(1, context // spec.block_size)", "2"),
        ("variants", "over_shapes", "1 in requests + 1", "2"),
        ("variants", "over_shapes", "floats(context, half)", "floats(half, context)"),
        ("executor", "CudaExecutor.__init__", "1 in -1", "0"),
    ],
    "another name for the same thing: keys and tickets are only compared with each other": [
        ("variants", "_known", "address % 16 == 0", "address % 16 != 0"),
        ("variants", "_known", "1 in 1 if value == 1 else (width, value % 16 == 0)", "2"),
        ("executor", "CudaExecutor.launch", "self._count += 1", "self._count -= 1"),
        ("executor", "CudaExecutor.__init__", "0 in self._count = 0", "1"),
    ],
    "padding that nobody reads, or that says the same": [
        ("step", "encode", "1 in _padded(f['settles_masked'], np.where(held, rows['target'], 1), 1)", "2"),
        ("step", "encode", "0 in f['seeds'][s:] = 0", "1"),
        ("step", "encode", "1 in _padded(f['settles'], np.where(held, 1, rows['target']), 1)", "2"),
        ("lowering", "Lowering._lower_attention", "1 in requests + 1", "2"),
        (
            "lowering",
            "Lowering._lower_attention",
            ":requests + 1 in step.query_starts[:requests + 1]",
            ":requests + 1 + 1",
        ),
        ("lowering", "Lowering._lower_rope_kv_write", ":tokens in step.positions[:tokens]", ":tokens + 1"),
        ("lowering", "Lowering._lower_attention", ":requests in step.context_lens[:requests]", ":requests + 1"),
        (
            "lowering",
            "Lowering._lower_embed",
            ":self.sizes.tokens in self.step.token_ids[:self.sizes.tokens]",
            ":self.sizes.tokens + 1",
        ),
    ],
    "a few bytes more": [
        ("memory", "DeviceMemory.allocate", "4 in max(4, counters)", "5"),
        ("memory", "Upload.place", "16 in max(16, -(-source.nbytes // 16) * 16)", "17"),
    ],
    "only the numbers of tokens, requests and rows are read of it": [
        ("variants", "reachable", "True in Sizes(tokens, min(max_requests, tokens), rows, True)", "False"),
    ],
    "beyond what a row wants the kernel leaves -1 and NaN, which is what is put there": [
        ("executor", "CudaExecutor._best", "0 in np.maximum(wanted, 0)", "1"),
    ],
    "a default that everybody overrides, or a check of lengths that are always the same": [
        ("lowering", "Lowering", "True in batch_invariant: bool = True", "False"),
        ("lowering", "Lowering", "False in Sizes(1, 1, 1, False)", "True"),
        ("step", "_cells", "True in strict=True", "False"),
    ],
    "a cache has scales of both or of neither": [
        (
            "lowering",
            "Lowering._scales",
            "cache.k_scales is None or cache.v_scales is None",
            "cache.k_scales is None",
        ),
    ],
    "every plan for the CUDA target selects its rows before the last norm": [
        (
            "executor",
            "CudaExecutor._capture",
            "normed is not None and normed.shape[0] == self.plan.inputs['sample_rows'].shape[0]",
            "normed is not None",
        ),
    ],
    "numpy takes any negative length for the one to be found": [
        ("executor", "CudaExecutor._send", "1 in -1", "2"),
        ("executor", "CudaExecutor._fetch", "1 in -1", "2"),
        ("step", "Layout.arrays", "1 in -1", "2"),
    ],
    "what is left out is implied by the rest": [
        ("executor", "CudaExecutor._capture", "normed is not None and selected", "selected"),
        ("executor", "CudaExecutor.finish", "masks is not None and given", "given"),
    ],
    "the same bytes in the same order: the last two dimensions are merged again": [
        ("weights", "merged", "p.reshape(-1, 1, interleave, p.shape[-1])", "p.reshape(-1, 1, p.shape[-1], interleave)"),
    ],
}

EQUIVALENT: frozenset[Key] = frozenset(
    (f"ridgeline.backends.cuda.{module}", *rest) for keys in REASONS.values() for module, *rest in keys
)
