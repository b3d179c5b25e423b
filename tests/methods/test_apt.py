from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apt.checkpoints.info import TEXT_ENCODER_FILE
from apt.checkpoints.load import load_bundle
from apt.checkpoints.save import save_bundle
from apt.condition import Condition
from apt.errors import ConfigError, InputError
from apt.kernels import perturbed_batch, sample_shifted_timesteps
from apt.losses import (
    R1,
    ApproximateR1,
    ApproximateR2,
    FeatureMatching,
    LogitCentring,
    MismatchedCondition,
)
from apt.methods.apt import AdversarialConfig, AdversarialPostTraining
from apt.methods.terms import Terms
from apt.models.discriminator import Discriminator
from apt.rng import Draw, sample_noise
from apt.train.config import OptimizerConfig
from tests.train.tiny_methods import (
    CAPTIONS,
    FROZEN,
    LATENT_SHAPE,
    adversarial,
    assert_same_gradients,
    build,
    floats,
    gradients,
    micro_batches,
    save_start,
    train_config,
    unchanged,
    weights,
)

UPDATE, FIRST = 5, 8


def networks(stage: AdversarialPostTraining) -> tuple[Any, Any]:
    return stage.generator.module, stage.trained["discriminator"].module


OFF = ApproximateR1(weight=0.0)


def key(stream: str) -> Draw:
    """The random draws of the samples FIRST, FIRST + 1, ... in update UPDATE."""
    return Draw(0, UPDATE, FIRST, stream)


def noise(stream: str) -> Tensor:
    return sample_noise(len(CAPTIONS), LATENT_SHAPE, key(stream))


def perturbation(stream: str = "perturbation") -> Tensor:
    zeros = torch.zeros(len(CAPTIONS), *LATENT_SHAPE)
    return perturbed_batch(zeros, zeros[:0], 1.0, key(stream))[len(CAPTIONS) :]


class Oracle:
    """The paper's equations from separate forwards of D, each with its own timesteps."""

    def __init__(self, stage: AdversarialPostTraining, shift: float) -> None:
        generator, self.discriminator = networks(stage)
        self.c: Condition = stage.encode(CAPTIONS)
        self.x = micro_batches(first=FIRST)[0].x
        ones = torch.ones(len(CAPTIONS))
        z = noise("discriminator/noise")
        self.fake = (z - generator(z, ones, self.c)).detach()
        self.t = self.timesteps("discriminator/timestep", shift)

    @staticmethod
    def timesteps(stream: str, shift: float) -> Tensor:
        return sample_shifted_timesteps(len(CAPTIONS), key(stream), shift=shift)

    def logits(self, x: Tensor) -> Tensor:
        return self.discriminator(x, self.t, self.c).logits


def discriminator_gradients(
    stage: AdversarialPostTraining, loss: Tensor
) -> dict[str, Tensor | None]:
    """Return D's gradients of `loss`, after its own step left other gradients."""
    discriminator = networks(stage)[1]
    discriminator.zero_grad()
    loss.backward()
    return gradients(discriminator)


def test_discriminator_minimises_equation_10(tmp_path: Path) -> None:
    stage = adversarial(
        tmp_path,
        train={"optimizer": FROZEN},
        r1=ApproximateR1(weight=30.0, sigma=0.3),
        timestep_shift=4.0,
    )
    metrics = stage.discriminator_step(micro_batches(first=FIRST), UPDATE)
    ours = gradients(networks(stage)[1])

    oracle = Oracle(stage, shift=4.0)
    real, fake = oracle.logits(oracle.x), oracle.logits(oracle.fake)
    perturbed = oracle.logits(oracle.x + 0.3 * perturbation())
    gan = F.softplus(-real).mean() + F.softplus(fake).mean()
    penalty = 30.0 * (real - perturbed).square().mean()
    assert metrics["discriminator/loss"] == pytest.approx(gan.item(), rel=1e-4)
    assert metrics["discriminator/approximate_r1"] == pytest.approx(penalty.item(), rel=1e-3)
    gap = real.mean() - fake.mean()
    assert metrics["discriminator/logit_gap"] == pytest.approx(gap.item(), rel=1e-3)
    assert_same_gradients(ours, discriminator_gradients(stage, gan + penalty), missing=True)


def test_generator_minimises_equation_2_through_the_discriminator(tmp_path: Path) -> None:
    stage = adversarial(tmp_path, train={"optimizer": FROZEN}, timestep_shift=4.0)
    generator, _ = networks(stage)
    metrics = stage.generator_step(micro_batches(first=FIRST), UPDATE)
    ours = gradients(generator)

    oracle = Oracle(stage, shift=4.0)
    oracle.t = oracle.timesteps("generator/timestep", 4.0)
    z = noise("generator/noise")
    fake = z - generator(z, torch.ones(len(CAPTIONS)), oracle.c)
    fake.retain_grad()
    loss = F.softplus(-oracle.logits(fake)).mean()
    generator.zero_grad()
    loss.backward()
    assert metrics["generator/loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert_same_gradients(ours, gradients(generator), missing=True)
    # Each sample's own loss has the gradient of the mean, times the batch.
    assert fake.grad is not None
    norm = fake.grad.flatten(1).norm(dim=1).mean() * len(CAPTIONS)
    assert metrics["discriminator/input_gradient"] == pytest.approx(norm.item(), rel=1e-3)
    total = torch.cat([g.flatten() for g in gradients(generator).values() if g is not None]).norm()
    assert metrics["generator/grad_norm"] == pytest.approx(total.item(), rel=1e-3)


OPTIONAL_TERMS: dict[str, dict[str, Any]] = {
    "approximate_r1": {"r1": ApproximateR1(weight=7.0, sigma=0.3)},
    "approximate_r2": {"terms": Terms(r2=ApproximateR2(weight=7.0, sigma=0.3))},
    "r1": {"terms": Terms(exact_r1=R1(weight=7.0))},
    "logit_centring": {"terms": Terms(logit_centring=LogitCentring(weight=7.0))},
    "mismatched_condition": {"terms": Terms(mismatched=MismatchedCondition(weight=7.0))},
}


@pytest.mark.parametrize("term", OPTIONAL_TERMS)
def test_discriminator_terms_one_by_one(term: str, tmp_path: Path) -> None:
    stage = adversarial(
        tmp_path, train={"optimizer": FROZEN}, **{"r1": OFF, **OPTIONAL_TERMS[term]}
    )
    metrics = stage.discriminator_step(micro_batches(first=FIRST), UPDATE)
    ours = gradients(networks(stage)[1])
    logged = {name.removeprefix("discriminator/") for name in metrics}
    assert logged & OPTIONAL_TERMS.keys() == {term}

    oracle = Oracle(stage, shift=1.0)
    x = oracle.x.clone().requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        real, fake = oracle.logits(x), oracle.logits(oracle.fake)
        if term == "approximate_r1":
            other = oracle.logits(oracle.x + 0.3 * perturbation())
            value = 7 * (real - other).square().mean()
        elif term == "approximate_r2":
            other = oracle.logits(oracle.fake + 0.3 * perturbation("perturbation/fake"))
            value = 7 * (fake - other).square().mean()
        elif term == "r1":
            (slope,) = torch.autograd.grad(real.sum(), x, create_graph=True)
            value = 7 * slope.square().flatten(1).sum(1).mean()
        elif term == "logit_centring":
            value = 7 * (real + fake).square().mean()
        else:
            # Sample i under the row (caption and timestep) of its right neighbour.
            right = torch.tensor([1, 2, 3, 0])
            wrong = oracle.discriminator(oracle.x, oracle.t[right], oracle.c.select(right)).logits
            value = 7 * F.softplus(wrong).mean()
        assert metrics[f"discriminator/{term}"] == pytest.approx(value.item(), rel=2e-3)
        gan = F.softplus(-real).mean() + F.softplus(fake).mean()
        assert_same_gradients(ours, discriminator_gradients(stage, gan + value), missing=True)


def test_all_terms_together(tmp_path: Path) -> None:
    terms = Terms(
        r2=ApproximateR2(fraction=0.5),
        exact_r1=R1(),
        logit_centring=LogitCentring(),
        feature_matching=FeatureMatching(),
        mismatched=MismatchedCondition(),
    )
    stage = adversarial(tmp_path, r1=ApproximateR1(fraction=0.5), terms=terms)
    metrics = stage.update(micro_batches(), 0)
    assert {f"discriminator/{name}" for name in OPTIONAL_TERMS} <= metrics.keys()
    assert "generator/feature_matching" in metrics
    assert all(torch.isfinite(torch.as_tensor(value)) for value in metrics.values())


def test_no_penalty_is_the_plain_gan_loss(tmp_path: Path) -> None:
    stage = adversarial(tmp_path, train={"optimizer": FROZEN}, r1=OFF)
    metrics = stage.discriminator_step(micro_batches(first=FIRST), UPDATE)
    assert not {f"discriminator/{name}" for name in OPTIONAL_TERMS} & metrics.keys()
    ours = gradients(networks(stage)[1])
    oracle = Oracle(stage, shift=1.0)
    real, fake = oracle.logits(oracle.x), oracle.logits(oracle.fake)
    gan = F.softplus(-real).mean() + F.softplus(fake).mean()
    assert_same_gradients(ours, discriminator_gradients(stage, gan), missing=True)


def test_fraction_perturbs_the_first_samples(tmp_path: Path) -> None:
    r1 = ApproximateR1(sigma=0.3, fraction=0.5)
    stage = adversarial(tmp_path, train={"optimizer": FROZEN}, r1=r1)
    metrics = stage.discriminator_step(micro_batches(first=FIRST), UPDATE)
    oracle = Oracle(stage, shift=1.0)
    real = oracle.logits(oracle.x)
    perturbed = oracle.logits(oracle.x + 0.3 * perturbation())
    penalty = 100 * (real - perturbed)[:2].square().mean()
    assert metrics["discriminator/approximate_r1"] == pytest.approx(penalty.item(), rel=1e-3)


@pytest.mark.parametrize("objective", ["hinge", "least_squares", "relativistic"])
def test_other_objectives(objective: str, tmp_path: Path) -> None:
    stage = adversarial(tmp_path, train={"optimizer": FROZEN}, objective=objective)
    metrics = stage.generator_step(micro_batches(first=FIRST), UPDATE)
    generator, _ = networks(stage)
    oracle = Oracle(stage, shift=1.0)
    oracle.t = oracle.timesteps("generator/timestep", 1.0)
    z = noise("generator/noise")
    fake = oracle.logits(z - generator(z, torch.ones(len(CAPTIONS)), oracle.c))
    real = oracle.logits(oracle.x)
    expected = {
        "hinge": -fake.mean(),
        "least_squares": (fake - 1).square().mean() / 2,
        "relativistic": F.softplus(real - fake).mean(),
    }[objective]
    assert metrics["generator/loss"] == pytest.approx(expected.item(), rel=1e-3)
    assert stage.discriminator_step(micro_batches(), 0)["discriminator/loss"] >= 0


def test_feature_matching_compares_all_heads(tmp_path: Path) -> None:
    terms = Terms(feature_matching=FeatureMatching(weight=3.0))
    stage = adversarial(tmp_path, train={"optimizer": FROZEN}, terms=terms)
    metrics = stage.generator_step(micro_batches(first=FIRST), UPDATE)
    generator, discriminator = networks(stage)
    oracle = Oracle(stage, shift=1.0)
    t = oracle.timesteps("generator/timestep", 1.0)
    z = noise("generator/noise")
    fake = discriminator(
        z - generator(z, torch.ones(len(CAPTIONS)), oracle.c), t, oracle.c
    ).features
    real = discriminator(oracle.x, t, oracle.c).features
    assert len(fake) == 3
    distance = 3 * torch.stack([(a - b).abs().mean() for a, b in zip(fake, real, strict=True)])
    value = metrics["generator/feature_matching"]
    assert value == pytest.approx(distance.mean().item(), rel=1e-3)


def test_each_step_leaves_the_other_network_alone(tmp_path: Path) -> None:
    stage = adversarial(tmp_path, terms=Terms(feature_matching=FeatureMatching()))
    generator, discriminator = networks(stage)
    ema = stage.generator.ema
    assert ema is not None

    before = weights(generator), weights(discriminator), dict(weights_of(ema.state_dict()))
    stage.discriminator_step(micro_batches(), 0)
    assert unchanged(before[0], weights(generator)) == before[0].keys()
    assert unchanged(before[2], ema.state_dict()) == before[2].keys()
    assert all(value is None for value in gradients(generator).values())
    assert unchanged(before[1], weights(discriminator)) == set()

    discriminator.zero_grad()
    before = weights(generator), weights(discriminator), dict(weights_of(ema.state_dict()))
    stage.generator_step(micro_batches(), 0)
    assert unchanged(before[1], weights(discriminator)) == before[1].keys()
    assert all(value is None for value in gradients(discriminator).values())
    assert unchanged(before[0], weights(generator)) == set()
    assert unchanged(before[2], ema.state_dict()) == set()


def weights_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state.items()}


def test_stale_gradients_do_not_add_up(tmp_path: Path) -> None:
    stage = adversarial(tmp_path, train={"optimizer": FROZEN})
    stage.update(micro_batches(), 0)
    once = [gradients(module) for module in networks(stage)]
    stage.update(micro_batches(), 0)
    for before, module in zip(once, networks(stage), strict=True):
        assert_same_gradients(before, gradients(module), missing=True)


@pytest.mark.parametrize("size", [1, 2])
def test_accumulation_equals_the_whole_batch(size: int, tmp_path: Path) -> None:
    terms = Terms(r2=ApproximateR2(weight=5.0), feature_matching=FeatureMatching())
    results = []
    for part in (len(CAPTIONS), size):
        stage = adversarial(tmp_path, train={"optimizer": FROZEN}, terms=terms, timestep_shift=3.0)
        metrics = stage.update(micro_batches(part), 0)
        results.append((metrics, *map(gradients, networks(stage))))
    whole, parts = results
    assert whole[0].keys() == parts[0].keys()
    for name, value in whole[0].items():
        assert float(parts[0][name]) == pytest.approx(float(value), rel=1e-3, abs=1e-5), name
    assert_same_gradients(whole[1], parts[1], missing=True)
    assert_same_gradients(whole[2], parts[2], missing=True)


def test_two_ranks_draw_as_one(tmp_path: Path) -> None:
    """The mean of two halves' gradients is the whole's, when each knows its global offset."""
    terms = Terms(r2=ApproximateR2(weight=5.0))
    stage = adversarial(tmp_path, train={"optimizer": FROZEN}, terms=terms)
    discriminator = networks(stage)[1]
    halves = micro_batches(2)
    sums: dict[str, Tensor | None] = {}
    for half in halves:
        stage.discriminator_step([half], 0)
        for name, value in gradients(discriminator).items():
            assert value is not None
            known = sums.get(name)
            sums[name] = value / 2 if known is None else known + value / 2
    stage.discriminator_step(micro_batches(), 0)
    assert_same_gradients(gradients(discriminator), sums, missing=True)


def test_frozen_backbone_stays_and_still_teaches(tmp_path: Path) -> None:
    stage = adversarial(tmp_path, freeze_discriminator_backbone=True)
    generator, discriminator = networks(stage)
    before = weights(discriminator), weights(generator)
    stage.update(micro_batches(), 0)
    kept = unchanged(before[0], weights(discriminator))
    assert kept == {name for name in before[0] if name.startswith("backbone.")}
    assert unchanged(before[1], weights(generator)) == set()
    optimised = stage.trained["discriminator"].optimizer.param_groups[0]["params"]
    assert {id(p) for p in optimised} == {id(p) for p in discriminator.head_parameters()}


@pytest.mark.parametrize("optimizer", ["rmsprop", "adamw"])
def test_a_slow_backbone_moves_by_a_share_of_the_rate(tmp_path: Path, optimizer: Any) -> None:
    moved = []
    for share in (1.0, 0.1):
        rate = OptimizerConfig(name=optimizer, learning_rate=1e-3, warmup_updates=2)
        stage = adversarial(tmp_path, discriminator_backbone_rate=share, train={"optimizer": rate})
        _, judge = networks(stage)
        before = weights(judge)
        stage.update(micro_batches(), 0)
        moved.append({name: (w - before[name]).abs().max() for name, w in weights(judge).items()})
    for name, far in moved[0].items():
        share = 0.1 if name.startswith("backbone.") else 1.0
        torch.testing.assert_close(moved[1][name], share * far, rtol=1e-3, atol=1e-8)


def test_without_an_ensemble_d_is_told_that_input_is_clean(tmp_path: Path) -> None:
    (batch,) = micro_batches()
    t = [
        adversarial(tmp_path / str(on), timestep_ensemble=on).timesteps(batch, 0, "a stream")
        for on in (True, False)
    ]
    assert t[0].shape == t[1].shape
    assert (t[0] > 0).all() and (t[1] == 0).all()


def test_only_blocks_move_if_the_generator_trains_only_blocks(tmp_path: Path) -> None:
    stage = adversarial(tmp_path, generator_trains="blocks")
    generator, discriminator = networks(stage)
    before = weights(generator), weights(discriminator)
    stage.update(micro_batches(), 0)
    kept = unchanged(before[0], weights(generator))
    assert kept == {name for name in before[0] if ".blocks." not in name}
    assert {"backbone.patch_out.weight", "backbone.patch_in.weight"} <= kept
    # D is another network, whose every weight trains still.
    assert unchanged(before[1], weights(discriminator)) == set()


def test_every_weight_of_both_networks_trains(tmp_path: Path) -> None:
    stage = adversarial(tmp_path)
    before = [weights(module) for module in networks(stage)]
    stage.update(micro_batches(), 0)
    for old, module in zip(before, networks(stage), strict=True):
        assert unchanged(old, weights(module)) == set()


def test_two_forwards_of_the_discriminator_give_the_gradients_of_one(tmp_path: Path) -> None:
    results = []
    for forwards in (1, 2):
        stage = adversarial(
            tmp_path, train={"optimizer": FROZEN}, discriminator_forwards=forwards,
            terms=Terms(r2=ApproximateR2(weight=3.0)),
        )  # fmt: skip
        metrics = stage.discriminator_step(micro_batches(), 0)
        results.append((floats(metrics), gradients(stage.discriminator)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    assert_same_gradients(results[0][1], results[1][1])


@pytest.mark.parametrize("exact", [False, True])
def test_activation_checkpointing_changes_nothing(exact: bool, tmp_path: Path) -> None:
    results = []
    for enabled in (False, True):
        stage = adversarial(
            tmp_path,
            train={"optimizer": FROZEN, "activation_checkpointing": enabled},
            terms=Terms(exact_r1=R1(weight=float(exact))),
        )
        generator, discriminator = networks(stage)
        for network in (generator, discriminator):
            assert (network.backbone.checkpointing is not None) is enabled
        stage.update(micro_batches(), 0)
        results.append([gradients(generator), gradients(discriminator)])
    for without, with_ in zip(*results, strict=True):
        assert_same_gradients(without, with_, missing=True)


def test_bf16_autocast_keeps_logits_and_weights_in_fp32(tmp_path: Path) -> None:
    stage = adversarial(tmp_path, train={"precision": "bf16"})
    seen: list[torch.dtype] = []
    _, discriminator = networks(stage)
    discriminator.register_forward_hook(lambda module, args, out: seen.append(out.logits.dtype))
    discriminator.backbone.patch_in.register_forward_hook(
        lambda m, args, out: seen.append(out.dtype)
    )
    metrics = stage.update(micro_batches(), 0)
    assert set(seen[0::2]) == {torch.bfloat16}
    assert set(seen[1::2]) == {torch.float32}
    assert {p.dtype for p in discriminator.parameters()} == {torch.float32}
    assert all(torch.isfinite(torch.as_tensor(value)) for value in metrics.values())


def test_mismatched_pairs_leave_out_equal_captions(tmp_path: Path) -> None:
    terms = Terms(mismatched=MismatchedCondition(weight=2.0))
    stage = adversarial(tmp_path, train={"optimizer": FROZEN}, terms=terms)
    discriminator = networks(stage)[1]
    sizes: list[int] = []
    discriminator.register_forward_hook(lambda module, args, out: sizes.append(len(out.logits)))
    captions = ("one", "one", "two", "two")
    metrics = stage.discriminator_step(micro_batches(captions=captions), 0)
    # Four real, perturbed and generated samples, and those whose neighbour differs: 1 and 3.
    assert sizes == [3 * 4 + 2]
    assert metrics["discriminator/mismatched_condition"] > 0

    same = micro_batches(captions=("one",) * 4)
    assert stage.discriminator_step(same, 0)["discriminator/mismatched_condition"] == 0
    grads = gradients(discriminator)
    assert all(value is not None and value.isfinite().all() for value in grads.values())


def test_mismatched_pairs_need_a_neighbour(tmp_path: Path) -> None:
    """With micro-batches of one, the term would silently be 0 in every update."""
    terms = Terms(mismatched=MismatchedCondition(weight=2.0))
    stage = adversarial(tmp_path, terms=terms)
    with pytest.raises(ConfigError, match="--micro-batch-size to 2 or more"):
        stage.discriminator_step(micro_batches(1), 0)


def test_precision_of_products_is_the_users_own_unless_d_has_one(tmp_path: Path) -> None:
    matmul = torch.backends.cuda.matmul
    matmul.fp32_precision, before = "tf32", matmul.fp32_precision
    try:
        with adversarial(tmp_path).products():
            matmul.fp32_precision = "none"  # as torch has it: what is set for all backends
        assert matmul.fp32_precision == "none"
        with adversarial(tmp_path, discriminator_precision="tf32").products():
            assert matmul.fp32_precision == "tf32"
        assert not matmul.allow_tf32
    finally:
        matmul.fp32_precision = before


def test_head_and_layers_are_configurable(tmp_path: Path) -> None:
    stage = adversarial(tmp_path, head="conv3d", layers=(1, 2))
    _, discriminator = networks(stage)
    assert isinstance(discriminator, Discriminator)
    assert discriminator.layers == (1, 2) and discriminator.backbone.depth == 2
    assert stage.generator.module.backbone.depth == 3  # type: ignore[union-attr]
    stage.update(micro_batches(), 0)


def test_discriminator_starts_from_its_own_model(tmp_path: Path) -> None:
    stage = adversarial(tmp_path)
    generator, discriminator = networks(stage)
    for module, name in ((generator, "generator"), (discriminator, "discriminator")):
        saved = weights(load_bundle(tmp_path / name).backbone)  # type: ignore[arg-type]
        ours = weights(module.backbone)
        assert unchanged(ours, saved) == ours.keys()
    ours = weights(discriminator.backbone)
    theirs = weights(generator.backbone)
    assert not unchanged(ours, theirs)


def test_the_discriminators_own_text_encoder_is_not_loaded(tmp_path: Path) -> None:
    """It would be a second T5-XXL in memory, only to be dropped."""
    start = save_start(tmp_path)
    (tmp_path / "discriminator" / TEXT_ENCODER_FILE).unlink()
    config = train_config(AdversarialConfig(**start))
    stage = build(config)
    stage.update(micro_batches(), 0)


def test_the_same_seed_gives_the_same_update(tmp_path: Path) -> None:
    states = []
    for _ in range(2):
        stage = adversarial(tmp_path)
        stage.update(micro_batches(), 0)
        states.append({**weights(networks(stage)[0]), **weights(networks(stage)[1])})
    assert unchanged(*states) == states[0].keys()


def test_models_that_do_not_fit_each_other(tmp_path: Path) -> None:
    stage = adversarial(tmp_path)
    start = stage.start
    other = dataclasses.replace(
        start.info,
        codec=dataclasses.replace(start.info.codec, config={**start.info.codec.config, "std": 1.0}),
    )
    codec = type(start.codec)(dataclasses.replace(start.codec.config, std=1.0))
    save_bundle(tmp_path / "discriminator", dataclasses.replace(start, info=other, codec=codec))
    config = train_config(
        AdversarialConfig(
            generator=str(tmp_path / "generator"), discriminator=str(tmp_path / "discriminator")
        )
    )
    with pytest.raises(ConfigError, match="different codecs"):
        build(config, start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discriminator": ""}, "stage.discriminator is empty"),
        ({"generator": ""}, "stage.generator is empty"),
        ({"objective": "hing"}, "did you mean 'hinge'"),
        ({"objective": "approximate_r1"}, "not an adversarial objective; choose from: hinge, "),
        ({"objective": "consistency"}, "not an adversarial objective"),
        ({"head": "attenton"}, "did you mean 'attention'"),
        ({"layers": (1, 9)}, "must lie in 1..3"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        adversarial(tmp_path, **options)


def in_bf16(tmp_path: Path, **options: Any) -> AdversarialPostTraining:
    return adversarial(tmp_path, train={"precision": "bf16"}, **options)


def test_a_sigma_that_bf16_loses_is_reported_with_one_that_it_keeps(tmp_path: Path) -> None:
    small = ApproximateR1(weight=100.0, sigma=0.01)
    (warning,) = in_bf16(tmp_path, r1=small).warnings()
    assert "--stage.r1.weight 1 --stage.r1.sigma 0.1" in warning
    assert not in_bf16(tmp_path, r1=ApproximateR1(weight=1.0, sigma=0.1)).warnings()
    assert not in_bf16(tmp_path, r1=small, discriminator_precision="tf32").warnings()
    assert not adversarial(tmp_path, r1=small).warnings()


def test_rounding_is_distinguished_from_slope(tmp_path: Path) -> None:
    """In fp32 a tenth of sigma gives a hundredth of the penalty; in bf16 a tiny sigma does not."""
    batch = micro_batches(first=FIRST)[0]

    def share(stage: AdversarialPostTraining) -> float:
        t = torch.zeros(len(batch))
        return float(stage.rounding(batch, t, stage.condition(batch), UPDATE))

    tiny = ApproximateR1(weight=1.0, sigma=1e-3)
    assert share(adversarial(tmp_path, r1=tiny)) == pytest.approx(1, rel=0.2)
    assert share(in_bf16(tmp_path, r1=tiny)) > 5
    assert share(in_bf16(tmp_path, r1=tiny, discriminator_precision="fp32")) == pytest.approx(
        1, rel=0.2
    )


def test_rounding_is_logged_now_and_then(tmp_path: Path) -> None:
    stage = adversarial(tmp_path, rounding_every=2)
    logged = ["discriminator/r1_rounding" in stage.update(micro_batches(), n) for n in range(4)]
    assert logged == [False, True, False, True]
