"""Read machine code: registers, local memory, and the width of global memory accesses."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

# `@!P0 LDG.E.128 R4, ...`, with or without an address before it
_INSTRUCTION = re.compile(r"^\s*(?:/\*[0-9a-f]+\*/)?\s*(?:\{\s*)?(?:@!?U?P[T\d]+\s+)?([A-Z][\w.]*)")
_RESOURCE = re.compile(r"\b(REG|STACK|SHARED|LOCAL):(\d+)")

_LOADS = ("LDG", "LDGSTS")
_STORES = ("STG",)
_BYTES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_KINDS = {
    "fma": ("FFMA", "FFMA2"),
    "add_mul": ("FADD", "FMUL", "FADD2", "FMUL2"),
    "special": ("MUFU",),
    "shuffle": ("SHFL",),
    "barrier": ("BAR",),
    "shared": ("LDS", "STS", "LDSM", "STSM"),
    "bulk": ("UBLKCP", "UTMALDG", "UTMASTG"),
    "atomic": ("ATOM", "ATOMG", "RED", "REDG"),
}


@dataclass(frozen=True, kw_only=True)
class Code:
    """Figures of a kernel's machine code.

    Attributes:
        registers: registers per thread.
        stack: bytes of local memory per thread, spills included.
        static_shared: bytes of shared memory that the code itself reserves.
        local: number of instructions that load from or store to local memory (spills).
        loads, stores: number of instructions on global memory, by bytes per thread.
        mix: number of other instructions, by kind.
        total: number of all instructions except padding.
    """

    registers: int
    stack: int
    static_shared: int
    local: int
    loads: dict[int, int]
    stores: dict[int, int]
    mix: dict[str, int]
    total: int


def read_code(resources: str, disassembly: str) -> Code:
    """Parse the output of `cuobjdump -res-usage` and `nvdisasm` for a cubin with one kernel."""
    usage = {name: int(value) for name, value in _RESOURCE.findall(resources)}
    missing = {"REG", "STACK", "LOCAL", "SHARED"} - usage.keys()
    opcodes = list(_opcodes(disassembly.splitlines()))
    if missing or not opcodes:
        raise ValueError(f"no usage of {sorted(missing)} or no instructions: {resources[:300]!r}")
    names = Counter(opcode.partition(".")[0] for opcode in opcodes)
    return Code(
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        static_shared=usage["SHARED"],
        local=names["LDL"] + names["STL"],
        loads=_by_width(opcodes, _LOADS),
        stores=_by_width(opcodes, _STORES),
        mix={kind: sum(names[name] for name in members) for kind, members in _KINDS.items()},
        total=sum(names.values()) - names["NOP"],
    )


def _opcodes(lines: Iterable[str]) -> Iterable[str]:
    for line in lines:
        match = _INSTRUCTION.match(line) if ";" in line else None  # others are directives
        if match:
            yield match[1]


def _by_width(opcodes: Iterable[str], names: tuple[str, ...]) -> dict[int, int]:
    widths: Counter[int] = Counter()
    for opcode in opcodes:
        name, *modifiers = opcode.split(".")
        if name in names:
            widths[next((_BYTES[m] for m in modifiers if m in _BYTES), 4)] += 1
    return dict(sorted(widths.items()))
