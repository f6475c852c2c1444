"""Which kernels an operator of a plan becomes, and why: for people, read off the launches themselves."""

from __future__ import annotations

from ridgeline.backends.cuda.launch import Launch
from ridgeline.backends.cuda.lowering import FEW_TOKENS, Sizes
from ridgeline.backends.cuda.variants import buckets, over_shapes
from ridgeline.graph.ir import bound
from ridgeline.graph.plan import Plan, PlanOp


def chosen(
    plan: Plan, arch: str, tokens: int, prefills: bool, context: int, max_requests: int
) -> list[tuple[PlanOp, list[Launch]]]:
    """Every operator's launches for a step of so many tokens, in the bucket that it falls into."""
    most_tokens, rows = bound(plan.inputs["token_ids"].shape[0]), bound(plan.outputs["logits"].shape[0])
    most = Sizes(most_tokens, min(max_requests, most_tokens), rows, True)
    lowering = over_shapes(plan, arch, most, context)
    sizes = buckets(most.tokens, most.requests, most.rows)
    fitting = [s for s in sizes if s.tokens >= tokens and s.prefills == prefills]
    lowering.sizes = (fitting or sizes[-1:])[0]
    return [(op, lowering.lower(op)) for segment in plan.segments for op in segment.ops]


def workspace_bytes(plan: Plan, arch: str, context: int, max_requests: int) -> int:
    """Of what operators use one after another."""
    most_tokens, rows = bound(plan.inputs["token_ids"].shape[0]), bound(plan.outputs["logits"].shape[0])
    lowering = over_shapes(plan, arch, Sizes(most_tokens, min(max_requests, most_tokens), rows, True), context)
    return lowering.workspace.partials.nbytes + lowering.workspace.counters.nbytes


def weights_bytes(plan: Plan) -> int:
    """Of all weights as the kernels read them."""
    from ridgeline.backends.cuda import weights

    return sum(weight.nbytes() for weight in weights.shapes(plan).values())


def describe(launches: list[Launch]) -> tuple[str, str]:
    """The kernels of an operator, and the reasons for the first."""
    names = " + ".join(launch.kernel.fn.__name__.removesuffix("_kernel") for launch in launches)
    meta = launches[0].config.meta
    if "BLOCK_K" in meta:
        tile = f"{meta['BLOCK_M']}x{meta['BLOCK_N']}x{meta['BLOCK_K']}"
        return f"{names} {tile}, {launches[0].config.num_warps} warps", "; ".join(_product_reasons(launches[0]))
    if "CHUNK" in meta:
        return names, f"up to {FEW_TOKENS} tokens of a request: split over its keys, {meta['BLOCK_M']} rows a tile"
    return names, ""


def _product_reasons(launch: Launch) -> list[str]:
    meta, found = launch.config.meta, [f"{launch.args['M']} rows"]
    if meta["SPLIT"] > 1:
        how = "side by side" if meta["PARALLEL"] else "one after another"
        found.append(f"K in {meta['SPLIT']} parts {how}, by the weight's shape")
    found.append("TMA" if meta["TMA"] else "cp.async")
    if meta["SWAP"]:
        found.append("the weight is the first operand")
    if meta.get("BITS"):
        found.append(f"{meta['BITS']} bits to the activations' type in registers")
    if meta["SILU_MUL"]:
        found.append("SiLU gate as epilogue")
    return found
