"""Headers of safetensors files, compared with the library's own reader; errors for bad ones."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from apt.errors import CheckpointError
from apt.untrusted import read_entries


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: Any, end: Any, shape: Any = None, dtype: Any = "F32") -> dict[str, Any]:
    shape = [(end - begin) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4))))
def test_what_the_library_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    tensors = {str(n): torch.zeros(shape, dtype=dtype) for n, (dtype, shape) in enumerate(kinds)}
    save_file(tensors, path, metadata={"format": "pt"})
    entries = read_entries(path)
    assert {key: tuple(e["shape"]) for key, e in entries.items()} == {
        key: tuple(tensor.shape) for key, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 16), "b": entry(8, 24)}, 24, "'b' overlaps"),
        ({"a": entry(0, 16), "b": entry(20, 36)}, 36, "leaves a gap"),
        ({"a": entry(4, 20)}, 20, "leaves a gap"),
        ({"a": entry(-4, 12)}, 16, "'a' lies at"),
        ({"a": entry(0, 2**70)}, 16, "promises"),
        ({"a": entry(0, 16, [5])}, 16, "which do not fit its shape"),
        ({"a": entry(0, 16, [2**62, 2**62])}, 16, "which do not fit its shape"),
        ({"a": entry(0, 16, [-4])}, 16, "has the shape"),
        ({"a": entry(0, 4, [1] * 5000)}, 4, "has the shape"),
        ({"a": entry(0, 16, [4.0])}, 16, "has the shape"),
        ({"a": entry(0, 4, [True])}, 4, "has the shape"),
        ({"a": entry(0, 16, "4")}, 16, "has the shape"),
        ({"a": {"dtype": "F32", "shape": [4]}}, 16, "'a' lies at None"),
        ({"a": {"shape": [4], "data_offsets": [0, 16]}}, 16, "'a' has no dtype"),
        ({"a": entry(0, 16, dtype=["F32"])}, 16, "'a' has no dtype"),
        ({"a": [0, 16]}, 16, "'a' has no dtype"),
        ({"a": entry(0, 16)}, 32, "damaged"),
        ({"a": entry(0, 16)}, 8, "truncated"),
        ([1], 0, "not an object"),
        (b'{"a":1,"a":2}', 0, "'a' occurs twice"),
        (b'{"__metadata__":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0, "nested deeper"),
        (b"\xff\xff", 0, "not a safetensors file"),
    ],
)
def test_bad_headers(tmp_path: Path, header: Any, data: int, message: str) -> None:
    path = write(tmp_path / "x.safetensors", header, b"\0" * data)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_entries(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    # The library takes these: of two tensors of one name it reads the last.
    if "twice" not in message and b"1, 1, 1, 1, 1, 1, 1" not in path.read_bytes():
        with pytest.raises(SafetensorError), safe_open(path, framework="pt"):
            pass


@pytest.mark.parametrize("length", [2**63, 2**31, 10**8])
def test_a_header_that_would_fill_the_memory(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "x.safetensors", {}, length=length)
    with pytest.raises(CheckpointError, match=r"not a safetensors file|truncated"):
        read_entries(path)
    with path.open("r+b") as file:
        file.truncate(length % 2**40 + 100)  # sparse: it is as large as it says
    with pytest.raises(CheckpointError, match=f"header of {length} bytes"):
        read_entries(path)


class Canary:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("canary"),)


def test_pickles_are_named_as_such_and_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain, zipped = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    plain.write_bytes(pickle.dumps(Canary()))
    torch.save(Canary(), zipped)
    assert zipfile.is_zipfile(zipped)
    for path in (plain, zipped):
        with pytest.raises(CheckpointError, match=r"is a pickle.*use the \.safetensors"):
            read_entries(path)
    assert not Path("canary").exists()
    pickle.loads(plain.read_bytes())
    assert Path("canary").exists(), "it would have run"


def test_a_folder_where_a_file_should_be(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read .* Is a directory"):
        read_entries(tmp_path / "x.safetensors")
