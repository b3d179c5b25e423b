"""Files that appear whole or not at all, and text as every system saves it."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from apt.checkpoints.lora import LoRALayer, save_lora
from apt.data.buckets import Bucket
from apt.data.latent_shards import Clip, write_clips
from apt.errors import CheckpointError, DataError
from apt.files import read_lines, read_text, replacing, write_safetensors, write_text


@contextmanager
def full_disk(size: int = 4096) -> Iterator[None]:
    """Limit files to `size` bytes, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "one")
    with pytest.raises(RuntimeError), replacing(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    with pytest.raises(OSError, match="File too large"), full_disk():
        write_text(path, "x" * 10_000)
    assert path.read_text() == "one" and list(tmp_path.iterdir()) == [path]


def test_views_and_tensors_that_share_memory(tmp_path: Path) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"x": x, "same": x, "turned": x.T})
    found = load_file(path)
    assert torch.equal(found["same"], x) and torch.equal(found["turned"], x.T)
    text = tmp_path / "a.txt"
    write_text(text, "")
    assert path.stat().st_mode == text.stat().st_mode, "readable for whoever reads other files"


def test_full_disks_are_errors_of_the_part_that_writes(tmp_path: Path) -> None:
    """safetensors reports them by an exception of its own, which no caller should have to know."""
    with pytest.raises(OSError), full_disk():
        write_safetensors(tmp_path / "x.safetensors", {"x": torch.zeros(10_000)})
    with pytest.raises(CheckpointError, match="cannot write"), full_disk():
        save_lora(tmp_path, {"a": LoRALayer(torch.ones(1, 10_000), torch.ones(2, 1))})
    with pytest.raises(DataError, match="repeat the command to continue"), full_disk():
        clip = Clip(torch.ones(16, 1, 32, 32), "a", Bucket(1, 256, 256))
        write_clips(tmp_path / "latents-00000.safetensors", [clip])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content",
    [
        "one\ntwo é\n".encode(),
        b"\xef\xbb\xbfone\r\ntwo \xc3\xa9\r\n",
        b"one\rtwo \xc3\xa9",
        b"one\n\xef\xbb\xbftwo \xc3\xa9\n",
        "one\r\ntwo é".encode("utf-16"),
        b"\xfe\xff" + "one\ntwo é\n".encode("utf-16-be"),
    ],
)
def test_text_as_every_system_saves_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert read_lines(path) == ["one", "two é"]
    assert read_text(path).rstrip("\n") == "one\ntwo é"


def test_only_line_ends_of_files_end_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a\u2028b\x0bc\x85d\u2029e\n\n\nlast", encoding="utf-8")
    assert read_lines(path) == ["a\u2028b\x0bc\x85d\u2029e", "", "", "last"]
    path.write_bytes(b"")
    assert read_lines(path) == [] and read_text(path) == ""
    path.write_bytes(b"gr\xfcn")
    with pytest.raises(UnicodeDecodeError):
        read_lines(path)
