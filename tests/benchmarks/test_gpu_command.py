"""`python -m benchmarks.gpu`, rehearsed on the CPU with the packages of a bare machine."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from apt.bench.ceilings import Ceilings
from apt.bench.records import read_records
from benchmarks.gpu import Job, Session, cases_in_order, parser, reserved_seconds
from benchmarks.workloads import WORKLOADS

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


@pytest.fixture
def on_an_h100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Session]:
    """Sessions with an H100's ceilings, and time that counts."""
    ceilings = Ceilings(copy_gb_s=3000, matmul_tflops=798)
    monkeypatch.setattr("benchmarks.gpu.measure_ceilings", lambda device, clock: ceilings)

    def make(*args: str) -> Session:
        options = parser().parse_args(["--device", "cpu", "--out", str(tmp_path), *args])
        session = Session(options)
        session.rehearsal = False
        return session

    return make


def test_the_paper_and_wan_come_before_the_ops_and_have_time_reserved(on_an_h100):
    session = on_an_h100()
    cases = list(cases_in_order(torch.device("cuda")))
    jobs = session.jobs(WORKLOADS["cuda"], cases)
    assert [job.name for job in jobs[:3]] == [
        "apt_8b 49x720x1280",
        "wan2.1_t2v_1.3b 81x480x832",
        f"{cases[0].op.name} 720p forward",
    ]
    assert len(jobs) == len(cases) + len(WORKLOADS["cuda"])
    assert [job.step for job in jobs[2:-4]] == ["kernels"] * len(cases)
    paper, wan = jobs[0].seconds, jobs[1].seconds
    assert 200 < paper < 240
    assert 80 < wan < 110
    assert reserved_seconds(jobs) == paper + wan
    assert reserved_seconds(jobs[2:]) == 0  # no networks were asked for
    assert session.seconds_left - paper - wan > 200  # for tests and ops


def test_what_there_is_no_time_for_is_listed_and_the_rest_is_done(on_an_h100, capsys):
    session = on_an_h100("--minutes", "2")
    done: list[str] = []
    for job in session.jobs(WORKLOADS["cuda"][:2], []):
        session.work(replace(job, run=lambda job=job: done.append(job.name)))
    assert done == ["wan2.1_t2v_1.3b 81x480x832"]
    assert session.finish() == 0
    assert re.search(
        r"not reached in time: dit apt_8b 49x720x1280, which may take 2\d\d s",
        capsys.readouterr().out,
    )


def test_a_job_that_breaks_fails_the_run_and_no_other_job(on_an_h100, capsys):
    session = on_an_h100()

    def broken() -> None:
        raise RuntimeError("out of memory")

    session.work(Job(step="dit", name="large", seconds=1, run=broken))
    session.work(Job(step="dit", name="small", seconds=1, run=lambda: print("measured")))
    assert session.finish() == 1
    said = capsys.readouterr().out
    assert "measured\n" in said
    assert "FAILED: dit large raised RuntimeError: out of memory" in said


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
