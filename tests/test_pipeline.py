from __future__ import annotations

import dataclasses
import warnings
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from apt.checkpoints.info import SamplingInfo
from apt.checkpoints.lora import LORA_FILE, LoRALayer, save_lora
from apt.checkpoints.save import save_bundle
from apt.condition import Condition
from apt.errors import CheckpointError, InputError
from apt.generate_options import GenerateOptions
from apt.pipeline import OneStepPipeline
from apt.rng import Draw, sample_noise
from tests.tiny import tiny_bundle

PROMPT = "a red seven moving left"
OTHERS = ("a blue one", "a rather longer prompt about a green three moving up")


@pytest.fixture(scope="module")
def pipeline() -> OneStepPipeline:
    return OneStepPipeline(tiny_bundle())


@pytest.fixture(scope="module")
def diffusion() -> OneStepPipeline:
    sampling = SamplingInfo(
        num_steps=3, cfg_scale=2.0, negative_prompt="dull and still", timestep_shift=2.0
    )
    return OneStepPipeline(tiny_bundle("diffusion", sampling))


def test_a_prompt_becomes_a_video(pipeline: OneStepPipeline) -> None:
    video = pipeline(PROMPT)
    assert video.shape == (1, 9, 32, 32, 3)
    assert video.dtype == torch.uint8
    assert video.is_contiguous()
    assert video.float().std() > 1, "the random model makes no flat picture"


def test_one_step_is_eq_5_in_pixels(pipeline: OneStepPipeline) -> None:
    """G(z, c) = z - v(z, c, 1), decoded, with the noise that the seed names."""
    bundle = pipeline.bundle
    z = sample_noise(1, (768, 3, 4, 4), Draw(7, stream="generate"))
    with torch.no_grad():
        velocity = bundle.backbone(z, torch.ones(1), Condition(bundle.text_encoder([PROMPT])))
        pixels = bundle.codec.decode(z - velocity).clamp(-1, 1)
    assert torch.allclose(pipeline.sample_pixels(PROMPT, seed=7), pixels, atol=1e-6)
    expected = ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
    assert (pipeline(PROMPT, seed=7).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_seed_gives_the_same_video_in_any_batch(
    pipeline: OneStepPipeline, diffusion: OneStepPipeline, num_steps: int
) -> None:
    for pipe in (pipeline, diffusion):
        alone = pipe(PROMPT, seed=5, num_steps=num_steps)[0]
        assert torch.equal(pipe(PROMPT, seed=5, num_steps=num_steps)[0], alone)
        crowd = pipe([*OTHERS, PROMPT], seed=[9, 2, 5], num_steps=num_steps)
        assert torch.equal(crowd[2], alone)
        crowd = pipe([PROMPT, *OTHERS], seed=5, num_steps=num_steps)
        assert torch.equal(crowd[0], alone)
        # In a batch, prompts are padded and matrices are split differently, which changes rounding.
        batch = pipe([*OTHERS, PROMPT], seed=[9, 2, 5], num_steps=num_steps, batch_size=3)
        assert (batch[2].int() - alone.int()).abs().max() <= 1


def test_global_randomness_is_neither_used_nor_spent(pipeline: OneStepPipeline) -> None:
    torch.manual_seed(1)
    first = pipeline(PROMPT, num_steps=2)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(pipeline(PROMPT, num_steps=2), first)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_torchs_default_type_does_not_matter(pipeline: OneStepPipeline) -> None:
    """If a script set it to bf16, t and the noise would be rounded."""
    expected = pipeline(PROMPT, num_steps=3)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = pipeline(PROMPT, num_steps=3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_prompts_seeds_and_samplers_matter(pipeline: OneStepPipeline) -> None:
    videos = {
        "base": pipeline(PROMPT),
        "seed": pipeline(PROMPT, seed=1),
        "prompt": pipeline(OTHERS[0]),
        "consistency": pipeline(PROMPT, num_steps=2, sampler="consistency"),
        "euler": pipeline(PROMPT, num_steps=2, sampler="euler"),
        "grid": pipeline(PROMPT, timesteps=(1, 0.8, 0)),
        "guided": pipeline(PROMPT, cfg_scale=3.0),
        "led away": pipeline(PROMPT, cfg_scale=3.0, negative_prompt="a blue one"),
    }
    names = list(videos)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            assert not torch.equal(videos[a], videos[b]), f"{a} and {b} are the same"
    assert torch.equal(pipeline(PROMPT, sampler="euler"), videos["base"]), "one step is one step"
    assert torch.equal(pipeline(PROMPT, timesteps=(1, 0.5, 0)), videos["consistency"])


def test_several_seeds_make_several_videos_of_one_prompt(pipeline: OneStepPipeline) -> None:
    videos = pipeline(PROMPT, seed=[3, 4])
    assert torch.equal(videos, torch.cat([pipeline(PROMPT, seed=s) for s in (3, 4)]))
    assert not torch.equal(videos[0], videos[1])


def test_the_plan_follows_from_the_stage(
    pipeline: OneStepPipeline, diffusion: OneStepPipeline
) -> None:
    plan = pipeline.plan()
    assert (plan.stage, plan.timesteps, plan.cfg_scale) == ("apt", (1.0, 0.0), 1.0)
    assert pipeline.plan(num_steps=2).sampler == "consistency"
    plan = diffusion.plan()
    assert (plan.stage, plan.sampler, plan.cfg_scale) == ("diffusion", "euler", 2.0)
    assert plan.negative_prompt == "dull and still"
    # Shift 2: 2 t / (1 + t) for t = 2/3 and 1/3.
    assert plan.timesteps == pytest.approx((1, 0.8, 0.5, 0))
    assert diffusion.plan(cfg_scale=1, num_steps=1).timesteps == (1.0, 0.0)


def test_a_distilled_model_is_not_guided_twice() -> None:
    """Its file may record the guidance it was distilled with."""
    for stage in ("consistency", "apt"):
        bundle = tiny_bundle(stage, SamplingInfo(cfg_scale=7.5))  # type: ignore[arg-type]
        assert OneStepPipeline(bundle).plan().cfg_scale == 1.0


def test_guidance_uses_the_models_own_negative_prompt(diffusion: OneStepPipeline) -> None:
    own = diffusion(PROMPT)
    assert torch.equal(diffusion(PROMPT, negative_prompt="dull and still"), own)
    assert not torch.equal(diffusion(PROMPT, negative_prompt=""), own)
    assert not torch.equal(diffusion(PROMPT, cfg_scale=1.0), own)


@pytest.mark.parametrize(
    ("size", "shape"),
    [
        ({"frames": 1}, (1, 32, 32)),
        ({"frames": 13}, (13, 32, 32)),
        ({"height": 16, "width": 48}, (9, 16, 48)),
    ],
)
def test_other_sizes_that_fit(
    pipeline: OneStepPipeline, size: dict[str, int], shape: tuple[int, int, int]
) -> None:
    assert pipeline(PROMPT, **size).shape == (1, *shape, 3)  # type: ignore[arg-type]


@settings(deadline=None)
@given(value=st.integers(-3, 60), axis=st.sampled_from(["frames", "height", "width"]))
def test_sizes_fit_or_name_sizes_that_do(pipeline: OneStepPipeline, value: int, axis: str) -> None:
    fits = value > 0 and (value % 4 == 1 if axis == "frames" else value % 8 == 0)
    if fits:
        pipeline.latent_shape(**{axis: value})
        return
    with pytest.raises(InputError, match=f"{axis} = {value} does not fit") as caught:
        pipeline.latent_shape(**{axis: value})
    advice = str(caught.value).partition("use ")[2].partition(".")[0]
    for near in map(int, advice.split(" or ")):
        assert abs(near - value) <= 12
        pipeline.latent_shape(**{axis: near})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "non-empty text"),
        ({"prompt": " \n"}, "non-empty text"),
        ({"prompt": []}, "list of prompts or seeds is empty"),
        ({"prompt": [PROMPT, ""]}, "non-empty text, got ''"),
        ({"prompt": [PROMPT, 7]}, "got 7"),
        ({"prompt": "a \udcff"}, "not UTF-8"),
        ({"prompt": "a \x07"}, "U\\+0007"),
        ({"prompt": "seven " * 65}, "65 words, but at most 64"),
        ({"prompt": "x" * 33}, "33 bytes, but at most 32"),
        ({"prompt": [PROMPT, PROMPT], "seed": [1, 2, 3]}, "2 prompts need one seed"),
        ({"prompt": [PROMPT], "seed": []}, "list of prompts or seeds is empty"),
        ({"prompt": PROMPT, "seed": [0.5]}, "whole number"),
        ({"prompt": PROMPT, "seed": [True]}, "whole number"),
        ({"prompt": PROMPT, "num_steps": 0}, "num_steps"),
        ({"prompt": PROMPT, "num_steps": 10**9}, "num_steps must be at most 1000"),
        ({"prompt": PROMPT, "num_steps": 3, "timesteps": (1, 0)}, "make 1 steps"),
        ({"prompt": PROMPT, "timesteps": (0, 1)}, "timesteps must fall"),
        ({"prompt": PROMPT, "sampler": "ddim"}, "choose from auto, consistency, euler"),
        ({"prompt": PROMPT, "cfg_scale": float("nan")}, "cfg_scale"),
        ({"prompt": PROMPT, "cfg_scale": -1}, "cfg_scale"),
        ({"prompt": PROMPT, "num_inference_steps": 0}, "num_steps"),
        ({"prompt": PROMPT, "frames": 5, "num_frames": 5}, "are the same option"),
        ({"prompt": PROMPT, "guidance": 2.0}, "did you mean 'guidance_scale'"),
        (
            {"prompt": PROMPT, "seed": 0, "generator": torch.Generator()},
            "pass either a seed or a generator",
        ),
        ({"prompt": PROMPT, "seed": 0.5}, "whole number, got 0.5"),
        ({"prompt": PROMPT, "generator": 3}, "must be a torch.Generator"),
        ({"prompt": [PROMPT] * 3, "generator": [torch.Generator()] * 2}, "need one generator"),
        ({"prompt": PROMPT, "batch_size": 0}, "batch_size"),
        ({"prompt": PROMPT, "batch_size": 0.5}, "batch_size"),
        ({"prompt": PROMPT, "frames": 10**12 + 1}, "needs more than .* GiB, and cpu has"),
        ({"prompt": PROMPT, "cfg_scale": 2.0, "negative_prompt": "\0"}, "U\\+0000"),
    ],
)
def test_wrong_input_is_explained(
    pipeline: OneStepPipeline, arguments: dict[str, Any], message: str
) -> None:
    for call in (pipeline, pipeline.stream, pipeline.sample_pixels):
        with pytest.raises(InputError, match=message):
            call(**arguments)


def test_options_in_one_are_options_by_name(pipeline: OneStepPipeline) -> None:
    by_name = pipeline(PROMPT, seed=3, num_steps=2, frames=5, cfg_scale=2.0)
    options = GenerateOptions(num_steps=2, frames=5, cfg_scale=2.0)
    assert torch.equal(pipeline(PROMPT, seed=3, options=options), by_name)
    theirs = pipeline(PROMPT, seed=3, num_inference_steps=2, num_frames=5, guidance_scale=2.0)
    assert torch.equal(theirs, by_name)
    # A name goes before the options.
    assert torch.equal(
        pipeline(PROMPT, seed=3, options=options, num_frames=9),
        pipeline(PROMPT, seed=3, num_steps=2, cfg_scale=2.0),
    )
    assert pipeline.plan(options) == pipeline.plan(num_inference_steps=2, guidance_scale=2.0)


def test_a_generator_is_drawn_from(pipeline: OneStepPipeline) -> None:
    def seeded(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    (generator,) = seeded(1)
    first, second = (pipeline(PROMPT, generator=generator) for _ in range(2))
    assert not torch.equal(first, second), "a generator moves on"
    assert torch.equal(pipeline(PROMPT, generator=seeded(1)), first)
    both = pipeline([PROMPT, PROMPT], generator=seeded(1)[0])
    assert torch.equal(both, torch.cat([first, second])), "a seed for each video"
    apart = pipeline(PROMPT, generator=seeded(1, 2))
    assert torch.equal(apart[0], first[0]) and not torch.equal(apart[1], first[0])


def test_a_generator_is_left_alone_by_a_call_that_is_refused(pipeline: OneStepPipeline) -> None:
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    for wrong in ({"frames": 4}, {"prompt": "\0"}, {"num_step": 1}, {"output_type": "latent"}):
        with pytest.raises(InputError):
            pipeline(**{"prompt": PROMPT, "generator": generator, **wrong})  # type: ignore[call-overload]
    assert torch.equal(generator.get_state(), before)


def test_output_types_are_one_video(pipeline: OneStepPipeline) -> None:
    frames = pipeline(PROMPT, seed=3)
    for unit in (
        pipeline(PROMPT, seed=3, output_type="pt").permute(0, 1, 3, 4, 2),
        torch.from_numpy(pipeline(PROMPT, seed=3, output_type="np")),
    ):
        assert unit.dtype == torch.float32
        assert (unit * 255 - frames.float()).abs().max() <= 0.5 + 1e-4
    (video,) = pipeline(PROMPT, seed=3, output_type="pil")
    assert torch.equal(torch.from_numpy(np.stack([np.asarray(i) for i in video])), frames[0])


def test_from_pretrained_and_to(tmp_path: Any, pipeline: OneStepPipeline) -> None:
    save_bundle(tmp_path, pipeline.bundle)
    loaded = OneStepPipeline.from_pretrained(tmp_path, device="cpu")
    assert (loaded.stage, loaded.device.type, loaded.dtype) == ("apt", "cpu", torch.float32)
    exact = loaded(PROMPT)
    assert torch.equal(exact, pipeline(PROMPT))
    assert loaded.to(dtype=torch.bfloat16) is loaded
    assert loaded.dtype == torch.bfloat16
    rounded = loaded(PROMPT)
    assert not torch.equal(rounded, exact)
    assert (rounded.float() - exact.float()).abs().mean() < 8
    direct = OneStepPipeline.from_pretrained(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert torch.equal(direct(PROMPT), rounded)


def test_generation_leaves_no_gradients(pipeline: OneStepPipeline) -> None:
    assert not pipeline.sample_pixels(PROMPT).requires_grad
    assert all(not module.training for module in pipeline.bundle.modules())


def test_a_size_far_from_any_that_fits_names_the_trained_one(pipeline: OneStepPipeline) -> None:
    backbone = cast(nn.Module, pipeline.bundle.backbone)

    def small(latent: tuple[int, ...]) -> tuple[int, int, int]:
        if max(latent) > 64:
            raise InputError("too large")
        return type(backbone).token_grid(backbone, latent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "token_grid", small)
        trained = pipeline.info.sample.height
        with pytest.raises(InputError, match=rf"height = 100000000 .*; use {trained}\. "):
            pipeline.latent_shape(height=100_000_000)


def test_an_expert_is_not_sampled_below_its_range_in_silence(diffusion: OneStepPipeline) -> None:
    info = diffusion.info
    expert = dataclasses.replace(info.model, architecture="wan2.2_t2v_a14b")
    diffusion.bundle.info = dataclasses.replace(info, model=expert)
    try:
        with pytest.warns(UserWarning, match=r"an expert for t >= 0\.875, .* down to 0\.667"):
            diffusion(PROMPT, num_steps=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            diffusion(PROMPT, num_steps=1)
    finally:
        diffusion.bundle.info = info


def test_offload_has_one_part_at_a_time_on_the_device(
    pipeline: OneStepPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tiny_bundle()
    moves: list[tuple[str, str]] = []
    for name in ("text_encoder", "backbone", "codec"):
        part: Any = getattr(bundle, name)

        def record(device: Any, part: Any = part, name: str = name) -> Any:
            moves.append((name, str(device)))
            return torch.nn.Module.to(part, device)

        monkeypatch.setattr(part, "to", record)
    # The same device under another spelling, so that arriving and leaving can be told apart
    offloaded = OneStepPipeline(bundle, offload_to=torch.device("cpu", 0))
    assert torch.equal(
        offloaded([PROMPT, "a blue one"], seed=3), pipeline([PROMPT, "a blue one"], seed=3)
    )
    assert moves == [
        (name, device)
        for name in ("text_encoder", "backbone", "codec")
        for device in ("cpu:0", "cpu")
    ]
    assert offloaded.device == torch.device("cpu", 0)


def test_weights_that_offload_has_copied_can_still_train(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tiny_bundle()
    for part in bundle.modules():
        # As between two devices: every weight is copied.
        copied = partial(nn.Module._apply, part, torch.Tensor.clone)
        monkeypatch.setattr(part, "to", lambda device, copied=copied: copied())
    OneStepPipeline(bundle, offload_to=torch.device("cpu", 0))(PROMPT)
    assert not any(p.is_inference() for part in bundle.modules() for p in part.parameters())


def test_a_lora_is_merged_and_taken_off(tmp_path: Path) -> None:
    pipe = OneStepPipeline(tiny_bundle())
    before = pipe(PROMPT)
    weight = pipe.bundle.backbone.get_parameter("blocks.0.streams.0.qkv.weight")  # type: ignore[attr-defined]
    layer = LoRALayer(torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2))
    save_lora(tmp_path, {"blocks.0.streams.0.qkv": layer})
    assert pipe.load_lora(tmp_path, scale=0.5) is pipe
    assert not torch.equal(pipe(PROMPT), before)
    pipe.load_lora(tmp_path / LORA_FILE, scale=-0.5)
    assert (pipe(PROMPT).int() - before.int()).abs().max() <= 1
    with pytest.raises(CheckpointError, match="there is no LoRA"):
        pipe.load_lora(tmp_path / "nowhere")


def test_a_stream_gives_what_a_call_does_one_after_the_other(pipeline: OneStepPipeline) -> None:
    prompts = [PROMPT, *OTHERS, PROMPT]
    for batch_size in (1, 3):
        together = pipeline(prompts, seed=[5, 6, 7, 8], batch_size=batch_size)
        stream = pipeline.stream(prompts, seed=[5, 6, 7, 8], batch_size=batch_size)
        assert torch.equal(torch.stack(list(stream)), together)


def test_a_stream_makes_a_video_when_it_is_asked_for(
    pipeline: OneStepPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    sample = pipeline._sample_latents

    def count(*arguments: Any) -> torch.Tensor:
        made.append(1)
        return sample(*arguments)

    monkeypatch.setattr(pipeline, "_sample_latents", count)
    stream = pipeline.stream([PROMPT] * 1000, seed=list(range(1000)))
    assert not made
    next(stream)
    next(stream)
    assert len(made) == 2
    # The last of many prompts is read before the first video is made.
    with pytest.raises(InputError, match="U\\+0007"):
        pipeline.stream([PROMPT] * 1000 + ["a \x07"])
    with pytest.raises(InputError, match="U\\+0000"):
        pipeline.stream(PROMPT, cfg_scale=2.0, negative_prompt="\0")
    assert len(made) == 2


def test_more_videos_than_parts_stay_for_with_offload() -> None:
    bundle = tiny_bundle()
    offloaded = OneStepPipeline(bundle, offload_to=torch.device("cpu", 0))
    prompts = [PROMPT] * 11
    videos = list(offloaded.stream(prompts, seed=list(range(11))))
    assert torch.equal(torch.stack(videos), OneStepPipeline(bundle)(prompts, seed=list(range(11))))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error_and_no_black_video(value: float) -> None:
    bundle = tiny_bundle()
    pipe = OneStepPipeline(bundle)
    weight = cast(nn.Module, bundle.backbone).get_parameter("blocks.0.streams.0.qkv.weight")
    with torch.no_grad():
        weight[0, 0] = value
    for call in (pipe, pipe.sample_pixels, lambda prompt: list(pipe.stream(prompt))):
        with pytest.raises(
            InputError, match="values of the latents are NaN or infinite in float32"
        ):
            call(PROMPT)  # type: ignore[operator]


def test_a_size_that_fits_is_taken_whatever_the_model_was_trained_on() -> None:
    bundle = tiny_bundle()
    odd = dataclasses.replace(bundle.info.sample, height=33)
    bundle.info = dataclasses.replace(bundle.info, sample=odd)
    assert OneStepPipeline(bundle).latent_shape(frames=5, height=32) == (768, 2, 4, 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite(
    value: float, pipeline: OneStepPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A VAE may overflow where the transformer does not."""
    decode = pipeline.bundle.codec.decode
    monkeypatch.setattr(pipeline.bundle.codec, "decode", lambda x: decode(x) + value)
    with pytest.raises(InputError, match="values of the pixels are NaN"):
        pipeline(PROMPT)


def test_too_little_memory_is_one_line(
    pipeline: OneStepPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(*arguments: Any) -> torch.Tensor:
        return torch.empty(2**60)

    monkeypatch.setattr(pipeline, "_sample_latents", greedy)
    with pytest.raises(InputError, match="out of memory while generating 9 frames of 32x32 on cpu"):
        pipeline(PROMPT)


def test_it_is_shown_in_a_line() -> None:
    pipeline = OneStepPipeline(tiny_bundle(), offload_to=torch.device("cuda"))
    text = repr(pipeline)
    assert text.startswith("OneStepPipeline(ModelBundle(apt: MMDiT(depth=2, hidden_size=24")
    assert text.endswith("codec patchify, 9 frames of 32x32 at 8 fps), offloaded from cuda)")
    assert repr(pipeline.bundle) in text and "\n" not in text and len(text) < 300
    codec, encoder = repr(pipeline.bundle.codec), repr(pipeline.bundle.text_encoder)
    assert codec == (
        "PatchifyCodec(channels=768, temporal_compression=4, spatial_compression=8, no parameters)"
    )
    assert encoder.startswith("ByteTextEncoder(embedding_dim=") and "float32 on cpu" in encoder
    assert "\n" not in encoder
