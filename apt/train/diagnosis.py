"""Find the rank that broke an update: gradients are summed over ranks, but activations are not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from apt.distributed.collectives import everywhere
from apt.errors import HardwareError, listed
from apt.methods.base import MicroBatch, Part, TrainedNetwork
from apt.train.networks import NonFiniteGradient, Trained
from apt.train.witness import Rehearsed, Seen, witnessed

__all__ = ["check_replay", "where_not_finite"]


def where_not_finite(
    error: NonFiniteGradient,
    trained: Mapping[str, TrainedNetwork],
    part: Part,
    batches: Sequence[MicroBatch],
    update: int,
) -> str:
    """Repeat a part whose gradients are not finite, and return where this begins. Collective.

    Returns:
        The parameters, and for each rank the first module whose output is not finite.
    """
    found = everywhere(lambda: error.names)
    names = [name for names in found for name in names]
    with _rehearsing(trained), witnessed(_modules(trained), _is_finite) as seen:
        _until_it_would_move(part, batches, update)
    first = everywhere(lambda: seen.first(lambda number, finite: not bool(finite)))
    begins = [f"{where} on rank {rank}" for rank, where in enumerate(first) if where]
    parameters = f"the gradient of {listed(dict.fromkeys(names))}" if names else "the norm"
    return f"{parameters} (first {listed(begins) if begins else 'in the sum over ranks'})"


def check_replay(
    trained: Mapping[str, TrainedNetwork], part: Part, batches: Sequence[MicroBatch], update: int
) -> None:
    """Run a part twice without updating weights, and compare the outputs of every module.

    Collective; each rank compares its own.

    Raises:
        HardwareError: they differ in a bit; the message names the rank.
    """
    runs: list[Seen] = []
    with _rehearsing(trained):
        for _ in range(2):
            with witnessed(_modules(trained), _fingerprint) as seen:
                _until_it_would_move(part, batches, update)
            runs.append(seen)
    differences = everywhere(lambda: runs[0].first_difference(runs[1]))
    bad = [f"rank {rank} ({where})" for rank, where in enumerate(differences) if where]
    if bad:
        raise HardwareError(
            f"repeating a micro-batch gave different results on {listed(bad)}, in update "
            f"{update + 1}: test that machine, and do not use it until then. If all ranks are "
            "named, an operation is not deterministic: set --replay-every 0"
        )


@contextmanager
def _rehearsing(trained: Mapping[str, TrainedNetwork]) -> Iterator[None]:
    """Keep weights unchanged inside the block."""
    networks = [network for network in trained.values() if isinstance(network, Trained)]
    for network in networks:
        network.rehearses = True
    try:
        yield
    finally:
        for network in networks:
            network.rehearses = False


def _until_it_would_move(part: Part, batches: Sequence[MicroBatch], update: int) -> None:
    try:
        part(batches, update)
    except Rehearsed:
        return
    raise AssertionError("a part of an update ended without updating weights")


def _modules(trained: Mapping[str, TrainedNetwork]) -> dict[str, torch.nn.Module]:
    return {name: network.module for name, network in trained.items()}


def _is_finite(tensor: Tensor) -> Tensor:
    return tensor.isfinite().all()


def _fingerprint(tensor: Tensor) -> Tensor:
    """Return a hash of the bits."""
    return torch.hash_tensor(tensor.reshape(-1).view(torch.uint8))
