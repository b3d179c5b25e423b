"""The forward passes that are measured, by kind of device."""

from __future__ import annotations

from dataclasses import replace

from apt.bench.dit import DIGITS, usual_workload

# Most important first. The first call of `benchmarks.gpu` runs this many, the second the others.
FIRST_NETWORKS = 2
WORKLOADS = {
    "cuda": (
        usual_workload("apt_8b"),
        usual_workload("wan2.1_t2v_1.3b"),  # 81 frames of 832x480, its published size
        usual_workload("apt_8b", height=480, width=832),
        usual_workload("apt_8b", frames=1, height=1024, width=1024),
        usual_workload("mmdit_small"),
        replace(DIGITS, dtype="bfloat16"),  # no fused attention supports fp32
    ),
    # 64 tokens of the small preset: deep and wide enough to take longer than Python's overhead
    "cpu": (
        DIGITS,
        usual_workload(
            "mmdit_small", frames=1, height=128, width=128, text_tokens=16, dtype="float32"
        ),
    ),
}
