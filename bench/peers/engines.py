"""Which engines are compared, with what model file, and what the peers were measured at."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers import install, workload
from peers.client import EngineError, Worker

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Engine:
    """One column of the comparison.

    Attributes:
        name: key in the JSON line.
        label: heading in the table.
        script: worker script beside this file.
        python: interpreter of its environment.
        model: its model, file or directory or alias.
        peer: key of its recipe in ``install.RECIPES`` (None: ours).
        recorded: a quiet machine's medians, 2 threads, by metric (see is_reference_machine).
    """

    name: str
    label: str
    script: str
    python: Path
    model: str
    peer: str | None
    recorded: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def command(self, mode: str, threads: int, max_seqs: int, context: int) -> list[str]:
        """The worker's command line; ``context`` is tokens per request."""
        settings = {
            "model": self.model,
            "threads": threads,
            "max_seqs": max_seqs,
            "context": context,
            "options": self.options,
        }
        return [str(self.python), str(HERE / self.script), mode, json.dumps(settings)]

    def start(self, threads: int, max_seqs: int, context: int) -> Worker:
        """A warm worker that has named the capital of France, paused."""
        worker = Worker(self.label, self.command("serve", threads, max_seqs, context))
        try:
            worker.read()
            tokens, _ = worker.generate([workload.SANITY_PROMPT], workload.SANITY_STEPS)
            if workload.SANITY_TOKEN not in tokens[0]:
                raise EngineError(f"{self.label} does not know the capital of France: {tokens[0]}")
            worker.generate(workload.prompts("warm", 8, 64), 8)
        except BaseException:
            worker.close()
            raise
        return worker

    def missing(self) -> str | None:
        """The first file this engine lacks, if any."""
        needed = [self.python]
        if self.peer:
            needed.append(Path(self.model))
        if "source" in self.options:
            needed.append(Path(self.options["source"]) / "build" / "bin" / "libllama.so")
        return next((str(path) for path in needed if not path.exists()), None)


def is_reference_machine(threads: int) -> bool:
    """Whether this is the kind of machine the ``recorded`` figures were taken on (AMD, 2 cores, AVX-512 VNNI)."""
    with open("/proc/cpuinfo") as info:
        text = info.read()
    return threads == 2 == os.cpu_count() and "avx512_vnni" in text and "AuthenticAMD" in text


RIDGELINE = "ridgeline"
RIDGELINE_INT8 = "ridgeline_int8"
LLAMACPP_SAME_FILE = "llamacpp_q4_1"
LLAMACPP_FASTEST = "llamacpp_q4_0"


def lone_streams() -> list[Engine]:
    """Ridgeline as ``ridgeline run`` and ``chat`` have it, where that is not how it is for batches (AMX)."""
    import ridgeline.backends.cpu._native as native

    options = {"activation_dtype": "int8"}
    ours = Engine(
        RIDGELINE_INT8, "Ridgeline int8", "worker_ridgeline.py", Path(sys.executable), "smollm2", None, options=options
    )
    return [ours] if native.available_isas()[0] == "amx" else []


def engines() -> list[Engine]:
    """Every engine, ours first."""
    llama = {"source": str(install.LLAMACPP_SOURCE)}
    gguf = str(install.model_path())
    return [
        Engine(RIDGELINE, "Ridgeline", "worker_ridgeline.py", Path(sys.executable), "smollm2", None),
        *lone_streams(),
        Engine(
            LLAMACPP_SAME_FILE,
            "llama.cpp same file",
            "worker_llamacpp.py",
            install.python_of("llamacpp"),
            gguf,
            "llamacpp",
            {"prefill": 420, "decode1": 161, "decode8": 209, "decode32": 249},
            llama,
        ),
        Engine(
            LLAMACPP_FASTEST,
            "llama.cpp Q4_0",
            "worker_llamacpp.py",
            install.python_of("llamacpp"),
            str(install.LLAMACPP_MODEL),
            "llamacpp",
            {"prefill": 1233, "decode1": 184, "decode8": 408, "decode32": 545},
            llama,
        ),
        Engine(
            "openvino",
            "OpenVINO GenAI",
            "worker_openvino.py",
            install.python_of("openvino"),
            str(install.OPENVINO_MODEL),
            "openvino",
            {"prefill": 2385, "decode1": 80, "decode8": 446, "decode32": 721, "together": 575, "mixed": 377},
        ),
        Engine(
            "ort",
            "ONNX Runtime int4",
            "worker_ort.py",
            install.python_of("ort"),
            str(install.ORT_MODEL),
            "ort",
            {"prefill": 958, "decode1": 195, "decode8": 515, "decode32": 633},
        ),
    ]
