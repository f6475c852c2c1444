"""Peak rates: datasheet figures of accelerators; a CPU's are measured where it runs."""

from __future__ import annotations

from dataclasses import dataclass

from ridgeline.core.errors import ConfigError


@dataclass(frozen=True)
class Peaks:
    """Peak rates of a machine, per second; an operation is a multiply or an add.

    Attributes:
        bandwidth: bytes read from memory.
        int8, bf16, f32: dot-product operations by kind of operand.
        fp8: the same for 8-bit floats; 0 where there are no units for them.
    """

    bandwidth: float
    int8: float
    bf16: float
    f32: float
    fp8: float = 0.0


DATASHEET: dict[str, Peaks] = {
    # NVIDIA A100 Tensor Core GPU datasheet (2021): dense; f32 is the FP32 rate, not TF32.
    "a100-sxm4-40gb": Peaks(1.555e12, 624e12, 312e12, 19.5e12),
    "a100-sxm4-80gb": Peaks(2.039e12, 624e12, 312e12, 19.5e12),
    "a100-pcie-80gb": Peaks(1.935e12, 624e12, 312e12, 19.5e12),
    # NVIDIA H100 Tensor Core GPU datasheet (2023), halved: it quotes sparse rates. H200's is the same chip.
    "h100-sxm5-80gb": Peaks(3.35e12, 1979e12, 989.4e12, 66.9e12, 1979e12),
    "h100-pcie-80gb": Peaks(2.0e12, 1513e12, 756.5e12, 51.2e12, 1513e12),
    "h200-sxm-141gb": Peaks(4.8e12, 1979e12, 989.4e12, 66.9e12, 1979e12),
}
"""Dense peaks by device, as the makers state them."""

GPU_RESERVED = 1 << 30
"""Bytes of a GPU that the driver, the context, graphs and the kernels' code take."""

DEVICES: dict[str, str] = {
    "a100": "a100-sxm4-80gb",
    "a100-40gb": "a100-sxm4-40gb",
    "a100-pcie": "a100-pcie-80gb",
    "h100": "h100-sxm5-80gb",
    "h100-pcie": "h100-pcie-80gb",
    "h200": "h200-sxm-141gb",
}
"""Short names -> entries of ``DATASHEET``."""

MEMORY: dict[str, int] = {
    "a100": 80 << 30,
    "a100-40gb": 40 << 30,
    "a100-pcie": 80 << 30,
    "h100": 80 << 30,
    "h100-pcie": 80 << 30,
    "h200": 141 * 10**9,
}
"""Bytes of memory, by short name."""


def datasheet_of(name: str) -> Peaks:
    """Peaks of the GPU that its driver calls ``name`` ("NVIDIA H100 80GB HBM3"); raises ConfigError for others."""
    said = name.upper().replace(" ", "-")
    for words, device in (
        (("H200",), "h200-sxm-141gb"),
        (("H100", "PCIE"), "h100-pcie-80gb"),
        (("H100",), "h100-sxm5-80gb"),
        (("A100", "PCIE"), "a100-pcie-80gb"),
        (("A100", "40GB"), "a100-sxm4-40gb"),
        (("A100",), "a100-sxm4-80gb"),
    ):
        if all(word in said for word in words):
            return DATASHEET[device]
    raise ConfigError(f"no datasheet is known of {name}, whose peaks a profile compares with: A100, H100 and H200 are")
