from __future__ import annotations

from apt.bench.records import Measurement
from benchmarks.summary import TestCounts, summary_table


def op(variant: str, median: float | None, name: str = "norm") -> Measurement:
    case = {"op": name, "shape": "720p", "size": "", "dtype": "", "direction": "forward"}
    if median is None:
        return Measurement(case=case | {"variant": variant}, status="wrong", reason="error of o")
    metrics = {"share_of_copy": 0.9}
    return Measurement(case=case | {"variant": variant}, samples_ms=(median,), metrics=metrics)


def network(model: str) -> Measurement:
    case = {"model": model, "size": "49x720x1280", "batch": 1}
    return Measurement(case=case, samples_ms=(2200.0,), metrics={"share_of_floor": 0.8, "fps": 24})


def test_what_matters_most_is_last_and_others_stand_beside_ours():
    lines = summary_table(
        {"tests": "3 passed, of 3"},
        {
            "dit": [network("apt_8b"), network("wan")],
            "kernels": [
                op("triton", 0.2), op("eager", 1.0), op("compile", 0.3),
                op("triton", None, "rope"), op("eager", 2.0, "rope"),
                op("native", 5.0, "attention"),
            ],
        },
    ).splitlines()[2:]  # fmt: skip
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells == [
        ["tests", "3 passed, of 3", ""],
        ["attention 720p forward", "no kernel of ours", "native 5 ms"],
        ["rope 720p forward", "wrong: error of o", "eager 2 ms"],
        ["norm 720p forward", "0.2 ms (90% of copy)", "compile 0.3 ms"],
        ["wan 49x720x1280 1", "2200 ms", "80% of the floor, 1.08 of real time"],
        ["apt_8b 49x720x1280 1", "2200 ms", "80% of the floor, 1.08 of real time"],
    ]


def test_counts_of_tests():
    counts = TestCounts(collected=4)
    assert str(counts) == "none ran, of 4"
    for outcome in ("passed", "failed", "passed"):
        counts.add(outcome)
    assert str(counts) == "1 failed, 2 passed, of 4"
