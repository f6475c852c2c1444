"""How wrong a kernel may be: at most twice what its precision must cost (the rule of the CPU's tests).

The error of an output is max|difference| from the float64 truth. A straightforward implementation in float32, rounded
to the output's type, sets the allowance; one unit in the last place of the largest result is always allowed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ridgeline.backends.cuda.ladder.climb import Expected

FACTOR = 2.0
_FRACTION_BITS = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23, torch.float8_e4m3fn: 3}


class Inaccurate(AssertionError):
    """A kernel's output is further from the truth than its precision explains."""


def values(tensor: Any) -> npt.NDArray[np.float64]:
    """A tensor's numbers."""
    result: npt.NDArray[np.float64] = tensor.to(torch.float64).numpy()
    return result


def unit(tensor: Any, magnitude: float) -> float:
    """Distance between neighbouring numbers of the tensor's type around ``magnitude``; 1 for integers."""
    bits = _FRACTION_BITS.get(tensor.dtype)
    if bits is None:
        return 1.0
    return float(2.0 ** (np.floor(np.log2(magnitude)) - bits)) if magnitude > 0 else 0.0


def _excess(got: npt.NDArray[np.float64], truth: npt.NDArray[np.float64], step: float) -> float:
    return float(np.max(np.abs(got - truth) - step / 2, initial=0.0))


def check(expected: Expected) -> float:
    """The error as a share of what is allowed; raises ``Inaccurate`` above 1."""
    got, truth = values(expected.tensor), expected.truth
    if not np.isfinite(truth).all():
        raise Inaccurate("a case must have a finite answer")
    if not np.isfinite(got).all():
        raise Inaccurate(f"{int((~np.isfinite(got)).sum())} of {got.size} results are not finite")
    error = _excess(got, truth, expected.step)
    if expected.exact:
        if error:
            raise Inaccurate(f"moved data differs by {error:.3g}")
        return 0.0
    plain = values(torch.from_numpy(np.ascontiguousarray(expected.plain)).to(expected.tensor.dtype))
    largest = float(np.abs(truth).max(initial=0.0))
    floor = 2.0**-20 * largest if expected.step else unit(expected.tensor, largest)
    allowed = max(FACTOR * _excess(plain, truth, expected.step), floor)
    if error > allowed:
        at = tuple(int(i) for i in np.unravel_index(np.abs(got - truth).argmax(), got.shape))
        raise Inaccurate(f"error {error:.3g} at {at}, allowed {allowed:.3g}")
    return error / allowed if allowed else 0.0
