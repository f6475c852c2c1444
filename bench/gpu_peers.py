"""The Triton kernels of Liger, flash-attn and vLLM, without a GPU: fetched, imported file by file, their launches kept.

A peer's own launcher is called with tensors on torch's meta device, so that its own choice of blocks, warps and
stages is what gets compiled; ``JITFunction.run`` is replaced by one that writes the launch down. What a package
imports beyond the kernels (CUDA extensions, servers) is replaced by modules that hold nothing.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import inspect
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from ridgeline.backends.cuda.launch import Config, Launch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(os.environ.get("RIDGELINE_GPU_PEERS", ROOT / ".peers" / "gpu"))

VERSIONS = {"liger_kernel": "0.8.5", "flash_attn": "2.8.3.post2", "vllm": "0.33.0"}
SOURCES = {name: FOLDER / f"{name}-{version}" for name, version in VERSIONS.items()}

BUILD_TOOLS = ["setuptools", "wheel", "packaging", "ninja", "psutil", "setuptools-rust", "setuptools-scm", "jinja2"]
"""What the sdists' setup scripts import; pip runs them to learn the version it has just been told."""

NO_BUILD = {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE", "VLLM_TARGET_DEVICE": "empty"}

PROCESSORS = {"sm_80": 108, "sm_90": 132}
SHARED_OPTIN = {"sm_80": 163 << 10, "sm_90": 227 << 10}
DEVICE_NAMES = {"sm_80": "NVIDIA A100-SXM4-80GB", "sm_90": "NVIDIA H100 80GB HBM3"}


def install() -> None:
    """The sdists, unpacked into ``.peers/gpu``; nothing of them is built or installed."""
    tools, downloads = FOLDER / "tools", FOLDER / "dl"
    if not tools.exists():
        _pip("install", "--quiet", "--target", str(tools), *BUILD_TOOLS)
    for name, version in VERSIONS.items():
        if SOURCES[name].exists():
            continue
        variables = {**NO_BUILD, "VLLM_VERSION_OVERRIDE": version, "PYTHONPATH": str(tools)}
        flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-d", str(downloads)]
        _pip("download", *flags, f"{name.replace('_', '-')}=={version}", variables=variables)
        with tarfile.open(downloads / f"{name}-{version}.tar.gz") as archive:
            archive.extractall(FOLDER, filter="data")


def _pip(*words: str, variables: dict[str, str] | None = None) -> None:
    print("+ pip", *words, flush=True)
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, env={**os.environ, **(variables or {})})


def missing() -> list[str]:
    """The peers that are not there."""
    return [name for name, folder in SOURCES.items() if not folder.exists()]


class Nothing:
    """Stands for whatever a stub module is asked for: false, callable, and a decorator that changes nothing."""

    def __init__(self, name: str = "") -> None:
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and (inspect.isfunction(args[0]) or hasattr(args[0], "fn")):
            return args[0]
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing(name)

    def __getitem__(self, key: Any) -> Any:
        return self

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return ()

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__

    def __bool__(self) -> bool:
        return False

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        return None


class StubModule(ModuleType):
    """A package of which every attribute is ``Nothing`` unless it is set."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Nothing(name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of one package: the ``real`` ones in its source, all others as stubs.

    Args:
        package: its name.
        source: the folder that holds the package.
        real: modules to load from their files.
        given: attributes of stub modules, by module.
    """

    def __init__(self, package: str, source: Path, real: set[str], given: dict[str, dict[str, Any]]) -> None:
        self.package, self.source, self.real, self.given = package, source, real, given

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """The file of a real module, a stub for any other of the package."""
        if name != self.package and not name.startswith(self.package + "."):
            return None
        if name not in self.real:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        file = self.source / (name.replace(".", "/") + ".py")
        return importlib.util.spec_from_file_location(name, file)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """A stub."""
        module = StubModule(spec.name)
        for name, value in self.given.get(spec.name, {}).items():
            setattr(module, name, value)
        return module

    def exec_module(self, module: ModuleType) -> None:
        """A stub has no code."""


def platform(arch: str) -> Any:
    """What vLLM asks of ``current_platform``: an NVIDIA GPU of this architecture."""
    import torch

    class Capability(tuple):  # noqa: SLOT001
        major, minor = int(arch[3]), int(arch[4])

        def to_int(self) -> int:
            return 10 * self.major + self.minor

    here = Capability((int(arch[3]), int(arch[4])))
    given = {
        "is_cuda": lambda: True,
        "is_cuda_alike": lambda: True,
        "fp8_dtype": lambda: torch.float8_e4m3fn,
        "get_device_capability": lambda *a, **k: here,
        "has_device_capability": lambda need, *a, **k: (
            here.to_int() >= (need if isinstance(need, int) else need[0] * 10)
        ),
        "is_device_capability_family": lambda family, *a, **k: here.major == family // 10,
        "get_device_name": lambda *a, **k: DEVICE_NAMES[arch],
        "device_type": "cuda",
    }
    stub = Nothing("current_platform")
    stub.__dict__.update(given)
    return stub


VLLM_REAL = {
    "vllm.triton_utils.tensor_descriptor",
    "vllm.v1.attention.ops.triton_attention_helpers",
    "vllm.v1.attention.ops.triton_unified_attention",
    "vllm.v1.attention.ops.triton_decode_attention",
    "vllm.v1.attention.ops.prefix_prefill",
    "vllm.v1.sample.ops.topk_topp_triton",
    "vllm.utils.math_utils",
    "vllm.model_executor.determinism.batch_invariant",
    "vllm.model_executor.determinism.batch_invariant_configs",
    "vllm.model_executor.kernels.linear.mixed_precision.triton_w4a16",
    "vllm.model_executor.layers.quantization.awq_triton",
    "vllm.model_executor.layers.quantization.compressed_tensors.triton_scaled_mm",
    "vllm.model_executor.layers.quantization.utils.fp8_utils",
}


def vllm_given(arch: str) -> dict[str, dict[str, Any]]:
    """The few attributes of stub modules that vLLM's kernels and launchers use."""
    import torch
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

    from_file = importlib.import_module
    modes = SimpleNamespace(NONE=0, INT8_PER_TOKEN_HEAD=2, FP8_PER_TOKEN_HEAD=3, INT4_PER_TOKEN_HEAD=4)

    def descriptor(override: bool | None = None) -> bool:
        return bool(from_file("vllm.triton_utils.tensor_descriptor").use_tensor_descriptor(override))

    name = DEVICE_NAMES[arch].replace(" ", "_")
    return {
        "vllm.envs": {"VLLM_TRITON_USE_TD": None, "VLLM_BATCH_INVARIANT": False},
        "vllm.platforms": {"current_platform": platform(arch)},
        "vllm.triton_utils": {
            "tl": tl,
            "triton": triton,
            "tldevice": libdevice,
            "LOG2E": 1.4426950408889634,
            "LOGE2": 0.6931471805599453,
            "use_tensor_descriptor": descriptor,
        },
        "vllm.v1.kv_cache_interface": {"KVQuantMode": modes},
        "vllm.utils.platform_utils": {
            "num_compute_units": lambda *a: PROCESSORS[arch],
            "get_device_name_as_file_name": lambda *a: name,
        },
        "vllm.utils.mem_utils": {"get_max_shared_memory_bytes": lambda *a: SHARED_OPTIN[arch]},
        "vllm.utils.torch_utils": {"is_torch_equal_or_newer": lambda *a: True},
        "vllm.utils.gpu_sync_debug": {"gpu_sync_allowed": nullcontext},
        "vllm.scalar_type": {"scalar_types": SimpleNamespace(uint4b8=0, uint4=1)},
        "vllm.model_executor.warmup.jit_warmup_triton_helper": {
            "triton_kernel_dispatcher_with_warmup": lambda *a, **k: lambda function: function
        },
        "vllm.model_executor.layers.quantization.utils.quant_utils": {"get_fp8_min_max": lambda *a: (-448.0, 448.0)},
        "vllm._custom_ops": {"torch": torch},
    }


FLASH_REAL = {
    "flash_attn.flash_attn_triton",
    "flash_attn.ops.triton.layer_norm",
    "flash_attn.ops.triton.rotary",
    "flash_attn.ops.triton.linear",
    "flash_attn.ops.triton.k_activations",
}

LIGER_REAL = {
    "liger_kernel.utils",
    *(f"liger_kernel.ops.{n}" for n in ("utils", "rms_norm", "layer_norm", "fused_add_rms_norm")),
    *(f"liger_kernel.ops.{n}" for n in ("rope", "swiglu", "geglu")),
}


def pretend(arch: str) -> None:
    """Lets the peers be imported and called in this process, as on a GPU of ``arch``. For a process of its own."""
    import torch
    import triton

    from ridgeline.backends.cuda.ladder.compile import StandInDriver

    triton.runtime.driver.set_active(StandInDriver(arch))
    wrapper = {"triton_op": lambda *a, **k: lambda function: function}
    sys.meta_path[:0] = [
        Finder("vllm", SOURCES["vllm"], VLLM_REAL, vllm_given(arch)),
        Finder("flash_attn", SOURCES["flash_attn"], FLASH_REAL, {"flash_attn.utils.library": wrapper}),
        Finder("liger_kernel", SOURCES["liger_kernel"] / "src", LIGER_REAL, {}),
    ]
    properties = SimpleNamespace(
        multi_processor_count=PROCESSORS[arch], warp_size=32, name=DEVICE_NAMES[arch], major=int(arch[3]), minor=0
    )
    torch.cuda.current_device = lambda: 0
    torch.cuda.get_device_properties = lambda *a: properties
    torch.cuda.get_device_capability = lambda *a: (int(arch[3]), 0)
    torch.cuda.device = lambda *a: nullcontext()  # type: ignore[assignment, misc]
    torch.library.wrap_triton = lambda kernel: kernel
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment]


@contextmanager
def kept() -> Iterator[list[list[Launch]]]:
    """Launches of Triton kernels are written down, not run: each a list of one, or of a tuner's configurations."""
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    calls: list[list[Launch]] = []
    tuned: list[list[Launch]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        (tuned[-1] if tuned else _new(calls)).append(_launch(self, grid, args, kwargs))

    def run_tuner(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        tuned.append([])
        for config in self.prune_configs(kwargs):
            self.fn.run(*args, **{**kwargs, **config.all_kwargs()})
        calls.append(tuned.pop())

    before = JITFunction.run, Autotuner.run
    JITFunction.run, Autotuner.run = run, run_tuner
    try:
        yield calls
    finally:
        JITFunction.run, Autotuner.run = before


def _new(calls: list[list[Launch]]) -> list[Launch]:
    calls.append([])
    return calls[-1]


def _launch(kernel: Any, grid: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """A call as a ``Launch``; four warps and three stages where a launcher leaves them to Triton."""
    words = dict(kwargs)
    warps, stages = words.pop("num_warps", 4) or 4, words.pop("num_stages", 3) or 3
    bound = {**dict(zip(kernel.arg_names, args, strict=False)), **words}
    for name, parameter in inspect.signature(kernel.fn).parameters.items():
        if name not in bound and parameter.default is not inspect.Parameter.empty:
            bound[name] = parameter.default
    shape = grid(bound) if callable(grid) else grid
    constants = {p.name for p in kernel.params if p.is_constexpr}
    meta = {name: value for name, value in bound.items() if name in constants or name not in kernel.arg_names}
    run_time = {name: value for name, value in bound.items() if name not in meta}
    return Launch(kernel, tuple(shape), run_time, Config(meta, warps, stages), ())


def launches_of(call: Callable[[], Any]) -> list[list[Launch]]:
    """What a peer's function would launch."""
    with kept() as calls:
        call()
    return calls
