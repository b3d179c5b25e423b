"""Atomic writes (to a file beside the target, then renamed), and text files from any system."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it replaces `path` if the block raises no error.

    Raises:
        OSError: if the file cannot be written. An existing file is then untouched.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically. Raises OSError; see `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def without_nan(value: Any) -> Any:
    """Return plain data with NaN and infinity, which JSON cannot represent, replaced by None."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_text(path: Path) -> str:
    """Read UTF-8 text, or UTF-16 with a byte order mark; line endings of any system become "\\n".

    Byte order marks are removed everywhere, because joined files have them in the middle.

    Raises:
        OSError: if the file cannot be read.
        UnicodeDecodeError: if the text is in neither encoding.
    """
    return decode_text(path.read_bytes())


def decode_text(content: bytes) -> str:
    """The bytes of a file as `read_text` reads them. Raises UnicodeDecodeError likewise."""
    text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    return re.sub("\r\n?", "\n", text.replace("\ufeff", ""))


def read_lines(path: Path) -> list[str]:
    """Return the lines of `read_text`, without their line endings.

    U+2028 and similar characters, at which `str.splitlines` splits, do not end a line: text copied
    from web pages has them inside sentences.
    """
    lines = read_text(path).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    value: Callable[[str], Tensor] | None = None,
) -> None:
    """Write tensors on any device, including views and shared memory, to one safetensors file.

    The file equals that of the safetensors package, which needs copies of all tensors at once; this
    function copies one at a time.

    Args:
        value: returns the tensor of a name when it is written; `tensors` then only give the shapes
            and dtypes.

    Raises:
        OSError: if the file cannot be written; see `replacing`.
    """
    import torch

    # The order of the safetensors package: widest dtypes first, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-_kind(tensors[name]).order, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": _kind(tensors[name]).name,
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = (tensors[name] if value is None else value(name)).detach().cpu()
            if tensor.shape != tensors[name].shape or tensor.dtype != tensors[name].dtype:
                raise ValueError(f"{name} has another shape or dtype than `tensors` gave for it")
            flat = tensor.contiguous().reshape(-1)
            if flat.numel():
                file.write(flat.view(torch.uint8).numpy().data)


class _Kind(NamedTuple):
    """The name of a dtype in safetensors, and its place in the order of writing."""

    name: str
    order: int


def _kind(tensor: Tensor) -> _Kind:
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in _KINDS:
        raise ValueError(f"cannot write {kind} tensors to a safetensors file")
    return _Kind(_KINDS[kind], list(_KINDS).index(kind))


_KINDS = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3", "int16": "I16", "uint16": "U16", "float16": "F16",
    "bfloat16": "BF16", "int32": "I32", "uint32": "U32", "float32": "F32", "float64": "F64",
    "int64": "I64", "uint64": "U64",
}  # fmt: skip
"""In the order in which the safetensors package sorts them."""
