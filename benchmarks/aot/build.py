"""Compile a launch for a chip, and measure the code."""

from __future__ import annotations

import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.compiler import ASTSource

from benchmarks.aot.cases import SHARED, Case, Point
from benchmarks.aot.chips import Chip
from benchmarks.aot.launches import Launch, launches_of, target
from benchmarks.aot.sass import Code, read_code

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One compiled kernel.

    Attributes:
        kernel: name of the jit function.
        case, width, dtype: case and shape of the op that launches it.
        chip: chip that it was compiled for.
        warps, stages: options that it was compiled with.
        shared: bytes of shared memory per program.
        code: figures of the machine code.
        ptx: the PTX, for what machine code no longer shows.
    """

    kernel: str
    case: str
    width: int
    dtype: str
    chip: str
    warps: int
    stages: int
    shared: int
    code: Code
    ptx: str

    @property
    def key(self) -> str:
        return f"{self.kernel} | {self.case} | {self.width} | {self.dtype} | {self.chip}"


def build(case: Case, point: Point, chip: Chip) -> Iterator[Row]:
    """Compile what a case launches at one point; a kernel's second variant is `kernel (2)`."""
    times: Counter[str] = Counter()
    for launch in launches_of(lambda: case.call(point), chip):
        if (launch.kernel in SHARED) == case.shared:
            times[launch.kernel] += 1
            number = times[launch.kernel]
            name = launch.kernel if number == 1 else f"{launch.kernel} ({number})"
            yield _compile(launch, name, case, point, chip)


def _compile(launch: Launch, name: str, case: Case, point: Point, chip: Chip) -> Row:
    source = ASTSource(launch.function, launch.signature, launch.constants, launch.attributes)
    compiled = triton.compile(source, target=target(chip), options=launch.options)
    code = _read(compiled.asm["cubin"])
    return Row(
        kernel=name,
        case=case.name,
        width=point.width,
        dtype=str(point.dtype).removeprefix("torch."),
        chip=chip.name,
        warps=launch.options["num_warps"],
        stages=launch.options["num_stages"],
        # sm_90 and later reserve 1 KiB of every block for the system
        shared=compiled.metadata.shared + code.static_shared,
        code=code,
        ptx=compiled.asm["ptx"],
    )


def _read(cubin: bytes) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return read_code(
            _run("cuobjdump", "-res-usage", file.name), _run("nvdisasm", "-c", file.name)
        )


def _run(tool: str, *args: str) -> str:
    command = [str(_TOOLS / tool), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
