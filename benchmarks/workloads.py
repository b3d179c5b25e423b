"""The forward passes that are measured, by kind of device."""

from __future__ import annotations

from dataclasses import replace

from apt.bench.dit import Workload

# 9 frames of 32x32 in pixel patches, one clip: what the digits model generates
DIGITS = Workload(
    model="mmdit_digits",
    frames=9,
    height=32,
    width=32,
    text_tokens=32,
    compression=(4, 4, 4),
    dtype="float32",
)
PAPER = Workload(model="apt_8b", frames=49, height=720, width=1280)

WORKLOADS = {
    "cuda": (
        PAPER,
        Workload(model="apt_8b", frames=49, height=480, width=832),
        Workload(model="apt_8b", frames=1, height=1024, width=1024),
        Workload(model="mmdit_small", frames=49, height=720, width=1280),
        replace(DIGITS, dtype="bfloat16"),  # no fused attention takes fp32
    ),
    # 64 tokens of the small preset: enough blocks and width to be more than Python
    "cpu": (
        DIGITS,
        Workload(
            model="mmdit_small", frames=1, height=128, width=128, text_tokens=16, dtype="float32"
        ),
    ),
}
