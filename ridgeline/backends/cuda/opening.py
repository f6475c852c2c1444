"""Opens a device: the one place that decides whether this process interprets kernels or launches them."""

from __future__ import annotations

import importlib.util
import os
import sys
from typing import TYPE_CHECKING

from ridgeline.core.errors import ConfigError

if TYPE_CHECKING:
    from ridgeline.backends.cuda.device import Device


def open_device(name: str) -> Device:
    """ "gpu" or "emulated".

    Triton decides when a kernel is decorated whether it will be interpreted, so a process does one or the other.

    Raises ConfigError when torch or triton is missing, when there is no GPU, or when this process does the other.
    """
    missing = [package for package in ("torch", "triton") if importlib.util.find_spec(package) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} not installed: pip install 'ridgeline[cuda]'")
    interprets = os.environ.get("TRITON_INTERPRET", "0") == "1"
    if name == "emulated":
        if not interprets and any(module.startswith("ridgeline.backends.cuda.kernels.") for module in sys.modules):
            raise ConfigError(
                "this process has its GPU kernels compiled already: set TRITON_INTERPRET=1 before it starts"
            )
        os.environ["TRITON_INTERPRET"] = "1"
        from ridgeline.backends.cuda.emulated import EmulatedDevice

        return EmulatedDevice()
    if interprets:
        raise ConfigError("TRITON_INTERPRET=1 is set: kernels would be interpreted, not launched on the GPU; unset it")
    from ridgeline.backends.cuda.device import CudaDevice

    return CudaDevice()
