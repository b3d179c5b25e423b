"""Which implementation of a fused op runs, and what each one needs."""

from __future__ import annotations

from typing import NamedTuple

from apt.errors import InputError

OPS = (
    "modulated_norm",
    "residual_modulated_norm",
    "qk_norm_rope",
    "sample_shifted_timesteps",
    "perturbed_batch",
)
BACKENDS = ("reference",)


class BackendStatus(NamedTuple):
    """One row of a status table: `reason` says why a backend is unavailable, or what it is."""

    name: str
    available: bool
    reason: str


def kernel_status() -> list[BackendStatus]:
    """A row `op/backend` for each implementation of each fused op on this machine."""
    return [BackendStatus(f"{op}/{name}", True, "torch ops") for op in OPS for name in BACKENDS]


def resolve_backend(op: str, backend: str | None) -> str:
    """The backend that `op` will run; None lets it choose.

    Raises InputError for a backend that the op does not have.
    """
    if backend is None:
        return "reference"
    if backend not in BACKENDS:
        raise InputError(
            f"{op} has no backend {backend!r}; choose from: {', '.join(BACKENDS)}, or leave it out"
        )
    return backend
