"""`python -m benchmarks.gpu`, rehearsed on the CPU with the packages of a bare machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apt.bench.ceilings import Ceilings
from apt.bench.records import read_records
from benchmarks import plan
from benchmarks.gpu import Session, main, parser
from benchmarks.plan import Job, choose, jobs_of
from benchmarks.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parents[2]

# Packages of the command line, of media and of peers: none may be needed
ABSENT = (
    "tyro", "av", "rich", "diffusers", "matplotlib", "tensorboard", "liger_kernel",
    "pytest_benchmark", "flash_attn", "xformers",
)  # fmt: skip
SITE = f"""
import sys
sys.modules.update(dict.fromkeys({ABSENT!r}))
"""


def run(tmp_path: Path, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Run in processes, including those of the steps, that lack these packages."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE)
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *map(str, args)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_rehearsal_measures_records_and_ends_with_a_table(tmp_path):
    only = ("--shape", "digits", "--model", "mmdit_digits", "--steps", "dit", "kernels")
    out = tmp_path / "out"
    result = run(tmp_path, "--device", "cpu", *only, "--out", out, "--commit", "abc")
    assert result.returncode == 0, result.stdout + result.stderr
    (kernels,) = read_records(out, "kernels")
    (dit,) = read_records(out, "dit")
    for record in (kernels, dit):
        assert record.provenance.commit == "abc"
        assert record.provenance.date == dit.provenance.date
        assert "test of the harness" in record.note
    (page,) = out.glob("*.md")
    text = page.read_text()
    assert f"[{kernels.stem}.json]({kernels.stem}.json)" in text
    assert "## Gates" in text
    assert str(tmp_path) not in text
    times = {m.case["variant"] for m in kernels.measurements if m.status == "measured"}
    assert times >= {"eager", "native"}
    assert not times & {"triton", "compile", "liger"}
    assert {m.case["model"] for m in dit.measurements} == {"mmdit_digits"}
    assert "not reached" not in result.stdout
    last = result.stdout.strip().splitlines()
    assert last[-1] == f"RECORDS ARE IN {out}"
    assert last[-3].startswith("| mmdit_digits 9x32x32")  # what matters most


@pytest.mark.slow
def test_a_rehearsal_of_everything(tmp_path):
    out = tmp_path / "out"
    result = run(tmp_path, "--device", "cpu", "--out", out)
    assert result.returncode == 0, result.stdout + result.stderr
    (training,) = read_records(out, "training")
    checks = [(m.case["check"], m.case["stage"], m.status) for m in training.measurements]
    assert [(stage, status) for check, stage, status in checks if check == "first losses"] == [
        ("pretrain", "measured"), ("distill", "measured"), ("apt", "measured"),
    ]  # fmt: skip
    assert len(checks) == 7
    (encoders,) = read_records(out, "encoders")
    reasons = {m.case["part"]: m.reason for m in encoders.measurements}
    assert "diffusers" in reasons["Wan 2.1 VAE decode"]
    assert result.stdout.count("not run: they need a GPU") == 2  # tests, sanitizer
    assert len(list(out.iterdir())) == 5


H100 = Ceilings(copy_gb_s=3000, matmul_tflops=798)


def test_the_two_calls_have_everything_once_and_fit_their_time():
    first, second = (choose("cuda", call) for call in ("first", "second"))
    assert [w.model for w in first.workloads] == ["apt_8b", "wan2.1_t2v_1.3b"]
    assert {case.shape.name for case in first.cases} == {"720p"}
    assert first.workloads + second.workloads == WORKLOADS["cuda"]
    assert [c.shape.name for c in second.cases[:: len(first.cases)]] == ["480p", "1024px", "digits"]
    assert first.steps[0] == "dit"
    paper, wan = (job.seconds for job in jobs_of("dit", first, H100))
    assert 200 < paper < 260
    assert 80 < wan < 120
    training = sum(job.seconds for job in jobs_of("training", first, H100))
    assert training <= 90
    assert paper + wan + training + plan.TESTS_SECONDS <= plan.SECONDS["first"]
    every = [j.name for c in (first, second) for step in c.steps for j in jobs_of(step, c, H100)]
    assert len(every) == len(set(every))


def test_a_call_can_be_narrowed():
    chosen = choose("cuda", "second", steps=["kernels"], shapes=["digits"], models=["apt_8b"])
    assert chosen.steps == ("kernels",)
    assert {case.shape.name for case in chosen.cases} == {"digits"}
    assert {w.model for w in chosen.workloads} == {"apt_8b"}


@pytest.fixture
def session(tmp_path: Path) -> Callable[..., Session]:
    """Sessions on a machine with known rates and limited time."""

    def make(seconds: float = 60) -> Session:
        options = parser().parse_args(["--device", "cpu", "--out", str(tmp_path / "out")])
        made = Session(options, seconds)
        made.rehearsal = False
        made.ceilings = H100
        return made

    return make


def job(fault: str, **changes: Any) -> Job:
    call = f"tests.benchmarks.faults:{fault}"
    return Job(**{"step": "dit", "name": fault, "seconds": 1, "call": call, **changes})


def test_whatever_a_job_does_it_is_named_and_the_others_are_measured(session, tmp_path, capsys):
    here = session()
    broken = job("aborts_with_bad", name="net", step="kernels", parts=("good", "bad"))
    here.run_step([broken, job("raises"), job("loses"), job("measures", alone=True)])
    assert [m.case["kernels"] for m in here.measurements["dit"]] == ["good"]
    here.run_again()
    assert here.again == []
    assert [m.case["kernels"] for m in here.measurements["kernels"]] == ["good"]
    here.measurements.pop("kernels")  # these are networks
    here.judged.pop("kernels")
    assert here.finish() == 1
    said = capsys.readouterr().out
    assert "FAILED: kernels: net was killed by SIGABRT\n" in said
    assert "FAILED: kernels: net bad alone was killed by SIGABRT\n" in said
    assert "about to abort" in said
    assert "FAILED: dit: raises\n" in said
    assert "RuntimeError: CUDA error: invalid configuration argument" in said
    lost = (
        "FAILED: dit: loses left the GPU unusable: RuntimeError: CUDA error: an illegal memory "
        "access was encountered\n"
    )
    assert lost in said
    assert "good alone" not in said.replace("... kernels: net good alone", "")
    (page,) = (tmp_path / "out").glob("*_gpu.md")
    assert "its fault" in page.read_text()
    assert said.rstrip().endswith(f"RECORDS ARE IN {tmp_path / 'out'}")


def test_what_there_is_no_time_for_is_listed_and_the_rest_is_done(session, capsys):
    here = session(seconds=30)
    here.run_step([job("raises", name="large", seconds=99), job("measures")])
    assert len(here.measurements["dit"]) == 1
    assert here.finish() == 0
    assert "not reached in time: dit: large (99 s)" in capsys.readouterr().out


def test_what_runs_when_the_time_is_up_is_ended(session, capsys):
    here = session(seconds=1.5)
    here.run_step([job("hangs"), job("measures")])
    assert here.finish() == 0
    said = capsys.readouterr().out
    assert "not reached in time: dit: the rest of hangs, measures (1 s)" in said


GPU_TESTS = """
import os, pytest
pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("what", ["passes", "aborts", "fails"])
def test(what):
    if what == "aborts":
        os.abort()
    assert what == "passes", "off by 0.5"
"""


def test_failed_and_deadly_tests_are_told_with_their_tracebacks(session, tmp_path, capsys):
    (tmp_path / "test_it.py").write_text(GPU_TESTS)
    here = session()
    here.run_tests("tests", ["--noconftest", str(tmp_path / "test_it.py")], 60)
    assert here.checks == {"tests": "2 failed, 1 passed, of 3"}
    assert here.finish() == 1
    said = capsys.readouterr().out
    assert "test_it.py::test[aborts] was killed by SIGABRT\n" in said
    assert "test_it.py::test[fails]\n" in said
    assert "off by 0.5" in said


SANITIZER = """#!/bin/sh
while [ "$1" != {python} ]; do shift; done
"$@"
echo "========= ERROR SUMMARY: 1 error"
exit 9
"""


def test_what_the_sanitizer_finds_is_a_failure(session, tmp_path, monkeypatch, capsys):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(SANITIZER.format(python=sys.executable))
    tool.chmod(0o755)
    (tmp_path / "test_it.py").write_text(GPU_TESTS)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    chosen = ("--noconftest", str(tmp_path / "test_it.py"), "-k", "passes")
    monkeypatch.setattr("benchmarks.gpu.SANITIZED", chosen)
    here = session()
    here.run_sanitizer()
    assert here.checks == {"sanitizer": "1 passed, of 1"}
    assert here.finish() == 1
    said = capsys.readouterr().out
    assert "FAILED: sanitizer: accesses out of bounds" in said
    assert "ERROR SUMMARY: 1 error" in said


def test_a_model_that_is_not_measured_is_an_error(capsys):
    assert main(["--device", "cpu", "--model", "mmdit_digit"]) == 2
    assert capsys.readouterr().err == (
        "error: model 'mmdit_digit' is not measured on cpu; choose from: mmdit_digits, "
        "mmdit_small\n"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("error: PyTorch sees no CUDA GPU here")
