"""Every op on a GPU: against fp64 at ragged and at real sizes, repeatable, and in CUDA graphs.

`python -m benchmarks.gpu` runs these. The interpreter's tests beside this file run on a GPU too,
and go deeper into shapes and options.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apt.bench.inputs import Random, copies
from apt.bench.kernels import Direction, OpCase, check_op, variant_names
from apt.bench.ops import OPS, Op, variants_of
from apt.bench.shapes import SHAPES, Shape

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # A GPU gives freed memory to the next tensor: an unwritten output would hold the right result
    pytest.mark.usefixtures("poisoned_memory"),
]

# Row counts and widths that no tile divides, in every dtype; the models' own in bf16
RAGGED = Shape(name="ragged", batch=3, tokens=77, heads=3, head_dim=40)
ONE = Shape(name="one", batch=1, tokens=1, heads=1, head_dim=64)
SIZES = [
    *((RAGGED, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
    *((shape, torch.bfloat16) for shape in (ONE, SHAPES["digits"], SHAPES["1024px"])),
]
OURS = [(op, name) for op in OPS.values() for name in variants_of(op)]
FUSED = [op for op in OPS.values() if "triton" in variants_of(op)]
# An optimiser's step builds a table on the host: it is no part of a network's graph
GRAPHED = [op for op in FUSED if not op.mutates]


def directions(op: Op) -> list[Direction]:
    return ["forward", "backward"] if op.gradients else ["forward"]


@pytest.mark.parametrize(("shape", "dtype"), SIZES, ids=str)
@pytest.mark.parametrize(("op", "variant"), OURS, ids=lambda value: getattr(value, "name", value))
def test_accuracy(op: Op, variant: str, shape: Shape, dtype: torch.dtype) -> None:
    for direction in directions(op):
        case = OpCase(op=op, shape=shape, dtype=dtype, direction=direction)
        check = check_op(case, device=torch.device("cuda"), only=[variant])[variant]
        if check.status == "skipped":
            pytest.skip(check.reason)
        assert check.status == "measured", f"{direction}: {check.reason}"


@pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
def test_compiled_reference_is_the_same_function(op: Op) -> None:
    if "compile" not in variant_names(op):
        pytest.skip("is not compiled")
    for direction in directions(op):
        case = OpCase(op=op, shape=RAGGED, dtype=torch.float32, direction=direction)
        check = check_op(case, device=torch.device("cuda"), only=["compile"])["compile"]
        assert check.status == "measured", f"{direction}: {check.reason}"


@pytest.mark.parametrize("op", FUSED, ids=lambda op: op.name)
def test_results_repeat_bit_for_bit(op: Op) -> None:
    first, second = (outputs_and_gradients(op, SHAPES["1024px"]) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", GRAPHED, ids=lambda op: op.name)
def test_a_cuda_graph_replays_on_new_inputs(op: Op) -> None:
    device = torch.device("cuda")
    random = Random(torch.Generator(device).manual_seed(0), torch.bfloat16)
    inputs, fresh = (op.draw(SHAPES["1024px"], random) for _ in range(2))
    function = variants_of(op)["triton"]
    with torch.no_grad():
        function(inputs)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = tensors(function(inputs))
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                value.copy_(fresh[name])
        for output in captured:
            if output.is_floating_point():
                output.fill_(float("nan"))
        graph.replay()
        expected = tensors(function(fresh))
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["modulated_norm", "residual_modulated_norm"])
def test_more_than_two_to_the_31_elements(name: str) -> None:
    """The last rows of a tensor that 32-bit offsets cannot reach equal the same rows alone."""
    width, tail = 8192, 64
    tokens = 2**31 // width + tail
    needed = 6 * 2 * tokens * width
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    op, shape = OPS[name], Shape(name="huge", batch=1, tokens=tokens, heads=64, head_dim=128)
    random = Random(torch.Generator(torch.device("cuda")).manual_seed(0), torch.bfloat16)
    inputs = op.draw(shape, random)
    ends = {k: v[:, -tail:].clone() if v.ndim == 3 else v for k, v in inputs.items()}
    function = variants_of(op)["triton"]
    with torch.no_grad():
        for whole, end in zip(tensors(function(inputs)), tensors(function(ends)), strict=True):
            # not equal: another number of rows may be tiled, and so summed, in another order
            torch.testing.assert_close(whole[:, -tail:], end)


def outputs_and_gradients(op: Op, shape: Shape) -> list[Tensor]:
    device = torch.device("cuda")
    inputs = op.draw(shape, Random(torch.Generator(device).manual_seed(0), torch.bfloat16))
    wanted = [inputs[name].requires_grad_() for name in op.gradients]
    outputs = tensors(variants_of(op)["triton"](copies(inputs) if op.mutates else inputs))
    if not wanted:
        return outputs
    return [*outputs, *torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs])]


def tensors(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]
