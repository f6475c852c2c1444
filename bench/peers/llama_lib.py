"""llama.cpp driven in-process through its own ctypes bindings: batches in, greedy tokens or logits out."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]

if platform.machine() == "x86_64":
    # Asks Linux for the AMX tile registers (ARCH_REQ_XCOMP_PERM), which the library, driven this way, uses unasked. It
    # is refused once something has set up a small stack for signals, as torch does, so when this module is imported.
    ctypes.CDLL(None).syscall(158, 0x1023, 18)


def load_bindings(source: Path) -> Any:
    """The low-level binding module of the llama-cpp-python source tree at ``source``.

    The package's ``__init__`` imports a high-level API with dependencies nobody needs here, so an
    empty package stands in for it; the library comes from the native build beside the bindings.
    """
    os.environ["LLAMA_CPP_LIB_PATH"] = str(source / "build" / "bin")
    package = types.ModuleType("llama_cpp")
    package.__path__ = [str(source / "llama_cpp")]
    sys.modules.setdefault("llama_cpp", package)
    import importlib

    return importlib.import_module("llama_cpp.llama_cpp")


class LlamaCpp:
    """One model and one context of llama.cpp, with as many sequences as ``max_seqs``.

    Args:
        source: unpacked llama-cpp-python source tree, built in ``build/``.
        model: a GGUF file.
        threads: for generation and for prefill alike.
        max_seqs: sequences that may live side by side (each owns ``context / max_seqs`` cells).
        context: cells of the KV cache, over all sequences.
        flash: ``"on"``, ``"off"`` or ``"auto"`` (llama.cpp's default).
        kv_type: ``None`` for llama.cpp's default (fp16).
    """

    def __init__(
        self,
        source: Path,
        model: Path,
        *,
        threads: int = 2,
        max_seqs: int = 1,
        context: int = 512,
        batch: int = 2048,
        flash: str = "on",
    ) -> None:
        self.lib = lib = load_bindings(source)
        # Keep the callback alive for as long as the library may call it.
        self._quiet = lib.llama_log_callback(lambda level, text, data: None)
        lib.llama_log_set(self._quiet, None)
        lib.llama_backend_init()
        self.model = lib.llama_model_load_from_file(str(model).encode(), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = context, batch, 512, max_seqs
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = {"auto": -1, "off": 0, "on": 1}[flash]
        params.kv_unified = False  # one stream per sequence: what llama.cpp advises for unrelated prompts
        self.context = lib.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp refused the context parameters")
        self.memory = lib.llama_get_memory(self.context)
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.vocab_size = int(lib.llama_vocab_n_tokens(self.vocab))
        self.batch = lib.llama_batch_init(batch, 0, 1)
        self.capacity = batch

    def tokenize(self, text: str) -> list[int]:
        """Plain text to token ids, adding nothing and reading no control token."""
        raw = text.encode()
        out = (ctypes.c_int32 * (len(raw) + 8))()
        count = self.lib.llama_tokenize(self.vocab, raw, len(raw), out, len(out), False, False)
        if count < 0:
            raise RuntimeError("llama.cpp could not tokenize the text")
        return list(out[:count])

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """Run one batch of (token, position, sequence, wants logits)."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        code = self.lib.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode failed with code {code}")

    def _logits(self, rows: int) -> Float32:
        """[rows, vocab] logits of the last batch, a copy."""
        pointer = self.lib.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, shape=(rows, self.vocab_size)).copy()

    def all_logits(self, tokens: Sequence[int]) -> Float32:
        """[len(tokens), vocab] next-token logits of a fresh sequence, in one batch."""
        self.lib.llama_memory_clear(self.memory, False)
        self._decode([(token, i, 0, True) for i, token in enumerate(tokens)])
        return self._logits(len(tokens))

    def generate(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """``count`` greedy tokens for each prompt, end of text ignored.

        Prompts are packed into batches as long as the context allows, then all sequences advance
        together, one token a step.
        """
        self.lib.llama_memory_clear(self.memory, False)
        rows = [
            (token, i, sequence, i == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for i, token in enumerate(prompt)
        ]
        last: list[int] = []
        for start in range(0, len(rows), self.capacity):
            part = rows[start : start + self.capacity]
            self._decode(part)
            last += self._argmax(sum(row[3] for row in part))
        out = [[token] for token in last]
        for step in range(count - 1):
            self._decode([(out[s][-1], len(p) + step, s, True) for s, p in enumerate(prompts)])
            for sequence, token in enumerate(self._argmax(len(prompts))):
                out[sequence].append(token)
        return out

    def _argmax(self, rows: int) -> list[int]:
        if not rows:
            return []
        pointer = self.lib.llama_get_logits(self.context)
        logits = np.ctypeslib.as_array(pointer, shape=(rows, self.vocab_size))
        return [int(token) for token in logits.argmax(axis=1)]
