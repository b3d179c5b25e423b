"""Every kernel compiles for GPUs that are not present, within their limits and as recorded."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
from apt.kernels.backends import OPS
from benchmarks.aot.build import Row
from benchmarks.aot.cases import CASES, accepted_spill
from benchmarks.aot.gate import differences, problems
from benchmarks.aot.sass import Code, read_code
from benchmarks.aot.table import read_table, record_of

ROOT = Path(__file__).resolve().parents[2]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """Run in a separate process, since this one interprets kernels."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_kernels_at_the_width_of_apt_8b_are_as_recorded():
    result = run("-m", "benchmarks.aot", "--check", "--quick")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
def test_all_kernels_are_as_recorded():
    result = run("-m", "benchmarks.aot", "--check")
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


@pytest.mark.network
@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_all_kernels_with_another_triton(version):
    result = run("-m", "benchmarks.aot", "--check", "--triton", version)
    assert result.returncode == 0, result.stdout + result.stderr[-2000:]


def test_every_fused_op_has_a_case():
    # A case is named after its op or class, then what is special about it
    compiled = {case.name.replace(",", "").split()[0].lower() for case in CASES}
    fused = [op for op, backends in OPS.items() if "triton" in backends]
    assert [op for op in fused if not {op, op.replace("_", "")} & compiled] == []


def test_recorded_tables_have_every_case():
    cases = {case.name for case in CASES}
    for path in tables():
        table = read_table(path.stem.removeprefix("aot_triton_"))
        assert table and {key.split(" | ")[1] for key in table} == cases, path.name


def test_kernels_that_break_the_rules_are_seen():
    result = run(str(Path(__file__).with_name("bad_kernels.py")))
    assert result.returncode == 0, result.stderr
    spilling, narrow, approximate, atomic = result.stdout.splitlines()
    assert "bytes of local memory" in spilling
    assert "no load of global memory is 16 bytes wide" in narrow
    assert "promised bit for bit, but has" in approximate
    assert "div.full.f32" in approximate and "fma.rn" in approximate
    assert "atomics" in atomic


CODE = Code(
    registers=40,
    stack=0,
    static_shared=0,
    local=0,
    loads={4: 1, 16: 3},
    stores={16: 1},
    mix={"atomic": 0},
    total=100,
)
ROW = Row(
    kernel="norm_kernels.forward",
    case="norm",
    width=64,
    dtype="bfloat16",
    chip="sm_80",
    warps=4,
    stages=1,
    shared=166_912,
    code=CODE,
    ptx="mul.f32 a, b, c;",
)


def change(**code: object) -> Row:
    return dataclasses.replace(ROW, code=dataclasses.replace(CODE, **code))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (change(local=2, stack=8), "spills: 2 accesses to 8 bytes"),
        (dataclasses.replace(ROW, shared=166_913), "sm_80 has 166912"),
        (dataclasses.replace(ROW, chip="sm_90", shared=232_449), "sm_90 has 232448"),
        (dataclasses.replace(change(registers=65), warps=32), "32 warps of 65 registers"),
        (change(stores={4: 8}), "no store of global memory is 16 bytes"),
    ],
)
def test_limits(row, problem):
    assert problems(ROW) == []
    assert len(problems(row)) == 1
    assert problem in problems(row)[0]


def test_a_change_is_told_with_what_it_was():
    before = record_of(ROW)
    after = record_of(change(registers=48))
    assert differences({"a": before}, {"a": before}, whole=True) == []
    assert differences({"a": after}, {"a": before}, whole=True) == ["a: registers 40 -> 48"]
    assert differences({"b": after}, {}, whole=False) == ["b: not in the table"]
    assert differences({}, {"a": before}, whole=True) == [
        "a: in the table, but nothing launches it"
    ]
    assert differences({}, {"a": before}, whole=False) == []


RESOURCES = "Function k:\n  REG:169 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:488"
DISASSEMBLY = """
        .section        .text.k,"ax",@progbits
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.64 R4, desc[UR6][R10.64] ;
        /*0020*/                   LDG.E.128.CONSTANT R4, desc[UR6][R10.64] ;
        /*0030*/             @!UPT LDG.E.U16 R4, desc[UR6][R10.64] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR6][R10.64] ;
        /*0050*/               @P0 STG.E desc[UR6][R2.64], R4 ;
        /*0060*/                   STL.64 [R1], R4 ;
        /*0070*/                   FFMA R4, R5, R6, R7 ;
        /*0080*/                   LDL R4, [R1] ;
.L_x_1:
        /*0090*/                   BRA `(.L_x_1);
        /*00a0*/                   NOP;
"""


def test_machine_code_is_read():
    code = read_code(RESOURCES, DISASSEMBLY)
    assert (code.registers, code.stack, code.static_shared) == (169, 16, 1024)
    assert code.loads == {2: 1, 8: 1, 16: 2}
    assert code.stores == {4: 1}
    assert code.local == 2
    assert code.mix["fma"] == 1
    assert code.total == 10
    with pytest.raises(ValueError, match="no instructions"):
        read_code(RESOURCES, "")


def test_recorded_tables_hold_no_spill_that_was_not_accepted():
    recorded = [path.stem.removeprefix("aot_triton_") for path in tables()]
    assert recorded
    for version in recorded:
        table = read_table(version)
        assert table
        for key, row in table.items():
            kernel, _, width, dtype, chip = key.split(" | ")
            accepted = accepted_spill(version, kernel, int(width), dtype, chip)
            assert int(str(row["stack"])) <= accepted, f"{version}: {key}"


def tables() -> list[Path]:
    return sorted((ROOT / "benchmarks" / "results").glob("aot_triton_*.json"))
