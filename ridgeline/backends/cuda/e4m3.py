"""FP8 e4m3 in integer arithmetic, for architectures without its conversions (before sm_89).

Format: OCP 8-bit Floating Point Specification (2023): exponent bias 7, no infinity, NaN 0x7F, largest number 448.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def encode(x):
    """The e4m3 code (uint8) of fp32 ``x``: nearest, ties to even, beyond 448 saturated, NaN kept."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(tl.abs(x), 448.0)
    whole = size.to(tl.int32, bitcast=True)
    # Adding just under half of what 3 bits of fraction drop, or half where the last kept bit is odd, rounds upwards.
    normal = ((whole + 0x7FFFF + ((whole >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 codes count units of 2^-9, which is what the last bit of 2^14 is worth: the adder rounds.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
