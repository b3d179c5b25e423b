"""Failures of the machine, told as one line: no space, no memory, no permission."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from apt.errors import AptError, InputError

__all__ = ["explained"]


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Turns failures of the machine inside the block into InputErrors.

    Args:
        place: what is being written to, for errors that name no file.

    Raises:
        InputError: for an OSError, and for memory that ran out, on the CPU or on a GPU.
    """
    try:
        yield
    except AptError:
        raise
    except BrokenPipeError:  # whoever read our output has left; no file is concerned
        raise
    except OSError as error:
        reason = error.strerror or str(error) or type(error).__name__
        raise InputError(
            f"{error.filename or place}: {reason}. Make room or mend the permissions, or choose "
            "another --run-dir; what was saved stays, and --resume continues it"
        ) from error
    except (MemoryError, RuntimeError) as error:
        needed = _memory(error)
        if needed is None:
            raise
        raise InputError(
            f"out of memory: {needed}. Make --micro-batch-size smaller, add "
            "--activation-checkpointing, train adapters (--lora.rank), or use more GPUs; --resume "
            "continues what was saved"
        ) from error


def _memory(error: BaseException) -> str | None:
    """What could not be had, if the error is a lack of memory."""
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        return text.partition(". GPU")[0]
    if "DefaultCPUAllocator" in text or "std::bad_alloc" in text:
        return text.partition("DefaultCPUAllocator: ")[2].partition(". Error")[0] or text
    if isinstance(error, MemoryError):
        return text or "the system gives no more"
    return None
