"""Compile every Triton kernel ahead of time; check it against the chips' limits and the table."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from benchmarks.aot.isolated import run_with

if TYPE_CHECKING:
    from benchmarks.aot.build import Row
    from benchmarks.aot.cases import Case
    from benchmarks.aot.table import Record

HOW_TO_UPDATE = (
    "A kernel, or the Triton that compiles it, has changed. If the changes are intended, record "
    "them: python -m benchmarks.aot --update [--only 'CASE*']"
)


def main() -> int:
    """Return 0 if all kernels pass, 1 if some fail or differ from the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="check the limits and the table")
    action.add_argument("--update", action="store_true", help="check the limits, write the table")
    parser.add_argument("--only", default="*", metavar="GLOB", help="only cases with such a name")
    parser.add_argument("--quick", action="store_true", help="few cases, one shape, sm_90 only")
    parser.add_argument("--triton", metavar="VERSION", help="another Triton, installed separately")
    args = parser.parse_args()
    if args.update and args.quick:
        parser.error("a table needs all shapes: use --update without --quick")
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing
    if args.triton is not None:
        command = ["--check" if args.check else "--update", "--only", args.only]
        return run_with(args.triton, command + ["--quick"] * args.quick)
    from benchmarks.aot.cases import CASES

    cases = [case for case in CASES if fnmatch(case.name, args.only)]
    cases = [case for case in cases if case.quick or not args.quick]
    if not cases:
        parser.error(f"no such case; choose from: {'; '.join(case.name for case in CASES)}")
    rows, failures = compile_cases(cases, quick=args.quick)
    if args.update:
        update(rows, cases)
    else:
        failures += compare(rows, cases, quick=args.quick)
    print("\n".join(failures) or f"{len(rows)} kernels pass")
    return 1 if failures else 0


def compile_cases(cases: Sequence[Case], *, quick: bool) -> tuple[dict[str, Record], list[str]]:
    """Return the table's record of each kernel, and why kernels fail."""
    from benchmarks.aot.gate import problems
    from benchmarks.aot.table import record_of

    rows, failures = {}, []
    for case in cases:
        for row in build_case(case, quick=quick):
            rows[row.key] = record_of(row)
            failures += [f"{row.key}: {why}" for why in problems(row, unfused=case.unfused)]
            print(f"{len(rows)}: {row.key}", file=sys.stderr, flush=True)
    return rows, failures


def build_case(case: Case, *, quick: bool) -> Iterator[Row]:
    """Compile a case at all points for all chips, or with `quick` at its quick point for sm_90."""
    from benchmarks.aot.build import build
    from benchmarks.aot.chips import CHIPS

    for point in [case.quick] if quick and case.quick else case.points:
        for chip in CHIPS:
            if chip.capability == 90 or not quick:
                yield from build(case, point, chip)


def update(rows: dict[str, Record], cases: Sequence[Case]) -> None:
    """Replace the rows of these cases, and drop those of cases that no longer exist."""
    import triton

    from benchmarks.aot.cases import CASES
    from benchmarks.aot.table import case_of, read_table, write_table

    others = {case.name for case in CASES} - {case.name for case in cases}
    table = read_table(triton.__version__) or {}
    kept = {key: row for key, row in table.items() if case_of(key) in others}
    print(f"wrote {write_table(triton.__version__, kept | rows).name}")


def compare(rows: dict[str, Record], cases: Sequence[Case], *, quick: bool) -> list[str]:
    """Return differences from the table of this Triton, with advice; empty if there are none."""
    import triton

    from benchmarks.aot.gate import differences
    from benchmarks.aot.table import case_of, path_of, read_table

    table = read_table(triton.__version__)
    if table is None:
        print(f"no {path_of(triton.__version__).name}: only the limits were checked")
        return []
    names = {case.name for case in cases}
    table = {key: row for key, row in table.items() if case_of(key) in names}
    changed = differences(rows, table, whole=not quick)
    return [*changed, HOW_TO_UPDATE] if changed else []


if __name__ == "__main__":
    sys.exit(main())
