"""The ahead-of-time gate: compiles every Triton kernel for GPUs that need not be present.

    python -m benchmarks.aot --check            # compile, check the limits and the table
    python -m benchmarks.aot --update           # compile, check the limits, write the table
    python -m benchmarks.aot --triton 3.6.0 ... # with another Triton, installed separately

`cases.py` lists what is compiled. No kernel runs: ops are called without a device (`launches`), the
kernels that they would launch are compiled for each chip (`build`), and the machine code is read
(`sass`).
"""

from __future__ import annotations
