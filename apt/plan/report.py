"""The text of a plan: memory by part, time, traffic, what was tried, and what to change."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from apt.errors import counted
from apt.plan.estimate import Estimate, Job
from apt.plan.gpus import GIB
from apt.plan.layouts import Choice
from apt.plan.measure import BATCH, HEADS, STATES
from apt.plan.tracking import CAST, GATHERED, OTHER
from apt.train.config import TrainConfig

__all__ = ["describe_changes", "report"]


def report(job: Job, choice: Choice, ranks: int) -> str:
    """Return the whole plan as text."""
    taken = choice.taken
    paragraphs = [
        _head(job, taken, ranks),
        _memory(taken),
        _verdict(job, taken, ranks),
        _time(taken),
        _traffic(taken),
        _tried(job.config, choice, ranks),
        _assumed(job, taken),
    ]
    return "\n\n".join(text for text in paragraphs if text)


def _head(job: Job, taken: Estimate, ranks: int) -> str:
    clip = job.sample
    size = f"{clip.frames} x {clip.height} x {clip.width}"
    lines = [f"{job.config.name} on {ranks} x {taken.gpu.name}: clips of {size}"]
    models = {"starts from": job.start, **job.others}
    for field, model in models.items():
        found = f" ({model.found})" if model.found else ""
        lines.append(f"  {field}: {model.name}{found}")
    changes = describe_changes(job.config, taken.config)
    lines.append(f"  layout: {taken.layout}" + (f", {changes}" if changes else ""))
    share = taken.config.batch_size // taken.layout.data
    size_ = taken.config.micro_batch_size or share
    lines.append(
        f"  batch: {taken.config.batch_size:,}; {share:,} on each data rank, in micro-batches of "
        f"{size_:,}"
    )
    return "\n".join(lines)


def _memory(taken: Estimate) -> str:
    peaks = taken.usage.peaks
    names = sorted({part for peak in peaks.values() for part in peak.parts}, key=_order)
    header = ["GiB on each GPU at the peak of", *(f"{name}'s step" for name in peaks)]
    rows = [[part, *(_gib(peak.parts[part]) for peak in peaks.values())] for part in names]
    if taken.usage.peak.total >= GIB:  # below that, all parts are small
        rows = [row for row in rows if any(cell != _gib(0) for cell in row[1:])]
    rows.append(["tensors", *(_gib(peak.total) for peak in peaks.values())])
    reserved = taken.gpu.reserved
    rows.append(["with CUDA and NCCL", *(_gib(p.total + reserved) for p in peaks.values())])
    return table(header, rows)


_ORDER = (*STATES, GATHERED, CAST, BATCH, OTHER, HEADS)


def _order(part: str) -> int:
    return _ORDER.index(part) if part in _ORDER else len(_ORDER)


def _verdict(job: Job, taken: Estimate, ranks: int) -> str:
    have = f"{_gib(taken.gpu.memory)} GiB"
    if taken.fits:
        return f"It fits: {taken.room:.0%} of {have} stays free."
    lacking = _gib(taken.needed - taken.gpu.memory)
    advice = "".join(f"\n  - {text}" for text in _advice(job, taken, ranks))
    return f"It does not fit: it needs {lacking} GiB more than {have}. What would help:{advice}"


def _advice(job: Job, taken: Estimate, ranks: int) -> list[str]:
    """Return what to change to save memory."""
    config, peak = taken.config, taken.usage.peak
    kept = sum(peak.parts[part] for part in STATES)
    found = []
    size = config.micro_batch_size or config.batch_size // taken.layout.data
    if size > 1:
        found.append(f"--micro-batch-size 1 (now {size}): activations grow with it")
    if not config.activation_checkpointing:
        found.append("--activation-checkpointing: the backward pass recomputes blocks")
    if kept > 0.4 * taken.needed:
        sharded = f"{_gib(kept / 2)} instead of {_gib(kept)} GiB of states"
        found.append(f"--gpus {2 * ranks}: {sharded} if twice as many share a copy")
        if not config.lora.rank and config.stage.start_field is not None:
            found.append("--lora.rank 64: only adapters train, and weights are frozen in bf16")
    shared = {model.file for model in job.others.values()}
    if config.lora.rank and shared and ranks == 1 and job.start.file not in shared:
        found.append("--lora.base MODEL: G's adapters share the frozen weights that D starts from")
    if not config.bf16_residual and config.precision == "bf16":
        found.append(
            "--bf16-residual: in MMDiT, inputs of blocks take half the memory; results change"
        )
    if job.sample.frames > 1:
        found.append("fewer --data.frames: activations grow with the number of tokens")
    return found


def _time(taken: Estimate) -> str:
    work, gpu = taken.usage.work, taken.gpu
    share = taken.tflops / gpu.peak_tflops
    text = (
        f"An update: {_figure(work.flops / 1e12)} TFLOP on each GPU, recomputation included "
        f"({work.attention / max(work.flops, 1):.0%} attention); {_words(taken.compute_seconds)} "
        f"at {taken.tflops:.0f} TFLOP/s ({share:.0%} of the peak, an assumption)."
    )
    if taken.hidden_seconds or taken.waiting_seconds:
        text += (
            f"\nCommunication: {_words(taken.hidden_seconds)} overlaps with it, "
            f"{_words(taken.waiting_seconds)} does not."
        )
    total = taken.seconds * taken.config.num_updates
    return (
        f"{text}\nIn total {_words(taken.seconds)} per update, {taken.samples_per_second:.3g} "
        f"samples/s, {_words(total)} for {counted(taken.config.num_updates, 'update')}."
    )


def _traffic(taken: Estimate) -> str:
    sent = taken.sent()
    if not sent:
        return ""
    rows = [
        [
            collective.name,
            f"{taken.usage.work.calls[collective]:,}",
            f"{size / 1e9:,.3g}",
            _words(taken.seconds_of(collective, size)),
        ]
        for collective, size in sorted(sent.items(), key=lambda item: -item[1])
        if collective.ranks > 1
    ]
    return table(["sent by each GPU per update", "calls", "GB", "time"], rows)


def _tried(config: TrainConfig, choice: Choice, ranks: int) -> str:
    if len(choice.tried) + len(choice.refused) + len(choice.skipped) < 2:
        return ""
    rows = []
    for found in choice.tried:
        mark = "taken" if found is choice.taken else ""
        row = [_gib(found.needed), _words(found.seconds), mark]
        rows.append([_way(config, found.config, ranks), *row])
    for other, least in choice.skipped:
        rows.append([_way(config, other, ranks), f"> {_gib(least)}", "", "not measured"])
    text = table(["tried", "GiB", "per update", ""], rows)
    for parallel, reason in choice.refused:
        text += f"\nrefused: sequence {parallel.sequence}: {reason}"
    return text


def _way(before: TrainConfig, after: TrainConfig, ranks: int) -> str:
    changes = describe_changes(before, after)
    return f"{after.parallel.layout(ranks)}{', ' if changes else ''}{changes}"


def _assumed(job: Job, taken: Estimate) -> str:
    gpu = taken.gpu
    lines = [
        "Counted from the trainer's own networks and steps, run without data. Assumed: "
        f"{_gib(gpu.reserved)} GiB for CUDA and NCCL, {gpu.node_gb_s:g} GB/s between GPUs "
        f"of a machine and {gpu.network_gb_s:g} GB/s between machines. Not counted: "
        "fragmentation of the allocator, sample sheets"
    ]
    if job.config.data.source not in ("latents", "digits"):
        lines.append(", text encoder and VAE (as if clips and captions came from a cache)")
    return "".join(lines) + "."


def describe_changes(before: TrainConfig, after: TrainConfig) -> str:
    """Return the options that differ, as command-line arguments, except those of the layout."""
    found = []
    for name, was, now in _differences(before, after, ""):
        if name.startswith("parallel."):
            continue
        option = name.replace("_", "-")
        found.append(f"--{option}" if now is True else f"--{option} {now}" if was != now else "")
    return " ".join(found)


def _differences(before: Any, after: Any, prefix: str) -> list[tuple[str, Any, Any]]:
    found = []
    for field in dataclasses.fields(before):
        was, now = getattr(before, field.name), getattr(after, field.name)
        if was == now:
            continue
        if dataclasses.is_dataclass(was) and type(was) is type(now):
            found += _differences(was, now, f"{prefix}{field.name}.")
        else:
            found.append((f"{prefix}{field.name}", was, now))
    return found


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table with aligned columns: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (
            f"{cell:<{width}}" if not i else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *rest]).rstrip()

    return "\n".join(map(line, [header, *rows]))


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= GIB or not size else f"{size / GIB:.3f}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _words(seconds: float) -> str:
    if seconds < 0.1:
        return f"{seconds * 1e3:.2g} ms"
    for unit, length in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.3g} {unit}"
    return f"{seconds:.3g} s"
