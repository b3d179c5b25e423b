"""First frames, which nothing in the package knows, go the whole way from data to samples.

What makes them and what reads them is here; all that hands them on is the package's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apt.checkpoints.info import SampleInfo
from apt.checkpoints.save import save_bundle
from apt.condition import Condition, extra_condition
from apt.data.dataset import Batch, Sample
from apt.errors import InputError
from apt.flow import SamplerName, bind, bind_guided, sample
from apt.kernels.modulated_norm import take_rows
from apt.losses import ApproximateR1, ApproximateR2, FeatureMatching, MismatchedCondition
from apt.methods.apt import AdversarialConfig, generate
from apt.methods.base import Method, MethodConfig
from apt.methods.consistency import DistillConfig
from apt.methods.flow_matching import PretrainConfig
from apt.methods.terms import Terms
from apt.models import MODELS, create_discriminator, create_model
from apt.models.discriminator import discriminate_groups
from apt.models.mmdit import MMDiT, MMDiTConfig
from apt.models.transformer import Context, Tokens
from apt.pipeline import OneStepPipeline
from apt.rng import Draw, sample_noise
from apt.train.host import MicroBatches
from apt.train.initial import initial_bundle
from tests.train.tiny_methods import (
    CAPTIONS,
    LATENT_SHAPE,
    TINY_MODEL,
    build,
    floats,
    randomize,
    train_config,
)

NAME, NUM = "mmdit_first_frame", len(CAPTIONS)
CLIP = SampleInfo(frames=2, height=8, width=8, fps=8)
ALL_TERMS: dict[str, Any] = {
    "r1": ApproximateR1(weight=10.0, sigma=0.1),
    "terms": Terms(
        r2=ApproximateR2(weight=10.0, sigma=0.1),
        feature_matching=FeatureMatching(weight=1.0),
        mismatched=MismatchedCondition(weight=1.0),
    ),
    "layers": (1, 2),
}


@dataclass(frozen=True, kw_only=True)
class FirstFrameConfig(MMDiTConfig):
    def build(self) -> FirstFrameMMDiT:
        return FirstFrameMMDiT(self)


class FirstFrameMMDiT(MMDiT):
    """The package's model, told latents (R, C, 1, H, W) of the frame that a clip begins with."""

    extra_conditions = ("first_frame",)

    def __init__(self, config: MMDiTConfig) -> None:
        super().__init__(config)
        self.frame_in = nn.Linear(config.in_channels, config.hidden_size)

    def embed(
        self, x: Tensor, t: Tensor, c: Condition, rows: Tensor | None
    ) -> tuple[Tokens, Context]:
        frame_RD = self.frame_in(extra_condition(c, "first_frame").mean(dim=(2, 3, 4)))
        tokens, context = super().embed(x, t, c, rows)
        visual = tokens.visual + take_rows(frame_RD, rows)[:, None]
        return tokens._replace(visual=visual), context


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS._builders, NAME, FirstFrameConfig)
    monkeypatch.setitem(MODELS._pretrained, NAME, {})


def config(stage: MethodConfig, **changes: Any) -> Any:
    return train_config(stage, model=dataclasses.replace(TINY_MODEL, name=NAME), **changes)


def stages(folder: Path) -> Iterator[Method]:
    """All three, each from random weights."""
    bundles = [initial_bundle(config(PretrainConfig(), seed=seed)) for seed in range(2)]
    for seed, bundle in enumerate(bundles):
        randomize(bundle.backbone, seed)
    starts = [str(save_bundle(folder / str(i), bundle)) for i, bundle in enumerate(bundles)]
    models = {"generator": starts[0], "discriminator": starts[1]}
    yield build(config(PretrainConfig()), bundles[0])
    yield build(config(DistillConfig(teacher=starts[0])))
    yield build(config(AdversarialConfig(**models, **ALL_TERMS)))


def data() -> Batch:
    """Clips as a data set of one's own would give them."""
    generator = torch.Generator().manual_seed(0)
    samples = [
        Sample(
            torch.rand(3, 2, 8, 8, generator=generator) * 2 - 1,
            caption,
            extra={"first_frame": torch.randn(12, 1, 4, 4, generator=generator)},
        )
        for caption in CAPTIONS
    ]
    return Batch.collate(samples, offset=0, batch_index=0)


def batches(stage: Method, size: int = NUM) -> MicroBatches:
    """The same as the update's micro-batches of so many samples."""
    whole = data()
    assert whole.pixels is not None
    parts = [
        dataclasses.replace(
            whole,
            pixels=whole.pixels[first : first + size],
            captions=whole.captions[first : first + size],
            offset=first,
            extra={name: value[first : first + size] for name, value in whole.extra.items()},
        )
        for first in range(0, NUM, size)
    ]
    return MicroBatches(stage, iter(parts).__next__, len(parts))


def tiny(**options: Any) -> Any:
    with torch.random.fork_rng():
        model: Any = create_model(NAME, **{**TINY_MODEL.options, **options})
    randomize(model, 0)
    return model


def conditions(stage: Method) -> tuple[Condition, Tensor]:
    """Those of the data, and their frames."""
    (batch,) = batches(stage)
    return stage.condition(batch), batch.extra["first_frame"]


@pytest.fixture
def c() -> Condition:
    return conditions(build(config(PretrainConfig())))[0]


def test_every_method_trains_on_it_and_shows_samples(tmp_path: Path) -> None:
    for stage in stages(tmp_path):
        halves = batches(stage, size=2)
        frames = [half.extra["first_frame"] for half in halves]
        assert torch.equal(torch.cat(frames), data().extra["first_frame"])
        backbone: Any = stage.generator.module
        before = backbone.backbone.frame_in.weight.detach().clone()
        metrics = floats(stage.update(halves, 0))
        assert all(torch.isfinite(torch.tensor(value)) for value in metrics.values())
        assert not torch.equal(backbone.backbone.frame_in.weight, before)

        randomize(backbone.backbone, 0)
        prompts = CAPTIONS[:3]  # more than a micro-batch has samples
        with torch.no_grad():
            shown = stage.samples(prompts, CLIP, halves)
            moved = [dataclasses.replace(halves[0], extra={"first_frame": frames[0] + 1})]
            other = stage.samples(prompts, CLIP, moved)
        assert shown is not None and other is not None
        assert shown.latents.shape == (3, *LATENT_SHAPE)
        assert not torch.allclose(shown.latents, other.latents, atol=1e-3)


def test_the_discriminator_shares_rows_without_copies(tmp_path: Path) -> None:
    *_, stage = stages(tmp_path)
    made = batches(stage)
    seen: dict[str, list[tuple[Tensor, Condition]]] = {"generator": [], "discriminator": []}
    for name, calls in seen.items():
        stage.trained[name].module.register_forward_pre_hook(
            lambda _, args, calls=calls: calls.append((args[0], args[2]))
        )
    stage.update(made, 0)

    (_, of_g), _ = seen["generator"]
    (x, of_d), (_, in_g_step) = seen["discriminator"]
    # Real, perturbed and generated, generated and perturbed, real under a neighbour's condition.
    assert len(x) == 5 * NUM and len(of_d) == NUM
    assert of_g is of_d
    for given in (of_d, in_g_step):
        assert given.extra["first_frame"].data_ptr() == made[0].extra["first_frame"].data_ptr()


def test_a_mismatched_condition_is_another_samples_text_and_frame(c: Condition) -> None:
    discriminator = create_discriminator(tiny(), layers=[1, 2])
    randomize(discriminator.project, 1)
    assert not hasattr(discriminator.backbone, "patch_out"), "cut behind the last head"
    x, t = torch.randn(NUM, *LATENT_SHAPE), torch.rand(NUM)
    own, other = torch.arange(NUM), (torch.arange(NUM) + 1) % NUM
    groups = {"real": own, "mismatched": other}
    found = discriminate_groups(discriminator, torch.cat([x, x]), t, c, groups)
    alone = discriminator(x, t[other], c.select(other)).logits
    torch.testing.assert_close(found["mismatched"].logits, alone, rtol=1e-4, atol=1e-5)
    only_text = discriminator(x, t[other], c.with_text(c.select(other).text)).logits
    assert not torch.allclose(only_text, alone, atol=1e-3)


@torch.no_grad()
def test_guidance_leads_away_from_text_alone_and_every_sampler_is_told(c: Condition) -> None:
    model = tiny()
    negative = c.with_text(c.select(slice(0, 1)).text)
    x, t = torch.randn(NUM, *LATENT_SHAPE), torch.full((NUM,), 0.7)
    v, v_negative = model(x, t, c), model(x, t, negative)
    guided = bind_guided(model, c, negative, 2.5)
    torch.testing.assert_close(guided(x, t), v_negative + 2.5 * (v - v_negative), atol=1e-3, rtol=0)

    z = sample_noise(NUM, LATENT_SHAPE, Draw(0))
    moved = dataclasses.replace(c, extra={"first_frame": c.extra["first_frame"] + 1})
    elsewhere = bind_guided(model, moved, moved.with_text(negative.text), 2.5)
    samplers: tuple[SamplerName, ...] = ("euler", "consistency")
    for pair in ((guided, elsewhere), (bind(model, c), bind(model, moved))):
        for sampler in samplers:
            ours, other = (
                sample(predict, z, [1, 0.5, 0], sampler=sampler, noise=lambda _: z)
                for predict in pair
            )
            assert not torch.allclose(ours, other, atol=1e-3)
    with pytest.raises(InputError, match="different inputs: first_frame and only text"):
        bind_guided(model, c, Condition(negative.text), 2.5)


@torch.no_grad()
def test_models_say_what_they_read(c: Condition) -> None:
    z = sample_noise(NUM, LATENT_SHAPE, Draw(0))
    with pytest.raises(InputError, match="needs 'first_frame' beside the text, got only text"):
        generate(tiny(), z, Condition(c.text))
    with pytest.raises(
        InputError, match="does not read first_frame; beside the text it reads nothing"
    ):
        generate(create_model("mmdit_small", **TINY_MODEL.options), z, c)


def test_the_pipeline_takes_it_for_each_video_or_for_all(tmp_path: Path) -> None:
    bundle = initial_bundle(config(PretrainConfig(num_steps=1)))
    randomize(bundle.backbone, 0)  # type: ignore[arg-type]
    bundle.info = dataclasses.replace(bundle.info, sample=CLIP)
    pipeline = OneStepPipeline(bundle)
    frames = torch.randn(2, 12, 1, 4, 4)
    videos = pipeline.sample_pixels("a", seed=[0, 1], extra={"first_frame": frames}, num_steps=2)
    for number in range(2):
        # With guidance, the negative prompt has the same frame beside it.
        alone = pipeline.sample_pixels(
            "a", seed=number, extra={"first_frame": frames[number : number + 1]}, num_steps=2
        )
        assert torch.equal(videos[number : number + 1], alone)
    other = {"first_frame": frames[:1]}
    for_all = pipeline.sample_pixels("a", seed=[0, 1], extra=other, num_steps=2)
    assert torch.equal(for_all[0], videos[0])
    assert not torch.allclose(for_all[1], videos[1], atol=1e-3)
    (streamed, _) = pipeline.stream("a", seed=[0, 1], extra=other, num_steps=2, batch_size=2)
    assert streamed.shape == (2, 8, 8, 3)


def test_the_pipeline_says_what_the_model_reads() -> None:
    bundle = initial_bundle(config(PretrainConfig()))
    bundle.info = dataclasses.replace(bundle.info, sample=CLIP)
    pipeline, frame = OneStepPipeline(bundle), torch.zeros(3, 12, 1, 4, 4)
    with pytest.raises(InputError, match=r"does not read camera; .* it reads first_frame"):
        pipeline("a", extra={"camera": frame})
    with pytest.raises(InputError, match=r"with 2 rows, one per video, .* got .3, 12"):
        pipeline("a", seed=[0, 1], extra={"first_frame": frame})
    with pytest.raises(InputError, match="needs 'first_frame' beside the text"):
        pipeline("a")
