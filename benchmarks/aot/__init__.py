"""The ahead-of-time gate: every Triton kernel, compiled for GPUs that are not here.

    python -m benchmarks.aot --check            # compile, hold to the limits and to the table
    python -m benchmarks.aot --update           # write the table anew
    python -m benchmarks.aot --triton 3.6.0 ... # with another Triton, installed apart

`cases.py` says what is compiled. Nothing runs: kernels are launched without a device (`launches`),
what they would launch is compiled for each chip (`build`), and the machine code is read (`sass`).
"""

from __future__ import annotations
