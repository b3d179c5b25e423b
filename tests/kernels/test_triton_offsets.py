"""Elements beyond 2^31, whose offsets overflow in 32 bits, without the memory for them.

Buffers are mapped, and pages that nobody touches take no memory. In the interpreter a launch of a
few programs stands for the last ones of a large grid: their numbers are shifted. On a GPU
`test_more_than_2_to_the_31_elements` in test_triton_modulated_norm.py runs the whole of it.
"""

from __future__ import annotations

import mmap

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apt.kernels.backends import interpreted

pytest.importorskip("triton")
from apt.kernels._triton import norm_kernels as norms
from apt.kernels._triton import query_pooling as pooling
from apt.kernels._triton.segment_sum import segment_sum_kernel

pytestmark = pytest.mark.skipif(not interpreted(), reason="the interpreter's programs are shifted")

WIDTH = 8192
FAR = 2**31 // WIDTH + 5  # a token whose elements lie beyond 2^31
EPS = 1e-6
MAP_NORESERVE = 0x4000  # of Linux; `mmap` has no name for it in every Python


def huge(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros of which only touched pages take memory.

    Memory also lies before them: an offset that wraps to a negative one finds zeros there, and the
    test fails instead of the process.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    memory = mmap.mmap(-1, (2**31 + elements) * dtype.itemsize, flags)
    return torch.frombuffer(memory, dtype=dtype)[2**31 :]


def tokens(dtype: torch.dtype = torch.float16) -> Tensor:
    """(FAR + 1, WIDTH)."""
    return huge((FAR + 1) * WIDTH, dtype).view(FAR + 1, WIDTH)


@pytest.fixture
def start_at(monkeypatch):
    """Shifts the numbers of programs along the first axis of the grid."""
    from triton.runtime.interpreter import TensorHandle, interpreter_builder

    real = interpreter_builder.create_get_program_id

    def shift(first: int) -> None:
        def program_id(axis: int) -> TensorHandle:
            handle = real(axis)
            handle.data = handle.data + (first if axis == 0 else 0)
            assert handle.data.dtype.itemsize == 4  # as on a GPU: the kernel must widen it
            return handle

        monkeypatch.setattr(interpreter_builder, "create_get_program_id", program_id)

    return shift


def test_the_shift_reaches_32_bits():
    # Were offsets computed in 32 bits, FAR would wrap to an address before the buffer
    assert FAR * WIDTH > 2**31 - 1
    assert torch.tensor([FAR], dtype=torch.int32).mul(WIDTH).item() < 0


@pytest.mark.parametrize("per_token", [False, True])
def test_forward(start_at, per_token):
    x, update, x_new, y = tokens(), tokens(), tokens(), tokens()
    x[FAR], update[FAR] = torch.randn(2, WIDTH).half()
    row, (gate, scale, shift) = modulations(per_token)
    stats = torch.full((2 * (FAR + 1),), torch.nan)
    tiling = norms.forward_tiling(WIDTH, per_token)
    assert tiling.tokens == 1  # program and token have the same number
    start_at(FAR)
    norms.forward_kernel[(1,)](
        x, update, gate, scale, shift, None, None, None, x_new, y, stats, FAR + 1, FAR + 1, EPS,
        GATE_STRIDE=WIDTH, SCALE_STRIDE=WIDTH, SHIFT_STRIDE=WIDTH, PER_TOKEN=per_token, LAYER=True,
        D=WIDTH, MAIN=tiling.main, REST=tiling.rest, TOKENS=1, num_warps=tiling.num_warps,
    )  # fmt: skip
    residual = x[FAR].float() + gate[row].float() * update[FAR].float()
    torch.testing.assert_close(x_new[FAR], residual.half())
    normed = F.layer_norm(x_new[FAR].float(), (WIDTH,), eps=EPS)
    expected = normed * (1 + scale[row].float()) + shift[row].float()
    torch.testing.assert_close(y[FAR].float(), expected, rtol=2e-3, atol=2e-3)
    written = (~stats.isnan()).nonzero().flatten().tolist()
    assert written == [FAR, 2 * FAR + 1]  # rstd, then mean, of that token alone


@pytest.mark.parametrize("per_token", [False, True])
def test_backward(start_at, per_token):
    x, grad_y, grad_x, grad_scale = tokens(), tokens(), tokens(), tokens()
    x[FAR], grad_y[FAR] = torch.randn(2, WIDTH).half()
    row, (scale, *_) = modulations(per_token)
    stats = torch.zeros(FAR + 1)
    rstd = stats[FAR] = x[FAR].float().square().mean().add(EPS).rsqrt()
    # A program for each token, so that its sums lie beyond 2^31 too; of one program in the grid,
    # the second sum follows the first
    partials = huge((FAR + 2) * WIDTH, torch.float32).view(-1, WIDTH)
    tiling = norms.backward_tiling(WIDTH, 2, itemsize=2, per_token=per_token)
    assert tiling.tokens == 1
    start_at(FAR)
    norms.backward_kernel[(1,)](
        grad_y, None, x, None, None, scale, None, None, None, stats,
        grad_x, None, None, grad_scale if per_token else None, partials,
        FAR + 1, FAR + 1, 1, FAR + 1,
        GATE_STRIDE=0, SCALE_STRIDE=WIDTH, PER_TOKEN=per_token, LAYER=False, D=WIDTH,
        MAIN=tiling.main, REST=tiling.rest, TOKENS=1, STAGES=1, KEEP_SHARED=False,
        KEEP_X=not per_token, num_warps=tiling.num_warps,
    )  # fmt: skip
    x_hat, grad = x[FAR].float() * rstd, grad_y[FAR].float()
    factor = 1 + scale[row].float()
    g = grad * factor
    expected = rstd * (g - x_hat * (g * x_hat).mean())
    torch.testing.assert_close(grad_x[FAR].float(), expected, rtol=2e-3, atol=2e-3)
    shared = grad * factor if per_token else grad
    torch.testing.assert_close(partials[FAR], shared * x_hat)
    torch.testing.assert_close(partials[FAR + 1], shared)
    if per_token:
        torch.testing.assert_close(grad_scale[FAR], (grad * x_hat).half())


def test_segment_sum(start_at):
    # Each of P rows has one partial sum, in two quantities of which the second starts at P * D
    programs, width = 2**31 // 64 + 3, 64
    partials = huge(2 * programs * width, torch.float32).view(2, programs, width)
    sums = huge(2 * programs * width, torch.float32).view(2, programs, width)
    values = partials[1, -1] = torch.randn(width)
    start_at(2 * programs - 1)
    segment_sum_kernel[(1, 1)](
        partials, None, sums, programs, programs, 1, D=width, COLUMNS=64, PARTIALS_PER_STEP=32
    )
    assert torch.equal(sums[1, -1], values)


# One head over one sample of FAR + 1 tokens, of which a program has the last block
BLOCKS = FAR // pooling.PAD + 1
FIRST = (BLOCKS - 1) * pooling.PAD


def pooling_constants(tiling) -> dict[str, object]:  # type: ignore[no-untyped-def]
    found = pooling._constants(torch.empty(1, 1, WIDTH, dtype=torch.float16), 1, tiling)
    return found | {"BLOCK": 2048, "ROWS": pooling.PAD}  # fewer and larger steps


def per_token() -> Tensor:
    return torch.full((BLOCKS * pooling.PAD,), torch.nan)


def test_scores(start_at):
    x, scores, rstd = tokens(), per_token(), per_token()
    x[FAR] = torch.randn(WIDTH).half()
    folded = torch.randn(WIDTH) * WIDTH**-0.5
    start_at(BLOCKS - 1)
    pooling.scores_kernel[(1,)](
        x, folded, scores, rstd, FAR + 1, BLOCKS, EPS, **pooling_constants(pooling.scores_tiling)
    )
    row = x[FAR].float()
    torch.testing.assert_close(rstd[FAR], row.square().mean().add(EPS).rsqrt())
    torch.testing.assert_close(scores[FAR], rstd[FAR] * (row @ folded), rtol=1e-4, atol=1e-5)
    assert (scores[FAR + 1 :] == -torch.inf).all()
    assert (rstd[FAR + 1 :] == 0).all()
    assert scores[:FIRST].isnan().all()


def test_weighted_sum(start_at):
    x, weights, sums = tokens(), per_token(), torch.full((BLOCKS, WIDTH), torch.nan)
    x[FAR] = torch.randn(WIDTH).half()
    weights[FIRST:] = 0
    weights[FAR] = 0.5
    start_at(BLOCKS - 1)
    pooling.weighted_sum_kernel[(1, WIDTH // 2048)](
        x, weights, None, None, sums, FAR + 1, BLOCKS, BLOCKS, 1,
        **pooling_constants(pooling.sum_tiling),
    )  # fmt: skip
    torch.testing.assert_close(sums[-1], 0.5 * x[FAR].float())
    assert sums[:-1].isnan().all()


def test_tokens_backward(start_at):
    x, grad_x, scores, rstd, slopes = tokens(), tokens(), per_token(), per_token(), per_token()
    x[FAR] = torch.randn(WIDTH).half()
    grad, folded = torch.randn(2, WIDTH) * WIDTH**-0.5
    row = x[FAR].float()
    rstd[FIRST:], scores[FIRST:] = 0, 0
    r = rstd[FAR] = row.square().mean().add(EPS).rsqrt()
    score = scores[FAR] = r * (row @ folded)
    lse, delta = score + 0.5, torch.tensor(0.3)
    start_at(BLOCKS - 1)
    pooling.tokens_backward_kernel[(1,)](
        grad, x, folded, scores, lse, delta, rstd, grad_x, slopes, FAR + 1, BLOCKS, 1,
        **pooling_constants(pooling.backward_tiling),
    )  # fmt: skip
    p, grad_p = (score - lse).exp(), r * (row @ grad)
    grad_score = p * (grad_p - delta)
    through_norm = r**2 / WIDTH * (p * grad_p + grad_score * score)
    expected = p * r * grad + grad_score * r * folded - through_norm * row
    torch.testing.assert_close(grad_x[FAR].float(), expected, rtol=2e-3, atol=2e-5)
    torch.testing.assert_close(slopes[FAR], grad_score * r, rtol=1e-4, atol=1e-6)
    assert (slopes[FAR + 1 :] == 0).all()
    assert slopes[:FIRST].isnan().all()


def modulations(per_token: bool) -> tuple[int, list[Tensor]]:
    """The row that token FAR uses, and three modulations with that row filled."""
    row = FAR if per_token else 0
    tensors = [tokens() if per_token else torch.empty(1, WIDTH).half() for _ in range(3)]
    for values in tensors:
        values[row] = torch.randn(WIDTH).half()
    return row, tensors
