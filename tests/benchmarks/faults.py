"""Jobs that fail in every way, for `benchmarks.worker`."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

Context = dict[str, Any]


def measures(context: Context, only: Sequence[str] = ("good",)) -> dict[str, Any]:
    """Like a network with these variants."""
    print("working")
    case = {
        "model": "net", "size": "1x8x8", "batch": 1, "text_tokens": 1, "dtype": "float32",
        "kernels": "auto", "attention": "native", "mode": "graph",
    }  # fmt: skip
    figures = {"tokens": 1.0, "tflop": 1.0, "tflops": 1.0, "floor_ms": 1.0, "share_of_floor": 0.5}
    return {
        "measurements": [
            {
                "case": case | {"kernels": name}, "status": "measured", "reason": "",
                "samples_ms": [1.0, 2.0, 3.0], "metrics": figures,
            }
            for name in only
        ]
    }  # fmt: skip


def aborts(context: Context) -> dict[str, Any]:
    """Like a failed assertion in a driver."""
    print("about to abort")
    os.abort()


def aborts_with_bad(context: Context, only: Sequence[str] = ("good", "bad")) -> dict[str, Any]:
    """One variant of several ends the process."""
    return aborts(context) if "bad" in only else measures(context, only)


def exits(context: Context) -> dict[str, Any]:
    os._exit(7)


def raises(context: Context) -> dict[str, Any]:
    raise RuntimeError("CUDA error: invalid configuration argument")


def hangs(context: Context) -> dict[str, Any]:
    threading.Event().wait()
    raise AssertionError("nobody ended it")


def loses(context: Context) -> dict[str, Any]:
    """An illegal access: this call and all later ones fail."""

    def synchronize() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore words")

    cuda = SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    sys.modules["torch"] = SimpleNamespace(cuda=cuda)  # type: ignore[assignment]
    wrong = measures(context)["measurements"][0]
    return {"measurements": [wrong | {"status": "wrong", "reason": "its fault", "samples_ms": []}]}
