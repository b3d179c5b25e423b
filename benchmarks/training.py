"""A training check of at most 90 seconds: compares losses on this GPU with the CPU's, and times it.

It runs the digits' three stages with their recipes' batches and optimisers. Each starts from a
model that ships with the package, so that none needs the result of another: pre-training from
random weights, distillation of "digits-diffusion", and adversarial training from "digits" against
"digits-diffusion".

`python -m benchmarks.training` records the first losses in fp32 on the CPU again. Run it when a
change of a recipe, a model or a loss is meant to change them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from apt.bench.records import Measurement
from apt.bench.timing import median
from apt.data.loader import make_loader, num_micro_batches, share_of_rank
from apt.distributed.parallel import Parallel
from apt.files import write_text
from apt.kernels import kernel_backend
from apt.methods import MicroBatch, PretrainConfig
from apt.train.config import ModelConfig, OptimizerConfig, TrainConfig
from apt.train.datasets import make_dataset
from apt.train.host import MicroBatches
from apt.train.recipes import RECIPES
from apt.train.trainer import make_stage

STAGES = ("pretrain", "distill", "apt")
STARTS: dict[str, dict[str, Any]] = {
    "pretrain": {"codec": "digits-codec"},
    "distill": {"teacher": "digits-diffusion"},
    "apt": {"generator": "digits", "discriminator": "digits-diffusion"},
}
UPDATES = {"pretrain": 200, "distill": 100, "apt": 60}
CURVE = Path(__file__).with_name("training_curve.json")
CURVE_UPDATES = 20
LOSSES = ("generator/loss", "discriminator/loss")

_WARM_UP = 3  # first updates, which compile and fill the allocator's cache


@dataclass(frozen=True)
class Update:
    """Metrics of one update, its milliseconds, and those of making its batch."""

    metrics: Mapping[str, float]
    milliseconds: float
    data_milliseconds: float


def stage_config(stage: str, *, precision: Literal["fp32", "bf16"]) -> TrainConfig:
    """Return the digits' recipe of a stage, starting from models that ship with the package."""
    recipe = RECIPES.get(f"digits_{stage}")()
    assert isinstance(recipe, TrainConfig)
    start = dataclasses.replace(recipe.stage, **STARTS[stage])
    return dataclasses.replace(recipe, stage=start, precision=precision)


def alone(device: torch.device) -> Parallel:
    """Return a single rank."""
    return Parallel(rank=0, world_size=1, device=device, mesh=None)


def train(config: TrainConfig, parallel: Parallel, number: int) -> Iterator[Update]:
    """Run the first updates, one by one; each of several ranks does its share."""
    stage = make_stage(config, parallel)
    dataset = make_dataset(config.data, seed=config.seed)
    loader = make_loader(
        dataset,
        batch_size=config.batch_size,
        micro_batch_size=config.micro_batch_size,
        rank=parallel.data_rank,
        world_size=parallel.data_size,
        seed=config.seed,
    )
    share = share_of_rank(config.batch_size, parallel.data_size)
    parts = num_micro_batches(share, config.micro_batch_size)
    for update in range(number):
        begin = time.perf_counter()
        read = list(islice(loader, parts))
        loaded = time.perf_counter()
        batches = MicroBatches(stage, iter(read).__next__, parts)
        metrics = stage.update(batches, update)
        found = {name: float(value) for name, value in metrics.items()}
        wait(parallel.device)
        ended = time.perf_counter()
        yield Update(found, (ended - loaded) * 1e3, (loaded - begin) * 1e3)


def train_within(
    config: TrainConfig, device: torch.device, number: int, seconds: float
) -> list[Update]:
    """Run as many updates as the time allows, but at least one after those that warm up."""
    until, done = time.monotonic() + seconds, []
    for update in train(config, alone(device), number):
        done.append(update)
        if time.monotonic() > until and len(done) > _WARM_UP:
            break
    return done


def check_curve(
    device: torch.device, kernels: str, *, updates: int = CURVE_UPDATES, max_seconds: float
) -> list[Measurement]:
    """Compare the first losses of each stage in fp32 with those recorded on the CPU.

    A stage whose losses differ is "wrong". On a device that does not really compute, stages are
    "skipped", since nothing can be judged.
    """
    recorded = json.loads(CURVE.read_text(encoding="utf-8"))
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    found = []
    try:
        for stage in STAGES:
            config = stage_config(stage, precision="fp32")
            with backend(kernels):
                done = train_within(config, device, updates, max_seconds / len(STAGES))
            case = case_of("first losses", stage, kernels, "fp32")
            found.append(judge_curve(case, done, recorded["losses"][stage], why_unjudged(device)))
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    return found


def judge_curve(
    case: Mapping[str, str | int],
    done: Sequence[Update],
    recorded: Mapping[str, Sequence[float]],
    unjudged: str,
) -> Measurement:
    """Compare losses with recorded ones; each may differ by the share in `ALLOWED`."""
    deviation, where = worst_deviation([update.metrics for update in done], recorded)
    if unjudged:
        return Measurement(case=case, status="skipped", reason=unjudged)
    allowed = ALLOWED[str(case["stage"])]
    if deviation > allowed:
        reason = f"{where} differs from the CPU's by {deviation:.2g} of it, allowed {allowed:g}"
        return Measurement(case=case, status="wrong", reason=reason)
    return Measurement(
        case=case, samples_ms=steady(done), metrics={"deviation": deviation, "updates": len(done)}
    )


def worst_deviation(
    found: Sequence[Mapping[str, float]], recorded: Mapping[str, Sequence[float]]
) -> tuple[float, str]:
    """Return the largest difference as a share of the recorded value, and where it is.

    The difference is infinite for a loss that is not finite.
    """
    worst, where = 0.0, ""
    for name, curve in recorded.items():
        for number, (metrics, value) in enumerate(zip(found, curve, strict=False), 1):
            deviation = abs(metrics[name] - value) / abs(value)
            if not math.isfinite(deviation):
                return math.inf, f"{name} of update {number}"
            if deviation > worst:
                worst, where = deviation, f"{name} of update {number}"
    return worst, where


# A hundred times the effect of rounding on the CPU: splitting a batch, or changing weights by a
# rounding error, changed losses by at most 1e-7, 2e-6 and 1e-6. bf16 changes them by 1e-2 in
# distillation. Pre-training starts with an output of zeros: its first losses say little about the
# network.
ALLOWED = {"pretrain": 2e-5, "distill": 2e-4, "apt": 2e-4}


def check_speed(
    device: torch.device, kernels: str, *, updates: Mapping[str, int], max_seconds: float
) -> list[Measurement]:
    """Measure milliseconds per update in bf16, samples per second and memory for each stage."""
    found, deadline = [], time.monotonic() + max_seconds
    for number, stage in enumerate(STAGES):
        config = stage_config(stage, precision="bf16")
        seconds = (deadline - time.monotonic()) / (len(STAGES) - number)
        reset_peak(device)
        with backend(kernels):
            done = train_within(config, device, updates[stage], seconds)
        case = case_of("speed", stage, kernels, "bf16", config.batch_size)
        samples = steady(done)
        found.append(
            Measurement(
                case=case,
                samples_ms=samples,
                metrics={
                    "samples_per_s": config.batch_size / median(samples) * 1e3,
                    "data_ms": median([update.data_milliseconds for update in done]),
                    "peak_gb": peak_gb(device),
                    "updates": len(done),
                },
            )
        )
    return found


def check_large_step(device: torch.device, *, small: bool = False) -> list[Measurement]:
    """Time updates with checkpointed blocks and FusedRMSprop, which also averages the weights.

    The model is the 0.3 B preset, on the latents of one clip of 49x480x832, in bf16.
    """
    grid = (2, 4, 4) if small else (13, 60, 104)
    options: dict[str, int | float | str] = {"in_channels": 192, "text_dim": 128, "pooled_dim": 128}
    if small:
        options |= {"hidden_size": 48, "depth": 2, "num_heads": 2}
    config = TrainConfig(
        name="large step",
        run_dir="",
        stage=PretrainConfig(timestep_shift=12.0),
        model=ModelConfig(name="mmdit_small", options=options, codec_options={"temporal": 1}),
        optimizer=OptimizerConfig(),
        batch_size=1,
        precision="bf16",
        activation_checkpointing=True,
    )
    stage = make_stage(config, alone(device))
    x = torch.randn(1, 192, *grid, generator=torch.Generator().manual_seed(0)).to(device)
    batch = MicroBatch(x=x, captions=["a red seven moving left"], offset=0)
    reset_peak(device)
    samples, losses = [], []
    for update in range(_WARM_UP + 3):
        begin = time.perf_counter()
        metrics = stage.update([batch], update)
        wait(device)
        samples.append((time.perf_counter() - begin) * 1e3)
        losses.append(float(metrics["generator/loss"]))
    case = case_of("checkpointed step, FusedRMSprop", "pretrain", "auto", "bf16", 1)
    if not all(map(math.isfinite, losses)) and not why_unjudged(device):
        return [Measurement(case=case, status="wrong", reason=f"the losses are {losses}")]
    metrics_found = {
        "parameters": float(sum(p.numel() for p in stage.generator.module.parameters())),
        "tokens": float(x[0, 0].numel() // 4),
        "peak_gb": peak_gb(device),
    }
    return [Measurement(case=case, samples_ms=tuple(samples[_WARM_UP:]), metrics=metrics_found)]


def case_of(
    check: str,
    stage: str,
    kernels: str,
    precision: Literal["fp32", "bf16"],
    batch: int | None = None,
) -> dict[str, str | int]:
    """Return the case as records hold it."""
    batch = stage_config(stage, precision=precision).batch_size if batch is None else batch
    return {
        "check": check, "stage": stage, "kernels": kernels, "precision": precision, "batch": batch,
    }  # fmt: skip


def steady(done: Sequence[Update]) -> tuple[float, ...]:
    """Return the milliseconds of all updates after those that warm up."""
    behind = done[_WARM_UP:] or done
    return tuple(update.milliseconds for update in behind)


def backend(kernels: str) -> AbstractContextManager[None]:
    """Return the context of a kernel backend; "auto" is the default for users."""
    return nullcontext() if kernels == "auto" else kernel_backend(kernels)


def why_unjudged(device: torch.device) -> str:
    """Return why values mean nothing on this device; empty if it computes."""
    computes = float(torch.ones(2, device=device).sum()) == 2.0
    return "" if computes else "not judged: this device does not compute (1 + 1 is not 2 there)"


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Start to measure `peak_gb`."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float:
    """Return the peak memory of tensors in GiB; 0 on a CPU, where it is not counted."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def record(path: Path = CURVE) -> None:
    """Record the first losses of each stage in fp32 on the CPU, with the reference ops."""
    losses: dict[str, dict[str, list[float]]] = {}
    with kernel_backend("reference"):
        for stage in STAGES:
            config = stage_config(stage, precision="fp32")
            done = list(train(config, alone(torch.device("cpu")), CURVE_UPDATES))
            names = [name for name in LOSSES if name in done[0].metrics]
            losses[stage] = {
                name: [float(f"{update.metrics[name]:.8g}") for update in done] for name in names
            }
            print(stage, losses[stage], file=sys.stderr, flush=True)
    found = {"command": "python -m benchmarks.training", "torch": torch.__version__}
    write_text(path, json.dumps({**found, "losses": losses}, indent=1) + "\n")


if __name__ == "__main__":
    record()
