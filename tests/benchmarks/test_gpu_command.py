"""`python -m benchmarks.gpu`, rehearsed on the CPU with the packages of a bare machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from apt.bench.records import read_records

ROOT = Path(__file__).resolve().parents[2]

# The command line's and the media's packages, and peers: none of them may be needed
ABSENT = ("tyro", "av", "diffusers", "liger_kernel", "pytest_benchmark", "flash_attn", "xformers")
RUN = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
runpy.run_module("benchmarks.gpu", run_name="__main__", alter_sys=True)
"""


def run(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_rehearsal_measures_records_and_ends_with_tables(tmp_path):
    only = ("--shape", "digits", "--model", "mmdit_digits")
    result = run("--device", "cpu", *only, "--out", tmp_path, "--commit", "abc")
    assert result.returncode == 0, result.stdout + result.stderr
    (kernels,) = read_records(tmp_path, "kernels")
    (dit,) = read_records(tmp_path, "dit")
    for record in (kernels, dit):
        assert record.provenance.commit == "abc"
        assert "test of the harness" in record.note
        page = (tmp_path / f"{record.stem}.md").read_text()
        assert f"[{record.stem}.json]({record.stem}.json)" in page
        assert str(tmp_path) not in page
    times = {m.case["variant"] for m in kernels.measurements if m.status == "measured"}
    assert times >= {"eager", "native"}
    assert not times & {"triton", "compile", "liger"}
    assert {m.case["model"] for m in dit.measurements} == {"mmdit_digits"}
    assert "Gates:" in result.stdout
    assert "not reached" not in result.stdout


def test_a_model_that_is_not_measured_is_an_error():
    result = run("--device", "cpu", "--model", "mmdit_digit")
    assert result.returncode == 2
    assert result.stderr == (
        "error: on cpu there is no model 'mmdit_digit'; there are: mmdit_digits, mmdit_small\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    result = run()
    assert result.returncode == 2
    assert result.stderr.startswith("error: PyTorch sees no CUDA GPU here")
