"""The fused norms and rotations of q and k against fp64: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apt.condition import Condition, EncodedText
from apt.errors import InputError
from apt.kernels import (
    StreamQKV,
    joint_qk_norm_rope,
    kernel_backend,
    norm_rope,
    qk_norm_rope,
)
from apt.kernels.backends import interpreted
from apt.models.mmdit import MMDiTConfig

pytest.importorskip("triton")
from apt.kernels._triton import joint_qk_norm_rope as joint_fused
from apt.kernels._triton import norm_rope as fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Case(NamedTuple):
    """What a test draws its inputs from: a visual stream that turns, and a text stream.

    joint: both streams in one sequence; else q and k of the visual stream alone.
    """

    batch: int = 2
    length: int = 5
    text: int = 3
    heads: int = 3
    channels: int = 8
    joint: bool = True
    text_queries: bool = True
    rotate: bool = True
    affine: bool = True
    across_heads: bool = False
    layout: str = "interleaved"
    dtype: torch.dtype = torch.float32
    seed: int = 0

    def draw(self) -> dict[str, Tensor]:
        """Inputs by name: leaves that require gradients, and fp32 tables."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = (self.heads, self.channels)
        if self.joint:
            parts = 3 if self.text_queries else 2
            shapes: dict[str, tuple[int, ...]] = {
                "visual": (self.batch, self.length, 3, *heads),
                "text": (self.batch, self.text, parts, *heads),
            }
            weights = ["q_weight", "k_weight", "text_k_weight"]
            weights += ["text_q_weight"] if self.text_queries else []
        else:
            shapes = dict.fromkeys(("q", "k"), (self.batch, self.length, *heads))
            weights = ["q_weight", "k_weight"]
        width = self.heads * self.channels if self.across_heads else self.channels
        shapes |= dict.fromkeys(weights, (width,)) if self.affine else {}
        inputs = {
            name: torch.randn(size, generator=generator).to(DEVICE, self.dtype).requires_grad_()
            for name, size in shapes.items()
        }
        if self.rotate:
            angles = torch.randn(self.length, self.channels // 2, generator=generator)
            inputs |= {"cos": angles.cos().to(DEVICE), "sin": angles.sin().to(DEVICE)}
        return inputs

    def run(self, inputs: dict[str, Tensor], backend: str | None) -> tuple[Tensor, ...]:
        """q and k, and v of the joint sequence."""
        options: Any = {"across_heads": self.across_heads, "layout": self.layout}
        table = (inputs.get("cos"), inputs.get("sin"))
        weights = (inputs.get("q_weight"), inputs.get("k_weight"))
        if not self.joint:
            q, k = inputs["q"], inputs["k"]
            return qk_norm_rope(q, k, *weights, *table, backend=backend, **options)
        streams = [
            StreamQKV(inputs["visual"], *weights, *table),
            StreamQKV(inputs["text"], inputs.get("text_q_weight"), inputs.get("text_k_weight")),
        ]
        return joint_qk_norm_rope(streams, backend=backend, **options)

    def outputs_and_gradients(
        self, inputs: dict[str, Tensor], backend: str | None = "triton"
    ) -> dict[str, Tensor]:
        outputs = self.run(inputs, backend)
        generator = torch.Generator().manual_seed(self.seed + 1)
        directions = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
        leaves = {name: value for name, value in inputs.items() if value.requires_grad}
        gradients = torch.autograd.grad(outputs, list(leaves.values()), directions)
        found = dict(zip(("q", "k", "v"), outputs, strict=False))
        return found | {f"d {name}": g for name, g in zip(leaves, gradients, strict=True)}


def check(case: Case, *, floor: float = 0.05) -> None:
    """Every output and gradient within twice the reference's error against fp64.

    `floor`, in units of the type's epsilon, is for references that are exact by luck.
    """
    inputs = case.draw()
    exact = case.outputs_and_gradients(
        {
            name: value.detach().double().requires_grad_(value.requires_grad)
            for name, value in inputs.items()
        },
        "reference",
    )
    reference = case.outputs_and_gradients(inputs, "reference")
    ours = case.outputs_and_gradients(inputs)
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


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("across_heads", [False, True], ids=["per head", "across heads"])
@pytest.mark.parametrize("joint", [False, True], ids=["pair", "joint"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy(dtype, joint, across_heads, layout):
    check(Case(2, 9, joint=joint, across_heads=across_heads, layout=layout, dtype=dtype))


@pytest.mark.parametrize(("heads", "channels"), [(6, 24), (4, 64), (2, 96), (2, 128), (2, 256)])
def test_accuracy_at_the_heads_of_models(heads, channels):
    check(Case(1, 3, 2, heads, channels, dtype=torch.float16))


@pytest.mark.parametrize(("heads", "channels"), [(12, 128), (40, 128)])
def test_accuracy_across_the_heads_of_models(heads, channels):
    check(Case(1, 2, 1, heads, channels, across_heads=True, dtype=torch.float16))


@settings(max_examples=12, deadline=None)
@given(
    st.builds(
        Case,
        batch=st.integers(1, 3),
        length=st.integers(0, 19),
        text=st.integers(0, 9),
        heads=st.integers(1, 5),
        channels=st.integers(1, 20).map(lambda pairs: 2 * pairs),
        joint=st.booleans(),
        text_queries=st.booleans(),
        rotate=st.booleans(),
        affine=st.booleans(),
        across_heads=st.booleans(),
        layout=st.sampled_from(["interleaved", "half"]),
        dtype=st.sampled_from(DTYPES),
        seed=st.integers(0, 9),
    )
)
def test_accuracy_at_ragged_shapes(case):
    check(case, floor=2)


@pytest.mark.parametrize(("batch", "length", "text"), [(0, 5, 3), (2, 0, 3), (2, 5, 0), (2, 0, 0)])
def test_zero_rows(batch, length, text):
    case = Case(batch, length, text)
    found = case.outputs_and_gradients(case.draw())
    expected = case.outputs_and_gradients(case.draw(), "reference")
    for name, want in expected.items():
        torch.testing.assert_close(found[name], want, msg=name)


@pytest.mark.parametrize("across_heads", [False, True])
def test_non_contiguous_inputs(across_heads):
    case = Case(2, 6, joint=False, across_heads=across_heads)
    inputs = case.draw()
    expected = case.outputs_and_gradients(inputs)
    fused_projection = torch.stack([inputs["q"], inputs["k"]], 3).detach()  # (B, L, H, 2, Dh)
    views = {
        "q in heads": {"q": fused_projection[:, :, :, 0], "k": fused_projection[:, :, :, 1]},
        # Strides of their own: two launches
        "q turned": {"q": inputs["q"].detach().transpose(1, 2).contiguous().transpose(1, 2)},
        "channels apart": {"k": inputs["k"].detach().repeat_interleave(2, -1)[..., ::2]},
        "weight apart": {"q_weight": inputs["q_weight"].detach().repeat_interleave(2)[::2]},
        "table apart": {"cos": inputs["cos"].t().contiguous().t()},
    }
    for name, changed in views.items():
        assert not any(view.is_contiguous() for view in changed.values())
        leaves = {n: v.requires_grad_(inputs[n].requires_grad) for n, v in changed.items()}
        found = case.outputs_and_gradients(inputs | leaves)
        for key, want in expected.items():
            assert torch.equal(found[key], want), (name, key)


def test_the_gradient_of_attention_may_come_with_any_strides():
    case = Case(2, 6)
    inputs = case.draw()
    q, k, v = case.run(inputs, "triton")
    leaves = [inputs["visual"], inputs["text"], inputs["k_weight"]]
    dense = [torch.randn_like(out) for out in (q, k, v)]
    turned = [grad.transpose(1, 2).contiguous().transpose(1, 2) for grad in dense]
    one = torch.ones((), device=DEVICE)
    expected = torch.autograd.grad((q, k, v), leaves, dense, retain_graph=True)
    found = torch.autograd.grad((q, k, v), leaves, turned, retain_graph=True)
    assert all(map(torch.equal, found, expected))
    expanded = [one.expand_as(out) for out in (q, k, v)]
    found = torch.autograd.grad((q, k, v), leaves, expanded, retain_graph=True)
    expected = torch.autograd.grad((q, k, v), leaves, [grad.contiguous() for grad in expanded])
    assert all(map(torch.equal, found, expected))


def test_a_stream_of_a_wider_projection_is_read_in_place():
    # As in a block that shares its weights with text whose output nothing reads
    case = Case(2, 6)
    inputs = case.draw()
    text = inputs["text"]
    _, k, v = case.run(inputs, "triton")
    part = case._replace(text_queries=False)
    found = part.run(
        {n: t for n, t in inputs.items() if n != "text_q_weight"} | {"text": text[:, :, 1:]},
        "triton",
    )
    assert torch.equal(found[1], k) and torch.equal(found[2], v)
    (gradient,) = torch.autograd.grad((found[1] + found[2]).square().sum(), text)
    (expected,) = torch.autograd.grad((k + v).square().sum(), text)
    assert torch.equal(gradient, expected)
    assert not gradient[:, :, 0].any() and gradient[:, :, 1:].all()


def test_queries_and_keys_of_different_lengths():
    q, k = torch.randn(2, 5, 3, 8, device=DEVICE), torch.randn(2, 9, 3, 8, device=DEVICE)
    weights = torch.randn(2, 24, device=DEVICE)
    leaves = [leaf.requires_grad_() for leaf in (q, k, *weights)]
    outputs, gradients = [], []
    for backend in ("triton", "reference"):
        out = qk_norm_rope(*leaves, across_heads=True, backend=backend)
        outputs.append(out)
        gradients.append(torch.autograd.grad(sum(o.square().sum() for o in out), leaves))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_queries_alone():
    case = Case(2, 6, joint=False)
    inputs = case.draw()
    x, weight, table = inputs["q"], inputs["q_weight"], (inputs["cos"], inputs["sin"])
    q, _ = case.run(inputs, "triton")
    alone = norm_rope(x, weight, *table, backend="triton")
    assert torch.equal(alone, q)
    found = torch.autograd.grad(alone.square().sum(), [x, weight])
    assert all(map(torch.equal, found, torch.autograd.grad(q.square().sum(), [x, weight])))


def test_types_may_differ_as_under_autocast():
    case = Case(2, 9, dtype=torch.bfloat16)
    inputs = case.draw()
    weights = [name for name in inputs if "weight" in name]
    inputs |= {name: inputs[name].detach().float().requires_grad_() for name in weights}
    found = case.outputs_and_gradients(inputs)
    expected = case.outputs_and_gradients(inputs, "reference")
    assert {n: v.dtype for n, v in found.items()} == {n: v.dtype for n, v in expected.items()}
    for name, want in expected.items():
        tolerance = 2 * torch.finfo(torch.bfloat16).eps
        assert ((found[name] - want).norm() / want.norm()).item() < tolerance, name


@pytest.mark.parametrize("wanted", [["visual"], ["text", "q_weight"], ["text_k_weight"]])
def test_only_the_gradients_that_are_wanted(wanted):
    case = Case(2, 6)
    inputs = case.draw()
    for name, value in inputs.items():
        value.requires_grad_(name in wanted)
    leaves = [inputs[name] for name in wanted]
    found, expected = (
        torch.autograd.grad(sum(out.square().sum() for out in case.run(inputs, backend)), leaves)  # type: ignore[arg-type]
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("unused", [0, 1, 2])
def test_one_of_the_outputs_may_be_unused(unused):
    case = Case(2, 6)
    inputs = case.draw()
    leaves = [value for value in inputs.values() if value.requires_grad]
    found, expected = (
        torch.autograd.grad(
            sum(o.square().sum() for i, o in enumerate(case.run(inputs, backend)) if i != unused),  # type: ignore[arg-type]
            leaves,
            allow_unused=True,
            materialize_grads=True,
        )
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("joint", [False, True])
def test_gradients_repeat_bit_for_bit(joint):
    case = Case(3, 70, 40, joint=joint, dtype=torch.float16)
    first, second = (case.outputs_and_gradients(case.draw()) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("joint", [False, True])
def test_double_backward_raises_and_names_the_reference(joint):
    case = Case(joint=joint)
    inputs = case.draw()
    leaf = inputs["visual" if joint else "q"]
    (gradient,) = torch.autograd.grad(
        case.run(inputs, "triton")[0].square().sum(), leaf, create_graph=True
    )
    with pytest.raises(InputError, match="backend='reference'"):
        gradient.square().sum().backward()
    with kernel_backend("reference"):
        y = case.run(inputs, None)[0]
        (gradient,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        gradient.square().sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_the_ops_keep_the_rules_of_torch_library():
    case = Case(2, 4, text_queries=False)
    inputs = case.draw()
    qkvs = [inputs["visual"], inputs["text"]]
    absent = torch.empty(0, device=DEVICE)
    q_weights = [inputs["q_weight"], absent]
    k_weights = [inputs["k_weight"], inputs["text_k_weight"]]
    tables = [[inputs["cos"], absent], [inputs["sin"], absent]]
    options = (1e-6, False, False)
    given_ = (qkvs, q_weights, k_weights, *tables)
    torch.library.opcheck(joint_fused.joint_qk_norm_rope_op.overload, (*given_, *options))
    detached = [[value.detach() for value in values] for values in given_]
    grads = [torch.randn(2, n, 3, 8, device=DEVICE) for n in (4, 7, 7)]
    torch.library.opcheck(
        joint_fused.joint_qk_norm_rope_backward_op.overload, (*grads, *detached, *options, True)
    )
    pair = [qkvs[0][:, :, 0], qkvs[0][:, :, 1]]
    weights = [q_weights[0], k_weights[0]]
    table = (inputs["cos"], inputs["sin"])
    torch.library.opcheck(fused.norm_rope_op.overload, (*pair, *weights, *table, *options))
    grads = [torch.randn(2, 4, 3, 8, device=DEVICE) for _ in range(2)]
    values = [value.detach() for value in (*pair, *weights, *table)]
    torch.library.opcheck(fused.norm_rope_backward_op.overload, (grads, *values, *options, True))
    # One tensor without weight or rotation
    alone = (pair[0], *[None] * 5)
    torch.library.opcheck(fused.norm_rope_op.overload, (*alone, *options))
    alone = (pair[0].detach(), *[None] * 5)
    torch.library.opcheck(fused.norm_rope_backward_op.overload, (grads[:1], *alone, *options, True))


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("joint", [False, True])
def test_compiles_to_one_graph_with_its_backward(joint, backend):
    case = Case(2, 6, joint=joint)
    inputs = case.draw()
    leaves = [value for value in inputs.values() if value.requires_grad]

    def run(inputs):  # type: ignore[no-untyped-def]
        return case.run(inputs, backend)

    expected = run(inputs)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(inputs)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(sum(out.square().sum() for out in found), leaves)
    wanted = torch.autograd.grad(sum(out.square().sum() for out in expected), leaves)
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-4)


def test_checkpointing_computes_it_again():
    case = Case(2, 6)
    inputs = case.draw()
    leaves = [value for value in inputs.values() if value.requires_grad]

    def run(*_: Tensor) -> Tensor:
        return sum(out.square().sum() for out in case.run(inputs, "triton"))  # type: ignore[return-value]

    plain = torch.autograd.grad(run(), leaves)
    again = torch.utils.checkpoint.checkpoint(run, *leaves, use_reentrant=False)
    assert all(map(torch.equal, torch.autograd.grad(again, leaves), plain))


def test_inputs_that_the_kernel_cannot_take():
    double = torch.zeros(1, 2, 2, 8, dtype=torch.float64, device=DEVICE)
    with pytest.raises(InputError, match="takes fp32, fp16 and bf16"):
        qk_norm_rope(double, double, None, None, backend="triton")
    wide = torch.zeros(1, 1, 2, 4098, device=DEVICE)
    with pytest.raises(InputError, match="norms over 2 to 8192 channels, got 8196"):
        norm_rope(wide, None, across_heads=True, backend="triton")
    stream = StreamQKV(wide[:, :, None].expand(-1, -1, 3, -1, -1))
    with pytest.raises(InputError, match="joint_qk_norm_rope backend 'triton' cannot run"):
        joint_qk_norm_rope([stream], across_heads=True, backend="triton")


@pytest.mark.parametrize("num_dual_blocks", [None, 1])
def test_a_backbone_computes_the_same_with_kernels(num_dual_blocks):
    torch.manual_seed(0)
    model = MMDiTConfig(
        in_channels=4,
        hidden_size=16,
        depth=2,
        num_heads=2,
        text_dim=8,
        num_dual_blocks=num_dual_blocks,
    ).build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.to(DEVICE).set_checkpointing(True)
    latents = torch.randn(3, 4, 2, 4, 4, device=DEVICE)
    t = torch.rand(2, device=DEVICE)
    c = Condition(EncodedText(torch.randn(2, 5, 8, device=DEVICE)))
    rows = torch.tensor([0, 1, 1], device=DEVICE)
    found = []
    for backend in ("triton", "reference"):
        with kernel_backend(backend):
            velocity = model(latents, t, c, rows=rows)
            loss = velocity.square().mean()
            gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append((velocity, *gradients))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    heads, channels = 24, 128
    length = 2**31 // (3 * heads * channels) + 3
    qkv = torch.randn(1, length, 3, heads, channels, device="cuda", dtype=torch.float16)
    qkv.requires_grad_()
    weights = torch.randn(2, channels, device="cuda", dtype=torch.float16)
    last = qkv[:, -3:].detach().requires_grad_()
    out, expected = (
        joint_qk_norm_rope([StreamQKV(x, *weights)], backend="triton") for x in (qkv, last)
    )
    for found, want in zip(out, expected, strict=True):
        assert torch.equal(found[:, -3:], want)
    (gradient,) = torch.autograd.grad(out, qkv, [o.detach() for o in out])
    (wanted,) = torch.autograd.grad(expected, last, [o.detach() for o in expected])
    assert torch.equal(gradient[:, -3:], wanted)
