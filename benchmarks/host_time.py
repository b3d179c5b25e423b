"""Measure what a call costs the host: `python -m benchmarks.host_time`.

Small networks are only as fast as Python and the driver launch their kernels. This measures the
launching thread's processor time, for each fused op with its kernel and with its reference, and for
whole passes of the digits' network. The result is the minimum over many short series of calls; the
device catches up between them. On a GPU it shows where `apt.kernels.backends.SMALL` should lie. It
needs a CUDA device, but what that device computes, and how fast, does not matter.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
from torch import nn

from apt.bench.dit import DIGITS, RandomNetwork
from apt.bench.inputs import Random
from apt.bench.machine import describe_machine, find_device
from apt.bench.ops import OPS, Op, variants_of
from apt.bench.shapes import SHAPES
from apt.bench.tables import format_table
from apt.errors import InputError
from apt.kernels import kernel_backend

ROWS, CALLS = 60, 5  # few enough calls to fit into the queue, or the host would wait for the device
FUSED = [op for op in OPS.values() if "triton" in variants_of(op)]

Times = dict[str, float]  # microseconds by backend


def microseconds(call: Callable[[], object]) -> float:
    """Return the calling thread's processor time for one call."""
    for _ in range(3):
        call()
    rows = []
    for _ in range(ROWS):
        torch.cuda.synchronize()
        begun = time.thread_time()
        for _ in range(CALLS):
            call()
        rows.append((time.thread_time() - begun) / CALLS)
    return min(rows) * 1e6


def measure_op(op: Op, device: torch.device) -> Iterator[tuple[str, Times]]:
    """Measure an op at the digits' shape: forward without gradients, and forward with backward."""
    shape = SHAPES["digits"]
    inputs = op.draw(shape, Random(torch.Generator(device).manual_seed(0), shape.dtype))
    variants = {name: variants_of(op)[name] for name in ("triton", "eager")}
    with torch.no_grad():
        yield (
            f"{op.name} forward",
            {name: microseconds(lambda f=f: f(inputs)) for name, f in variants.items()},  # type: ignore[misc]
        )
    if not op.gradients:
        return
    wanted = [inputs[name].requires_grad_() for name in op.gradients]

    def train(function: Callable[..., object]) -> None:
        found = function(inputs)
        outputs = found if isinstance(found, tuple) else (found,)
        torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs])

    yield (
        f"{op.name} forward and backward",
        {name: microseconds(lambda f=f: train(f)) for name, f in variants.items()},  # type: ignore[misc]
    )


def measure_network(device: torch.device) -> Iterator[tuple[str, Times]]:
    """Measure the digits' generator op by op, with each backend and with the choice by size."""
    network = RandomNetwork(DIGITS, device)
    module = cast(nn.Module, network.backbone)

    def train() -> None:
        module.zero_grad()
        network.backbone(*network.inputs).square().sum().backward()

    for name, call in (("forward", network), ("forward and backward", train)):
        module.requires_grad_(call is train)
        times = {}
        for backend, kernels in (("triton", "triton"), ("eager", "reference")):
            with kernel_backend(kernels):
                times[backend] = microseconds(call)
        yield f"{DIGITS.model} {name}", times | {"auto": microseconds(call)}


def main(argv: Sequence[str] | None = None) -> int:
    """Print one table; return exit code 2 without a CUDA device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_time", description=__doc__)
    names = [op.name for op in FUSED]
    parser.add_argument("--op", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--no-network", action="store_true", help="leave out the digits' network")
    options = parser.parse_args(argv)
    try:
        device = find_device("cuda")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.autograd.set_multithreading_enabled(False)  # backward passes on this thread as well
    print(describe_machine(device).describe())
    x = torch.ones(SHAPES["digits"].width, device=device)
    print(f"an addition: {microseconds(lambda: x + x):.1f} µs")
    found = [row for name in options.op for row in measure_op(OPS[name], device)]
    found += [] if options.no_network else measure_network(device)
    rows = [
        (
            name,
            f"{times['triton']:.0f}",
            f"{times['eager']:.0f}",
            f"{times['triton'] / times['eager']:.2f}",
            f"{times['auto']:.0f}" if "auto" in times else "",
        )
        for name, times in found
    ]
    print(format_table(("host µs", "kernels", "references", "ratio", "by size"), rows, left=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
