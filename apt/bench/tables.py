"""Format records as tables that read well in a terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from apt.bench.clocks import GpuState
from apt.bench.gate import Verdict
from apt.bench.records import Measurement, Record
from apt.bench.timing import quantile

# APT Table 8: seconds of the DiT for 49 frames of 1280x720, by number of H100s.
PAPER_SECONDS = {1: 2.65, 4: 0.73, 8: 0.50}
PAPER_SIZE = "49x720x1280"
PAPER_MODEL = "apt_8b"
FRAMES_PER_SECOND = 24  # of the paper's videos


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> str:
    """Return an aligned Markdown table; columns from number `left` on are right-aligned figures."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            f"{cell:<{width}}" if i < left else f"{cell:>{width}}"
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(header), line(rule), *map(line, rows)])


def record_table(record: Record) -> str:
    """Return a table of measurements; wrong and skipped ones come below, with the reasons."""
    measured = [m for m in record.measurements if m.status == "measured"]
    form = {"dit": _dit_table, "kernels": _kernel_table}.get(record.topic, _plain_table)
    parts = [form(measured)] if measured else ["Nothing was measured."]
    for status in ("wrong", "skipped"):
        reasons: dict[str, list[str]] = {}
        for m in record.measurements:
            if m.status == status:
                reasons.setdefault(m.reason, []).append(m.label)
        parts += [
            f"{status} ({len(labels)}): {reason}\n" + "\n".join(f"  {label}" for label in labels)
            if status == "wrong"
            else f"{status} ({len(labels)}): {reason}; {labels[0]}"
            + (", ..." if len(labels) > 1 else "")
            for reason, labels in reasons.items()
        ]
    return "\n\n".join(parts)


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Return a table of verdicts, failures first, and the number of cases not judged."""
    order = {"failed": 0, "passed": 1}
    judged = sorted((v for v in verdicts if v.outcome in order), key=lambda v: order[v.outcome])
    silent = len(verdicts) - len(judged)
    lines = []
    if judged:
        rows = [
            (v.outcome if v.enforced else f"{v.outcome} (a goal)", v.gate, v.subject, v.text)
            for v in judged
        ]
        lines.append(format_table(("gate", "of", "what", "figures"), rows, left=4))
    if silent:
        reasons = sorted({v.text for v in verdicts if v.outcome not in order})
        lines.append(f"{silent} not judged: {'; '.join(reasons)}")
    return "\n\n".join(lines) or "No gate applies."


def markdown(record: Record, verdicts: Sequence[Verdict]) -> str:
    """Return the Markdown page that goes with a record's raw samples.

    Ceilings and gates have no place on it if there are none.
    """
    machine, run = record.machine, record.provenance
    software = [f"Python {machine.python}", f"torch {machine.torch}"]
    software += [f"triton {machine.triton}"] if machine.triton else []
    software += [f"CUDA {machine.cuda}"] if machine.cuda else []
    software += [f"cuDNN {machine.cudnn}"] if machine.cudnn else []
    software += [f"liger-kernel {machine.liger}"] if machine.liger else []
    where = f"{machine.device}, {machine.memory_gb} GB"
    where += f", {machine.threads} threads" if machine.threads else ""
    ceilings = ", ".join(map(ceiling, record.ceilings.items()))
    return "\n".join(
        [
            f"# Benchmark: {record.topic}",
            "",
            *([f"**{record.note}**", ""] if record.note else []),
            f"- Device: {where}; {machine.system}",
            f"- Software: {', '.join(software)}; apt {run.apt}, commit {run.commit}",
            f"- Date: {run.date}",
            f"- Command: `{run.command}`",
            *([f"- Ceilings measured in the same run: {ceilings}"] if ceilings else []),
            f"- Raw samples: [{record.stem}.json]({record.stem}.json)",
            "",
            record_table(record),
            "",
            *(["## Gates", "", verdict_table(verdicts), ""] if verdicts else []),
        ]
    )


def ceiling(item: tuple[str, Any]) -> str:
    """Format an item of `Ceilings.as_dict`: a rate, or the state of the GPU under load."""
    name, value = item
    if isinstance(value, Mapping):
        return f"{name}: {GpuState(**value).describe()}"
    return f"{name} not measured" if value is None else f"{name} {value:.4g}"


def milliseconds(value: float) -> str:
    """Format milliseconds to three digits, or two below 0.01."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}" if value >= 0.01 else f"{value:.2g}"


def _kernel_table(measurements: Sequence[Measurement]) -> str:
    header = (
        "op", "shape", "dtype", "direction", "variant",
        "median ms", "10-90 % ms", "host ms", "GB/s", "of copy", "TFLOP/s", "of matmul",
    )  # fmt: skip
    rows = []
    for m in measurements:
        case, figures = m.case, m.metrics
        rows.append(
            (
                *(str(case[key]) for key in ("op", "shape", "dtype", "direction", "variant")),
                milliseconds(m.median_ms),
                spread(m),
                host_time(m),
                f"{figures['gb_s']:.1f}",
                f"{figures['share_of_copy']:.0%}",
                f"{figures['tflops']:.3g}",
                f"{figures['share_of_matmul']:.0%}",
            )
        )
    return "\n\n".join([format_table(header, rows, left=5), *_remarks(measurements)])


def _plain_table(measurements: Sequence[Measurement]) -> str:
    """Return a table with a column for every field of the cases and every metric."""
    names = list(dict.fromkeys(name for m in measurements for name in m.case))
    figures = list(dict.fromkeys(name for m in measurements for name in m.metrics))
    rows = [
        (
            *(str(m.case.get(name, "")) for name in names),
            milliseconds(m.median_ms),
            spread(m),
            *(f"{m.metrics[name]:.4g}" if name in m.metrics else "" for name in figures),
        )
        for m in measurements
    ]
    return format_table((*names, "median ms", "10-90 % ms", *figures), rows, left=len(names))


def _dit_table(measurements: Sequence[Measurement]) -> str:
    header = (
        "model", "frames x height x width", "kernels", "attention", "mode", "tokens", "TFLOP",
        "median ms", "10-90 % ms", "host ms", "TFLOP/s", "of floor", "of sustained",
        "in attention", "in linear", "elementwise", "real time",
    )  # fmt: skip
    rows = []
    for m in measurements:
        case, figures = m.case, m.metrics
        rows.append(
            (
                *(str(case[key]) for key in ("model", "size", "kernels", "attention", "mode")),
                f"{figures['tokens']:.0f}",
                f"{figures['tflop']:.4g}",
                milliseconds(m.median_ms),
                spread(m),
                host_time(m),
                f"{figures['tflops']:.3g}",
                f"{figures['share_of_floor']:.0%}",
                share(figures.get("share_of_sustained_floor")),
                *split_shares(m),
                real_time(m),
            )
        )
    lines = [
        format_table(header, rows, left=5),
        "Of floor: the time of matrix products and attention at the measured matmul rate, divided "
        "by this time. Of sustained: the same at the rate of products that go on for seconds. In "
        "attention, in linear, elementwise: shares of the time in a profile. Real time: this time "
        "divided by the length of the clip.",
        *_remarks(measurements),
    ]
    if any(is_papers_case(m) for m in measurements):
        others = ", ".join(f"{s:.2f} s on {n}" for n, s in PAPER_SECONDS.items())
        lines.append(f"The paper's DiT at this size (APT Table 8), H100s: {others}.")
        for m in measurements:
            if is_papers_case(m):
                ratio = m.median_ms / 1e3 / PAPER_SECONDS[1]
                lines.append(f"{m.label}: {ratio:.2f} of the paper's time on one H100")
    return "\n\n".join(lines)


def _remarks(measurements: Sequence[Measurement]) -> list[str]:
    """Return notes to the figures: the host's time, which attention kernel ran, and warnings."""
    remarks = []
    if any("host_ms" in m.metrics for m in measurements):
        remarks.append(
            "Host ms: time of Python and the driver to launch the work. The median does not "
            "include it, except where * marks that the device waited for the host in some samples. "
            "In a series of calls, each takes the longer of the two."
        )
    by_kernel: dict[str, list[str]] = {}
    for m in measurements:
        if "attention_kernel" in m.facts:
            by_kernel.setdefault(m.facts["attention_kernel"], []).append(m.label)
    for kernel, labels in by_kernel.items():
        remarks.append(f"Attention by {kernel}:\n" + "\n".join(f"  {label}" for label in labels))
    warnings = dict.fromkeys(m.facts["warning"] for m in measurements if "warning" in m.facts)
    return remarks + [f"WARNING: {warning}" for warning in warnings]


def host_time(m: Measurement) -> str:
    """Format milliseconds of the host; empty for a CPU, and for records without them."""
    if "host_ms" not in m.metrics:
        return ""
    return milliseconds(m.metrics["host_ms"]) + ("*" if m.metrics["share_waited"] else "")


def share(value: float | None) -> str:
    """Format a share in percent; empty for None."""
    return "" if value is None else f"{value:.0%}"


def spread(m: Measurement) -> str:
    """Format the range from the 10 % to the 90 % quantile."""
    low, high = (milliseconds(quantile(m.samples_ms, share)) for share in (0.1, 0.9))
    return f"{low}-{high}"


def split_shares(m: Measurement) -> tuple[str, str, str]:
    """Format the profile's shares of attention, linear and elementwise; empty without a profile."""
    parts = [m.metrics.get(f"{name}_ms", 0.0) for name in ("attention", "linear", "elementwise")]
    total = sum(parts) + m.metrics.get("unattributed_ms", 0.0)
    if not total:
        return "", "", ""
    attention, linear, elementwise = (f"{part / total:.0%}" for part in parts)
    return attention, linear, elementwise


def real_time(m: Measurement) -> str:
    """Format time over the video's length; below 1 is faster than real time. Empty for images."""
    frames = int(str(m.case["size"]).split("x")[0])
    fps = m.metrics.get("fps", FRAMES_PER_SECOND)  # old records have none
    videos = int(m.case["batch"])
    return "" if frames == 1 else f"{m.median_ms / 1e3 * fps / (frames * videos):.2f}"


def is_papers_case(m: Measurement) -> bool:
    """Return whether this is the paper's video size on the paper's model."""
    case = m.case
    return (case["model"], case["size"], case["batch"]) == (PAPER_MODEL, PAPER_SIZE, 1)
