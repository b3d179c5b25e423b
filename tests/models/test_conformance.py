"""What the generator, the discriminator and the trainer require of every backbone.

A new family is covered by its registration and a line in `tests.models.backbones.SHAPES`. Its own
tests check its values.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from apt.checkpoints.layouts import family_of, original_layout
from apt.checkpoints.load import load_model
from apt.checkpoints.source import WEIGHTS_STEM
from apt.condition import Condition, EncodedText
from apt.errors import InputError
from apt.kernels import attention_backend, kernel_backend
from apt.models import create_discriminator
from apt.models.discriminator import paper_layers
from apt.models.transformer import Tokens
from tests.memory import peak_bytes
from tests.models.backbones import CASES, CHANNELS, DEPTH, TEXT_DIM, Case

cases = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
# Where a case takes seconds: the last registered model of each family.
families = {
    (type(case.config), case.token_timesteps): name
    for name, case in CASES.items()
    if name.startswith(case.name)
}
one_of_each_family = pytest.mark.parametrize(
    "case", [CASES[name] for name in families.values()], ids=list(families.values())
)

public = {
    name: case
    for name, case in CASES.items()
    if family_of(case.config) is not None and not case.token_timesteps
}


def relative(value: Tensor | None, expected: Tensor | None) -> float:
    """The norm of the difference over that of what is expected."""
    assert value is not None and expected is not None
    difference = (value.detach().double() - expected.detach().double()).norm()
    return float(difference / expected.detach().double().norm())


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def assert_same_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-4 of each, or 1e-6 of the largest: some nearly vanish, and are noise in both."""
    assert ours.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        limit = 1e-4 * float(gradient.abs().max()) + 1e-6 * largest
        torch.testing.assert_close(
            ours[name], gradient, rtol=0, atol=limit, msg=lambda m, name=name: f"{name}: {m}"
        )


def dead_weights(module: nn.Module) -> set[str]:
    """Parameters that train and get no gradient."""
    return {
        name
        for name, p in module.named_parameters()
        if p.requires_grad and (p.grad is None or not p.grad.any())
    }


def shared_inputs(case: Case) -> tuple[Tensor, Tensor, Condition, Tensor]:
    """Five samples of three rows: shared, out of order, and one left out."""
    x, t, c = case.inputs(3, lengths=[5, 1, 4])
    x = torch.cat([x, x.flip(0)])[:5] + torch.arange(5.0).view(-1, 1, 1, 1, 1) / 10
    return x, t, c, torch.tensor([2, 0, 2, 2, 0])


# --- hidden states


@cases
def test_hidden_states_are_the_tokens_between_the_blocks(case: Case) -> None:
    model = case.build()
    x, t, c = case.inputs()
    seen: list[Tensor] = []
    for block in model.block_list():
        block.register_forward_hook(lambda module, args, out: seen.append(out.visual))
    model(x, t, c)
    assert len(seen) == model.depth == DEPTH
    length = torch.Size(model.token_grid(x.shape[2:])).numel()
    assert all(tokens.shape == (2, length, model.hidden_size) for tokens in seen)
    of_forward = list(seen)
    states = model.hidden_states(x, t, c, layers=[3, 1])
    assert torch.equal(states[0], of_forward[2]) and torch.equal(states[1], of_forward[0])
    seen.clear()
    model.hidden_states(x, t, c, layers=[2])
    assert len(seen) == 2, "blocks after the last one asked for are not run"


@cases
@pytest.mark.parametrize("layers", [[], [2], [1, 4], [5]], ids=str)
def test_only_the_layers_asked_for_are_kept(case: Case, layers: list[int]) -> None:
    """None are kept for the velocity. Before each block, only its input is alive beside them."""
    model = case.build(depth=5)
    inputs = case.inputs()
    outputs: list[weakref.ref[Tensor]] = []
    alive: list[set[int]] = []

    def before(module: nn.Module, args: Any) -> None:
        alive.append({i for i, output in enumerate(outputs, start=1) if output() is not None})

    def after(module: nn.Module, args: Any, out: Tokens) -> None:
        outputs.append(weakref.ref(out.visual))

    for block in model.block_list():
        block.register_forward_pre_hook(before)
        block.register_forward_hook(after)
    with torch.no_grad():
        if layers:
            model.hidden_states(*inputs, layers=layers)
        else:
            model(*inputs)
    assert alive[0] == set()
    for number, found in enumerate(alive[1:], start=2):
        assert found == {number - 1} | {layer for layer in layers if layer < number}


@one_of_each_family
def test_peak_memory_does_not_depend_on_the_depth(case: Case) -> None:
    inputs = case.inputs(2, (3, 4, 5))
    tokens = case.build(depth=1).hidden_states(*inputs, layers=[1])[0].nbytes

    def peaks(depth: int) -> list[int]:
        model = case.build(depth=depth)
        with torch.no_grad():
            return [
                peak_bytes(lambda: model(*inputs)),
                peak_bytes(lambda: model.hidden_states(*inputs, layers=[depth])),
            ]

    for deep, shallow in zip(peaks(7), peaks(3), strict=True):
        assert deep < shallow + tokens


@cases
@pytest.mark.parametrize("last", [1, 2, 3])
def test_weights_that_nothing_reads_after_a_layer_can_be_deleted(case: Case, last: int) -> None:
    whole, kept = case.build(), case.build()
    kept.keep_hidden_states(last)
    x, t, c = case.inputs()
    assert kept.depth == len(kept.block_list()) == last
    (expected,) = whole.hidden_states(x, t, c, layers=[last])
    (hidden,) = kept.hidden_states(x, t, c, layers=[last])
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-6)
    hidden.square().sum().backward()
    assert dead_weights(kept) == set()
    assert all(p.requires_grad for p in kept.parameters())
    with pytest.raises(InputError, match=rf"layers must lie in 1\.\.{last}"):
        kept.hidden_states(x, t, c, layers=[last + 1])


# --- gradients


@cases
def test_every_weight_trains_as_generator_and_as_discriminator(case: Case) -> None:
    generator = case.build()
    discriminator = create_discriminator(case.build(seed=1))
    assert discriminator.layers == paper_layers(DEPTH)
    discriminator.backbone.set_checkpointing(True)
    x, t, c = case.inputs(3, lengths=[5, 2, 3])
    velocity = generator(x, t, c)
    assert velocity.shape == x.shape and velocity.isfinite().all()
    fake = (x - velocity).detach().requires_grad_()
    logits = discriminator(torch.cat([x, fake]), t, c, rows=torch.arange(3).repeat(2)).logits
    assert logits.shape == (6,) and logits.dtype == torch.float32
    logits.square().sum().backward()
    assert fake.grad is not None and fake.grad.flatten(1).any(dim=1).all()
    velocity.backward(fake.grad)
    assert dead_weights(generator) == dead_weights(discriminator) == set()


@one_of_each_family
def test_gradients_are_those_of_finite_differences(case: Case) -> None:
    # Samples are made velocities in fp32, whatever the model is in.
    exact = {"prediction": "velocity"} if hasattr(case.config, "prediction") else {}
    model = case.build(depth=1, **exact).double()
    x, t, c = case.inputs(1, (1, 1, 1))
    assert c.text.pooled is not None
    leaves = [value.double().requires_grad_() for value in (x, c.text.tokens, c.text.pooled)]

    def velocity(latents: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        return model(latents, t, Condition(EncodedText(tokens, None, pooled)))

    assert torch.autograd.gradcheck(velocity, leaves, fast_mode=True)


@cases
def test_exact_r1_runs_on_reference_ops(case: Case) -> None:
    """Second derivatives, as APT Eq. 8 needs."""
    discriminator = create_discriminator(case.build())
    x, t, c = case.inputs()
    x.requires_grad_()
    with kernel_backend("reference"), attention_backend("_native_math"):
        (gradient,) = torch.autograd.grad(discriminator(x, t, c).logits.sum(), x, create_graph=True)
        gradient.square().sum().backward()
    first = next(discriminator.backbone.block_list()[0].parameters())
    assert first.grad is not None and first.grad.any()


@cases
@pytest.mark.parametrize("shared", [False, True])
def test_checkpointing_gives_the_same_gradients_and_keeps_less(case: Case, shared: bool) -> None:
    x, t, c, rows = shared_inputs(case)
    results, stored = [], []
    for enabled in (False, True):
        model = case.build()
        model.set_checkpointing(enabled)
        latents = (x if shared else x[:3]).clone().requires_grad_()
        kept: list[int] = []

        def pack(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            velocity = model(latents, t, c, rows=rows if shared else None)
        velocity.square().sum().backward()
        results.append([velocity, latents.grad, *gradients(model).values()])
        stored.append(sum(kept))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert stored[1] < stored[0] / 2


# --- rows, samples, sizes


@cases
def test_shared_rows_equal_repeated_rows(case: Case) -> None:
    """Values and all gradients."""
    x, t, c, rows = shared_inputs(case)
    results = []
    for shared in (True, False):
        model = case.build()
        latents, tokens = x.clone().requires_grad_(), c.text.tokens.clone().requires_grad_()
        text = c.with_text(dataclasses.replace(c.text, tokens=tokens))
        if shared:
            velocity = model(latents, t, text, rows=rows)
        else:
            velocity = model(latents, t[rows], text.select(rows))
        velocity.square().sum().backward()
        results.append((velocity, latents.grad, tokens.grad, gradients(model)))
    ours, theirs = results
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert relative(a, b) < 1e-5
    assert ours[2] is not None and not ours[2][1].any(), "a row that no sample uses"
    assert_same_gradients(ours[3], theirs[3])


@cases
def test_samples_do_not_see_each_other(case: Case) -> None:
    model = case.build()
    x, t, c = case.inputs(3, lengths=[5, 2, 3])
    together = model(x, t, c)
    for i in range(3):
        alone = model(x[i : i + 1], t[i : i + 1], c.select(slice(i, i + 1)))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)


@cases
def test_every_input_matters(case: Case) -> None:
    model = case.build()
    x, t, c = case.inputs(1)
    velocity = model(x, t, c)
    other_words = c.with_text(dataclasses.replace(c.text, tokens=c.text.tokens + 0.5))
    assert not torch.allclose(model(x, t, other_words), velocity, atol=1e-3)
    assert not torch.allclose(model(x, t + 0.1, c), velocity, atol=1e-3)
    # Every latent reaches every place.
    moved = x.clone()
    moved[0, 0, 0, 0, 0] += 1.0
    assert ((model(moved, t, c) - velocity).abs() > 1e-6).float().mean() > 0.95


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(list(CASES)),
    grid=st.tuples(*[st.integers(1, 5)] * 3),
    samples=st.integers(1, 3),
)
def test_any_size(name: str, grid: tuple[int, int, int], samples: int) -> None:
    case = CASES[name]
    model = case.build(depth=1)
    x, t, c = case.inputs(samples, grid)
    frames, *sides = model.token_grid(x.shape[2:])
    assert frames in (1, grid[0]) and sides == list(grid[1:])
    velocity = model(x, t, c)
    assert velocity.shape == x.shape and velocity.isfinite().all()
    (hidden,) = model.hidden_states(x, t, c, layers=[1])
    assert hidden.shape == (samples, frames * grid[1] * grid[2], model.hidden_size)


# --- ways to run


@one_of_each_family
def test_compiles_without_graph_breaks(case: Case) -> None:
    model = case.build(depth=2)
    x, t, c, rows = shared_inputs(case)
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(
        compiled(x, t, c, rows=rows), model(x, t, c, rows=rows), rtol=1e-4, atol=1e-5
    )


@one_of_each_family
def test_on_the_fused_kernels(case: Case) -> None:
    """Their interpreter where there is no GPU."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, t, c = case.inputs(3, (1, 2, 3), lengths=[5, 2, 3])
    rows = torch.tensor([2, 0, 2], device=device)
    results = []
    for backend in ("triton", "reference"):
        model = case.build(depth=2).to(device)
        latents = x.to(device, copy=True).requires_grad_()
        with kernel_backend(backend):
            velocity = model(latents, t.to(device), c.to(device), rows=rows)
            velocity.square().sum().backward()
        results.append((velocity, latents.grad, gradients(model)))
    ours, expected = results
    for a, b in zip(ours[:2], expected[:2], strict=True):
        assert relative(a, b) < 1e-5
    assert_same_gradients(ours[2], expected[2])


@cases
def test_under_autocast(case: Case) -> None:
    model = case.build()
    x, t, c = case.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(x, t, c)
    assert 0 < relative(velocity, model(x, t, c)) < 0.1


@cases
def test_trains_after_inference_mode(case: Case) -> None:
    """Cached tables of an inference must not spoil a later training step."""
    model = case.build()
    inputs = case.inputs(1, (3, 5, 4))
    with torch.inference_mode():
        model(*inputs)
    model(*inputs).sum().backward()


# --- what it is made from


@cases
def test_the_config_rebuilds_the_model(case: Case) -> None:
    model = case.build()
    again = type(case.config)(**dataclasses.asdict(model.config)).build()
    again.load_state_dict(model.state_dict())
    inputs = case.inputs()
    assert torch.equal(again(*inputs), model(*inputs))
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.config.depth = 2  # type: ignore[misc]


@cases
def test_a_copy_is_independent(case: Case) -> None:
    model = case.build()
    other = copy.deepcopy(model)
    inputs = case.inputs()
    with torch.no_grad():
        expected = model(*inputs)
        for parameter in other.parameters():
            parameter.mul_(0.5)
        assert torch.equal(model(*inputs), expected)
        assert not torch.equal(other(*inputs), expected)


@pytest.mark.parametrize("case", public.values(), ids=list(public))
def test_public_layouts_there_and_back(case: Case, tmp_path: Path) -> None:
    """Through diffusers' folder, and through a file as the authors publish it."""
    model = case.build()
    family, state = family_of(case.config), model.state_dict()
    assert family is not None
    written = family.to_diffusers(case.config)
    assert family.to_diffusers(family.from_diffusers(written)) == written
    folder = tmp_path / "transformer"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(written))
    save_file(state, folder / f"{WEIGHTS_STEM}.safetensors")
    assert_same(load_model(folder).state_dict(), state)

    original = {}
    for theirs, made_of in original_layout(state, family.rules_for(case.config)).items():
        parts = [state[name] for name in made_of.ours]
        if made_of.swap_halves:
            parts = [torch.cat(part.chunk(2)[::-1]) for part in parts]
        original[theirs] = torch.cat(parts)
    assert original.keys() != state.keys()
    save_file(original, tmp_path / "original.safetensors")
    options = dataclasses.asdict(case.config)
    again = load_model(tmp_path / "original.safetensors", architecture=case.name, options=options)
    assert again.config == case.config
    assert_same(again.state_dict(), state)


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


# --- what it refuses


@cases
def test_latents_that_do_not_fit(case: Case) -> None:
    model = case.build()
    x, t, c = case.inputs()
    for wrong in (x[:, :3], x[:, :, 0]):
        with pytest.raises(InputError, match=rf"latents must be \(B, {CHANNELS}, T, H, W\), got"):
            model(wrong, t, c)
    grid = model.token_grid(x.shape[2:])
    for axis, (name, tokens) in enumerate(zip(("frames", "height", "width"), grid, strict=True), 2):
        size = x.shape[axis] - 1
        if size >= tokens:
            with pytest.raises(InputError, match=f"latent {name} {size} is not a multiple"):
                model(x.narrow(axis, 0, size), t, c)


@cases
def test_conditions_that_do_not_fit(case: Case) -> None:
    model = case.build()
    x, t, c = case.inputs()
    with pytest.raises(InputError, match="2 samples need 2 conditions"):
        model(x, t[:1], c)
    length = torch.Size(model.token_grid(x.shape[2:])).numel()
    with pytest.raises(InputError, match=r"timesteps of shape \(2,\).*; got timesteps \(2, \d+\)"):
        model(x, torch.zeros(2, length + model.token_timesteps), c)
    with pytest.raises(InputError, match="1 conditions; pass `rows` to share them"):
        model(x, t, c.select(slice(0, 1)))
    with pytest.raises(InputError, match=r"need 1 conditions.* and 2 conditions"):
        model(x, t[:1], c, rows=torch.tensor([0, 0]))
    for rows in (torch.tensor([0, 1, 1]), torch.tensor([0, 1], dtype=torch.int32)):
        with pytest.raises(InputError, match=r"rows must be \(2,\) int64"):
            model(x, t, c, rows=rows)
    with pytest.raises(InputError, match=f"text embeddings of {TEXT_DIM} dimensions, got 3"):
        model(x, t, c.with_text(dataclasses.replace(c.text, tokens=c.text.tokens[..., :3])))
    if getattr(case.config, "pooled_dim", 0):
        assert c.text.pooled is not None
        for pooled, got in ((None, "none"), (c.text.pooled[:, :4], r"\(2, 4\)")):
            with pytest.raises(InputError, match=f"pooled vector of 6 dimensions, got {got}"):
                model(x, t, c.with_text(dataclasses.replace(c.text, pooled=pooled)))


@cases
@pytest.mark.parametrize("layers", [[], [0], [DEPTH + 1], [1, DEPTH + 2]], ids=str)
def test_layers_are_counted_from_1(case: Case, layers: list[int]) -> None:
    with pytest.raises(InputError, match=rf"layers must lie in 1\.\.{DEPTH}"):
        case.build().hidden_states(*case.inputs(), layers=layers)
