"""One-line errors for failures of the machine: no space, no memory, no permission."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from apt.errors import AptError, InputError

__all__ = ["explained"]


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Turn failures of the machine inside the block into InputErrors.

    Args:
        place: the place that is written to, for errors that name no file.

    Raises:
        InputError: for an OSError, and if memory ran out on the CPU or a GPU.
    """
    try:
        yield
    except AptError:
        raise
    except BrokenPipeError:  # the reader of our output has gone; no file is affected
        raise
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise InputError(
            f"{error.filename or place}: {reason}. Free some space or fix the permissions, or "
            "choose another --run-dir; saved checkpoints stay, and --resume continues the run"
        ) from error
    except (MemoryError, RuntimeError) as error:
        needed = _memory(error)
        if needed is None:
            raise
        raise InputError(
            f"out of memory: {needed}. Make --micro-batch-size smaller, add "
            "--activation-checkpointing, train adapters (--lora.rank), or use more GPUs; --resume "
            "continues from the last checkpoint"
        ) from error


def _memory(error: BaseException) -> str | None:
    """Return what could not be allocated if memory ran out, else None."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return text.partition(". GPU")[0]
    if "DefaultCPUAllocator" in text or "std::bad_alloc" in text:
        return text.partition("DefaultCPUAllocator: ")[2].partition(". Error")[0] or text
    if isinstance(error, MemoryError):
        return text or "an allocation failed"
    return None
