from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from apt.checkpoints.info import CodecInfo, SampleInfo, SamplingInfo
from apt.checkpoints.load import NO_SIZE
from apt.checkpoints.save import save_bundle
from apt.device import computes_in_bf16
from apt.errors import ConfigError
from apt.losses import Consistency
from apt.methods import AdversarialConfig, DistillConfig, MethodConfig, PretrainConfig
from apt.train.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from apt.train.config_file import plain
from apt.train.recipes import RECIPES, list_recipes
from apt.train.resolve import advice, prompt_check, resolve, resolve_with_notes
from tests.data.media import numbered, write_image, write_video
from tests.train.tiny_methods import random_bundle

SIZE = SampleInfo(frames=17, height=64, width=96, fps=16.0)
SAMPLING = SamplingInfo(num_steps=40, cfg_scale=3.0, timestep_shift=5.0, negative_prompt="blurred")
TEACHER = dataclasses.replace(
    random_bundle().info,
    sample=SIZE,
    sampling=SAMPLING,
    training={"config": {"sample_prompts": ["a red one", "a blue two"]}},
)
STAGES = (DistillConfig(teacher="t"), AdversarialConfig(generator="g", discriminator="d"))


def config(stage: MethodConfig, **changes: Any) -> TrainConfig:
    return TrainConfig(name="x", run_dir="x", stage=stage, **changes)


@pytest.mark.parametrize("stage", STAGES)
def test_size_and_rate_are_those_of_the_model_that_a_stage_starts_from(stage: MethodConfig) -> None:
    assert resolve(config(stage), TEACHER).data.clip == SIZE
    some = resolve(config(stage, data=DataConfig(height=32, fps=0.0)), TEACHER)
    assert some.data.clip == dataclasses.replace(SIZE, height=32, fps=0.0)
    stills = resolve(config(stage, data=DataConfig(images="only")), TEACHER)
    assert stills.data.clip == dataclasses.replace(SIZE, frames=1)


def test_pretraining_has_the_digits_size_unless_it_says_another() -> None:
    assert resolve(config(PretrainConfig()), None).data.clip == SampleInfo(
        frames=9, height=32, width=32, fps=8.0
    )


def test_a_stage_at_another_size_than_its_model_says_so() -> None:
    same = resolve(config(STAGES[0]), TEACHER)
    assert not [text for text in advice(same, SIZE) if "frames of" in text]
    other = resolve(config(STAGES[0], data=DataConfig(height=32, width=32)), TEACHER)
    (said,) = [text for text in advice(other, SIZE) if "frames of" in text]
    assert "17 frames of 64x96 at 16 fps" in said and "17 frames of 32x32 at 16 fps" in said


@pytest.mark.parametrize(
    ("stage", "decay", "updates", "warm"),
    [
        (PretrainConfig(), 0.999, 200, True),
        (PretrainConfig(), 0.999, 22_000, False),
        (PretrainConfig(), 0.5, 6, False),
        (STAGES[0], 0.999, 200, False),
    ],
)
def test_short_pretraining_warms_its_average_up(
    stage: MethodConfig, decay: float, updates: int, warm: bool
) -> None:
    settings = config(stage, ema_decay=decay, num_updates=updates)
    assert resolve(settings, TEACHER).ema_warmup is warm
    asked = dataclasses.replace(settings, ema_warmup=not warm)
    assert resolve(asked, TEACHER).ema_warmup is not warm


def test_a_resumed_run_keeps_the_average_that_it_began_with() -> None:
    short = config(PretrainConfig(), num_updates=10)
    begun = resolve(short, None)
    longer = dataclasses.replace(short, num_updates=100_000)
    assert resolve(longer, None, plain(begun)).ema_warmup is True
    old = {key: value for key, value in plain(begun).items() if key != "ema_warmup"}
    assert resolve(short, None, old).ema_warmup is False


def test_an_average_of_what_the_run_started_from_is_pointed_out() -> None:
    def said(**changes: Any) -> list[str]:
        return [text for text in advice(resolve(config(STAGES[0], **changes), None), None)]

    (text,) = said(ema_decay=0.99, num_updates=200)
    assert "make up 13% of the exported average" in text and "--ema-decay 0.985" in text
    assert said(ema_decay=0.985, num_updates=200) == []
    assert said(ema_decay=0.999, num_updates=200, ema_warmup=True) == []


@pytest.mark.parametrize(("warmup", "decay", "says"), [(30, 80, False), (30, 171, True)])
def test_a_rate_that_is_never_reached_is_pointed_out(warmup: int, decay: int, says: bool) -> None:
    optimizer = OptimizerConfig(warmup_updates=warmup, decay_updates=decay)
    settings = config(STAGES[0], num_updates=200, ema_decay=0.5, optimizer=optimizer)
    assert bool(advice(resolve(settings, None), None)) is says


def test_a_decay_longer_than_the_run_names_the_value_to_set() -> None:
    with pytest.raises(ConfigError, match=r"--optimizer\.decay-updates to at most 200 \(0 "):
        config(STAGES[0], num_updates=200, optimizer=OptimizerConfig(decay_updates=201))


def test_averages_of_shipped_pretraining_are_what_they_were() -> None:
    for name in list_recipes():
        made = RECIPES.get(name)()
        for one in [made] if isinstance(made, TrainConfig) else made:
            if isinstance(one.stage, PretrainConfig):
                made_here = dataclasses.replace(
                    one, stage=dataclasses.replace(one.stage, codec=""), data=DataConfig()
                )
                assert resolve(made_here, None).ema_warmup is False, one.name


def test_captions_are_checked_by_the_encoder_that_will_read_them(tmp_path: Path) -> None:
    save_bundle(tmp_path / "model", random_bundle())
    for stage in (PretrainConfig(), DistillConfig(teacher=str(tmp_path / "model"))):
        check = prompt_check(config(stage))
        assert check is not None
        check(["a short one", ""])
        with pytest.raises(ValueError, match="65 words, but at most 64"):
            check(["word " * 65])


def own_folder(root: Path, num: int = 5) -> Path:
    """Captioned clips of 33 frames of 48x64 at 16 fps, and a small image."""
    for i in range(num):
        write_video(root / f"{i}.mp4", numbered(33, 48, 64), 16)
        (root / f"{i}.txt").write_text(f"clip {i} of them", encoding="utf-8")
    write_image(root / "z.png", numbered(1, 16, 16)[0])
    (root / "z.txt").write_text("word " * 300, encoding="utf-8")
    return root


def test_a_first_stage_takes_what_the_folder_gives(tmp_path: Path) -> None:
    folder = str(own_folder(tmp_path / "clips"))
    on_folder = DataConfig(source="folder", path=folder, max_frames=17)
    settings = config(PretrainConfig(), data=on_folder)
    found, notes = resolve_with_notes(settings, None)
    # The patch of mmdit_digits is 1, and its codec makes one latent of 8 pixels.
    assert found.data.size_multiple == 8
    assert found.data.clip == SampleInfo(frames=17, height=48, width=64, fps=16.0)
    assert notes[0] == (
        "  size: 17 frames of 48x64 at 16 fps, which most of 5 videos and 1 image can provide"
    )
    # The long one, which the text encoder refuses, is no prompt.
    assert found.sample_prompts == tuple(f"clip {i} of them" for i in range(5))
    asked = dataclasses.replace(on_folder, frames=5, fps=8.0)
    assert resolve(config(PretrainConfig(), data=asked), None).data.clip == SampleInfo(
        frames=5, height=48, width=64, fps=8.0
    )
    stills = dataclasses.replace(on_folder, images="only")
    assert resolve(config(PretrainConfig(), data=stills), None).data.clip == SampleInfo(
        frames=1, height=16, width=16, fps=0.0
    )
    (tmp_path / "clips" / "z.png").unlink()
    assert resolve(config(PretrainConfig(), data=stills), None).data.clip == SampleInfo(
        frames=1, height=48, width=64, fps=16.0
    )
    quiet = config(PretrainConfig(), data=on_folder, sample_prompts=())
    assert resolve(quiet, None).sample_prompts == ()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"height": 33}, "data.height must be a multiple of 8, .* --data.height 32 or 40"),
        ({"width": 4, "height": 8}, "data.width must be a multiple of 8, .* --data.width 8"),
        ({"frames": 8}, r"data.frames must be 4k \+ 1, got 8; set --data.frames 5 or 9"),
    ],
)
def test_clips_that_the_model_could_not_make(
    tmp_path: Path, asked: dict[str, int], says: str
) -> None:
    data = DataConfig(source="folder", path=str(own_folder(tmp_path / "clips")), **asked)
    with pytest.raises(ConfigError, match=says):
        resolve(config(PretrainConfig(), data=data), None)


def test_frames_are_what_the_codec_folds(tmp_path: Path) -> None:
    data = DataConfig(source="folder", path=str(own_folder(tmp_path / "clips")), max_frames=13)
    deep = ModelConfig(codec_options={"temporal": 8})
    for model, frames in ((ModelConfig(), 13), (deep, 9)):
        settings = config(PretrainConfig(), data=data, model=model)
        assert resolve(settings, None).data.frames == frames


def test_a_size_that_nothing_gives_is_told_with_the_options_that_set_it() -> None:
    nowhere_yet = DataConfig(source="webdataset", path="", fps=12.0)
    _, notes = resolve_with_notes(config(PretrainConfig(), data=nowhere_yet), None)
    assert notes[0].startswith(
        "  size: 9 frames of 32x32 at 12 fps, the default of --data.frames, "
    )
    assert "--data.fps" not in notes[0]
    assert not resolve_with_notes(config(PretrainConfig()), None)[1]  # the digits have their own


def test_a_trained_codec_gives_the_size_and_another_does_not(tmp_path: Path) -> None:
    folder = str(own_folder(tmp_path / "clips"))
    settings = config(PretrainConfig(), data=DataConfig(source="folder", path=folder))
    codec = CodecInfo(codec=TEACHER.codec, sample=SIZE)
    assert resolve(settings, codec).data.clip == SIZE
    public = CodecInfo(codec=TEACHER.codec, sample=NO_SIZE)
    assert resolve(settings, public).data.clip.height == 48


def test_channels_are_the_codecs_unless_they_are_named() -> None:
    fold = ModelConfig(codec_options={"temporal": 1, "spatial": 2})
    settings = config(PretrainConfig(), model=fold)
    assert resolve(settings, None).model.options == {"in_channels": 12}
    named = dataclasses.replace(fold, options={"in_channels": 5})
    assert resolve(config(PretrainConfig(), model=named), None).model == named
    assert resolve(config(PretrainConfig()), None).model == ModelConfig()


def test_later_stages_take_the_rest_from_their_teacher(tmp_path: Path) -> None:
    some = Consistency(num_timesteps=None, cfg_scale=7.0, timestep_shift=None)
    on_folder = DataConfig(source="folder", path=str(tmp_path))
    settings = config(DistillConfig(teacher="t", loss=some), data=on_folder)
    found, notes = resolve_with_notes(settings, TEACHER)
    assert isinstance(found.stage, DistillConfig)
    assert found.stage.loss == Consistency(num_timesteps=40, cfg_scale=7.0, timestep_shift=5.0)
    assert found.negative_prompt == "blurred"
    assert found.sample_prompts == ("a red one", "a blue two")
    assert found.data.size_multiple == 4  # 2 pixels to a latent, 2 latents to a token
    assert notes == [
        "  num_timesteps 40, timestep_shift 5: taken from the model that it starts from",
        "  size: 17 frames of 64x96 at 16 fps, taken from the model that it starts from",
    ]
    other = config(STAGES[1], negative_prompt="", sample_prompts=("x",))
    assert resolve(other, TEACHER).negative_prompt == ""
    assert resolve(other, TEACHER).sample_prompts == ("x",)


@pytest.mark.parametrize("record", [{}, {"config": 1}, {"config": {"sample_prompts": [1]}}])
def test_a_record_of_free_form_may_have_no_prompts(record: dict[str, Any]) -> None:
    assert dataclasses.replace(TEACHER, training=record).sample_prompts() == ()


def test_a_resumed_run_keeps_what_it_began_with(tmp_path: Path) -> None:
    folder = own_folder(tmp_path / "clips")
    settings = config(
        PretrainConfig(), precision="auto", data=DataConfig(source="folder", path=str(folder))
    )
    begun = resolve(settings, None)
    for i in range(20):  # most files are others now
        write_video(folder / f"new{i}.mp4", numbered(9, 32, 32), 4)
        (folder / f"new{i}.txt").write_text("another", encoding="utf-8")
    assert resolve(settings, None).data != begun.data
    again, notes = resolve_with_notes(settings, None, plain(begun))
    assert again == begun and notes == []


def test_precision_is_what_the_device_computes_in() -> None:
    for device in ("cpu", "auto"):
        settings = config(STAGES[0], precision="auto", device=device)
        expected = "bf16" if computes_in_bf16(device) else "fp32"
        assert resolve(settings, TEACHER).precision == expected
    assert resolve(config(STAGES[0], precision="bf16"), TEACHER).precision == "bf16"
