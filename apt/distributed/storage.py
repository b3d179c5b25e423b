"""The tensors of all ranks in one folder of safetensors, by PyTorch's distributed checkpoint."""

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

# The writer serialises one file at a time in memory, so this limits the extra memory of a save.
FILE_BYTES = 2 * 2**30


class HostCopies:
    """Copies of tensors in host memory, which later copies of the same tensors reuse.

    Args:
        device: where the tensors are; those of a GPU are copied to page-locked memory.
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
        """Copy the tensors, each rank its own shards. Overwrites earlier copies."""
        copies = self._stager.stage(tensors)
        assert isinstance(copies, dict)
        return copies

    def close(self) -> None:
        """Release the memory."""
        self._stager.close()


def write_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write each rank's shards to its own files. Collective.

    Args:
        folder: on a file system that all ranks share.
        tensors: contiguous plain tensors or DTensors, with the same names on every rank.

    Raises:
        CheckpointError: writing failed on any rank.
    """
    writer = dcp.HuggingFaceStorageWriter(
        str(folder), fqn_to_index_mapping=_file_indices(tensors), save_distributed=True
    )
    alone = world() == 1
    tensors = _without_sharing(tensors)
    _run(lambda: dcp.save(tensors, storage_writer=writer, process_group=group(), no_dist=alone))


@torch.no_grad()
def read_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` in place; any number of ranks may have written the files. Collective.

    Raises:
        CheckpointError: reading failed on any rank.
    """
    reader = dcp.HuggingFaceStorageReader(str(folder))
    _run(lambda: dcp.load(tensors, storage_reader=reader, no_dist=world() == 1))


def _without_sharing(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory with another, because safetensors refuses to write those.

    Networks that start from one file share the weights that do not train.
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
    """Return the files that this rank wrote, sorted."""
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
    """Run a call of torch.distributed.checkpoint, and turn its failures into CheckpointError."""
    # Without a process group, it warns that it saves in a single process. The filter stays, because
    # filters belong to the process, and another thread may be training.
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    try:
        action()
    except CheckpointException as error:
        causes = [cause for cause, _ in error.failures.values()]
        reasons = dict.fromkeys(reason(cause) for cause in causes)
        raise CheckpointError("; ".join(reasons)) from error
