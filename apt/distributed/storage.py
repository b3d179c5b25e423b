"""Tensors of all ranks in one folder of safetensors, through PyTorch's distributed checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from apt.distributed.collectives import group, rank, reason, world
from apt.distributed.tensors import local
from apt.errors import CheckpointError

__all__ = ["HostCopies", "own_files", "read_shards", "write_shards"]

# The writer serialises one file in memory at a time, so this bounds the extra memory of a save.
FILE_BYTES = 2 * 2**30


class HostCopies:
    """Copies of tensors in host memory, which is kept for the next copies of the same tensors.

    Args:
        device: where the tensors are; from a GPU they go into page-locked memory.
    """

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=on_gpu,
                use_shared_memory=False,
                use_async_staging=False,
                use_non_blocking_copy=on_gpu,
            )
        )

    def of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What they are now, each rank's shard by itself. Overwrites the copies made before."""
        copies = self._stager.stage(tensors)
        assert isinstance(copies, dict)
        return copies

    def close(self) -> None:
        """Give the memory back."""
        self._stager.close()


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write each rank's shards to files of its own; every rank must call it.

    Args:
        folder: on a file system that all ranks share.
        tensors: contiguous, plain or DTensors, the same names on every rank.

    Raises:
        CheckpointError: the disk refuses, on any rank.
    """
    writer = dcp.HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=_file_indices(tensors), save_distributed=True
    )
    alone = world() == 1
    tensors = _without_sharing(tensors)
    _run(lambda: dcp.save(tensors, storage_writer=writer, process_group=group(), no_dist=alone))


@torch.no_grad()
def read_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place, whatever the number of ranks that wrote them.

    Raises:
        CheckpointError: the files cannot be read, on any rank.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    _run(lambda: dcp.load(tensors, storage_reader=reader, no_dist=world() == 1))


def _without_sharing(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies of those whose memory another has too, which safetensors refuses to write twice.

    Networks that start from one file share what does not train.
    """
    seen: set[tuple[str, int]] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        memory = local(tensor).untyped_storage()
        place = (str(memory.device), memory.data_ptr())
        apart[name] = tensor.clone() if place in seen and memory.nbytes() else tensor
        seen.add(place)
    return apart


def own_files(folder: Path) -> list[Path]:
    """The files that this rank wrote, sorted."""
    return sorted(folder.glob(f"shard-{rank() + 1:05d}-*"))


def _file_indices(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Number the files (from 1) so that each holds about FILE_BYTES of a rank's share."""
    indices: dict[str, int] = {}
    index, used = 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size() // world()
        if used and used + size > FILE_BYTES:
            index, used = index + 1, 0
        indices[name] = index
        used += size
    return indices


def _run(action: Callable[[], object]) -> None:
    """Run a call into torch.distributed.checkpoint, turning its failures into CheckpointError."""
    # Without a process group it announces that it saves in a single process. For good, because
    # filters are the process's, and another thread may train meanwhile.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    try:
        action()
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        reasons = dict.fromkeys(reason(cause) for cause in causes)
        raise CheckpointError("; ".join(reasons)) from error
