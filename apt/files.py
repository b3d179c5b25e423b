"""Files that appear whole or not at all, written beside their place and then moved into it; and
text as editors of every system save it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a file beside `path` to write; it becomes `path` if the block ends without an error.

    Raises:
        OSError: if the disk refuses. A file that was there before is then untouched.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text. Raises OSError; see `replacing`."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_text(path: Path) -> str:
    """UTF-8 text, or UTF-16 that begins with its mark, with line ends of any system as "\\n".

    Byte order marks are no part of the text, wherever files were joined.

    Raises:
        OSError: if the disk refuses.
        UnicodeDecodeError: if it is neither.
    """
    content = path.read_bytes()
    text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8")
    return re.sub("\r\n?", "\n", text.replace("\ufeff", ""))


def read_lines(path: Path) -> list[str]:
    """The lines of `read_text`, without their ends.

    Only line ends of files end a line: U+2028 and its like, which web pages leave inside a
    sentence and `str.splitlines` obeys, do not.
    """
    lines = read_text(path).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors of any device, also views and ones that share memory, as one safetensors file.

    Raises:
        OSError: if the disk refuses; see `replacing`.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Tensors that share memory are written as copies: a loader must find every key.
    ready = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in tensors.items()
    }
    with replacing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        try:
            save_file(ready, partial, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:
            # How safetensors reports a disk that is full.
            raise OSError(str(error)) from error
        # safetensors >= 0.8 makes the file readable for its owner alone.
        partial.chmod(mode)
