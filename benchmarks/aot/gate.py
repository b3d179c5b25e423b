"""The limits for every compiled kernel, and the comparison with the recorded table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import triton

from benchmarks.aot.build import Row
from benchmarks.aot.cases import NARROW_LOADS, NARROW_STORES, accepted_spill
from benchmarks.aot.chips import CHIPS

_WIDE = 16  # bytes
_INEXACT = re.compile(r"\b(?:fma\.\w+|div\.full|\w+\.approx)\b[\w.]*")  # PTX instructions


def problems(row: Row, *, unfused: bool = False) -> list[str]:
    """Return why a kernel fails the gate; empty if it passes."""
    chip = next(chip for chip in CHIPS if chip.name == row.chip)
    code, found = row.code, []
    kernel = row.kernel.partition(" (")[0]  # without the number of its variant
    accepted = accepted_spill(triton.__version__, kernel, row.width, row.dtype, row.chip)
    if code.stack > accepted or (code.local and not accepted):
        found.append(f"spills: {code.local} accesses to {code.stack} bytes of local memory")
    if row.shared > chip.shared_bytes:
        found.append(f"{row.shared} bytes of shared memory, {chip.name} has {chip.shared_bytes}")
    if code.registers * 32 * row.warps > chip.registers:
        found.append(f"{row.warps} warps of {code.registers} registers do not fit")
    if code.mix["atomic"]:
        found.append(f"{code.mix['atomic']} atomics: results would not repeat")
    for what, widths, allowed in (
        ("load", code.loads, NARROW_LOADS),
        ("store", code.stores, NARROW_STORES),
    ):
        if max(widths, default=_WIDE) < _WIDE and kernel not in allowed:
            found.append(f"no {what} of global memory is {_WIDE} bytes wide: {widths}")
    if unfused and (inexact := sorted(set(_INEXACT.findall(row.ptx)))):
        found.append(f"promised bit for bit, but has {', '.join(inexact)}")
    return found


def differences(
    rows: Mapping[str, dict[str, object]], table: Mapping[str, dict[str, object]], *, whole: bool
) -> list[str]:
    """Return how rows differ from the table; with `whole`, the table must have no other rows."""
    found = [f"{key}: not in the table" for key in rows if key not in table]
    for key in rows.keys() & table.keys():
        changes = _changes(table[key], rows[key])
        if changes:
            found.append(f"{key}: {', '.join(changes)}")
    if whole:
        found += [
            f"{key}: in the table, but nothing launches it" for key in table.keys() - rows.keys()
        ]
    return sorted(found)


def _changes(before: Mapping[str, object], after: Mapping[str, object]) -> Iterable[str]:
    names = sorted(before.keys() | after.keys())
    return [
        f"{name} {before.get(name)} -> {after.get(name)}"
        for name in names
        if before.get(name) != after.get(name)
    ]
