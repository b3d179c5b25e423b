"""What an update was worth: samples, tokens and operations a second, and which rank is slow.

Operations are the model's: those of its matrix products and attention once forward, once more for
gradients of inputs and once more for those of weights. What is computed again counts nothing.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from apt.distributed.parallel import Parallel
from apt.errors import InputError
from apt.kernels.roofline import GPUS
from apt.methods.base import Pass
from apt.models.costs import COUNTERS, dit_cost

__all__ = ["model_flops", "peak_tflops", "probe_seconds", "speed"]

_PROBES = 8

_COUNTED: dict[str, float | None] = {}


def model_flops(passes: Sequence[Pass], latent_shape: tuple[int, ...]) -> float | None:
    """Of one sample of an update; None for a network that nobody has counted, or sizes that its
    counter does not take.

    Text is left out, but in Wan, which pads every prompt to one length.

    Args:
        passes: of the stage, see `Stage.passes`.
        latent_shape: (T, H, W) of the sample.
    """
    total = 0.0
    for one in passes:
        config: Any = one.backbone.config
        if type(config) not in COUNTERS:
            return None
        # A discriminator has lost the blocks that no head reads.
        flops = _forward_flops(dataclasses.replace(config, depth=one.backbone.depth), latent_shape)
        if flops is None:
            return None
        total += one.samples * (1 + one.backward) * flops
    return total


def _forward_flops(config: Any, latent_shape: tuple[int, ...]) -> float | None:
    """Counted once for each network and size: it is asked for in every update."""
    key = repr((config, latent_shape))
    if key not in _COUNTED:
        frames, height, width = latent_shape
        try:
            cost = dit_cost(config, 1, (frames, height, width), text_tokens=0)
            _COUNTED[key] = cost.flops
        except InputError:
            _COUNTED[key] = None
    return _COUNTED[key]


def peak_tflops(device: torch.device) -> float | None:
    """The vendor's figure for dense bf16 of the GPU that is here; None if it is not known."""
    if device.type != "cuda":
        return None
    here = torch.cuda.get_device_name(device).upper()
    for key, gpu in GPUS.items():
        word, _, kind = key.upper().removeprefix("RTX").partition("-")
        if word in here and (kind == "PCIE") == ("PCIE" in here):
            return gpu.peak.matmul_tflops
    return None


def probe_seconds(device: torch.device) -> float:
    """How long a product of one size takes here, now.

    A rank that computes slower than the others is found so: they wait for it inside an update,
    which therefore takes as long on all.
    """
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (256, torch.float32)
    x = torch.ones(size, size, dtype=dtype, device=device)
    x @ x  # the first one may choose a kernel
    _wait(device)
    begin = time.perf_counter()
    for _ in range(_PROBES):
        x @ x
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Update:
    """An update that is done.

    Attributes:
        seconds: that it took.
        waited: of them for data, on this rank.
        samples: over all ranks.
        latent_shape: (T, H, W) of each; None if it is not known.
    """

    seconds: float
    waited: float
    samples: int
    latent_shape: tuple[int, ...] | None


def speed(update: Update, passes: Sequence[Pass], parallel: Parallel) -> dict[str, float]:
    """Figures for `speed.jsonl`; every rank must call it."""
    seconds = max(update.seconds, 1e-9)
    found = {
        "speed/seconds_per_update": update.seconds,
        "speed/samples_per_second": update.samples / seconds,
    }
    waits = parallel.of_each(update.waited)
    found["speed/data_wait_seconds"] = max(waits)
    if len(waits) > 1:
        found["speed/data_wait_spread_seconds"] = max(waits) - min(waits)
        found["speed/slowest_rank"] = float(waits.index(max(waits)))
        probes = parallel.of_each(probe_seconds(parallel.device))
        found["speed/probe_ratio"] = max(probes) / median(probes)
        found["speed/slowest_computing_rank"] = float(probes.index(max(probes)))
    if not passes or update.latent_shape is None:
        return found
    tokens = math.prod(passes[0].backbone.token_grid(update.latent_shape))
    found["speed/tokens_per_second"] = update.samples * tokens / seconds
    flops = model_flops(passes, update.latent_shape)
    if flops is None:
        return found
    tflops = update.samples * flops / seconds / parallel.world_size / 1e12
    found["speed/model_tflops_per_rank"] = tflops
    peak = peak_tflops(parallel.device)
    if peak is not None:
        found["speed/mfu"] = tflops / peak
    return found
