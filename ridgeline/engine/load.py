"""From engine options to a running engine: the model's file, its plan, an executor, a tokenizer."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ridgeline.core.config import EngineConfig
from ridgeline.core.errors import ConfigError, ModelFileError, UnsupportedError
from ridgeline.core.ranges import NvtxRanges, within
from ridgeline.core.types import Executor
from ridgeline.engine.engine import Engine, EngineLimits
from ridgeline.engine.identity import environment
from ridgeline.engine.ledger import Ledger, make_ledger
from ridgeline.engine.planning import activation_dtype, cache_dtype, hidden_dtype
from ridgeline.engine.recorder import FlightRecorder
from ridgeline.engine.text import Detokenizer
from ridgeline.graph.ir import Graph
from ridgeline.graph.plan import Plan, compile
from ridgeline.graph.target import cuda_target, naive_target
from ridgeline.models.load import Model, load_model
from ridgeline.models.registry import resolve

if TYPE_CHECKING:
    from ridgeline.text.chat import ChatTemplate
    from ridgeline.text.tokenizer import Tokenizer

T = TypeVar("T")

_SCHEDULING = (
    *("max_open_steps", "prefix_sharing", "speculation", "num_draft_tokens", "ngram_min", "ngram_max"),
    *("max_queued_requests", "max_queued_tokens", "max_preemptions", "priority_aging_steps", "step_target_us"),
)
"""Options that the engine's limits take as they are."""


@dataclass
class Runtime:
    """A loaded model and the engine that runs it.

    ``load_seconds`` counts from the file to a ready engine; ``ledger`` says where the memory goes.
    """

    config: EngineConfig
    model: Model
    plan: Plan
    executor: Executor
    tokenizer: Tokenizer
    engine: Engine
    load_seconds: float
    ledger: Ledger
    _chat: ChatTemplate | None = field(default=None, repr=False)

    def chat_template(self) -> ChatTemplate:
        """The model's chat template, read on first use; raises UnsupportedError when its file has none."""
        if self._chat is None:
            from ridgeline.text.chat import ChatTemplate

            with _naming(self.model.file.path):
                self._chat = ChatTemplate.from_gguf(self.model.metadata)
        return self._chat


def load_runtime(config: EngineConfig) -> Runtime:
    """Load ``config.model``: its plan first, then one thread packs its weights, in native code, while this one builds
    the tokenizer.

    Raises ModelFileError, UnsupportedError or ConfigError, the last also when there is not enough memory.
    """
    try:
        return _load(config)
    except MemoryError:
        raise ConfigError(
            f"there is not enough memory for max_num_batched_tokens {config.max_num_batched_tokens}, max_num_seqs "
            f"{config.max_num_seqs} and num_kv_blocks {config.num_kv_blocks or 'by default'}: lower one of them"
        ) from None


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """A vocabulary is a hundred thousand objects, none of them garbage: the collector would spend a tenth of the time
    on going through them."""
    collects = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if collects:
            gc.enable()


def _load(config: EngineConfig) -> Runtime:
    start = time.perf_counter()
    with _nothing_collected():
        model = load_model(resolve(config.model))
    max_len = config.model_len(model.config.context_length)
    num_blocks = None
    if not config.fills_the_gpu:
        num_blocks = config.pool_blocks(model.config.context_length, _block_bytes(config, model))
        if num_blocks * config.block_size < 2:
            raise ConfigError("num_kv_blocks must hold at least 2 tokens: raise it or block_size")
    with _naming(model.file.path):
        plan, build = plan_executor(config, model, max_len, num_blocks)
        packing = _Background(build)
        with _nothing_collected():
            tokenizer, detokenizer = _make_tokenizer(model)
        executor = packing.result()
    limits = EngineLimits(
        max_requests=config.max_num_seqs,
        max_tokens=config.max_num_batched_tokens,
        max_len=max_len,
        vocab_size=model.config.vocab_size,
        block_size=config.block_size,
        num_blocks=executor.num_blocks if num_blocks is None else [num_blocks] * len(plan.caches),  # type: ignore[attr-defined]
        max_sampled_rows=config.sampled_rows(),
        **{name: getattr(config, name) for name in _SCHEDULING},
    )
    engine = Engine(
        executor,
        limits,
        eos_ids=tokenizer.eos_ids,
        detokenizer=detokenizer,
        encode_word=tokenizer.encode_plain,
        seed=config.seed,
        recorder=_make_recorder(config, model, executor, limits),
    )
    if config.nvtx:
        engine.trace(within(NvtxRanges()))
    ledger = make_ledger(plan, executor, limits, config.backend)
    return Runtime(config, model, plan, executor, tokenizer, engine, time.perf_counter() - start, ledger)


def _make_recorder(
    config: EngineConfig, model: Model, executor: Executor, limits: EngineLimits
) -> FlightRecorder | None:
    if not config.flight_record_steps:
        return None
    return FlightRecorder(
        config.flight_record_steps,
        limits,
        describe=lambda: environment(config, _kv_dtype(config, model), model.file.path, executor),
        directory=config.flight_record_dir,
        logits=(lambda: executor.last_logits) if config.flight_record_logits else None,  # type: ignore[attr-defined]
    )


def _kv_dtype(config: EngineConfig, model: Model) -> str:
    return cache_dtype(config, model.config.head_dim, (w.tensor.format for w in model.weights.values()))


def _block_bytes(config: EngineConfig, model: Model) -> int:
    """Bytes of one block in all cache groups; 0 where nobody asks for a cache of so many bytes."""
    if config.kv_cache_bytes is None:
        return 0
    caches = model.graph(1, 1, _kv_dtype(config, model), config.block_size).caches
    return sum(c.bytes_per_token * c.block_size for c in caches)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of the file's contents say which file it is."""
    try:
        yield
    except (ModelFileError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from None


def _make_tokenizer(model: Model) -> tuple[Tokenizer, Callable[[], Detokenizer]]:
    from ridgeline.text.detokenizer import Detokenizer as Plain  # imported while the weights are being packed
    from ridgeline.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_gguf(model.metadata)
    return tokenizer, lambda: Plain(tokenizer)


def plan_executor(
    config: EngineConfig, model: Model, max_len: int, num_blocks: int | None, spare_slots: int = 0
) -> tuple[Plan, Callable[[], Executor]]:
    """The plan of ``model``, and what makes the backend that runs it and packs its weights.

    Args:
        max_len: tokens of the longest sequence.
        num_blocks: blocks of each cache group; None: as many as a GPU's memory has room for.
        spare_slots: slots beyond the config's max_num_seqs.
    """
    kv_dtype = _kv_dtype(config, model)
    graph = model.graph(config.max_num_batched_tokens, config.sampled_rows(), kv_dtype, config.block_size)
    sizes: dict[str, Any] = {
        "num_slots": config.max_num_seqs + spare_slots,
        "num_blocks": [num_blocks or 0] * len(graph.caches),
        "max_blocks_per_slot": -(-max_len // config.block_size),
    }
    if config.backend == "reference":
        from ridgeline.backends.reference.executor import ReferenceExecutor

        plan = compile(graph, naive_target(kv_dtype))
        return plan, lambda: ReferenceExecutor(plan, model.weights, **sizes)
    if config.backend == "cuda":
        return _plan_cuda_executor(config, model, graph, kv_dtype, sizes)
    from ridgeline.backends.cpu.executor import CpuExecutor
    from ridgeline.backends.cpu.lowering import plan_target

    plan = compile(graph, plan_target(kv_dtype, config.isa, activation_dtype(config)))
    _check_memory(config, plan, num_blocks)
    sizes |= {"threads": config.threads, "isa": config.isa}
    # A packed weight's pages in the file are not read again: they are given back as packing goes on.
    return plan, lambda: CpuExecutor(plan, model.weights, mapped=model.file.mapped, **sizes)


def _check_memory(config: EngineConfig, plan: Plan, num_blocks: int | None) -> None:
    """Raise ConfigError for a cache that somebody asks for, or steps, beyond this machine's memory (a container's limit
    is not looked at): the kernel would give it, as untouched memory costs nothing."""
    asked = [name for name in ("num_kv_blocks", "kv_cache_bytes") if getattr(config, name) is not None]
    cache = sum(c.bytes_per_token * c.block_size for c in plan.caches) * (num_blocks or 0) if asked else 0
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if cache + plan.arena_bytes > most:
        kv = f"a KV cache of {cache / 2**30:.1f} GiB ({asked[0]} {getattr(config, asked[0])}) and " if asked else ""
        ways = [*asked, "max_num_seqs or max_num_batched_tokens"]
        raise ConfigError(
            f"there is not enough memory for {kv}a step's {plan.arena_bytes / 2**30:.1f} GiB of values: "
            f"this machine has {most / 2**30:.1f} GiB; lower {', '.join(ways)}"
        )


def _plan_cuda_executor(
    config: EngineConfig, model: Model, graph: Graph, kv_dtype: str, sizes: dict[str, Any]
) -> tuple[Plan, Callable[[], Executor]]:
    """As ``plan_executor``, on a GPU or the emulated device; torch and triton are imported when it is made."""
    matrices = {w.tensor.format.name for w in model.weights.values() if len(w.tensor.shape) == 2}
    plan = compile(graph, cuda_target(kv_dtype, hidden_dtype(matrices)))
    return plan, lambda: _make_cuda_executor(config, model, plan, sizes)


def _make_cuda_executor(config: EngineConfig, model: Model, plan: Plan, sizes: dict[str, Any]) -> Executor:
    from ridgeline.backends.cuda.opening import open_device

    device = open_device(config.device or "gpu")
    device.ranges = NvtxRanges() if config.nvtx else None
    from ridgeline.backends.cuda.executor import CudaExecutor

    context = sizes["max_blocks_per_slot"] * config.block_size
    if config.device != "emulated":
        from ridgeline.backends.cuda.compiled import compile_for

        compile_for(plan, device.arch, context, sizes["num_slots"], config.batch_invariant)
    if config.fills_the_gpu:
        from ridgeline.backends.cuda.budget import cache_blocks
        from ridgeline.backends.cuda.memory import Limits

        limits = Limits.of(plan, **sizes | {"num_blocks": []})
        blocks = cache_blocks(plan, device.arch, limits, context, device.free_memory())
        sizes = sizes | {"num_blocks": [blocks] * len(plan.caches)}
    options: dict[str, Any] = {"batch_invariant": config.batch_invariant, "graphs": config.cuda_graphs}
    executor = CudaExecutor(plan, model.weights, device, **options, **sizes)
    if device.ranges is not None:
        executor.trace(device.ranges)
    return executor


class _Background(Generic[T]):
    """Runs ``work`` in a thread; ``result`` waits for it and hands on what it returns or raises."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._values: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ridgeline-load", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._values.append(self._work())
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        self._thread.join()
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame, and the frame all that was loaded
        return self._values[0]
