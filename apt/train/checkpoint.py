"""Checkpoints that survive kills, full disks and bit rot, at any number of ranks.

A checkpoint is a folder such as `step_00000042`. It holds safetensors shards, written by PyTorch's
distributed checkpoint, and `manifest.json`, which has everything that is not a tensor, and the size
and SHA-256 of every file. The folder is written under a temporary name, flushed to disk and then
renamed, so it appears whole or not at all. Nothing in it is pickled, so loading it runs no code.

`save`, `load`, `latest`, `verify` and `prune` are collective: every rank calls them, and the folder
must be on a file system that all ranks share. If one rank fails, all raise.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from apt.distributed.collectives import everywhere, rank, world
from apt.distributed.storage import own_files, read_shards, write_shards
from apt.errors import CheckpointError, InputError
from apt.train.manifest import (
    check_file,
    fingerprint,
    read_manifest,
    sync_folder,
    write_manifest,
)

__all__ = [
    "all_names",
    "flatten",
    "is_intact",
    "latest",
    "load",
    "prune",
    "read_meta",
    "save",
    "step_of",
    "verify",
    "write",
]

_NAME = re.compile(r"step_(\d{8,})(\.old)?")
_SCALARS = (bool, int, float, str, type(None))
Contents = tuple[dict[str, Tensor], dict[str, Any]]


def save(root: Path, step: int, state: dict[str, Any], meta: dict[str, Any]) -> Path:
    """Write `state` and `meta` as the checkpoint of `step` under `root`.

    A checkpoint of the same step is replaced once the new one is complete. After a failure,
    temporary files are removed, and earlier checkpoints are untouched.

    Args:
        root: folder of the run's checkpoints; created if missing.
        step: number of updates done, at least 0.
        state: nested dicts with string keys of tensors, DTensors and plain values (bool, int,
            float, str, None, and lists of these).
        meta: anything that JSON can hold, such as the resolved configuration.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: writing failed, for example because the disk is full.
        TypeError: `state` or `meta` holds anything else.
    """
    return write(root, step, flatten(state), meta)


def write(root: Path, step: int, contents: Contents, meta: dict[str, Any]) -> Path:
    """Write a checkpoint like `save`, from the result of `flatten` or a copy of it."""
    tensors, values = contents
    name = f"step_{step:08d}"
    temporary, target = root / f".tmp-{name}", root / name
    try:
        everywhere(lambda: _prepare(root, temporary) if rank() == 0 else None)
        write_shards(temporary, tensors)
        files: dict[str, dict[str, Any]] = {}
        for part in everywhere(lambda: _fingerprints(temporary)):
            files.update(part)
        content = {
            "step": step,
            "meta": meta,
            "values": values,
            "tensors": {k: _signature(v) for k, v in tensors.items()},
            "files": files,
        }
        everywhere(lambda: _publish(content, temporary, target) if rank() == 0 else None)
    except CheckpointError as error:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"could not write the checkpoint of step {step} under {root}: {error}. Earlier "
            "checkpoints are untouched. Free some space or choose another folder, then resume."
        ) from error
    return target


def load(path: Path, state: dict[str, Any], *, verified: bool = False) -> dict[str, Any]:
    """Fill `state` in place from the checkpoint at `path`, bit for bit.

    Tensors are filled in place; plain values are replaced in their dicts. Names, shapes and dtypes
    must agree exactly, but the number of ranks may differ. Nothing changes unless everything fits.

    Args:
        path: a checkpoint folder.
        state: the same structure as was saved.
        verified: skip the check of sizes and SHA-256, for a path that `latest` just returned.

    Returns:
        The `meta` given to `save`.

    Raises:
        CheckpointError: the checkpoint is damaged, not one of this package, or does not fit
            `state`.
    """
    if not verified:
        verify(path)
    content = everywhere(lambda: read_manifest(path))[0]
    tensors, values = flatten(state)
    expected = {k: _signature(v) for k, v in tensors.items()}
    _check_fit(path, expected, content["tensors"], values, content["values"])
    try:
        read_shards(path, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"could not read the checkpoint {path}: {error}.") from error
    for parent, key, name, leaf in _leaves(state, ""):
        if not isinstance(leaf, Tensor):
            parent[key] = content["values"][name]
        elif tensors[name] is not leaf:  # a contiguous copy was loaded instead
            leaf.detach().copy_(tensors[name])
    return dict(content["meta"])


def all_names(root: Path) -> list[str]:
    """Return the names of all checkpoints under `root`, also damaged ones, newest first.

    Collective.
    """
    return everywhere(lambda: _candidates(root))[0]


def latest(root: Path) -> Path | None:
    """Return the newest intact checkpoint under `root`, or None.

    Damaged or incomplete checkpoints are skipped with a warning that names them.
    """
    for name in all_names(root):
        try:
            verify(root / name)
        except CheckpointError as error:
            if rank() == 0:
                warnings.warn(f"skipped a damaged checkpoint: {error}", stacklevel=2)
        else:
            return root / name
    return None


def is_intact(path: Path) -> bool:
    """Return whether `verify` finds the checkpoint intact. Collective."""
    try:
        verify(path)
    except CheckpointError:
        return False
    return True


def verify(path: Path) -> None:
    """Check that every file of the checkpoint exists, with its size and SHA-256.

    Each rank checks a share of the files.

    Raises:
        CheckpointError: a file is missing or altered; the message names it.
    """

    def check() -> None:
        files = read_manifest(path)["files"]
        for name in sorted(files)[rank() :: world()]:
            check_file(path / name, files[name])

    everywhere(check)


def read_meta(path: Path) -> dict[str, Any]:
    """Return the `meta` of the checkpoint at `path`; not collective.

    Raises:
        CheckpointError: no readable manifest.
    """
    return dict(read_manifest(path)["meta"])


def step_of(path: Path) -> int:
    """Return the number of updates that the folder name of a checkpoint states."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise CheckpointError(f"{path} is not a checkpoint folder: expected step_<number>")
    return int(match[1])


def prune(
    root: Path,
    keep: int,
    always: Collection[int] = (),
    *,
    intact: Callable[[Path], bool] = is_intact,
) -> None:
    """Delete all checkpoints that are older than the `keep` newest intact ones.

    A damaged checkpoint does not count; it stays until `keep` intact ones are newer. Call this
    right after a successful `save`.

    Args:
        root: folder of the run's checkpoints.
        keep: number of checkpoints to keep.
        always: steps that are also kept.
        intact: a collective check, for callers that know a cheaper one than reading all files.

    Raises:
        InputError: `keep` is less than 1.
        CheckpointError: a folder cannot be deleted.
    """
    if keep < 1:
        raise InputError(f"cannot keep {keep} checkpoints; keep at least 1")
    kept: set[int] = set()
    doomed: list[Path] = []
    for path in (root / name for name in all_names(root)):
        if len(kept) < keep:
            kept |= {step_of(path)} if intact(path) else set()
        elif step_of(path) not in {*kept, *always}:
            doomed.append(path)

    def delete() -> None:
        for path in doomed if rank() == 0 else ():
            _delete(path)

    try:
        everywhere(delete)
    except CheckpointError as error:
        raise CheckpointError(f"could not delete an old checkpoint: {error}") from error


# --- state -----------------------------------------------------------------------------------


def _leaves(node: dict[str, Any], prefix: str) -> Iterator[tuple[dict[str, Any], str, str, Any]]:
    for key, leaf in node.items():
        if not isinstance(key, str):
            raise TypeError(f"checkpoint state has the key {key!r}; keys must be strings")
        name = f"{prefix}{key}"
        if isinstance(leaf, dict):
            yield from _leaves(leaf, f"{name}/")
        else:
            yield node, key, name, leaf


def flatten(state: dict[str, Any]) -> Contents:
    """Split a nested state into tensors, which are not copied, and plain values.

    Names have the form `outer/inner`. Raises TypeError for anything else.
    """
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for _, _, name, leaf in _leaves(state, ""):
        if name in tensors or name in values:
            raise ValueError(f"two entries of the checkpoint state are named {name!r}")
        if isinstance(leaf, Tensor):
            tensor = leaf.detach()
            # safetensors stores contiguous tensors only.
            tensors[name] = leaf if leaf.is_contiguous() else tensor.contiguous()
        elif isinstance(leaf, _SCALARS) or (
            isinstance(leaf, list) and all(isinstance(item, _SCALARS) for item in leaf)
        ):
            values[name] = leaf
        else:
            raise TypeError(
                f"checkpoint state {name!r} is a {type(leaf).__name__}; "
                "only tensors and plain values can be saved"
            )
    return tensors, values


def _signature(tensor: Tensor) -> list[Any]:
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _check_fit(
    path: Path,
    tensors: dict[str, list[Any]],
    saved_tensors: dict[str, list[Any]],
    values: dict[str, Any],
    saved_values: dict[str, Any],
) -> None:
    expected: dict[str, Any] = tensors | dict.fromkeys(values, "a plain value")
    saved: dict[str, Any] = saved_tensors | dict.fromkeys(saved_values, "a plain value")
    problems = [f"it lacks {k}" for k in sorted(expected.keys() - saved.keys())]
    problems += [f"its {k} is not part of this run" for k in sorted(saved.keys() - expected.keys())]
    problems += [
        f"its {k} is {saved[k]}, expected {expected[k]}"
        for k in sorted(expected.keys() & saved.keys())
        if expected[k] != saved[k]
    ]
    if problems:
        more = f"; and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(
            f"the checkpoint {path} does not fit this configuration: "
            + "; ".join(problems[:4])
            + more
            + ". Resume with the configuration that wrote it, or start in a new folder."
        )


# --- files -----------------------------------------------------------------------------------


def _candidates(root: Path) -> list[str]:
    """Return the names of checkpoint folders, newest first; a replaced one after its successor."""
    if not root.is_dir():
        return []
    matches = [m for m in (_NAME.fullmatch(entry.name) for entry in root.iterdir()) if m]
    return [m[0] for m in sorted(matches, key=lambda m: (-int(m[1]), m[2] is not None))]


def _prepare(root: Path, temporary: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".tmp-step_*"):  # from a save or deletion that was killed
        shutil.rmtree(leftover)
    temporary.mkdir()


def _fingerprints(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of the files that this rank wrote."""
    return {file.name: fingerprint(file) for file in own_files(folder)}


def _publish(content: dict[str, Any], temporary: Path, target: Path) -> None:
    write_manifest(temporary, content)
    if target.exists():
        # A folder cannot be replaced atomically. `latest` also finds the old one under its new
        # name, so a kill between the two renames loses nothing.
        old = target.with_name(target.name + ".old")
        if old.exists():
            _delete(old)
        target.rename(old)
    temporary.rename(target)
    sync_folder(target.parent)
    _settle_replaced(target.parent)


def _settle_replaced(root: Path) -> None:
    """Finish the replacements under `root`, including those that a kill interrupted."""
    for old in list(root.glob("step_*.old")):
        replacement = old.with_suffix("")
        if replacement.exists():
            _delete(old)
        else:
            old.rename(replacement)


def _delete(folder: Path) -> None:
    # Rename it first: a half-deleted folder must not look like a damaged checkpoint.
    doomed = folder.with_name(f".tmp-{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed)
