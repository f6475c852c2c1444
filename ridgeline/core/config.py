"""Engine options: one dataclass, from whose fields the command line's flags are generated."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, fields
from typing import Any

from ridgeline.core.errors import ConfigError
from ridgeline.core.types import unknown_argument

KV_DTYPES = ("auto", "bf16", "f16", "f32", "int8", "fp8")
BACKENDS = ("cpu", "reference", "cuda")
DEVICES = ("gpu", "emulated")
SPECULATIONS = ("ngram",)
ISAS = ("generic", "avx2", "avx512", "amx")
ACTIVATION_DTYPES = ("auto", "int8", "bf16")

_DEFAULT_POOL_TOKENS = 2048  # per sequence, when the pool's size is left to us
_DEFAULT_ROWS = 64  # so that prompt logprobs and pooling go on in chunks of some size
_MOST = 2**31 - 1  # what an int32 holds: the native parts count in those
_MOST_THREADS = 1024
_MOST_RECORDED_STEPS = 2**16
_KV_CHUNK = 256  # attention's partial results cover this many tokens; a block must divide it


def _option(default: Any, text: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class EngineConfig:
    """What an engine is built from. Raises ConfigError for a value that cannot work.

    Every field's help text lives in its metadata; ``kv blocks`` are ``block_size`` tokens each.
    """

    model: str = _option("smollm2", "alias or path of a GGUF file")
    backend: str = _option("cpu", "cpu: native kernels; cuda: a GPU; reference: numpy, slow and exact", BACKENDS)
    device: str | None = _option(
        None, "of the cuda backend: gpu (default), or emulated: its kernels interpreted, very slow and exact", DEVICES
    )
    batch_invariant: bool = _option(
        True, "of the cuda backend: a row's bits hang on nothing beside it; without, a few products may go faster"
    )
    threads: int | None = _option(None, "CPU threads (default: what affinity and cgroup allow)")
    isa: str | None = _option(None, "force an instruction set (default: $RIDGELINE_ISA, or the best here)", ISAS)
    activation_dtype: str = _option(
        "auto",
        "of the cpu backend: what multiplies quantized weights (auto: int8, or bf16 on AMX)",
        ACTIVATION_DTYPES,
    )
    kv_dtype: str = _option(
        "auto", "format of the KV cache (auto: bf16; int8 where bf16 activations multiply quantized weights)", KV_DTYPES
    )
    max_num_seqs: int = _option(32, "most requests in one step")
    max_num_batched_tokens: int = _option(512, "most tokens in one step")
    max_model_len: int | None = _option(None, "longest sequence, prompt and output (default: the model's context)")
    block_size: int = _option(16, "tokens in a block of the KV cache (16 on a CPU)")
    num_kv_blocks: int | None = _option(
        None,
        "blocks in the KV cache (default: 2048 tokens for each of max_num_seqs, memory being taken as it is used, "
        "and while idle 128 MiB or 32 blocks more at most; on a GPU all that its memory has room for)",
    )
    kv_cache_bytes: str | None = _option(
        None, "size of the KV cache, such as 512MiB or 2GiB or a number of bytes (instead of num_kv_blocks)"
    )
    prefix_sharing: bool = _option(True, "requests share the cache of equal prefixes")
    max_sampled_rows: int | None = _option(
        None, "rows sampled or scored in one step (default: 64, or one for each request and its drafts)"
    )
    max_open_steps: int = _option(1, "steps under way at once, 1 or 2; the cpu backend runs one")
    speculation: str | None = _option(None, "draft tokens ahead, from n-grams the request holds already", SPECULATIONS)
    num_draft_tokens: int = _option(7, "most drafts of one request in a step")
    ngram_min: int = _option(2, "shortest n-gram that is looked up")
    ngram_max: int = _option(4, "longest n-gram that is looked up")
    max_queued_requests: int | None = _option(None, "most requests that may wait (default: no bound)")
    max_queued_tokens: int | None = _option(None, "most tokens of requests that may wait (default: no bound)")
    max_preemptions: int = _option(4, "a request that had to start again so often comes before all others")
    priority_aging_steps: int = _option(256, "steps of waiting that outweigh one level of priority")
    step_target_us: int | None = _option(
        None, "microseconds that a step should take while requests decode; long prompts are cut finer to meet it"
    )
    flight_record_steps: int = _option(64, "steps kept for a flight record, which ridgeline replay runs again; 0: none")
    flight_record_dir: str | None = _option(
        None, "where a flight record is written when the engine fails (default: nowhere); it holds the prompts' tokens"
    )
    flight_record_logits: bool = _option(False, "keep a hash of each row's logits in the flight record; takes time")
    cuda_graphs: bool = _option(
        True, "of the cuda backend: a step's operators are one CUDA graph; without, each is launched, for profilers"
    )
    nvtx: bool = _option(False, "NVTX ranges of steps, their parts, layers and operators, for Nsight; needs nvtx")
    seed: int | None = _option(None, "draws the seeds of requests that bring none (default: from the system)")

    def __init__(self, **values: Any) -> None:
        known = {f.name: f.default for f in fields(type(self))}
        for name in values:
            if name not in known:
                raise ConfigError(unknown_argument("EngineConfig", name, list(known)))
        for name, default in known.items():
            object.__setattr__(self, name, values.get(name, default))
        if self.isa is None and self.backend != "reference":
            object.__setattr__(self, "isa", os.environ.get("RIDGELINE_ISA") or None)
        self._check()

    def _check(self) -> None:
        if not isinstance(self.model, (str, os.PathLike)) or not os.fspath(self.model):
            raise ConfigError(f"model must be an alias or a path, got {self.model!r}")
        object.__setattr__(self, "model", os.fspath(self.model))
        for name in (
            *("max_num_seqs", "max_num_batched_tokens", "block_size", "num_draft_tokens", "ngram_min", "ngram_max"),
            "priority_aging_steps",
        ):
            self._need_int(name, 1, _MOST)
        self._need_int("max_preemptions", 1, _MOST)
        self._need_int("flight_record_steps", 0, _MOST_RECORDED_STEPS)
        self._need_int("max_open_steps", 1, 2)
        for name, least, most in (
            ("max_sampled_rows", 1, _MOST),
            ("max_queued_requests", 1, _MOST),
            ("max_queued_tokens", 1, _MOST),
            ("step_target_us", 1, _MOST),
            ("threads", 1, _MOST_THREADS),
            ("max_model_len", 1, _MOST),
            ("num_kv_blocks", 1, _MOST),
            ("seed", 0, 2**64 - 1),
        ):
            if getattr(self, name) is not None:
                self._need_int(name, least, most)
        for f in fields(self):
            choices, value = f.metadata["choices"], getattr(self, f.name)
            if choices and value is not None and value not in choices:
                raise ConfigError(f"{f.name} must be one of {', '.join(choices)}, got {value!r}")
        for name in ("threads", "isa"):
            if self.backend != "cpu" and getattr(self, name) is not None:
                raise ConfigError(f"the {self.backend} backend takes no {name}: leave it out, or use backend 'cpu'")
        if self.backend != "cpu" and self.activation_dtype != "auto":
            raise ConfigError(
                f"the {self.backend} backend takes no activation_dtype: leave it out, or use backend 'cpu'"
            )
        if self.backend == "cuda" and self.kv_dtype == "f32":
            raise ConfigError("the cuda backend keeps no f32 cache: kv_dtype may be auto, bf16, f16, int8 or fp8")
        if self.backend != "cuda" and self.kv_dtype == "fp8":
            raise ConfigError(f"the {self.backend} backend keeps no fp8 cache: kv_dtype int8 takes as little memory")
        if self.backend != "cuda" and self.device is not None:
            raise ConfigError(f"the {self.backend} backend takes no device: leave it out, or use backend 'cuda'")
        if _KV_CHUNK % self.block_size:
            raise ConfigError(f"block_size must divide {_KV_CHUNK}, got {self.block_size}")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least max_num_seqs "
                f"({self.max_num_seqs}): every running request decodes one token a step"
            )

        self._check_scheduling()
        self._check_recording()

    def _check_recording(self) -> None:
        directory = self.flight_record_dir
        if directory is not None:
            if not isinstance(directory, (str, os.PathLike)) or not os.fspath(directory):
                raise ConfigError(f"flight_record_dir must be a path, got {directory!r}")
            object.__setattr__(self, "flight_record_dir", os.fspath(directory))
        for name, given in (
            ("flight_record_dir", directory is not None),
            ("flight_record_logits", self.flight_record_logits),
        ):
            if given and not self.flight_record_steps:
                raise ConfigError(f"{name} needs recorded steps: set flight_record_steps above 0")

    def _check_scheduling(self) -> None:
        for name in ("prefix_sharing", "flight_record_logits", "batch_invariant", "cuda_graphs", "nvtx"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.ngram_min > self.ngram_max:
            raise ConfigError(f"ngram_min ({self.ngram_min}) must be at most ngram_max ({self.ngram_max})")
        if self.max_open_steps > 1 and self.backend == "cpu":
            raise ConfigError("the cpu backend runs one step at a time: leave max_open_steps at 1")
        if self.max_sampled_rows is not None and self.max_sampled_rows < self.max_num_seqs:
            raise ConfigError(
                f"max_sampled_rows ({self.max_sampled_rows}) must be at least max_num_seqs ({self.max_num_seqs}): "
                "every running request samples a row a step"
            )
        if self.kv_cache_bytes is not None:
            parse_bytes("kv_cache_bytes", self.kv_cache_bytes)
            if self.num_kv_blocks is not None:
                raise ConfigError("kv_cache_bytes and num_kv_blocks both size the cache: give one of them")

    def sampled_rows(self) -> int:
        """Rows that a step may sample or score."""
        if self.max_sampled_rows is not None:
            return self.max_sampled_rows
        each = 1 + self.num_draft_tokens if self.speculation else 1
        wanted = max(_DEFAULT_ROWS, self.max_num_seqs * each)
        return max(self.max_num_seqs, min(wanted, self.max_num_batched_tokens))

    def _need_int(self, name: str, least: int, most: int) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
        if value > most:
            raise ConfigError(f"{name} must be at most {most}, got {value}")

    def model_len(self, context_length: int) -> int:
        """Longest sequence in tokens, given the model's own ``context_length``; raises ConfigError above it."""
        if self.max_model_len is None:
            return context_length
        if self.max_model_len > context_length:
            raise ConfigError(
                f"max_model_len is {self.max_model_len}, but the model's context is {context_length} tokens"
            )
        return self.max_model_len

    @property
    def fills_the_gpu(self) -> bool:
        """Whether the cache takes what a GPU's memory leaves."""
        explicit = self.num_kv_blocks is not None or self.kv_cache_bytes is not None
        return self.backend == "cuda" and self.device != "emulated" and not explicit

    def pool_blocks(self, context_length: int, block_bytes: int = 0) -> int:
        """Blocks of a cache: what is asked for, or room for every sequence and for one at full length.

        ``block_bytes``: bytes of one block in all groups, for a cache sized in bytes. Raises ConfigError when that
        is more than can be counted, or less than a block.
        """
        if self.num_kv_blocks is not None:
            return self.num_kv_blocks
        if self.kv_cache_bytes is not None:
            blocks = parse_bytes("kv_cache_bytes", self.kv_cache_bytes) // max(1, block_bytes)
            if not 1 <= blocks <= _MOST:
                raise ConfigError(
                    f"kv_cache_bytes {self.kv_cache_bytes} gives {blocks} blocks of {block_bytes} bytes: "
                    f"it must give from 1 to {_MOST}"
                )
            return blocks
        longest = self.model_len(context_length)
        each = -(-min(longest, _DEFAULT_POOL_TOKENS) // self.block_size)
        blocks = max(self.max_num_seqs * each, -(-longest // self.block_size))
        if blocks > _MOST:
            raise ConfigError(f"max_num_seqs {self.max_num_seqs} asks for {blocks} KV blocks, above {_MOST}: lower it")
        return blocks


def parse_bytes(name: str, value: str | int) -> int:
    """Bytes of a size such as 1000000, "512MiB" or "2 GB" (KiB is 1024, KB is 1000); raises ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(value), re.IGNORECASE)
    if match is None or isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ConfigError(f"{name} must be a size such as 512MiB, 2GiB or a number of bytes, got {value!r}")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
