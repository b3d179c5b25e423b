"""The committed table: as JSON, one kernel per line, and as Markdown to read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from benchmarks.aot.build import Row

RESULTS = Path(__file__).resolve().parents[1] / "results"

Record = dict[str, object]


def path_of(version: str) -> Path:
    """Return the path of the table of a Triton version."""
    return RESULTS / f"aot_triton_{version}.json"


def record_of(row: Row) -> Record:
    """Return a row as the table holds it."""
    code = row.code
    return {
        "registers": code.registers,
        "shared": row.shared,
        "stack": code.stack,
        "local": code.local,
        "warps": row.warps,
        "stages": row.stages,
        "loads": {str(width): count for width, count in code.loads.items()},
        "stores": {str(width): count for width, count in code.stores.items()},
        "instructions": code.total,
        **code.mix,
    }


def case_of(key: str) -> str:
    """Return the case in a row's key."""
    return key.split(" | ")[1]


def read_table(version: str) -> dict[str, Record] | None:
    """Read the rows by key; None if that version was never recorded."""
    path = path_of(version)
    return json.loads(path.read_text())["rows"] if path.exists() else None


def write_table(version: str, rows: Mapping[str, Record]) -> Path:
    """Write both files; return the path of the JSON file."""
    path = path_of(version)
    path.parent.mkdir(exist_ok=True)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(rows[key])}" for key in sorted(rows))
    path.write_text(f'{{"triton": "{version}", "rows": {{\n{lines}\n}}}}\n')
    path.with_suffix(".md").write_text(_markdown(version, rows))
    return path


def _markdown(version: str, rows: Mapping[str, Record]) -> str:
    text = [
        f"# Kernels compiled ahead of time, Triton {version}",
        "",
        "Written by `python -m benchmarks.aot --update`; no kernel was run. A cell has registers "
        "per thread / KiB of shared memory per program / shares of the bytes of global loads and "
        "of global stores that instructions of 16 bytes move. The shares are counted in the code, "
        "not in a run: loads of statistics, the same for all threads, count as much as loads of "
        "rows.",
        "",
        f"{len(rows)} kernels; {sum(_spills(row) for row in rows.values())} spill.",
    ]
    keys = {key: tuple(key.split(" | ")) for key in rows}
    chips = sorted({key[4] for key in keys.values()}, key=lambda chip: int(chip[3:]))
    groups = dict.fromkeys(sorted((case, kernel) for kernel, case, *_ in keys.values()))
    for case, kernel in groups:
        text += [
            "",
            f"## {kernel}: {case}",
            "",
            f"| channels | dtype | warps | {' | '.join(chips)} |",
        ]
        text.append("| ---: | --- | ---: |" + " --- |" * len(chips))
        points = dict.fromkeys(
            (int(width), dtype)
            for kernel_, case_, width, dtype, _ in keys.values()
            if (kernel_, case_) == (kernel, case)
        )
        for width, dtype in sorted(points):
            of_chips = [
                rows.get(f"{kernel} | {case} | {width} | {dtype} | {chip}") for chip in chips
            ]
            warps = next(row["warps"] for row in of_chips if row is not None)
            cells = ["" if row is None else _cell(row) for row in of_chips]
            text.append(f"| {width} | {dtype} | {warps} | {' | '.join(cells)} |")
    return "\n".join(text) + "\n"


def _spills(row: Record) -> bool:
    return bool(row["local"] or row["stack"])


def _cell(row: Record) -> str:
    shared = f"{int(str(row['shared'])) / 1024:.1f}"
    shares = ", ".join(f"{_wide_share(row[name]):.0%}" for name in ("loads", "stores"))
    spills = ", spills" if _spills(row) else ""
    return f"{row['registers']} / {shared} / {shares}{spills}"


def _wide_share(widths: object) -> float:
    assert isinstance(widths, dict)
    moved = {int(width): int(width) * count for width, count in widths.items()}
    return sum(v for width, v in moved.items() if width >= 16) / max(1, sum(moved.values()))
