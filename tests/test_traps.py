"""Nine traps in implementing the paper: each test fails for code that falls into one.

The parts under test are the real ones: the adversarial stage that `diffusion-apt train` runs, on a
tiny model whose every layer is random, so that x, t and c all reach the logits.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apt.checkpoints.save import save_bundle
from apt.condition import Condition
from apt.distributed.parallel import Parallel
from apt.errors import InputError
from apt.flow import shift_timesteps
from apt.kernels import (
    StreamQKV,
    attention_backend,
    current_kernel_backend,
    joint_qk_norm_rope,
    kernel_status,
    modulated_norm,
    norm_rope,
    qk_norm_rope,
    query_pooling,
    residual_modulated_norm,
    sample_shifted_timesteps,
)
from apt.losses import R1, ApproximateR1, ApproximateR2, create_loss
from apt.methods.apt import AdversarialConfig, AdversarialPostTraining
from apt.methods.base import MicroBatch
from apt.methods.terms import Terms
from apt.models.discriminator import paper_layers
from apt.rng import Draw
from apt.train.config import OptimizerConfig, TrainConfig
from apt.train.host import RunHost
from apt.train.initial import initial_bundle
from tests.tiny import tiny_bundle

NUM = 6
SIGMA = 0.1
CAPTIONS = [
    f"a {color} {digit} moving {way}"
    for color, digit, way in (
        ("red", "one", "left"),
        ("green", "seven", "up"),
        ("white", "zero", "right"),
        ("blue", "five", "down"),
        ("yellow", "eight", "left"),
        ("red", "two", "up"),
    )
]


class Seen(NamedTuple):
    """One forward pass of D, expanded to a row per sample."""

    x: Tensor
    t: Tensor
    tokens: Tensor
    logits: Tensor


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bundle(tmp_path_factory.mktemp("tiny"), tiny_bundle("diffusion"))


@pytest.fixture
def make_stage(model_folder: Path):  # type: ignore[no-untyped-def]
    def make(*, precision: str = "fp32", learning_rate: float = 1e-4, **options: object):  # type: ignore[no-untyped-def]
        folder = str(model_folder)
        config = TrainConfig(
            name="traps",
            run_dir="unused",
            stage=AdversarialConfig(generator=folder, discriminator=folder, **options),  # type: ignore[arg-type]
            optimizer=OptimizerConfig(learning_rate=learning_rate),
            batch_size=NUM,
            precision=precision,  # type: ignore[arg-type]
            device="cpu",
        )
        parallel = Parallel(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)
        stage = config.stage.build(initial_bundle(config), RunHost(config, parallel))
        randomize_heads(stage)
        return stage

    return make


def randomize_heads(stage: AdversarialPostTraining) -> None:
    """Make logits of order 1 that differ between samples; those of new heads hardly do."""
    generator = torch.Generator().manual_seed(1)
    for parameter in discriminator(stage).project.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def discriminator(stage: AdversarialPostTraining):  # type: ignore[no-untyped-def]
    return stage.trained["discriminator"].module


EXACT = {"r1": ApproximateR1(weight=0.0), "terms": Terms(exact_r1=R1(weight=1.0))}


def one_penalty(name: str, *, weight: float, sigma: float) -> dict[str, object]:
    """Options with the approximated R1, or R2, alone."""
    if name == "r1":
        return {"r1": ApproximateR1(weight=weight, sigma=sigma)}
    r2 = ApproximateR2(weight=weight, sigma=sigma)
    return {"r1": ApproximateR1(weight=0.0), "terms": Terms(r2=r2)}


def real_batch(num: int = NUM) -> MicroBatch:
    x = torch.randn(num, 768, 1, 2, 2, generator=torch.Generator().manual_seed(7))
    return MicroBatch(x=x, captions=(CAPTIONS * num)[:num], offset=0)


@contextmanager
def recorded(stage: AdversarialPostTraining) -> Iterator[tuple[list[Seen], list[Tensor]]]:
    """D's forwards, and G's samples z - v, while the block runs."""
    seen: list[Seen] = []
    samples: list[Tensor] = []

    def on_discriminator(module, args, kwargs, output) -> None:  # type: ignore[no-untyped-def]
        x, t, c = args
        rows = kwargs.get("rows")
        rows = torch.arange(len(t)) if rows is None else rows
        logits = output.logits.detach().clone()
        seen.append(Seen(x.detach().clone(), t[rows], c.text.tokens[rows].detach(), logits))

    def on_generator(module, args, kwargs, output) -> None:  # type: ignore[no-untyped-def]
        z, t = args[0], args[1]
        assert (t == 1).all()
        samples.append((z - output).detach())

    hooks = [
        discriminator(stage).register_forward_hook(on_discriminator, with_kwargs=True),
        stage.generator.module.register_forward_hook(on_generator, with_kwargs=True),
    ]
    try:
        yield seen, samples
    finally:
        for hook in hooks:
            hook.remove()


def gradients(module: nn.Module) -> Tensor:
    """All gradients of a module in one vector; every parameter must have one."""
    missing = [name for name, p in module.named_parameters() if p.grad is None]
    assert not missing, f"no gradient: {missing}"
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def test_trap_1_the_objective_is_minimised_and_its_signs_are_back(make_stage) -> None:  # type: ignore[no-untyped-def]
    objective = create_loss("non_saturating")
    generator = torch.Generator().manual_seed(0)
    real, fake = torch.randn(5, generator=generator), torch.randn(5, generator=generator)
    ones, zeros = torch.ones(5), torch.zeros(5)
    bce = F.binary_cross_entropy_with_logits
    expected = bce(real, ones) + bce(fake, zeros)
    torch.testing.assert_close(objective.discriminator(real, fake), expected)
    torch.testing.assert_close(objective.generator(fake), bce(fake, ones))

    # Eq. 10: the penalty is added to it, and both are what the stage minimises.
    stage = make_stage()
    batch = real_batch()
    c = stage.encode(batch.captions)
    with recorded(stage) as (seen, _):
        x_fake = stage.draw_fake(batch, c, 0, "test")
        loss, _log = stage.loss_of_discriminator(batch, x_fake, torch.rand(NUM), c, 0)
    real, perturbed, fake = seen[0].logits.chunk(3)
    penalty = 100.0 * (real - perturbed).square().mean()
    assert penalty > 0.01
    torch.testing.assert_close(loss, F.softplus(-real).mean() + F.softplus(fake).mean() + penalty)

    # Descending: D comes to tell the two apart, then G comes to deceive a D that stands still.
    stage = make_stage(learning_rate=1e-3, r1=ApproximateR1(weight=0.0))
    gaps = [stage.discriminator_step([batch], 0)["discriminator/logit_gap"] for _ in range(12)]
    assert gaps[-1] > gaps[0] + 0.5
    with recorded(stage) as (seen, _):
        for _ in range(12):
            stage.generator_step([batch], 0)
    assert seen[-1].logits.mean() > seen[0].logits.mean() + 0.1


def test_trap_2_timesteps_are_shifted_once_and_in_the_unit_interval(make_stage) -> None:  # type: ignore[no-untyped-def]
    for wrong in (torch.tensor([500.0]), torch.tensor([0, 500])):
        with pytest.raises(InputError, match=r"\[0, 1\]"):
            shift_timesteps(wrong, 12.0)
    u = torch.tensor([0.0, 0.25, 0.5, 1.0])
    torch.testing.assert_close(shift_timesteps(u, 12.0), torch.tensor([0.0, 0.8, 12 / 13, 1.0]))

    def check(t: Tensor, shift: float) -> None:
        """Kolmogorov and Smirnov: undoing the shift once must leave uniform values."""
        n = len(t)
        assert (t >= 0).all() and (t <= 1).all()
        uniform = (t / (shift - (shift - 1) * t)).sort().values
        grid = torch.arange(1, n + 1) / n
        assert (uniform - grid).abs().max() < 1.95 / n**0.5 + 1 / n  # p = 0.001, a fixed seed

    for shift in (1.0, 12.0):
        draw = sample_shifted_timesteps(3000, Draw(0), shift=shift)
        check(draw, shift)
    # What D is given, in both steps.
    stage = make_stage(timestep_shift=12.0)
    given: dict[str, list[Tensor]] = {"discriminator": [], "generator": []}
    for update in range(12):
        with recorded(stage) as (seen, _):
            stage.discriminator_step([real_batch()], update)
            stage.generator_step([real_batch()], update)
        given["discriminator"].append(seen[0].t[:NUM])
        given["generator"].append(seen[1].t[:NUM])
    for values in given.values():
        check(torch.cat(values), 12.0)


@pytest.mark.parametrize("penalty", ["r1", "r2"])
def test_trap_3_the_perturbed_copy_shares_timestep_and_condition(make_stage, penalty: str) -> None:  # type: ignore[no-untyped-def]
    # With a vanishing sigma the penalty must vanish; what is left is the variance over t and c.
    stage = make_stage(**one_penalty(penalty, weight=1.0, sigma=1e-6))
    with recorded(stage) as (seen, _):
        metrics = stage.discriminator_step([real_batch()], 0)
    x, t, tokens, logits = seen[0]
    assert len(seen) == 1, "one forward serves all groups"
    assert metrics[f"discriminator/approximate_{penalty}"] < 1e-8

    # Power: D does depend on t and on c, and both differ between samples.
    assert t[:NUM].unique().numel() == NUM, "one timestep per sample"
    stage = make_stage(**one_penalty(penalty, weight=1.0, sigma=1e-6))
    condition = stage.encode(CAPTIONS)
    for other_t, other_c in (
        (t[:NUM].roll(1), condition),
        (t[:NUM], condition.select(torch.arange(NUM).roll(1))),
    ):
        with torch.no_grad():
            moved = discriminator(stage)(x[:NUM], other_t, other_c).logits
        assert (moved - logits[:NUM]).square().mean() > 1e-5

    # The same, by construction: find each copy's original, and compare what goes with it.
    distance = torch.cdist(x.flatten(1), x.flatten(1)).fill_diagonal_(torch.inf)
    pairs = (distance < 0.1).nonzero()
    assert len(pairs) == 2 * NUM
    for a, b in pairs.tolist():
        assert t[a] == t[b]
        assert torch.equal(tokens[a], tokens[b])


def by_hand(stage: AdversarialPostTraining, seen: Seen, condition: Condition) -> Tensor:
    """Eq. 10 with separate forwards of D, all with their graph."""
    real, perturbed, fake = (
        discriminator(stage)(x, seen.t[:NUM], condition).logits for x in seen.x.chunk(3)
    )
    penalty = (real - perturbed).square().mean()
    return F.softplus(-real).mean() + F.softplus(fake).mean() + 100.0 * penalty


def test_trap_4_gradient_flows_through_both_branches_and_through_d(make_stage) -> None:  # type: ignore[no-untyped-def]
    stage, batch = make_stage(), real_batch()
    before = copy.deepcopy(stage)
    with recorded(stage) as (seen, _):
        stage.discriminator_step([batch], 0)
    assert all(p.grad is None for p in stage.generator.module.parameters())
    by_hand(before, seen[0], before.encode(batch.captions)).backward()
    expected = gradients(discriminator(before))
    torch.testing.assert_close(gradients(discriminator(stage)), expected, rtol=1e-3, atol=1e-4)
    # Power: without one of the branches the gradient is another one.
    r1 = create_loss("approximate_r1")
    real, perturbed, _ = seen[0].logits.chunk(3)
    leaves = [real.clone().requires_grad_(), perturbed.clone().requires_grad_()]
    for grad in torch.autograd.grad(r1(*leaves), leaves):
        assert grad.norm() > 0.1

    # The generator's step: the gradient of softplus(-D(G(z))) by all of G's weights, through D.
    weights = copy.deepcopy(discriminator(stage).state_dict())
    before = copy.deepcopy(stage)
    # D's own gradients of its last step must not remain, or others would be added to them.
    stage.trained["discriminator"].zero_grad()
    with recorded(stage) as (seen, _):
        stage.generator_step([batch], 0)
    assert all(p.grad is None for p in discriminator(stage).parameters())
    after = discriminator(stage).state_dict()
    assert all(torch.equal(after[name], value) for name, value in weights.items())
    c = before.encode(batch.captions)
    x_fake = before.draw_fake(batch, c, 0, "generator/noise")
    torch.testing.assert_close(x_fake, seen[0].x)
    before.generator.zero_grad()
    F.softplus(-discriminator(before)(x_fake, seen[0].t, c).logits).mean().backward()
    expected = gradients(before.generator.module)
    actual = gradients(stage.generator.module)
    assert expected.norm() > 0
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_trap_5_the_discriminator_sees_clean_latents(make_stage) -> None:  # type: ignore[no-untyped-def]
    stage, batch = make_stage(), real_batch()
    patches: list[Tensor] = []
    discriminator(stage).backbone.patch_in.register_forward_hook(
        lambda module, args, out: patches.append(args[0].detach())
    )
    with recorded(stage) as (seen, samples):
        stage.discriminator_step([batch], 0)
        stage.generator_step([batch], 0)
    for forward, entered in zip(seen, patches, strict=True):
        # Nor does D noise them inside: the backbone gets the same values, in patches.
        assert torch.equal(entered.flatten(1).sort().values, forward.x.flatten(1).sort().values)
    real, perturbed, fake = seen[0].x.chunk(3)
    assert torch.equal(real, batch.x)
    assert torch.equal(fake, samples[0])
    assert torch.equal(seen[1].x, samples[1])
    assert seen[0].t.std() > 0.1, "the timestep input does vary"
    # The pair differs by sigma * eps alone: white, of one size for every sample, whatever its t.
    noise = (perturbed - real) / SIGMA
    n = noise[0].numel()
    assert (noise.flatten(1).mean(1).abs() < 5 / n**0.5).all()
    assert ((noise.flatten(1).std(1) - 1).abs() < 5 / (2 * n) ** 0.5).all()
    correlation = (noise * real).flatten(1).mean(1)
    assert (correlation.abs() < 5 * real.square().flatten(1).mean(1).sqrt() / n**0.5).all()


def test_trap_6_logits_heads_and_loss_are_fp32_under_bf16_autocast(make_stage) -> None:  # type: ignore[no-untyped-def]
    stage, batch = make_stage(precision="bf16"), real_batch()
    network = discriminator(stage)
    wrong: list[str] = []

    def watch(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            for value in (*args, output):
                if isinstance(value, Tensor) and value.dtype != torch.float32:
                    wrong.append(f"{name}: {value.dtype}")

        return hook

    half: list[torch.dtype] = []
    linear = network.backbone.block_list()[0].streams[0].qkv
    hooks = [
        module.register_forward_hook(watch(name))
        for name, module in network.named_modules()
        if name.startswith(("heads", "norm", "project"))
    ]
    hooks.append(linear.register_forward_hook(lambda m, args, out: half.append(out.dtype)))
    with recorded(stage) as (seen, _):
        metrics = stage.update([batch], 0)
    for hook in hooks:
        hook.remove()
    assert half and all(dtype == torch.bfloat16 for dtype in half), "autocast is on in the backbone"
    assert not wrong
    for forward in seen:
        assert forward.logits.dtype == torch.float32
        assert (forward.logits.bfloat16().float() != forward.logits).any()
    assert all(torch.as_tensor(value).isfinite() for value in metrics.values())

    # What bf16 logits would cost: one ulp at 2 is 0.016, and 100 * ulp^2 is a penalty of 0.024
    # for a D that is flat. They are refused instead.
    flat = torch.tensor([2.0, 2.008])
    penalty = create_loss("approximate_r1", weight=100.0)
    assert penalty(flat[:1], flat[1:]) < 0.01
    assert penalty(flat[:1].bfloat16().float(), flat[1:].bfloat16().float()) > 0.02
    with pytest.raises(InputError, match="fp32"):
        penalty(flat[:1].bfloat16(), flat[1:].bfloat16())


def test_trap_7_sigma_is_a_standard_deviation(make_stage) -> None:  # type: ignore[no-untyped-def]
    # At 0.04 a variance would mean a deviation of 0.2.
    for penalty in ("r1", "r2"):
        stage = make_stage(**one_penalty(penalty, weight=100.0, sigma=0.04))
        with recorded(stage) as (seen, _):
            stage.discriminator_step([real_batch()], 0)
        groups = seen[0].x.split(NUM)
        base, perturbed = (groups[0], groups[1]) if penalty == "r1" else (groups[1], groups[2])
        difference = perturbed - base
        n = difference.numel()
        assert abs(difference.std() / 0.04 - 1) < 5 / (2 * n) ** 0.5

    # lambda * sigma^2 is the weight of the squared gradient norm: for D = w . x it is
    # 100 * 0.2^2 * |w|^2 (chi-square noise), which `normalize` turns into 100 * |w|^2.
    generator = torch.Generator().manual_seed(0)
    n, w = 20_000, torch.tensor([0.5, -1.0, 2.0])
    x, noise = torch.randn(n, 3, generator=generator), torch.randn(n, 3, generator=generator)
    for normalize, scale in ((None, 100.0 * 0.2**2), ("sigma2", 100.0)):
        r1 = create_loss("approximate_r1", weight=100.0, sigma=0.2, normalize=normalize)
        value = r1(x @ w, (x + r1.sigma * noise) @ w)
        assert abs(value / (scale * w.square().sum()) - 1) < 5 * (2 / n) ** 0.5


def test_trap_8_exact_r1_runs_on_reference_ops_only(make_stage, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    # Whoever adds a fused op names it here, and in the test below that it raises.
    fused = {row.name for row in kernel_status() if not row.name.endswith("/reference")}
    # No gradient passes through an optimiser's step
    assert fused == {f"{op}/triton" for op in (*FUSED, *LINEAR, "fused_rmsprop")}

    stage, batch = make_stage(**EXACT), real_batch(2)
    c = stage.encode(batch.captions)
    t = torch.tensor([0.3, 0.8])
    x_fake = stage.draw_fake(batch, c, 0, "test").detach()
    # torch's fused attention has no double backward, and says so instead of dropping a term.
    with attention_backend("_native_flash"), pytest.raises(RuntimeError, match="derivative"):
        stage.loss_of_discriminator(batch, x_fake, t, c, 0)[0].backward()
    # The stage takes the reference by itself, whatever was chosen for everything else.
    monkeypatch.setenv("APT_KERNEL_BACKEND", "triton")
    with stage.double_backward():
        assert current_kernel_backend() == "reference"
    with make_stage().double_backward():
        assert current_kernel_backend() == "triton"
    assert torch.as_tensor(stage.discriminator_step([batch], 0)["discriminator/r1"]) > 0

    # And that is the right gradient: R1's derivative along a direction, by central differences.
    network = discriminator(stage)
    x = batch.x.clone().requires_grad_()

    def penalty() -> Tensor:
        with stage.double_backward():
            return create_loss("r1")(network(x, t, c).logits, x)

    parameters = list(network.parameters())
    generator = torch.Generator().manual_seed(0)
    direction = [
        torch.randn(p.shape, generator=generator) * p.detach().abs().mean() for p in parameters
    ]
    found = torch.autograd.grad(penalty(), parameters, allow_unused=True)
    slope = sum((g * d).sum() for g, d in zip(found, direction, strict=True) if g is not None)
    step, values = 3e-3, []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=sign * step)
        values.append(penalty().item())
    difference = (values[0] - values[1]) / (2 * step)
    assert difference == pytest.approx(float(slope), rel=0.02)


FUSED = {
    "modulated_norm": lambda x, y, gate, scale, shift, backend: modulated_norm(
        x, scale, shift, backend=backend
    ),
    "residual_modulated_norm": lambda *inputs, backend: residual_modulated_norm(
        *inputs, backend=backend
    )[1],
    "norm_rope": lambda x, *_, backend: norm_rope(x[:, :, None], None, backend=backend),
    "qk_norm_rope": lambda x, *_, backend: qk_norm_rope(
        x[:, :, None], x[:, :, None], None, None, backend=backend
    )[0],
    "joint_qk_norm_rope": lambda x, *_, backend: joint_qk_norm_rope(
        [StreamQKV(x[:, :, None, None].expand(-1, -1, 3, -1, -1))], backend=backend
    )[0],
    "query_pooling": lambda x, *_, backend: query_pooling(
        x, x[0, 0].detach(), *torch.eye(8, device=x.device).expand(2, 8, 8), num_heads=2,
        backend=backend,
    ),
}  # fmt: skip

# Ops whose second derivative is right with any backend (tests/kernels/test_triton_draws.py): one
# is linear in its inputs, one has none.
LINEAR = ("perturbed_batch", "sample_shifted_timesteps")


@pytest.mark.parametrize("op", FUSED)
def test_trap_8_fused_ops_raise_on_double_backward(op: str) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(2, 3, 8, device=device, requires_grad=True)
    vector = torch.randn(2, 8, device=device)
    for backend in ("triton", "reference"):
        out = FUSED[op](x, x, vector, vector, vector, backend=backend)
        (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        penalty = gradient.square().sum()
        if backend == "reference":
            penalty.backward()
        else:
            with pytest.raises(InputError, match="'reference'"):
                penalty.backward()


def test_trap_8_the_reference_ops_differentiate_twice() -> None:
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)

    x, y, vector = leaf(2, 3, 4), leaf(2, 3, 4), [leaf(2, 4) for _ in range(3)]
    check = torch.autograd.gradgradcheck
    assert check(lambda *a: modulated_norm(*a, backend="reference"), (x, *vector[:2]))
    assert check(lambda *a: residual_modulated_norm(*a, backend="reference"), (x, y, *vector))
    q, k, weights = leaf(1, 2, 1, 4), leaf(1, 2, 1, 4), [leaf(4), leaf(4)]
    assert check(lambda *a: qk_norm_rope(*a, None, None, backend="reference"), (q, k, *weights))


def test_heads_read_the_papers_depths_counted_from_1(make_stage) -> None:  # type: ignore[no-untyped-def]
    # Not one of the nine, but what public code gets wrong: 0-based 16/26/36, or 36 of 30 blocks.
    assert paper_layers(36) == (16, 26, 36)
    assert paper_layers(30) == (13, 22, 30)
    assert paper_layers(1) == (1,)
    stage = make_stage(layers=(1, 2))
    network = discriminator(stage)
    outputs: list[Tensor] = []
    inputs: list[Tensor] = []
    for block in network.backbone.block_list():
        block.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
    for head in network.heads:
        head.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    stage.discriminator_step([real_batch()], 0)
    assert len(inputs) == 2
    assert all(torch.equal(a, b) for a, b in zip(inputs, outputs, strict=True))


def contradicts_table_8(text: str) -> list[str]:
    """Lines that give the paper's one-GPU DiT time at 720p as anything but 2.65 s."""
    wrong = []
    for line in text.splitlines():
        if not re.search(r"\b(DiT|latent)", line) or not re.search(r"H100", line):
            continue
        introduction = re.search(r"(?<![\d.])(two|2|2\.0)[\s-]?(s|sec|seconds?)\b", line)
        paper = re.search(r"\bpaper|Table 8|APT 8B", line)
        if introduction or (paper and re.search(r"\d s\b", line) and "2.65 s" not in line):
            wrong.append(line)
    return wrong


def test_trap_9_the_papers_dit_time_is_that_of_its_table() -> None:
    assert contradicts_table_8("one latent in two seconds on an H100")
    assert contradicts_table_8("| paper, 1 H100 | DiT 2.0 s |")
    assert contradicts_table_8("| paper, 1 H100 | DiT 2.5 s |")
    assert not contradicts_table_8("| paper, 1 H100 | text 0.28 s, DiT 2.65 s, VAE 3.10 s |")
    root = Path(__file__).resolve().parents[1]
    for folder in ("apt", "benchmarks", "docs", "examples"):
        for path in (root / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".html"):
                assert not contradicts_table_8(path.read_text(encoding="utf-8")), path
    for path in root.glob("*.md"):
        assert not contradicts_table_8(path.read_text(encoding="utf-8")), path
