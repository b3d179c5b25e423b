"""RMSProp and the average of the weights, against torch's own."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from apt.errors import CheckpointError, InputError
from apt.kernels import FusedRMSprop, kernel_backend
from apt.kernels.backends import interpreted
from apt.kernels.fused_rmsprop import rmsprop_reference
from apt.kernels.signatures import RMSpropOptions, RMSpropStep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(3,), (40, 30), (1025,), (0,), (), (2, 3, 4)]
OPTIONS = {"lr": 1e-2, "alpha": 0.9, "eps": 1e-6}


def parameters(dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]
    return [nn.Parameter(value) for value in drawn]


def give_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p)


def averages(params: list[nn.Parameter]) -> dict[Tensor, Tensor]:
    wide = {p: torch.promote_types(p.dtype, torch.float32) for p in params}
    return {p: p.detach().to(wide[p], copy=True) for p in params}


def fused(params, backend="triton", **options) -> FusedRMSprop:
    return FusedRMSprop(params, **(OPTIONS | options), backend=backend)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_reference_is_torch_bit_for_bit(dtype, weight_decay):
    ours, theirs = parameters(dtype), parameters(dtype)
    ema, their_ema = averages(ours), list(averages(theirs).values())
    optimizer = fused(ours, "reference", weight_decay=weight_decay, ema=ema, ema_decay=0.9)
    peer = torch.optim.RMSprop(theirs, **OPTIONS, weight_decay=weight_decay, foreach=False)
    for update in range(4):
        for params in (ours, theirs):
            give_gradients(params, update)
        if update == 2:  # parameters that do not move are averaged all the same
            ours[1].grad = theirs[1].grad = None
        optimizer.step()
        peer.step()
        get_ema_multi_avg_fn(0.9)(their_ema, [p.detach() for p in theirs], None)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        for name, value in peer.state[q].items():
            assert torch.equal(optimizer.state[p][name], value), name
    assert all(map(torch.equal, ema.values(), their_ema))


def test_fp64_parameters_may_be_averaged_in_fp32():
    params = parameters(torch.float64)
    ema = {p: p.detach().float() for p in params}
    optimizer = fused(params, None, ema=ema, ema_decay=0.5)
    start = [p.detach().clone() for p in params]
    give_gradients(params, 0)
    optimizer.step()
    for p, before in zip(params, start, strict=True):
        torch.testing.assert_close(ema[p], ((p.detach() + before) / 2).float())


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_the_kernel_is_as_accurate_as_the_reference(name):
    pytest.importorskip("triton")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    found = {}
    for backend, kept in (("triton", dtype), ("reference", dtype), ("exact", torch.float64)):
        params = parameters(dtype)
        params = [nn.Parameter(p.detach().to(kept)) for p in params]
        ema = averages(params)
        optimizer = fused(
            params,
            "triton" if backend == "triton" else "reference",
            weight_decay=0.1,
            ema=ema,
            ema_decay=0.9,
        )
        give_gradients(params, 0)
        generator = torch.Generator().manual_seed(1)
        for p in params:
            p.grad = p.grad.to(dtype).to(kept)
            # From zero, all would move by the same, and errors would not be random
            squares = torch.rand(p.shape, generator=generator)
            optimizer.state[p]["square_avg"].copy_(squares)
        optimizer.step()
        squares = [optimizer.state[p]["square_avg"] for p in params]
        # All tensors together: the reference may be exact by luck on a few numbers
        found[backend] = [
            torch.cat([value.detach().flatten() for value in column])
            for column in (params, squares, ema.values())
        ]
    # The interpreter truncates to bf16: twice the error of rounding to nearest.
    times = 4 if name == "bf16" and interpreted() else 2
    for ours, reference, exact in zip(*found.values(), strict=True):
        assert ours.dtype == reference.dtype
        error, allowed = ((value.double() - exact).norm().item() for value in (ours, reference))
        floor = 0.05 * torch.finfo(reference.dtype).eps * exact.norm().item()
        assert error <= times * allowed + floor


@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.integers(0, 1500), min_size=1, max_size=5),
    st.lists(st.sampled_from([torch.float32, torch.bfloat16]), min_size=5, max_size=5),
    st.integers(0, 3),
    st.booleans(),
)
def test_sizes_types_and_alignments_may_be_mixed(sizes, dtypes, offset, with_ema):
    pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(size + offset, generator=generator) for size in sizes]
    results = []
    for backend in ("triton", "reference"):
        # Views that begin anywhere in a buffer, as shards do
        params = [
            nn.Parameter(value.to(DEVICE, dtype, copy=True)[offset:])
            for value, dtype in zip(drawn, dtypes, strict=False)
        ]
        ema = averages(params) if with_ema else None
        optimizer = fused(params, backend, ema=ema, ema_decay=0.9 if with_ema else None)
        for update in range(2):
            give_gradients(params, update)
            params[0].grad = None if update else params[0].grad
            optimizer.step()
        results.append((params, list((ema or {}).values())))
    for column in zip(*results, strict=True):
        for ours, reference, dtype in zip(*column, dtypes, strict=False):
            # An average follows the parameter as it is rounded, by the interpreter to zero
            tolerance = 2e-5 if dtype == torch.float32 else 3e-2
            torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


def test_large_tensors_are_cut_into_chunks():
    rmsprop = pytest.importorskip("apt.kernels._triton.fused_rmsprop")
    size = 2 * rmsprop.CHUNK + 5
    ours, theirs = parameters(shapes=[(size,), (7,)]), parameters(shapes=[(size,), (7,)])
    for params in (ours, theirs):
        give_gradients(params, 0)
    fused(ours).step()
    fused(theirs, "reference").step()
    torch.testing.assert_close(ours, theirs)


def test_one_launch_for_all_tensors_of_a_kind():
    rmsprop = pytest.importorskip("apt.kernels._triton.fused_rmsprop")
    params = parameters() + parameters(torch.bfloat16)
    grads = [torch.zeros_like(p) for p in params]
    grads[1] = torch.zeros(1201, device=DEVICE)[1:].view(40, 30)  # begins off a 16-byte boundary
    found = rmsprop.kinds(params, grads)
    assert found == {
        (torch.float32, torch.float32, True): [0, 2, 4, 5],
        (torch.float32, torch.float32, False): [1],
        (torch.bfloat16, torch.bfloat16, True): [6, 7, 8, 10, 11],
    }


def test_squares_of_low_precision_parameters_are_kept_in_fp32():
    params = parameters(torch.bfloat16, [(50,)])
    optimizer = fused(params, "reference")
    for update in range(3):
        give_gradients(params, update)
        optimizer.step()
    square_avg = optimizer.state[params[0]]["square_avg"]
    assert square_avg.dtype == torch.float32
    again = fused(parameters(torch.bfloat16, [(50,)]), "reference")
    again.load_state_dict(optimizer.state_dict())
    loaded = again.state[again.param_groups[0]["params"][0]]["square_avg"]
    assert torch.equal(loaded, square_avg) and loaded is not square_avg


@pytest.mark.parametrize("direction", ["to torch", "from torch"])
def test_state_dicts_are_those_of_torch(direction):
    kinds = {"ours": lambda p: fused(p, "reference"), "torch": None}
    kinds["torch"] = lambda p: torch.optim.RMSprop(p, lr=0.5, foreach=False)
    source, target = ("ours", "torch") if direction == "to torch" else ("torch", "ours")
    params = parameters()
    optimizer = kinds[source](params)
    optimizer.param_groups[0].update(OPTIONS)
    give_gradients(params, 0)
    optimizer.step()
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    other = kinds[target](copies)
    assert other.state_dict()["param_groups"][0].keys() == optimizer.param_groups[0].keys()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["lr"] == OPTIONS["lr"]
    for each in (params, copies):
        give_gradients(each, 1)
    optimizer.step()
    other.step()
    assert all(map(torch.equal, params, copies))


def test_a_fresh_state_of_torch_is_loaded_too():
    params = parameters()
    optimizer = fused(params, "reference")
    optimizer.load_state_dict(torch.optim.RMSprop(parameters(), lr=0.1).state_dict())
    assert all(optimizer.state[p]["square_avg"].count_nonzero() == 0 for p in params)
    give_gradients(params, 0)
    optimizer.step()


def test_a_deep_copy_keeps_its_averages_and_backend():
    params = parameters()
    optimizer = fused(params, "reference", ema=averages(params), ema_decay=0.5)
    again, copied = copy.deepcopy((optimizer, params))
    ema = again._averages
    assert set(ema) == set(copied) and not set(ema) & set(params)
    give_gradients(copied, 0)
    again.step()
    assert not torch.equal(ema[copied[1]], optimizer._averages[params[1]])


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.skipif(DEVICE != "cpu", reason="its process group has no NCCL")
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_shards_are_updated_by_themselves(mesh, backend):
    if backend == "triton":
        pytest.importorskip("triton")
    whole = parameters(shapes=[(5, 3), (4,)])
    sharded = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh)) for p in whole]
    for params in (whole, sharded):
        for update in range(2):
            for p in params:
                generator = torch.Generator().manual_seed(update)
                grad = torch.randn(p.shape, generator=generator)
                p.grad = distribute_tensor(grad, mesh) if params is sharded else grad
            if not update:
                ema = {p: p.detach().clone() for p in params}
                optimizer = fused(params, backend, ema=ema, ema_decay=0.9)
            optimizer.step()
        squares = [optimizer.state[p]["square_avg"] for p in params]
        found = [*params, *squares, *ema.values()]
        if params is whole:
            expected = found
        else:
            assert all(isinstance(value, DTensor) for value in found)
            assert all(
                torch.equal(a.full_tensor(), b) for a, b in zip(found, expected, strict=True)
            )
    sharded[0].grad = distribute_tensor(torch.zeros(5, 3), mesh, [Shard(0)])
    with pytest.raises(InputError, match="must be sharded like its parameter"):
        optimizer.step()


def test_groups_have_options_of_their_own():
    results = []
    for grouped in (True, False):
        params = parameters(shapes=[(4,), (5,)])
        give_gradients(params, 0)
        if grouped:
            groups = [{"params": params[:1], "lr": 0.3}, {"params": params[1:], "alpha": 0.5}]
            fused(groups, "reference").step()
        else:
            fused(params[:1], "reference", lr=0.3).step()
            fused(params[1:], "reference", alpha=0.5).step()
        results.append(params)
    assert all(map(torch.equal, *results))


def test_a_closure_has_gradients():
    params = parameters(shapes=[(4,)])
    optimizer = fused(params, "reference")
    before = params[0].detach().clone()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    assert torch.equal(optimizer.step(closure), before.square().sum())
    assert not torch.equal(params[0], before)


def test_transposed_parameters_take_the_reference_unless_the_kernel_is_named():
    pytest.importorskip("triton")
    params = [nn.Parameter(torch.randn(3, 4, device=DEVICE).t())]
    give_gradients(params, 0)
    fused(params, None).step()
    with pytest.raises(InputError, match="takes contiguous parameters"):
        fused(params).step()
    # A transposed gradient of a contiguous parameter is copied
    ours, theirs = parameters(shapes=[(3, 4)]), parameters(shapes=[(3, 4)])
    ours[0].grad = theirs[0].grad = torch.randn(4, 3, device=DEVICE).t()
    fused(ours).step()
    fused(theirs, "reference").step()
    torch.testing.assert_close(ours, theirs)


def one_of_each_kind() -> list[nn.Parameter]:
    """One parameter for the kernel, two that it cannot take (transposed; fp64), and one for it."""
    generator = torch.Generator().manual_seed(0)
    transposed = torch.randn(6, 5, generator=generator).t()
    return [
        nn.Parameter(torch.randn(30, generator=generator).to(DEVICE)),
        nn.Parameter(transposed.to(DEVICE)),
        nn.Parameter(torch.randn(7, generator=generator, dtype=torch.float64).to(DEVICE)),
        nn.Parameter(torch.randn(4, 3, generator=generator).to(DEVICE, torch.bfloat16)),
    ]


@pytest.mark.skipif(DEVICE != "cpu", reason="its fake GPUs are two, and must not be here")
def test_a_parameter_that_the_kernel_cannot_take_does_not_affect_the_others(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    with FakeTensorMode(allow_non_fake_inputs=True):  # of a GPU that need not be here
        params = [
            nn.Parameter(torch.zeros(30, device="cuda:0")),
            nn.Parameter(torch.zeros(6, 5, device="cuda:0").t()),
            nn.Parameter(torch.zeros(7, device="cuda:0", dtype=torch.float64)),
            nn.Parameter(torch.zeros(12, device="cuda:0", dtype=torch.bfloat16)),
            nn.Parameter(torch.zeros(12, device="cuda:1")),
            nn.Parameter(torch.zeros(12)),
            nn.Parameter(torch.zeros(5, device="cuda:0")),
        ]
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer = fused(params, None, ema=averages(params[:-1]), ema_decay=0.5)
        parts = optimizer._parts(optimizer.param_groups[0])
    numbers = {id(p): number for number, p in enumerate(params)}
    found = {tuple(numbers[id(row.param)] for row in part.rows): part.backend for part in parts}
    assert found == {
        (0, 3): "triton",
        (1,): "reference",  # not contiguous
        (2,): "reference",  # fp64
        (4,): "triton",  # another device: a launch of its own
        (5,): "reference",  # the host's
        (6,): "triton",  # no average
    }


@pytest.mark.parametrize("with_ema", [True, False])
def test_a_mixed_group_steps_as_the_reference_does(monkeypatch, with_ema):
    """Kernel and reference side by side, chosen as on a GPU but run where this test is."""
    pytest.importorskip("triton")
    chosen = []

    def as_on_a_gpu(op, backend, tensors, limit):
        name = "reference" if backend == "reference" or limit else "triton"
        chosen.append(name)
        return name

    monkeypatch.setattr("apt.kernels.fused_rmsprop.resolve_backend", as_on_a_gpu)
    results = []
    for backend in (None, "reference"):
        params = one_of_each_kind()
        ema = averages(params) if with_ema else {}
        optimizer = fused(params, backend, ema=ema, ema_decay=0.9)
        for update in range(2):
            give_gradients(params, update)
            optimizer.step()
        assert [int(optimizer.state[p]["step"]) for p in params] == [2] * 4
        squares = [optimizer.state[p]["square_avg"] for p in params]
        results.append((params, squares, list(ema.values())))
    assert chosen == ["triton", "reference", "reference"] * 2 + ["reference"] * 6
    for column in zip(*results, strict=True):
        for p, ours, reference in zip(params, *column, strict=False):
            # An average follows the parameter as it is rounded, by the interpreter to zero
            tolerance = 3e-2 if p.dtype == torch.bfloat16 else 2e-5
            torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)


def test_a_named_kernel_that_cannot_run_changes_nothing():
    pytest.importorskip("triton")
    params = one_of_each_kind()
    before = [p.detach().clone() for p in params]
    optimizer = fused([{"params": params[:1]}, {"params": params[1:]}])
    give_gradients(params, 0)
    with pytest.raises(InputError, match="takes contiguous parameters"):
        optimizer.step()
    assert all(map(torch.equal, params, before))
    for p in params:
        assert not optimizer.state[p]["step"] and not optimizer.state[p]["square_avg"].any()


def test_autograd_sees_that_parameters_changed():
    pytest.importorskip("triton")
    params = parameters(shapes=[(4,)])
    loss = params[0].square().sum()
    give_gradients(params, 0)
    with kernel_backend("triton"):
        fused(params, None).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_op_keeps_the_rules_of_torch_library():
    rmsprop = pytest.importorskip("apt.kernels._triton.fused_rmsprop")
    params = [p.detach() for p in parameters(shapes=[(3,), (5, 2)])]
    grads = [torch.randn_like(p) for p in params]
    squares = [torch.rand_like(p) for p in params]
    ema = [p.clone() for p in params]
    for used in (ema, []):
        torch.library.opcheck(
            rmsprop.fused_rmsprop_op.overload,
            (params, grads, squares, used, 0.1, 0.9, 1e-8, 0.0, 0.9),
        )


def test_the_reference_by_hand():
    p, grad, square_avg = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([4.0])
    options = RMSpropOptions(lr=0.1, alpha=0.5, eps=1.0, weight_decay=0.0)
    rmsprop_reference(RMSpropStep([p], [grad], [square_avg], [], options, ema_decay=0.0))
    assert square_avg.item() == 4.0  # 0.5 * 4 + 0.5 * 2^2
    torch.testing.assert_close(p.item(), 1 - 0.1 * 2 / (2 + 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 0.9}, r"has no momentum=0\.9"),
        ({"centered": True}, "has no centered=True"),
        ({"ema_decay": 0.9}, "pass both ema and an ema_decay"),
        ({"ema": {}}, "pass both ema and an ema_decay"),
        ({"ema": {}, "ema_decay": 1.5}, r"ema_decay in \[0, 1\], got 1\.5"),
        ({"ema": {torch.zeros(3): torch.zeros(3)}, "ema_decay": 0.5}, "1 parameters that are not"),
        ({"backend": "fused"}, "no backend 'fused'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        FusedRMSprop(parameters(), **options)


def test_bad_averages_states_and_gradients_are_refused():
    params = parameters(torch.bfloat16, [(3,)])
    for average in (torch.zeros(3, dtype=torch.bfloat16), torch.zeros(4)):
        with pytest.raises(InputError, match="must be fp32 of that shape, got"):
            fused(params, ema={params[0]: average.to(DEVICE)}, ema_decay=0.5)
    with pytest.raises(InputError, match="takes real parameters"):
        fused([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    moving = torch.optim.RMSprop(parameters(shapes=[(3,)]), lr=0.1, momentum=0.9)
    optimizer = fused(parameters(shapes=[(3,)]), "reference")
    with pytest.raises(CheckpointError, match=r"has no momentum=0\.9"):
        optimizer.load_state_dict(moving.state_dict())
    embedding = nn.Embedding(3, 2, sparse=True, device=DEVICE)
    embedding(torch.tensor([1], device=DEVICE)).sum().backward()
    with pytest.raises(InputError, match="takes dense gradients"):
        fused(list(embedding.parameters()), "reference").step()
