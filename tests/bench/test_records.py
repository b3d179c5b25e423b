"""Records are read back as they were written, and other files are refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from apt.bench.ceilings import Ceilings
from apt.bench.clocks import GpuState
from apt.bench.gate import Verdict
from apt.bench.machine import Machine, Provenance, command_line, describe_machine, find_commit
from apt.bench.records import Measurement, Record, read_record, read_records, write_record
from apt.bench.tables import format_table, markdown, record_table, verdict_table
from apt.errors import InputError

MACHINE = Machine(
    device="NVIDIA H100 80GB HBM3",
    kind="cuda",
    capability="9.0",
    threads=0,
    memory_gb=80,
    python="3.12",
    torch="2.11.0",
    triton="3.6.0",
    cuda="13.0",
    liger="",
    system="Linux x86_64",
)


def op(variant: str) -> dict[str, str | int]:
    return {
        "op": "modulated_norm",
        "shape": "720p",
        "size": "1x46800x3072",
        "dtype": "bfloat16",
        "direction": "forward",
        "variant": variant,
    }


FIGURES = {
    "gb_s": 1000.0, "share_of_copy": 0.5, "tflops": 1.5, "share_of_matmul": 0.01,
}  # fmt: skip
RECORD = Record(
    topic="kernels",
    note="figures of a test",
    provenance=Provenance(
        date="2026-11-24T18:00:01Z", command="make bench", commit="0123456789ab", apt="0.1"
    ),
    machine=MACHINE,
    ceilings={"copy_gb_s": 2000.0, "matmul_tflops": 500.0},
    measurements=(
        Measurement(case=op("eager"), samples_ms=(0.5, 0.75, 0.625), metrics=FIGURES),
        Measurement(case=op("liger"), status="skipped", reason="needs liger-kernel"),
        Measurement(case=op("compile"), status="wrong", reason="error of output 0 0.3"),
    ),
    failed=("modulated_norm 720p",),
)


def test_round_trip(tmp_path):
    path = write_record(RECORD, tmp_path / "results")
    assert path.name == "20261124T180001Z_nvidia-h100-80gb-hbm3_kernels.json"
    assert read_record(path) == RECORD
    assert '"samples_ms": [0.5, 0.75, 0.625]' in path.read_text()


def test_records_of_a_topic_oldest_first(tmp_path):
    later = replace(RECORD, provenance=replace(RECORD.provenance, date="2026-11-25T00:00:00Z"))
    for record in (later, RECORD, replace(RECORD, topic="dit")):
        write_record(record, tmp_path)
    assert read_records(tmp_path, "kernels") == [RECORD, later]
    assert read_records(tmp_path / "missing", "kernels") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "has schema 99, expected 1"),
        ({"machine": {"device": "x"}}, "is not a benchmark record"),
        ({"extra": 1}, "is not a benchmark record"),
        ({"measurements": [{"case": {}, "samples_ms": []}]}, "measured with 0 samples"),
    ],
)
def test_other_files_are_refused(tmp_path, change, message):
    path = write_record(RECORD, tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        read_record(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}'])
def test_what_is_no_record_is_refused(tmp_path, text):
    path = tmp_path / "x_kernels.json"
    path.write_text(text)
    with pytest.raises(InputError, match="is not a benchmark record"):
        read_record(path)


@pytest.mark.parametrize(
    ("status", "samples"), [("measured", ()), ("wrong", (1.0,)), ("skipped", (1.0,))]
)
def test_only_what_is_right_has_a_time(status, samples):
    with pytest.raises(InputError, match=f"{status} with"):
        Measurement(case={"op": "x"}, status=status, samples_ms=samples)


def test_no_speed_is_printed_of_a_wrong_result():
    table = record_table(RECORD)
    (measured,) = [line for line in table.splitlines() if line.startswith("| modulated_norm")]
    assert [cell.strip() for cell in measured.split("|")[5:10]] == [
        "eager", "0.625", "0.525-0.725", "", "1000.0",
    ]  # fmt: skip
    assert "wrong (1): error of output 0 0.3\n  modulated_norm 720p" in table
    assert "skipped (1): needs liger-kernel; modulated_norm 720p" in table


def test_the_host_and_the_attention_stand_beside_the_times():
    attention = op("native") | {"op": "attention"}
    times = {"host_ms": 0.087, "share_waited": 0.0}
    facts = {"attention_kernel": "torch's flash (by profile)", "warning": "not cuDNN: too old"}
    measured = Measurement(
        case=attention, samples_ms=(0.5,) * 3, metrics=FIGURES | times, facts=facts
    )
    late = replace(RECORD.measurements[0], metrics=FIGURES | times | {"share_waited": 0.3})
    table = record_table(replace(RECORD, measurements=(measured, measured, late)))
    hosts = [line.split("|")[8].strip() for line in table.splitlines() if line.startswith("| ")]
    assert hosts[2:] == ["0.087", "0.087", "0.087*"]
    assert "Attention by torch's flash (by profile):\n  attention 720p" in table
    assert table.count("WARNING: not cuDNN: too old") == 1


def test_ceilings_are_told_with_the_clocks_that_they_had(tmp_path):
    state = GpuState(sm_clock_mhz=1600.0, power_w=699.0, power_limit_w=700.0, readings=5)
    ceilings = Ceilings(
        copy_gb_s=2000.0, matmul_tflops=790.0, sustained_tflops=700.0, under_load=state
    )
    record = replace(RECORD, ceilings=ceilings.as_dict(), machine=replace(MACHINE, cudnn="9.19.0"))
    assert read_record(write_record(record, tmp_path)) == record
    page = markdown(record, [])
    assert "sustained_tflops 700, under_load: 1600 MHz, 699 W, 700 W at most" in page
    assert "cuDNN 9.19.0" in page
    unread = replace(ceilings, sustained_tflops=None, under_load=GpuState(reason="no nvidia-smi"))
    page = markdown(replace(record, ceilings=unread.as_dict()), [])
    assert "sustained_tflops not measured, under_load: no nvidia-smi" in page


def test_a_record_without_a_time_has_a_table_too():
    text = record_table(replace(RECORD, measurements=RECORD.measurements[1:]))
    assert text.startswith("Nothing was measured.")


def test_the_page_says_what_the_times_depend_on():
    verdicts = [
        Verdict(gate="fast", subject="a", outcome="passed", text="90"),
        Verdict(gate="goal", subject="b", outcome="failed", text="80", enforced=False),
        Verdict(gate="no regression", subject="c", outcome="not judged", text="0 comparable runs"),
    ]
    page = markdown(RECORD, verdicts)
    for text in (
        "**figures of a test**", "NVIDIA H100 80GB HBM3, 80 GB", "torch 2.11.0", "triton 3.6.0",
        "CUDA 13.0", "commit 0123456789ab", "`make bench`", "copy_gb_s 2000",
        "failed (a goal)", "1 not judged: 0 comparable runs",
    ):  # fmt: skip
        assert text in page
    assert verdict_table([]) == "No gate applies."


def test_tables_are_aligned_markdown():
    assert format_table(("a", "ms"), [("long", "1"), ("b", "10.5")], left=1).splitlines() == [
        "| a    |   ms |",
        "| ---- | ---: |",
        "| long |    1 |",
        "| b    | 10.5 |",
    ]


def test_this_machine():
    machine = describe_machine(torch.device("cpu"))
    assert machine.kind == "cpu"
    assert machine.device
    assert machine.threads == torch.get_num_threads()
    assert machine.torch == torch.__version__
    assert machine.memory_gb > 0


def test_commands_are_recorded_without_folders():
    argv = ["/opt/venv/bin/pytest", "benchmarks", "--out", "/data/results"]
    assert command_line(argv) == "pytest benchmarks --out results"
    argv = ["/opt/apt/__main__.py", "bench", "--json=/data/x.json", "--note=a/b"]
    expected = "python -m apt bench --json=x.json --note=a/b"
    assert command_line(argv, "apt.__main__") == expected
    argv = ["/opt/benchmarks/gpu.py", "--call", "first"]
    assert command_line(argv, "benchmarks.gpu") == "python -m benchmarks.gpu --call first"


def test_a_folder_outside_git_has_no_commit(tmp_path):
    assert find_commit(tmp_path) == "unknown"
