"""Estimate the roofline of a forward pass on a GPU that need not be present."""

from __future__ import annotations

from dataclasses import replace

from apt.bench.dit import Workload
from apt.bench.tables import (
    PAPER_MODEL,
    PAPER_SECONDS,
    PAPER_SIZE,
    format_table,
)
from apt.errors import InputError
from apt.kernels.costs import OpCost
from apt.kernels.roofline import GPUS, H100_ATTENTION_TFLOPS, Gpu, find_gpu

# The published attention rates are for the H100; the H200 computes as fast.
_HOPPER = ("h100", "h200")
_LONG = 4096  # tokens; the rates hold from this length on


def floor_report(workload: Workload, gpu: str) -> str:
    """Return a report: work by kind, the floor, and times with published attention kernels.

    Raises InputError for a GPU whose rates are not known, and for fp32, whose rates are not known.
    """
    if workload.dtype == "float32":
        raise InputError("GPU rates are known for bf16 and fp16 only: use --dtype bfloat16")
    found, cost = find_gpu(gpu), workload.cost()
    total, floor = cost.total, cost.floor(found.rates)
    rows = [
        _row("linear", total.linear, floor.linear),
        _row("attention", total.attention, floor.attention),
        _row("floor: linear and attention", total.linear + total.attention, floor.matmul),
        _row("elementwise, one pass an op", total.elementwise, floor.elementwise),
        ("sum, nothing overlapped", "", "", _ms(floor.total)),
        _row("elementwise, all fused", total.elementwise_fused, floor.elementwise_fused),
        ("sum, all fused", "", "", _ms(floor.total_fused)),
    ]
    plural = "s" if workload.frames > 1 else ""
    paragraphs = [
        f"{workload.name}, {workload.frames} frame{plural} of "
        f"{workload.width}x{workload.height}, batch "
        f"{workload.batch}, {workload.dtype}: {cost.visual_tokens:,} tokens and "
        f"{cost.text_tokens} of text, {cost.flops / 1e12:.4g} TFLOP",
        f"An estimate for {found.name}; the model was not run. Launches are not counted.\n"
        f"{_rates(found)}",
        format_table(("part", "TFLOP", "GB", "ms"), rows, left=1),
    ]
    published = H100_ATTENTION_TFLOPS.get(cost.head_dim, {})
    if gpu in _HOPPER and published and cost.visual_tokens >= _LONG:
        with_attention = []
        for name, tflops in published.items():
            there = cost.floor(replace(found.rates, attention_tflops=tflops))
            times = _ms(there.total), _ms(there.total_fused)
            with_attention.append((name, f"{tflops:g}", *times))
        header = ("attention by", "TFLOP/s", "sum, ms", "all fused, ms")
        paragraphs.append(
            "The sums, with the published rates of attention kernels on an H100 (16k tokens, head "
            f"dimension {cost.head_dim}):\n\n" + format_table(header, with_attention, left=1)
        )
    paragraphs += _comparison(workload, floor.matmul)
    return "\n\n".join(paragraphs)


def _row(name: str, cost: OpCost, seconds: float) -> tuple[str, str, str, str]:
    return name, f"{cost.flops / 1e12:.4g}", f"{cost.bytes / 1e9:.4g}", _ms(seconds)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f}" if seconds >= 1 else f"{seconds * 1e3:.4g}"


def _rates(gpu: Gpu) -> str:
    rates = gpu.rates
    figures = f"{rates.matmul_tflops:g} TFLOP/s, {rates.memory_gb_s:g} GB/s"
    if gpu.measured:
        return f"{figures} (measured: {gpu.measured_by})"
    return f"{figures} (peak: {gpu.source}).\n{_reached()}"


def _reached() -> str:
    """Say how close to their peaks large operations come, where that was measured."""
    h200 = GPUS["h200"]
    assert h200.measured is not None
    products = h200.measured.matmul_tflops / h200.peak.matmul_tflops
    copies = h200.measured.memory_gb_s / h200.peak.memory_gb_s
    known = ", ".join(name for name, gpu in GPUS.items() if gpu.measured)
    return (
        f"No kernel reaches the peak: on an H200, large products reach {products:.0%} and copies "
        f"{copies:.0%} of it. Estimates with measured rates ({known}) are longer accordingly."
    )


def _comparison(workload: Workload, floor: float) -> list[str]:
    lines = []
    if workload.frames > 1:
        clip = workload.batch * workload.frames / workload.fps
        lines.append(
            f"Real time: {clip:.2f} s at {workload.fps:g} frames per second; "
            f"the floor is {floor / clip:.2g} of it."
        )
    if (workload.name, workload.size, workload.batch) == (PAPER_MODEL, PAPER_SIZE, 1):
        times = ", ".join(f"{s:.2f} s on {n}" for n, s in PAPER_SECONDS.items())
        lines.append(f"The paper's DiT (APT Table 8), H100s: {times}.")
    return lines
