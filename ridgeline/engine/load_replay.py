"""From a flight record to an executor that can run it again, or a reason why this machine, build or model cannot."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ridgeline
from ridgeline.core.config import EngineConfig
from ridgeline.core.errors import ConfigError, ModelFileError, RidgelineError
from ridgeline.core.types import Executor
from ridgeline.engine.flight import FlightRecord
from ridgeline.engine.identity import identify, native_build
from ridgeline.engine.load import plan_executor
from ridgeline.models.load import load_model
from ridgeline.models.registry import resolve


@dataclass(frozen=True)
class ReplaySetup:
    """An executor for ``replay``; ``notes``: how it differs from the one that was recorded, as far as bits go."""

    executor: Executor
    notes: list[str]


def load_replay(
    record: FlightRecord, *, model: str | None = None, isa: str | None = None, threads: int | None = None
) -> ReplaySetup:
    """An executor as the record's, with room to rebuild its cache.

    Args:
        record: what is to be run.
        model: alias or path of the model; None: the one that was recorded.
        isa: an instruction set to run it with instead of the recorded one.
        threads: size of the team, which bits do not depend on; None: as many as there were.

    Raises:
        ModelFileError: the model is missing, or another.
        ConfigError: an instruction set this machine lacks.
        RidgelineError: the record is of another version, or of an engine without a model file.
    """
    environment, sizes = record.environment, record.sizes
    if environment.model is None:
        raise RidgelineError("the record is of an engine without a model file: replay it from Python")
    if environment.ridgeline != ridgeline.__version__:
        raise RidgelineError(
            f"the record is of ridgeline {environment.ridgeline} and this is {ridgeline.__version__}: "
            "their bits may differ, install that version"
        )
    notes = _check_isa(record, isa)
    if environment.build and environment.build != native_build():
        notes.append("the native extension is another build than the recorded one: bits may differ")
    config = EngineConfig(**_options(record, model, isa, threads))
    try:
        path = resolve(config.model)
    except ModelFileError as error:
        raise ModelFileError(f"{error}; name the recorded model's file with --model") from None
    found = identify(path)
    if found.sha256 != environment.model.sha256:
        raise ModelFileError(
            f"{path} ({found.size} bytes, hash {found.sha256[:12]}) is not the recorded model "
            f"({environment.model.size} bytes, hash {environment.model.sha256[:12]}): name that with --model"
        )
    spare = sizes.max_blocks_per_slot
    blocks = sizes.num_blocks[0] + spare
    _, build = plan_executor(config, load_model(path), sizes.max_len, blocks, spare_slots=1)
    return ReplaySetup(build(), notes)


def _options(record: FlightRecord, model: str | None, isa: str | None, threads: int | None) -> dict[str, Any]:
    """The recorded engine options, with what is resolved in place of defaults, and what the caller wants."""
    environment = record.environment
    options = {**environment.options, "kv_dtype": environment.kv_dtype, "flight_record_steps": 0}
    options |= {"flight_record_dir": None, "flight_record_logits": False}
    if model is not None:
        options["model"] = model
    if environment.backend == "cpu":
        same = isa in (None, environment.isa)  # another instruction set may multiply other activations
        options |= {"isa": isa or environment.isa, "threads": threads or environment.threads}
        options["activation_dtype"] = (environment.activation_dtype if same else "") or "auto"
    try:
        EngineConfig(**options)
    except TypeError as error:
        raise RidgelineError(f"the record's engine options cannot be read: {error}") from None
    return options


def _check_isa(record: FlightRecord, isa: str | None) -> list[str]:
    """Whether the record can run with ``isa``, or with its own instruction set; notes on what that means for bits."""
    environment = record.environment
    if environment.backend != "cpu":
        if isa is not None:
            raise ConfigError(f"the record is of the {environment.backend} backend, which takes no isa: leave it out")
        return []
    from ridgeline.backends.cpu import _native

    here = _native.available_isas()
    if isa is None and environment.isa not in here:
        others = " or ".join(f"--isa {name}" for name in here)
        raise ConfigError(
            f"the record needs instruction set {environment.isa}, which this machine lacks; "
            f"{others} runs its steps, but bits may differ"
        )
    if isa is not None and isa not in here:
        raise ConfigError(f"isa {isa!r} cannot run on this machine: use {' or '.join(here)}")
    if isa is not None and isa != environment.isa:
        return [f"run with instruction set {isa} and recorded with {environment.isa}: bits may differ"]
    return []
