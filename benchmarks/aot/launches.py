"""Find the kernels that an op launches, by calling it without a device.

Triton gets a driver that names a chip but has no device, and a hook that records each launch
instead of compiling it. Signatures, alignments, constants and options therefore come from the op's
own launcher and from Triton's specialisation: nothing is declared twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.aot.chips import Chip


@dataclass(frozen=True)
class Launch:
    """One kernel with everything that the compiler needs.

    Attributes:
        kernel: file and name of the jit function.
        key: Triton's cache key; equal keys compile to equal code.
        function: the jit function.
        signature, constants, attributes: as `triton.compiler.ASTSource` takes them.
        options: warps, stages and other options of the backend.
    """

    kernel: str
    key: str
    function: Any
    signature: dict[str, Any]
    constants: dict[Any, Any]
    attributes: dict[Any, Any]
    options: dict[str, Any]


class _NoDevice:
    """The part of a Triton driver that is needed to specialise a launch."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip

    def get_current_device(self) -> int:
        return self.chip.capability  # kernels cache per device, and options depend on the chip

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return target(self.chip)


def target(chip: Chip) -> GPUTarget:
    """Return Triton's target for a chip."""
    return GPUTarget("cuda", chip.capability, 32)


def launches_of(call: Callable[[], None], chip: Chip) -> list[Launch]:
    """Return the distinct kernels that `call` would launch on a chip, in order.

    Tensors may be on the CPU. Results of the call are uninitialised memory.
    """
    found: dict[str, Launch] = {}

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        launch = Launch(
            kernel=f"{fn.module.rpartition('.')[2]}.{fn.name.removesuffix('_kernel')}",
            key=key,
            function=fn.jit_function,
            signature=compile["signature"],
            constants=compile["constants"],
            attributes=compile["configs"][0],
            options={n: tuple(v) if isinstance(v, list) else v for n, v in options.items()},
        )
        found.setdefault(f"{launch.kernel} {key}", launch)
        return True  # do not compile, do not launch

    # Not restored: there was no driver before, and the default one would look for a device
    driver.set_active(_NoDevice(chip))
    before = knobs.runtime.jit_cache_hook
    knobs.runtime.jit_cache_hook = note
    try:
        call()
    finally:
        knobs.runtime.jit_cache_hook = before
    return list(found.values())
