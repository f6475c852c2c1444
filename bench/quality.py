"""How much quality the engine's arithmetic costs, beside llama.cpp on the same file and text.

    python bench/quality.py [--tokens 20000] [--activation-dtype auto|int8|bf16] [--kv-dtype auto|bf16|f16|f32|int8]

Over windows of 512 tokens spread over CPython's ``pydoc_data.topics``, the next-token distribution of
every position is compared with that of transformers in float32 on the dequantized weights: mean
KL(float32 || engine) and how often the likeliest token agrees. Intervals are 95%, from a paired bootstrap
over runs of 64 tokens. Needs torch, transformers and gguf, and llama.cpp
(``python bench/compare.py --install llamacpp``). Exit status 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from peers import install
from peers.llama_lib import LlamaCpp
from rich.console import Console
from rich.table import Table

Float32 = npt.NDArray[np.float32]
Logits = Callable[[list[int]], Float32]
"""One window of token ids -> next-token logits [window, vocab]."""

WINDOW = 512
RUN = 64  # tokens resampled together: neighbours are not independent
RESAMPLES = 4000
KL_BAR = 1.05
BASE = "llama.cpp"
OURS = "Ridgeline"


def topics_text() -> str:
    """CPython's help topics, in the order of their names."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def windows(tokens: list[int], wanted: int) -> list[list[int]]:
    """At least ``wanted`` tokens in windows spread evenly over the text."""
    count = -(-wanted // WINDOW)
    available = len(tokens) // WINDOW
    if count > available:
        raise SystemExit(f"the text has {available * WINDOW} tokens in windows of {WINDOW}: ask for fewer")
    starts = [i * available // count * WINDOW for i in range(count)]
    return [tokens[start : start + WINDOW] for start in starts]


def oracle(path: Path, threads: int) -> Logits:
    """transformers' Llama in float32 on the weights as the gguf package dequantizes them.

    None of Ridgeline's own reading of the file is involved, so a mistake in it shows as divergence.
    """
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    reader = GGUFReader(str(path))

    def meta(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    heads, kv_heads = meta("attention.head_count"), meta("attention.head_count_kv")
    weights = {
        t.name: torch.from_numpy(np.array(dequantize(t.data, t.tensor_type), np.float32)) for t in reader.tensors
    }
    config = LlamaConfig(
        vocab_size=weights["token_embd.weight"].shape[0],
        hidden_size=meta("embedding_length"),
        intermediate_size=meta("feed_forward_length"),
        num_hidden_layers=meta("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=meta("attention.layer_norm_rms_epsilon"),
        max_position_embeddings=meta("context_length"),
        rope_parameters={"rope_type": "default", "rope_theta": meta("rope.freq_base")},
        tie_word_embeddings="output.weight" not in weights,
    )
    model: Any = LlamaForCausalLM(config)
    model.eval()
    model.load_state_dict(_hf_names(weights, {"attn_q": heads, "attn_k": kv_heads}))

    def logits(tokens: list[int]) -> Float32:
        with torch.inference_mode():
            return np.asarray(model(torch.tensor([tokens])).logits[0].numpy())

    return logits


def _hf_names(weights: dict[str, Any], rotary_heads: dict[str, int]) -> dict[str, Any]:
    """GGUF tensors under transformers' names, the converter's row permutation of q and k undone."""
    inner = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    outer = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    state = {}
    for name, value in weights.items():
        stem = name.removesuffix(".weight")
        if stem in outer:
            state[f"{outer[stem]}.weight"] = value
            continue
        _, layer, part = stem.split(".")
        if part in rotary_heads:
            n, k = value.shape
            value = value.reshape(rotary_heads[part], n // rotary_heads[part] // 2, 2, k).transpose(1, 2).reshape(n, k)
        state[f"model.layers.{layer}.{inner[part]}.weight"] = value
    state.setdefault("lm_head.weight", weights["token_embd.weight"])
    return state


def ridgeline(path: Path, threads: int, **dtypes: str) -> Logits:
    """Our native executor, one window a step, every row sampled."""
    from ridgeline.core.config import EngineConfig
    from ridgeline.core.types import SAMPLING_DTYPE, Batch
    from ridgeline.engine.load import load_runtime

    config = EngineConfig(
        model=str(path),
        threads=threads,
        **dtypes,
        max_num_seqs=WINDOW,  # as many rows may be sampled
        max_num_batched_tokens=WINDOW,
        max_model_len=WINDOW,
        num_kv_blocks=-(-WINDOW // 16),
        block_size=16,
    )
    executor: Any = load_runtime(config).executor
    sampling = np.zeros(WINDOW, SAMPLING_DTYPE)
    sampling["top_p"], sampling["num_logprobs"] = 1, -1
    rows = np.arange(WINDOW, dtype=np.int32)
    cells = np.arange(config.num_kv_blocks or 0, dtype=np.int32)
    table = np.stack([np.zeros_like(cells), cells, cells], axis=1)

    def logits(tokens: list[int]) -> Float32:
        batch = Batch(
            token_ids=np.array(tokens, np.int32),
            positions=rows,
            slots=np.array([0], np.int32),
            query_starts=np.array([0, WINDOW], np.int32),
            context_lens=np.array([WINDOW], np.int32),
            sample_rows=rows,
            sampling=sampling,
            block_updates=[table],
        )
        executor.finish(executor.launch(batch))
        return np.array(executor.last_logits, np.float32)

    return logits


@dataclass
class Score:
    """Per-token results of one engine: KL in nats, and whether the likeliest token agrees."""

    kl: list[npt.NDArray[np.float64]] = field(default_factory=list)
    agrees: list[npt.NDArray[np.bool_]] = field(default_factory=list)

    def runs(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Means over runs of RUN tokens: (KL, agreement)."""
        kl, agrees = np.concatenate(self.kl), np.concatenate(self.agrees).astype(np.float64)
        return kl.reshape(-1, RUN).mean(axis=1), agrees.reshape(-1, RUN).mean(axis=1)


def log_softmax(logits: Float32) -> Float32:
    """Row-wise log probabilities, in place; the sum is taken in float64."""
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
    return logits


def compare(texts: list[list[int]], truth: Logits, engines: dict[str, Logits], log: Console) -> dict[str, Score]:
    """Run every window through every engine; nothing is kept but two numbers a token."""
    scores = {name: Score() for name in engines}
    start = time.monotonic()
    for done, tokens in enumerate(texts, 1):
        expected = log_softmax(np.array(truth(tokens)))
        weight = np.exp(expected)
        top = expected.argmax(axis=1)
        for name, engine in engines.items():
            raw = np.array(engine(tokens))
            if raw.shape != expected.shape or not np.isfinite(raw).all():
                raise SystemExit(f"{name} returned logits of shape {raw.shape}, or NaN among them")
            got = log_softmax(raw)
            scores[name].agrees.append(got.argmax(axis=1) == top)
            np.subtract(expected, got, out=got)
            scores[name].kl.append(np.einsum("tv,tv->t", weight, got, dtype=np.float64))
        if done % 8 == 0 or done == len(texts):
            log.print(f"[dim]{done} of {len(texts)} windows, {time.monotonic() - start:.0f} s[/]")
    return scores


def interval(values: npt.NDArray[np.float64]) -> list[float]:
    """The middle 95%."""
    return [float(v) for v in np.percentile(values, [2.5, 97.5])]


def summarize(scores: dict[str, Score]) -> dict[str, Any]:
    """Means, and ratio and difference to llama.cpp with their bootstrap intervals."""
    base_kl, base_top = scores[BASE].runs()
    draws = np.random.default_rng(0).integers(0, len(base_kl), (RESAMPLES, len(base_kl)))
    result: dict[str, Any] = {}
    for name, score in scores.items():
        kl, top = score.runs()
        result[name] = {
            "kl": float(kl.mean()),
            "kl_ratio": float(kl.mean() / base_kl.mean()),
            "kl_ratio_95": interval(kl[draws].mean(axis=1) / base_kl[draws].mean(axis=1)),
            "top1": float(top.mean()),
            "top1_difference": float((top - base_top).mean()),
            "top1_difference_95": interval((top - base_top)[draws].mean(axis=1)),
        }
    return result


def apart(logits: Logits) -> Logits:
    """On a thread of its own: llama.cpp configures AMX tiles once a thread and expects nobody else to release them."""
    thread = ThreadPoolExecutor(1)
    return lambda tokens: thread.submit(logits, tokens).result()


def verdict(ours: dict[str, Any]) -> dict[str, bool]:
    """Which bars hold: KL at most 1.05 times llama.cpp's, top-1 not lower by more than chance."""
    return {"kl": ours["kl_ratio"] <= KL_BAR, "top1": ours["top1_difference_95"][1] >= 0}


def show(result: dict[str, Any], tokens: int, console: Console) -> None:
    """The table."""
    table = Table(title=f"next-token distribution against float32 on the same weights, {tokens:,} tokens")
    for heading in ("", "mean KL, nats", f"x {BASE}", "95%", "top-1 agreement", f"less {BASE}'s", "95%"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, row in result.items():
        (low, high), (less, more) = row["kl_ratio_95"], row["top1_difference_95"]
        table.add_row(
            name,
            f"{row['kl']:.6f}",
            f"{row['kl_ratio']:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{row['top1']:.2%}",
            f"{row['top1_difference']:+.2%}",
            f"{less:+.2%} to {more:+.2%}",
        )
    console.print(table)


def main() -> int:
    """Run; 0 when our bars hold (or we are not in the run)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--kv-dtype", default="auto", choices=["auto", "bf16", "f16", "f32", "int8"], help="ours")
    parser.add_argument("--activation-dtype", default="auto", choices=["auto", "int8", "bf16"], help="ours")
    parser.add_argument("--model", type=Path, default=None, help="a GGUF of the llama architecture (default: smollm2)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-ridgeline", action="store_true", help="llama.cpp alone")
    options = parser.parse_args()
    log, console = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 140)
    path = options.model or install.model_path()
    if not (install.LLAMACPP_SOURCE / "build" / "bin" / "libllama.so").exists():
        log.print("llama.cpp is not installed: python bench/compare.py --install llamacpp")
        return 1
    settings: dict[str, Any] = {"threads": options.threads, "context": WINDOW}
    dtypes = {"activation_dtype": options.activation_dtype, "kv_dtype": options.kv_dtype}
    default = LlamaCpp(install.LLAMACPP_SOURCE, path, flash="auto", **settings)
    plain = LlamaCpp(install.LLAMACPP_SOURCE, path, flash="off", **settings)
    engines: dict[str, Logits] = {
        BASE: apart(default.all_logits),
        f"{BASE}, flash attention off": apart(plain.all_logits),
    }
    if not options.no_ridgeline:
        engines[OURS] = ridgeline(path, options.threads, **dtypes)
    texts = windows(default.tokenize(topics_text()), options.tokens)
    scores = compare(texts, oracle(path, options.threads), engines, log)
    result = summarize(scores)
    total = len(texts) * WINDOW
    show(result, total, console)
    passed = verdict(result[OURS]) if OURS in result else {}
    for name, ok in passed.items():
        console.print(f"{name}: {'[green]holds[/]' if ok else '[red]missed[/]'}")
    print(json.dumps({"tokens": total, **dtypes, "engines": result, "bars": passed}))
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
