"""The fused norms against fp64: on a GPU, or in Triton's interpreter (tests/conftest.py)."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apt.errors import InputError
from apt.kernels import kernel_backend, modulated_norm, residual_modulated_norm
from apt.kernels.backends import interpreted

pytest.importorskip("triton")
from apt.kernels._triton import modulated_norm as fused
from apt.kernels._triton.residual_modulated_norm import residual_modulated_norm_op
from apt.kernels._triton.segment_sum import segment_sum

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Case(NamedTuple):
    """What a test draws its inputs from."""

    batch: int = 2
    length: int = 5
    width: int = 72
    residual: bool = True
    norm: str = "rms"
    modulation: str = "per_sample"  # or shared, per_token
    affine: bool = True
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def draw(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """Inputs by name, leaves that require gradients, and rows."""
        generator = torch.Generator().manual_seed(self.seed)
        tokens = (self.batch, self.length, self.width)
        num_rows = 2 if self.modulation == "shared" else self.batch
        shape = tokens if self.modulation == "per_token" else (num_rows, self.width)
        shapes = {"x": tokens, "scale": shape, "shift": shape}
        if self.residual:
            shapes |= {"update": tokens, "gate": shape}
        if self.affine:
            shapes |= {"weight": (self.width,)}
            shapes |= {"bias": (self.width,)} if self.norm == "layer" else {}
        inputs = {
            name: torch.randn(size, generator=generator).to(DEVICE, self.dtype).requires_grad_()
            for name, size in shapes.items()
        }
        rows = None
        if self.modulation == "shared":
            rows = torch.randint(2, (self.batch,), generator=generator).to(DEVICE)
        return inputs, rows

    def run(self, inputs: dict[str, Tensor], rows: Tensor | None, **options: object):  # type: ignore[no-untyped-def]
        """(y,) or (x_new, y)."""
        options |= {"norm": self.norm, "rows": rows}
        if self.residual:
            return residual_modulated_norm(**inputs, **options)  # type: ignore[arg-type]
        return (modulated_norm(**inputs, **options),)  # type: ignore[arg-type]

    def outputs_and_gradients(
        self, inputs: dict[str, Tensor], rows: Tensor | None, **options: object
    ) -> dict[str, Tensor]:
        outputs = self.run(inputs, rows, **options)
        generator = torch.Generator().manual_seed(self.seed + 1)
        loss = sum(
            (out * torch.randn(out.shape, generator=generator).to(out)).sum() for out in outputs
        )
        gradients = torch.autograd.grad(loss, list(inputs.values()))  # type: ignore[arg-type]
        names = ("x_new", "y")[-len(outputs) :]
        found = dict(zip(names, outputs, strict=True))
        return found | {f"d {name}": g for name, g in zip(inputs, gradients, strict=True)}


def check(case: Case, *, floor: float = 0.05) -> None:
    """Every output and gradient within twice the reference's error against fp64.

    `floor`, in units of the type's epsilon, is for references that are exact by luck.
    """
    inputs, rows = case.draw()
    exact = case.outputs_and_gradients(
        {name: value.detach().double().requires_grad_() for name, value in inputs.items()},
        rows,
        backend="reference",
    )
    reference = case.outputs_and_gradients(inputs, rows, backend="reference")
    ours = case.outputs_and_gradients(inputs, rows, backend="triton")
    # The interpreter truncates where hardware rounds to nearest: twice the error of a rounding.
    times = 4 if case.dtype == torch.bfloat16 and interpreted() else 2
    for name, want in exact.items():
        assert ours[name].shape == reference[name].shape
        assert ours[name].dtype == reference[name].dtype == case.dtype
        norm = want.norm().clamp(min=1e-6)
        error, allowed = (
            ((found[name].double() - want).norm() / norm).item() for found in (ours, reference)
        )
        # `not <=` also when the error is NaN
        assert error <= times * allowed + floor * torch.finfo(case.dtype).eps, name


@pytest.mark.parametrize("modulation", ["per_sample", "shared", "per_token"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(dtype, residual, norm, modulation):
    check(Case(3, 20, 72, residual, norm, modulation, dtype=dtype))


@pytest.mark.parametrize("width", [64, 192, 1152, 1536, 2432, 3000, 3072, 5120, 8192])
def test_accuracy_at_the_widths_of_models(width):
    check(Case(1, 2, width, norm="layer", dtype=torch.float16))


@settings(max_examples=12, deadline=None)
@given(
    st.builds(
        Case,
        batch=st.integers(1, 3),
        length=st.integers(0, 35),
        width=st.integers(2, 150),  # of one value an RMS norm leaves the sign: dx is what cancels
        residual=st.booleans(),
        norm=st.sampled_from(["rms", "layer"]),
        modulation=st.sampled_from(["per_sample", "shared", "per_token"]),
        affine=st.booleans(),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 9),
    )
)
def test_accuracy_at_ragged_shapes(case):
    check(case, floor=2)


WIDE_CASES = st.builds(
    Case,
    batch=st.integers(1, 2),
    length=st.integers(1, 2),
    width=st.integers(151, 8192),
    residual=st.booleans(),
    norm=st.sampled_from(["rms", "layer"]),
    modulation=st.sampled_from(["per_sample", "shared", "per_token"]),
    affine=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)


@settings(max_examples=4, deadline=None)
@given(WIDE_CASES)
def test_accuracy_at_ragged_widths(case):
    check(case, floor=2)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(WIDE_CASES)
def test_accuracy_at_many_ragged_widths(case):
    check(case, floor=2)


@pytest.mark.parametrize("modulation", ["per_sample", "shared", "per_token"])
@pytest.mark.parametrize(("batch", "length"), [(0, 5), (2, 0)])
def test_zero_rows(batch, length, modulation):
    case = Case(batch, length, norm="layer", modulation=modulation)
    found = case.outputs_and_gradients(*case.draw(), backend="triton")
    assert found["y"].shape == (batch, length, 72)
    for name, value in case.draw()[0].items():
        assert torch.equal(found[f"d {name}"], torch.zeros_like(value)), name


def test_shared_rows_equal_copies_and_rows_that_nobody_uses_get_zeros():
    case = Case(4, 18)
    inputs, _ = case.draw()
    rows = torch.tensor([3, 1, 3, 3], device=DEVICE)
    shared = case.outputs_and_gradients(inputs, rows, backend="triton")
    copies = {
        name: value[rows].detach().requires_grad_() if value.ndim == 2 else value
        for name, value in inputs.items()
    }
    copied = case.outputs_and_gradients(copies, None, backend="triton")
    assert torch.equal(shared["x_new"], copied["x_new"])
    assert torch.equal(shared["y"], copied["y"])
    for name in ("gate", "scale", "shift"):
        gradient = copied[f"d {name}"]
        expected = torch.zeros_like(gradient)
        expected[1], expected[3] = gradient[1], gradient[[0, 2, 3]].sum(0)
        torch.testing.assert_close(shared[f"d {name}"], expected)


def test_non_contiguous_inputs():
    case = Case(3, 6, 40, norm="layer")
    inputs, rows = case.draw()
    expected = case.outputs_and_gradients(inputs, rows, backend="triton")
    views = {
        # As the backbone's table of modulation, cut into six, and as transposed tokens
        "x": inputs["x"].detach().transpose(1, 2).contiguous().transpose(1, 2),
        "update": inputs["update"].detach().repeat(1, 1, 2)[..., :40],
        "gate": inputs["gate"].detach().repeat(1, 6)[:, 80:120],
        "scale": inputs["scale"].detach().t().contiguous().t(),
        "weight": torch.stack([inputs["weight"].detach()] * 2, 1)[:, 0],
    }
    assert not any(view.is_contiguous() for view in views.values())
    views = {name: view.requires_grad_() for name, view in views.items()}
    found = case.outputs_and_gradients(inputs | views, rows, backend="triton")
    for name, want in expected.items():
        assert torch.equal(found[name], want), name


def test_a_modulation_that_all_samples_share_without_rows():
    case = Case(3, 6, 40, affine=False)
    inputs, _ = case.draw()
    one = {n: v[:1].detach().expand_as(v) if v.ndim == 2 else v for n, v in inputs.items()}
    found = case.run(one, None, backend="triton")
    for got, want in zip(found, case.run(one, None, backend="reference"), strict=True):
        torch.testing.assert_close(got, want)


def test_types_may_differ_as_under_autocast():
    # An fp32 residual stream, an update from a bf16 linear layer, fp16 and fp32 modulation
    case = Case(2, 20, norm="layer")
    inputs, rows = case.draw()
    dtypes = {"update": torch.bfloat16, "scale": torch.float16, "weight": torch.bfloat16}
    inputs |= {n: inputs[n].detach().to(dtype).requires_grad_() for n, dtype in dtypes.items()}
    found = case.outputs_and_gradients(inputs, rows, backend="triton")
    expected = case.outputs_and_gradients(inputs, rows, backend="reference")
    assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in expected.items()}
    for name, want in expected.items():
        tolerance = 2 * torch.finfo(want.dtype).eps
        assert ((found[name] - want).norm() / want.norm()).item() < tolerance, name


def test_modulation_per_token_and_per_sample_may_be_mixed():
    case = Case(2, 6, 40, modulation="per_token", affine=False)
    inputs, rows = case.draw()
    inputs["shift"] = inputs["shift"][:, 0].detach().requires_grad_()
    found = case.outputs_and_gradients(inputs, rows, backend="triton")
    expected = case.outputs_and_gradients(inputs, rows, backend="reference")
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, msg=name)


@pytest.mark.parametrize("wanted", [["x"], ["update", "shift"], ["x", "weight"]])
def test_only_the_gradients_that_are_wanted(wanted):
    case = Case(2, 20)
    inputs, rows = case.draw()
    for name, value in inputs.items():
        value.requires_grad_(name in wanted)
    for unused in (0, 1):  # of the two outputs, one may lead nowhere
        found, expected = (
            torch.autograd.grad(
                case.run(inputs, rows, backend=backend)[1 - unused].square().sum(),
                [inputs[name] for name in wanted],
                allow_unused=True,
                materialize_grads=True,
            )
            for backend in ("triton", "reference")
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_gradients_repeat_bit_for_bit():
    case = Case(3, 34, modulation="shared", dtype=torch.float16)
    first, second = (case.outputs_and_gradients(*case.draw(), backend="triton") for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("residual", [False, True])
def test_double_backward_raises_and_names_the_reference(residual):
    case = Case(residual=residual)
    inputs, rows = case.draw()
    y = case.run(inputs, rows, backend="triton")[-1]
    (gradient,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
    with pytest.raises(InputError, match="backend='reference'"):
        gradient.square().sum().backward()
    with kernel_backend("reference"):
        y = case.run(inputs, rows)[-1]
        (gradient,) = torch.autograd.grad(y.square().sum(), inputs["x"], create_graph=True)
        gradient.square().sum().backward()
    assert inputs["x"].grad is not None and inputs["x"].grad.isfinite().all()


@pytest.mark.parametrize("modulation", ["shared", "per_token"])
def test_the_ops_keep_the_rules_of_torch_library(modulation):
    case = Case(2, 3, 24, norm="layer", modulation=modulation)
    inputs, rows = case.draw()
    x, update, gate, scale, shift, weight, bias = (
        inputs[n] for n in ("x", "update", "gate", "scale", "shift", "weight", "bias")
    )
    norm = (x, scale, shift, weight, bias, rows, 1e-6, True)
    torch.library.opcheck(fused.modulated_norm_op.overload, norm)
    torch.library.opcheck(residual_modulated_norm_op.overload, (*norm, update, gate))
    stats = torch.ones(2, 6, device=DEVICE)
    values = (x, x, x, update, gate, scale, weight, bias, rows, stats, True)
    torch.library.opcheck(
        fused.modulated_norm_backward_op.overload,
        (*(v.detach() if isinstance(v, Tensor) else v for v in values), True),
    )


def test_compiles_to_one_graph_with_its_backward():
    case = Case(2, 6, 24)
    inputs, rows = case.draw()

    def run(inputs):  # type: ignore[no-untyped-def]
        return case.run(inputs, rows, backend="triton")

    expected = run(inputs)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(inputs)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)
    values = list(inputs.values())
    gradients = torch.autograd.grad(sum(out.sum() for out in found), values)  # type: ignore[arg-type]
    wanted = torch.autograd.grad(sum(out.sum() for out in expected), values)  # type: ignore[arg-type]
    torch.testing.assert_close(gradients, wanted)


def test_checkpointing_computes_it_again():
    case = Case(2, 6, 24, residual=False, affine=False)
    inputs, rows = case.draw()

    def run(*values):  # type: ignore[no-untyped-def]
        named = dict(zip(inputs, values, strict=True))
        return case.run(named, rows, backend="triton")[0].square().sum()

    plain = torch.autograd.grad(run(*inputs.values()), list(inputs.values()))
    again = torch.utils.checkpoint.checkpoint(run, *inputs.values(), use_reentrant=False)
    for got, want in zip(torch.autograd.grad(again, list(inputs.values())), plain, strict=True):
        assert torch.equal(got, want)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.integers(1, 70), st.booleans())
def test_segment_sum(quantities, samples, programs, width, shared):
    partials = torch.randn(quantities, samples * programs, width, device=DEVICE)
    of_samples = partials.double().unflatten(1, (samples, programs)).sum(2)
    num_rows, rows = samples, None
    if shared:
        num_rows, rows = 3, torch.randint(3, (samples,), device=DEVICE)
    expected = of_samples.new_zeros(quantities, num_rows, width)
    for sample in range(samples):
        expected[:, sample if rows is None else rows[sample]] += of_samples[:, sample]
    found = segment_sum(partials, rows, num_rows)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    width = 4096
    x = torch.randn(1, 2**31 // width + 3, width, device="cuda", dtype=torch.float16)
    scale, shift = torch.randn(2, 1, width, device="cuda", dtype=torch.float16)
    x.requires_grad_()
    y = modulated_norm(x, scale, shift, backend="triton")
    last = x[:, -3:].detach().requires_grad_()
    expected = modulated_norm(last, scale, shift, backend="triton")
    assert torch.equal(y[:, -3:], expected)
    (gradient,) = torch.autograd.grad(y, x, y.detach())
    (wanted,) = torch.autograd.grad(expected, last, expected.detach())
    assert torch.equal(gradient[:, -3:], wanted)
