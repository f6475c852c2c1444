"""Weights on the device are those of the file: every format, merged, interleaved and reordered, row for row."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch

from ridgeline.backends.cuda import weights as packed
from ridgeline.backends.cuda.ladder import interpret
from ridgeline.backends.cuda.launch import TORCH
from ridgeline.backends.cuda.weights import Matrix, QuantizedMatrix, StoredWeight, Vector, load, shapes
from ridgeline.backends.reference.executor import weight_array
from ridgeline.backends.reference.numerics import rounded
from ridgeline.core.errors import ModelFileError, UnsupportedError
from ridgeline.core.formats import FORMATS, WeightFormat
from ridgeline.models.load import Weight
from tests.gpu.small_model import executor, model

MIXED = (("up", "q4_0"), ("v", "f16"), ("embed", "f32"))
STORED = [("bf16", "bf16", ()), ("f16", "f16", ()), ("q4_0", "bf16", ()), ("q4_1", "bf16", ()), ("q8_0", "f16", ())]


@pytest.mark.parametrize(("fmt", "hidden", "others"), [*STORED, ("q8_0", "bf16", MIXED), ("f32", "bf16", ())])
def test_every_row_is_the_files(fmt: str, hidden: str, others: Any) -> None:
    """Gathered by the kernel that embeds; of a quantized matrix a row is rounded once, from its exact numbers."""
    _, plan, weights = model(fmt, hidden, hidden, layers=1, others=others, changes=(("tied", False),))
    found = load(plan, weights, lambda tensor: tensor)
    assert list(found) == [value.name for value in plan.weights.values()]
    for value in plan.weights.values():
        here, right = found[value.name], weight_array(value.info, weights, np.float32)
        if isinstance(here, Vector):
            assert here.values.dtype == torch.float32 and np.array_equal(here.values.numpy(), right)
            assert here.nbytes() == right.nbytes
            continue
        ids = torch.arange(0, len(right), 5, dtype=torch.int32)
        out = torch.empty((len(ids), right.shape[1]), dtype=TORCH[hidden])
        interpret.run(here.gather(ids, out, "sm_90"))
        assert np.array_equal(out.float().numpy(), rounded(right[::5], hidden))


@pytest.mark.parametrize(("fmt", "hidden", "others"), [*STORED, ("q8_0", "bf16", MIXED)])
def test_their_shapes_are_known_before_they_are_read(fmt: str, hidden: str, others: Any) -> None:
    _, plan, weights = model(fmt, hidden, hidden, layers=1, others=others)
    real, meta = load(plan, weights, lambda tensor: tensor), shapes(plan)
    assert list(real) == list(meta)
    for name, one in real.items():
        other: Any = meta[name]
        assert type(one) is type(other) and one.nbytes() == other.nbytes()
        if isinstance(one, Matrix):
            for m in (1, 3, 64, 65):
                assert one.scratch(m) == other.scratch(m)
        for field in fields(one):  # type: ignore[arg-type]
            a, b = getattr(one, field.name), getattr(other, field.name)
            if isinstance(a, torch.Tensor):
                assert b.is_meta and (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
            else:
                assert a == b


def damaged(weight: Weight, value: float) -> StoredWeight:
    """A weight with one number that is none: among the floats, or in a group's scale."""
    data = np.array(weight.tensor.data, copy=True).view(np.uint8).reshape(-1)
    form = weight.tensor.format
    if form.kind == "float":
        dtype: Any = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[form.name]
        torch.from_numpy(data).view(dtype)[37] = value
    else:
        data[form.group_bytes : form.group_bytes + 2].view(np.float16)[0] = value
    return Weight(replace(weight.tensor, data=data.reshape(weight.tensor.data.shape)), weight.row_order)


@pytest.mark.parametrize("fmt", ["bf16", "q4_0", "q4_1", "q8_0"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_weights_are_named(fmt: str, value: float) -> None:
    _, plan, weights = model(fmt, "bf16", layers=1)
    for name in ("layers.0.attn.k", "layers.0.mlp.down", "layers.0.attn.norm", "norm"):
        broken: Any = {**weights, name: damaged(weights[name], value)}
        with pytest.raises(ModelFileError, match=weights[name].tensor.name):
            load(plan, broken, lambda tensor: tensor)


def test_formats_without_a_kernel_are_refused() -> None:
    good = FORMATS["q4_0"]
    assert packed._offset(good, "w") == "middle" and packed._offset(FORMATS["q8_0"], "w") == "middle"
    assert packed._offset(FORMATS["q4_1"], "w") == "minimum"
    assert packed._offset(replace(good, bits=8, has_minimum=True), "w") == "minimum"
    bad: list[WeightFormat] = [replace(good, bits=7), replace(good, group=48), replace(good, zero=0)]
    for form in [*bad, replace(bad[0], has_minimum=True), replace(bad[1], has_minimum=True)]:
        with pytest.raises(UnsupportedError, match="weight w: no GPU kernel"):
            packed._offset(form, "w")


def test_a_quantized_weight_is_as_large_as_in_its_file() -> None:
    """Nothing is expanded, where rows are whole steps of the kernel."""
    _, plan, weights = model("q4_1", "bf16", layers=1)
    found = load(plan, weights, lambda tensor: tensor)
    for value in plan.weights.values():
        here = found[value.name]
        if isinstance(here, QuantizedMatrix):
            assert here.k == value.shape[1] and here.nbytes() >= value.info.format.nbytes(*value.shape)  # type: ignore[arg-type]
            if here.k % 128 == 0:
                assert here.nbytes() == value.info.format.nbytes(*value.shape)  # type: ignore[arg-type]
    made = executor("q4_1", layers=1)
    assert made.weights_bytes == sum(weight.nbytes() for weight in found.values())
