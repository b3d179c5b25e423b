"""The gates fail on a planted slowdown, pass within noise, and refuse runs that differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apt.bench.gate import (
    Budget,
    RegressionPolicy,
    Run,
    check_budget,
    check_record,
    check_regression,
    like_runs,
    runs_of,
)
from apt.bench.machine import Machine, Provenance
from apt.bench.records import Measurement, Record
from apt.errors import ConfigError, InputError

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
CASE = {"op": "modulated_norm", "shape": "720p", "dtype": "bfloat16", "variant": "triton"}
POLICY = RegressionPolicy(percent=5.0, floor_ms=0.01)
SPEED = Budget(
    name="fast", devices=("NVIDIA H100*",), where={"op": "*norm"}, metric="gb_s", at_least=90.0
)


def measured(*samples: float, case: dict[str, str] | None = None, **metrics: float) -> Measurement:
    return Measurement(case=case or CASE, samples_ms=samples, metrics=metrics)


def run_of(*samples: float, machine: Machine = MACHINE, **metrics: float) -> Run:
    return Run(machine=machine, topic="kernels", measurement=measured(*samples, **metrics))


def record_of(
    *measurements: Measurement, failed: tuple[str, ...] = (), machine: Machine = MACHINE
) -> Record:
    return Record(
        topic="kernels",
        note="",
        provenance=Provenance(date="2026-11-24T18:00:00Z", command="x", commit="y", apt="0"),
        machine=machine,
        ceilings={},
        measurements=measurements,
        failed=failed,
    )


class TestRegression:
    def test_a_planted_slowdown_fails(self):
        before = [run_of(1.0), run_of(1.02), run_of(0.98)]
        verdict = check_regression(run_of(1.1, 1.2, 1.15), before, POLICY)
        assert verdict.fails
        assert "1.15 ms against 1 ms of 3 comparable runs (+15.0 %" in verdict.text

    def test_noise_passes(self):
        assert check_regression(run_of(1.04), [run_of(1.0)], POLICY).outcome == "passed"

    def test_a_faster_run_passes(self):
        assert check_regression(run_of(0.2), [run_of(1.0)], POLICY).outcome == "passed"

    def test_many_percent_below_the_floor_pass(self):
        assert check_regression(run_of(0.012), [run_of(0.006)], POLICY).outcome == "passed"

    def test_much_time_below_the_percentage_passes(self):
        assert check_regression(run_of(2080.0), [run_of(2000.0)], POLICY).outcome == "passed"

    @given(
        before=st.floats(1e-3, 1e4), now=st.floats(1e-3, 1e4), percent=st.floats(1, 99),
        floor=st.floats(1e-3, 100),
    )  # fmt: skip
    def test_it_fails_exactly_beyond_both(self, before, now, percent, floor):
        policy = RegressionPolicy(percent=percent, floor_ms=floor)
        verdict = check_regression(run_of(now), [run_of(before)], policy)
        beyond = (now - before > floor, 100 * (now / before - 1) > percent)
        assert verdict.fails == all(beyond)

    def test_one_slow_day_does_not_move_the_baseline(self):
        before = [run_of(1.0), run_of(1.0), run_of(9.0)]
        assert check_regression(run_of(1.5), before, POLICY).fails

    def test_without_enough_like_runs_nothing_is_judged(self):
        policy = RegressionPolicy(percent=5.0, floor_ms=0.01, minimum_runs=3)
        verdict = check_regression(run_of(9.0), [run_of(1.0)] * 2, policy)
        assert verdict.outcome == "not judged"
        assert not verdict.fails
        assert "2 comparable runs recorded, 3 needed" in verdict.text

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("device", "NVIDIA H200"),
            ("torch", "2.13.0"),
            ("triton", "3.7.1"),
            ("cuda", "12.9"),
            ("cudnn", "9.19.0"),
            ("threads", 4),
        ],
    )
    def test_another_machine_is_refused(self, field, value):
        other = run_of(1.0, machine=replace(MACHINE, **{field: value}))
        with pytest.raises(InputError, match=f"cannot be compared.*{field} differ"):
            check_regression(run_of(1.0), [run_of(1.0), other], POLICY)

    @pytest.mark.parametrize(
        "case",
        [
            CASE | {"dtype": "float32"},
            CASE | {"shape": "480p"},
            CASE | {"tokens": 46_800},
            {"op": "modulated_norm"},
        ],
    )
    def test_another_case_is_refused(self, case):
        other = replace(run_of(1.0), measurement=measured(1.0, case=case))
        with pytest.raises(InputError, match="cannot be compared"):
            check_regression(run_of(1.0), [other], POLICY)

    def test_another_topic_is_refused(self):
        with pytest.raises(InputError, match="topic differ"):
            check_regression(run_of(1.0), [replace(run_of(1.0), topic="dit")], POLICY)

    def test_what_was_not_measured_is_refused(self):
        skipped = Measurement(case=CASE, status="skipped", reason="no GPU")
        with pytest.raises(InputError, match="was not measured: no GPU"):
            check_regression(replace(run_of(1.0), measurement=skipped), [], POLICY)

    def test_like_runs_are_found_among_others(self):
        other = replace(MACHINE, torch="2.13.0")
        archive = runs_of(
            [
                record_of(measured(1.0), measured(3.0, case=CASE | {"shape": "480p"})),
                record_of(measured(2.0), machine=other),
                record_of(Measurement(case=CASE, status="wrong", reason="error 0.3")),
            ]
        )
        found = like_runs(run_of(1.0), archive)
        assert [run.measurement.median_ms for run in found] == [1.0]

    def test_what_failed_is_no_baseline(self):
        slow = measured(5.0)
        kept = measured(3.0, case=CASE | {"shape": "480p"})
        archive = runs_of([record_of(slow, kept, failed=(slow.label,))])
        assert [run.measurement for run in archive] == [kept]

    @pytest.mark.parametrize(
        "wrong", [{"percent": 0.0}, {"floor_ms": 0.0}, {"floor_ms": -1.0}, {"minimum_runs": 0}]
    )
    def test_a_policy_needs_both_bounds(self, wrong):
        with pytest.raises(ConfigError, match="floor_ms > 0"):
            RegressionPolicy(**{"percent": 5.0, "floor_ms": 0.01} | wrong)


class TestBudget:
    def outcome(self, budget: Budget, run: Run, *beside: Run) -> str:
        verdict = check_budget(budget, run, [run, *beside])
        assert verdict is not None
        return verdict.outcome

    def test_bounds(self):
        slow, fast = run_of(2.0, gb_s=89.9), run_of(1.0, gb_s=90.0)
        assert self.outcome(SPEED, slow) == "failed"
        assert self.outcome(SPEED, fast) == "passed"
        latency = replace(SPEED, metric="median_ms", at_least=None, at_most=1.5)
        assert self.outcome(latency, slow) == "failed"
        assert self.outcome(latency, fast) == "passed"

    def test_another_device_is_not_judged(self):
        run = run_of(2.0, gb_s=1.0, machine=replace(MACHINE, device="NVIDIA A100"))
        assert self.outcome(SPEED, run) == "not judged"

    def test_a_budget_ignores_other_cases(self):
        assert check_budget(replace(SPEED, where={"op": "attention"}), run_of(1.0), []) is None
        assert check_budget(replace(SPEED, where={"head": "*x"}), run_of(1.0), []) is None
        assert check_budget(replace(SPEED, where={"topic": "dit"}), run_of(1.0), []) is None

    def test_a_wrong_result_fails_without_a_time(self):
        wrong = Measurement(case=CASE, status="wrong", reason="error 0.3")
        run = replace(run_of(1.0), measurement=wrong)
        verdict = check_budget(SPEED, run, [run])
        assert verdict is not None
        assert verdict.fails
        assert verdict.text == "error 0.3"

    def test_relative_to_another_variant_of_the_same_run(self):
        budget = replace(
            SPEED,
            metric="median_ms",
            at_least=None,
            at_most=1.02,
            relative_to={"variant": "compile"},
        )
        peer = replace(run_of(1.0), measurement=measured(1.0, case=CASE | {"variant": "compile"}))
        assert self.outcome(budget, run_of(1.01), peer) == "passed"
        assert self.outcome(budget, run_of(1.1), peer) == "failed"
        assert self.outcome(budget, run_of(1.1)) == "not judged"
        elsewhere = measured(1.0, case=CASE | {"variant": "compile", "shape": "480p"})
        unlike = replace(run_of(1.0), measurement=elsewhere)
        assert self.outcome(budget, run_of(1.1), unlike) == "not judged"

    def test_what_is_launch_bound_is_not_judged(self):
        budget = replace(SPEED, launch_bound_ms=0.05)
        slow = run_of(0.02, gb_s=1.0, floor_ms=0.049)
        verdict = check_budget(budget, slow, [slow])
        assert verdict is not None
        assert (verdict.outcome, verdict.text) == (
            "not judged", "launch-bound: roofline below 0.05 ms",
        )  # fmt: skip
        assert self.outcome(budget, run_of(0.02, gb_s=1.0, floor_ms=0.05)) == "failed"
        assert self.outcome(budget, run_of(0.02, gb_s=95.0, floor_ms=0.05)) == "passed"
        with pytest.raises(ConfigError, match="no metric 'floor_ms'"):
            check_budget(budget, run_of(0.02, gb_s=1.0), [])

    def test_a_goal_is_reported_and_fails_nothing(self):
        verdict = check_budget(replace(SPEED, enforced=False), run_of(1.0, gb_s=1.0), [])
        assert verdict is not None
        assert verdict.outcome == "failed"
        assert not verdict.fails

    def test_a_metric_that_nobody_measures_is_a_mistake(self):
        with pytest.raises(ConfigError, match=r"no metric 'gb_s'.*median_ms, share"):
            check_budget(SPEED, run_of(1.0, share=0.5), [])

    @pytest.mark.parametrize("bounds", [{}, {"at_least": 1.0, "at_most": 2.0}])
    def test_one_bound(self, bounds):
        with pytest.raises(ConfigError, match="either at_least or at_most"):
            Budget(name="x", devices=("*",), where={"op": "*"}, metric="gb_s", **bounds)


def test_a_record_is_judged_whole():
    archive = [record_of(measured(1.0, gb_s=95.0))]
    now = record_of(
        measured(2.0, gb_s=50.0), Measurement(case={"op": "x"}, status="skipped", reason="no GPU")
    )
    verdicts = check_record(now, archive, [SPEED], {"cuda": POLICY})
    assert [(v.gate, v.outcome) for v in verdicts] == [
        ("fast", "failed"),
        ("no regression", "failed"),
    ]
    with pytest.raises(ConfigError, match="no regression policy for 'cuda'"):
        check_record(now, archive, [], {"cpu": POLICY})
