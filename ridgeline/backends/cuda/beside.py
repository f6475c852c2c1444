"""What a step launches beside its graph: cache updates before it, adjustments, sampling and settling after it.

Their sizes, and which of them a step needs, change from step to step; none takes longer for not being in a graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import torch

from ridgeline.backends.cuda.kernels import step as kernels
from ridgeline.backends.cuda.kernels.sample import sample
from ridgeline.backends.cuda.kernels.top_logprobs import MOST, top_logprobs
from ridgeline.backends.cuda.launch import Launch, cdiv
from ridgeline.backends.cuda.lowering import Cache
from ridgeline.backends.cuda.memory import padded_rows
from ridgeline.backends.cuda.step import Layout
from ridgeline.graph.ir import bound, row_bytes
from ridgeline.graph.memory import row_stride
from ridgeline.graph.plan import Plan


def update_cache(cache: Cache, updates: torch.Tensor | None, copies: torch.Tensor | None) -> list[Launch]:
    """Changed block-table cells, int32 [n, 3], and copied blocks, int32 [n, 2], of a cache group."""
    found = [] if updates is None else kernels.put_cells(updates, cache.tables)
    if copies is not None:
        for tensor in (cache.k, cache.v, cache.k_scales, cache.v_scales):
            found += [] if tensor is None else kernels.copy_blocks(copies, tensor)
    return found


def sample_and_settle(
    fields: Mapping[str, torch.Tensor],
    settles: str,
    logits: torch.Tensor,
    results: torch.Tensor,
    last_tokens: torch.Tensor,
    adjusted: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    mask: torch.Tensor | None,
    filters: bool,
    arch: str,
) -> list[Launch]:
    """Samples every row and settles the requests that a field names.

    Args:
        fields: of the step's block (``step.Layout``); settles: "settles" or "settles_masked".
        logits: fp32 [rows, vocabulary].
        results: int32 [3, rows]: tokens, which stand, log probabilities.
        adjusted: token counts, bias and penalties, as ``sample`` takes them; None: no row asks for any.
        mask: int32 [rows, ceil(vocabulary / 32)]; None: every token is allowed.
        filters: whether any row has top-k or top-p.
    """
    tokens, accepted, logprobs = results.unbind(0)
    names = ("sample_indices", "top_ks", "targets", "temperatures", "top_ps", "floors", "seeds")
    params = {name: fields[name] for name in names} | {"positions": fields["next_positions"]}
    counts, bias, penalties = adjusted or (None, None, None)
    launches = sample(
        logits,
        params,
        tokens,
        logprobs.view(torch.float32),
        slots=fields["adjusted"],
        counts=counts,
        penalties=penalties,
        bias=bias,
        mask=mask,
        filters=filters,
        arch=arch,
    )
    starts = (fields["row_starts"], fields["query_starts"], fields["slots"])
    return launches + kernels.settle(
        tokens, fields[settles], fields["sample_rows"], *starts, fields["fed"], accepted, last_tokens
    )


def every_launch_beside(plan: Plan, layout: Layout, caches: Sequence[Cache], arch: str) -> list[Launch]:
    """A launch, over shapes, of every variant that steps can ask for beside their graphs."""

    def ints(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    found: list[Launch] = []
    for cache in caches:
        found += update_cache(cache, ints(1, 3), ints(1, 2))
    value = plan.outputs["logits"]
    rows, vocab = layout.sizes.rows, bound(value.shape[1])
    padded = torch.empty(rows, row_stride(row_bytes(value)) // 4, dtype=torch.float32, device="meta")
    logits, fields = padded[:, :vocab], layout.tensors(torch.empty(layout.nbytes, dtype=torch.uint8, device="meta"))
    counts, bias, penalties = ints(2, vocab), ints(2, vocab).view(torch.float32), ints(2, 3).view(torch.float32)
    found += kernels.adjust(ints(1, 4), counts, bias)
    best = (ints(rows, MOST), ints(rows, MOST).view(torch.float32))
    found += top_logprobs(logits, ints(rows), fields["wanted"], *best, arch=arch)
    masks = (None, ints(rows, cdiv(vocab, 32)))
    results, last = ints(3, padded_rows(rows)), ints(rows)
    for adjusted, mask, filters in product((None, (counts, bias, penalties)), masks, (False, True)):
        found += sample_and_settle(fields, "settles", logits, results, last, adjusted, mask, filters, arch)
    return found
