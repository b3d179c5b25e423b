"""Wrong results get no time, what cannot run says why, and figures follow from the samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
import triton
import triton.language as tl

from apt.bench.ceilings import Ceilings, measure_ceilings
from apt.bench.inputs import Inputs, Random, exact
from apt.bench.kernels import OpCase, cases_of, check_op, measure_op, variant_names
from apt.bench.ops import OPS, Function, Op, Outputs, variants_of
from apt.bench.peers import liger_modulated_norm, liger_residual_modulated_norm
from apt.bench.records import Measurement
from apt.bench.shapes import SHAPES, Shape, default_shapes
from apt.bench.timing import HostClock
from apt.errors import InputError
from apt.kernels import backends, modulated_norm

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_gb_s=10.0, matmul_tflops=0.1)
SMALL = Shape(name="small", batch=2, tokens=12, heads=2, head_dim=16, dtype=torch.float32)


def measure(case: OpCase, *only: str) -> dict[str, Measurement]:
    found = measure_op(
        case, device=CPU, clock=HostClock(), ceilings=CEILINGS, rounds=3, only=only or None
    )
    return {str(m.case["variant"]): m for m in found}


def test_compiled_variants_of_all_ops_in_one_process(monkeypatch):
    """They share one function's code, so each would count as a recompilation of the others."""
    # Dynamo's count does not depend on the backend that compiles its graphs
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    limit = 2  # of more than eight, to be quick
    # `monkeypatch` would delete the option when restoring it.
    with torch._dynamo.config.patch(recompile_limit=limit):
        for case in [case for case in ALL_CASES if case.op.compiled][: limit + 2]:
            check = check_op(case, device=CPU, only=["compile"])["compile"]
            assert check.status == "measured", f"{label(case)}: {check.reason}"


def with_peer(function: Function) -> Op:
    return replace(OPS["modulated_norm"], peers={"peer": function}, compiled=False)


def scaled(factor: float) -> Function:
    """The op, with its result multiplied."""

    def run(inputs: Inputs) -> Outputs:
        return modulated_norm(**inputs, backend="reference") * factor

    return run


def one(op: Op, direction: str = "forward") -> OpCase:
    (case,) = [case for case in cases_of(op, SMALL) if case.direction == direction]
    return case


ALL_CASES = [case for op in OPS.values() for case in cases_of(op, SMALL)]


def label(case: OpCase) -> str:
    return f"{case.op.name}-{case.direction}"


@pytest.mark.parametrize("case", ALL_CASES, ids=label)
def test_every_op_on_the_cpu(case):
    ours = "native" if case.op.name == "attention" else "eager"
    for variant, found in measure(case, *variants_of(case.op)).items():
        if variant == ours:
            assert found.status == "measured"
            assert found.metrics["error"] <= found.metrics["row_error"] < 1e-5
            assert ("attention_kernel" in found.facts) == (case.op.name == "attention")
            assert found.metrics["bytes"] > 0
        else:
            assert found.status in ("measured", "skipped"), found.reason


def test_figures():
    found = measure(one(OPS["modulated_norm"]), "eager")["eager"]
    moved = 4 * (2 * 2 * 12 * 32 + 2 * 2 * 32)  # x and y; scale and shift
    assert found.metrics["bytes"] == moved
    assert found.metrics["gb_s"] == pytest.approx(moved / found.median_ms / 1e6)
    assert found.metrics["share_of_copy"] == pytest.approx(found.metrics["gb_s"] / 10)
    assert found.metrics["share_of_matmul"] == pytest.approx(found.metrics["tflops"] / 0.1)
    floor = max(moved / 10e9, found.metrics["flops"] / 0.1e12)
    assert found.metrics["floor_ms"] == pytest.approx(floor * 1e3)
    assert found.case == {
        "op": "modulated_norm",
        "shape": "small",
        "size": "2x12x32",
        "dtype": "float32",
        "direction": "forward",
        "variant": "eager",
    }


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_wrong_result_has_no_time(direction):
    found = measure(one(with_peer(scaled(1.001)), direction), "eager", "peer")
    assert found["eager"].status == "measured"
    assert (found["peer"].status, found["peer"].samples_ms) == ("wrong", ())
    assert not found["peer"].metrics
    assert "0.001" in found["peer"].reason


def test_rounding_is_not_wrong():
    found = measure(one(with_peer(scaled(1 + 1e-7))), "peer")
    assert found["peer"].status == "measured"


def poisoned(inputs: Inputs) -> Outputs:
    out = modulated_norm(**inputs, backend="reference")
    out[0, 0, 0] = float("nan")
    return out


def cut(inputs: Inputs) -> Outputs:
    return modulated_norm(**inputs, backend="reference")[:, :-1]


@pytest.mark.parametrize("function", [poisoned, cut], ids=["NaN", "shape"])
def test_one_nan_or_a_missing_row_is_wrong(function: Callable[[Inputs], Outputs]):
    assert check_op(one(with_peer(function)), device=CPU)["peer"].status == "wrong"


def one_row_wrong(inputs: Inputs) -> Outputs:
    """The op, except its last row."""
    out = modulated_norm(**inputs, backend="reference").clone()
    out[-1, -1] = 0
    return out


def test_one_wrong_row_of_4096_is_wrong_in_bf16():
    many = Shape(name="many", batch=2, tokens=2048, heads=1, head_dim=64)
    (case, _) = cases_of(with_peer(one_row_wrong), many)
    checks = check_op(case, device=CPU, only=["eager", "peer"])
    assert checks["eager"].status == "measured"
    assert checks["peer"].status == "wrong"
    assert "in a row, allowed" in checks["peer"].reason  # and not as a whole


@triton.jit
def copy_but_the_last_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Forgets the last value of each block."""
    lane = tl.arange(0, BLOCK)
    at = tl.program_id(0) * BLOCK + lane
    tl.store(
        out_ptr + at, tl.load(x_ptr + at, mask=at < size), mask=(at < size) & (lane < BLOCK - 1)
    )


def unwritten(inputs: Inputs) -> Outputs:
    """The op, copied by a kernel that leaves some of its output unwritten."""
    values = modulated_norm(**inputs, backend="reference")
    out = torch.empty_like(values)
    if not out.isnan().all():
        out.copy_(values)  # as a GPU's allocator does, which gives freed memory to the next tensor
    copy_but_the_last_kernel[(values.numel() // 64,)](values, out, values.numel(), BLOCK=64)
    return out


def test_a_kernel_that_leaves_an_output_unwritten_is_wrong():
    case = one(with_peer(unwritten))
    inputs = OPS["modulated_norm"].draw(SMALL, Random(torch.Generator(), torch.float32))
    assert torch.equal(unwritten(inputs), modulated_norm(**inputs)), "the fault must be hidden"
    check = check_op(case, device=CPU)["peer"]
    assert check.status == "wrong"
    assert "nan" in check.reason


def crash(inputs: Inputs) -> Outputs:
    raise RuntimeError("out of memory\nand a long story")


def test_a_crash_is_reported_and_leaves_the_others_their_times():
    found = measure(one(with_peer(crash)), "peer", "eager")
    assert found["eager"].status == "measured"
    assert (found["peer"].status, found["peer"].reason) == (
        "skipped", "raised RuntimeError: out of memory",
    )  # fmt: skip
    ours = replace(with_peer(crash), call=lambda inputs, _: crash(inputs))
    with pytest.raises(RuntimeError, match="out of memory"):  # there is nothing to check against
        measure(one(ours), "eager")


def test_which_attention_ran_is_told():
    found = measure(one(OPS["attention"]), "native", "_native_flash")
    assert found["_native_flash"].facts == {"attention_kernel": "torch's flash (by selection)"}
    assert found["native"].facts == {"attention_kernel": "torch's flash (by selection)"}
    assert "warning" not in found["native"].facts


def test_the_interpreter_is_not_timed():
    found = measure(one(OPS["modulated_norm"]), "triton")["triton"]
    assert found.status == "skipped"
    assert "times in the interpreter mean nothing" in found.reason


def test_unknown_variants_are_told():
    with pytest.raises(InputError, match=r"has no variant cuda; there are: triton, eager"):
        measure(one(OPS["modulated_norm"]), "cuda", "eager")


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in ALL_CASES if case.op.compiled], ids=label)
def test_compiled_variants_on_the_cpu(case):
    found = measure(case, "compile")["compile"]
    assert found.status == "measured", found.reason


@pytest.mark.parametrize(
    "case", [case for case in ALL_CASES if "triton" in variants_of(case.op)], ids=label
)
def test_our_kernels_are_declared_right(case):
    """In the interpreter, so that the GPU command is not the first to call them this way."""
    check = check_op(case, device=CPU, only=["triton"])["triton"]
    assert check.status == "measured", check.reason


@pytest.mark.parametrize(
    ("op", "peer"), [("query_pooling", "cross_attention"), ("fused_rmsprop", "foreach")]
)
def test_peers_of_torch_are_the_same_function(op, peer):
    for case in cases_of(OPS[op], SMALL):
        check = check_op(case, device=CPU, only=[peer])[peer]
        assert check.status == "measured", check.reason


def test_torchs_optimiser_is_no_peer_in_bf16():
    (case,) = cases_of(OPS["fused_rmsprop"], SMALL, torch.bfloat16)
    check = check_op(case, device=CPU, only=["foreach"])["foreach"]
    assert check.status == "skipped"
    assert "keeps its state in the parameters' dtype" in check.reason


def test_inputs_of_an_op_that_writes_to_them_survive_the_check():
    (case,) = cases_of(OPS["fused_rmsprop"], SMALL)
    assert all(check.status != "wrong" for check in check_op(case, device=CPU).values())


def test_every_op_of_the_status_table_is_measured():
    assert set(OPS) - {"attention"} == set(backends.OPS)


def test_inputs_are_random_and_repeat():
    def draw(seed: int) -> Inputs:
        return OPS["modulated_norm"].draw(
            SMALL, Random(torch.Generator().manual_seed(seed), torch.float32)
        )

    assert torch.equal(draw(0)["x"], draw(0)["x"])
    assert not torch.equal(draw(0)["x"], draw(1)["x"])
    assert 0.5 < draw(0)["x"].std() < 1.5


def test_exact_inputs_are_leaves_of_the_same_values():
    x = torch.randn(3, dtype=torch.bfloat16, requires_grad=True)
    found = exact({"x": x, "rows": torch.tensor([1]), "num_heads": 2})
    assert found["x"].dtype == torch.float64
    assert found["x"].is_leaf
    assert found["x"].requires_grad
    assert torch.equal(found["x"].detach(), x.detach().double())
    assert found["rows"].dtype == torch.int64
    assert found["num_heads"] == 2


def test_sizes_are_those_of_the_models():
    assert str(SHAPES["720p"]) == "1x46800x3072"
    assert str(SHAPES["480p"]) == "1x20280x3072"
    assert str(SHAPES["1024px"]) == "1x4096x3072"
    assert str(SHAPES["digits"]) == "16x48x256"
    assert SHAPES["720p"].latent_values == 16 * 13 * 90 * 160
    assert [shape.name for shape in default_shapes(CPU)] == ["digits", "cpu"]


def test_ceilings_are_rates():
    ceilings = measure_ceilings(CPU, HostClock(), rounds=3, seconds=0.3)
    assert 0.01 < ceilings.copy_gb_s < 10_000
    assert 1e-4 < ceilings.matmul_tflops < 1000
    assert 1e-4 < ceilings.sustained_tflops < 1000
    assert ceilings.under_load.reason == "clocks are read on GPUs only"
    assert "sustained" in ceilings.describe()


@pytest.mark.parametrize("peer", [liger_modulated_norm, liger_residual_modulated_norm])
def test_liger_says_why_it_cannot_run(peer):
    inputs = {name: torch.zeros(1, 2, 8) for name in ("x", "update")}
    inputs |= {name: torch.zeros(1, 8) for name in ("gate", "scale", "shift")}
    with pytest.raises(InputError, match="needs a CUDA GPU"):
        peer(inputs)


def test_variants_in_the_order_of_reports():
    assert variant_names(OPS["modulated_norm"]) == ["triton", "eager", "compile", "liger"]
    assert "native" in variant_names(OPS["attention"])
    assert "_native_math" not in variant_names(OPS["attention"])
