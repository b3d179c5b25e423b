"""What tells the weights of one model from those of another, wherever they lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

_ENDS = 2**20


def weights_digest(place: Path) -> str:
    """The "sha256:..." of a file of weights, or of those of a folder.

    Of the names and sizes of the safetensors files, and of both ends of each: training moves every
    weight, and reading all of a large model takes minutes. A single file counts without its name.
    """
    digest = hashlib.sha256()
    for path in [place] if place.is_file() else sorted(place.rglob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(place).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_ENDS))
            file.seek(max(size - _ENDS, 0))
            digest.update(file.read())
    return f"sha256:{digest.hexdigest()}"
