from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from apt.errors import InputError
from apt.losses import create_loss
from apt.methods import (
    AdversarialConfig,
    AutoencoderConfig,
    DistillConfig,
    PretrainConfig,
)
from apt.models import MODELS, create_codec, create_model, create_text_encoder
from apt.models.discriminator import paper_layers
from apt.train.config import TrainConfig
from apt.train.initial import initial_bundle
from apt.train.recipes import RECIPES, list_recipes

ABLATIONS: dict[str, dict[str, Any]] = {
    "digits_apt_long": {},
    "digits_apt_no_r1": {"stage.r1.weight": 0.0, "stage.terms.r2.weight": 0.0},
    "digits_apt_no_r2": {"stage.terms.r2.weight": 0.0},
    "digits_apt_no_mismatched": {"stage.terms.mismatched.weight": 0.0},
    "digits_apt_shallow": {"stage.layers": (1, 2, 3)},
    "digits_apt_one_head": {"stage.layers": (6,)},
    "digits_apt_frozen": {"stage.freeze_discriminator_backbone": True},
    "digits_apt_slow_backbone": {"stage.discriminator_backbone_rate": 0.1},
    "digits_apt_distilled_d": {"stage.discriminator": "runs/digits/distill/export"},
    "digits_apt_no_ensemble": {"stage.timestep_ensemble": False},
    "digits_apt_small_batch": {"batch_size": 8},
    "digits_apt_low_rates": {
        "optimizer.learning_rate": 3e-5,
        "stage.discriminator_learning_rate": 2e-4,
    },
    "digits_apt_high_rates": {
        "optimizer.learning_rate": 3e-4,
        "stage.discriminator_learning_rate": 1.8e-3,
    },
}
STAGES = ("codec", "pretrain", "distill", "apt")
PIXEL_STAGES = STAGES[1:]
ROWS = ("digits", "digits_pixels", "digits_gpu", "digits_ablations", "own", "walks")
PUBLIC = (
    "wan_finetune",
    "wan_distill",
    "apt_image_wan",
    "apt_video_wan",
    "sd35_distill",
    "apt_image_sd35",
)
# Fields that may differ in every ablation: name, folder, length and what is kept.
OWN = {"name", "run_dir", "num_updates", "snapshot_at", "optimizer.decay_updates"}


def recipe(name: str) -> TrainConfig:
    made = RECIPES.get(name)()
    assert isinstance(made, TrainConfig)
    return made


def stages(name: str) -> list[TrainConfig]:
    made = RECIPES.get(name)()
    return [made] if isinstance(made, TrainConfig) else list(made)


def flat(config: TrainConfig) -> dict[str, Any]:
    """Every value by its dotted name."""
    leaves: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if dataclasses.is_dataclass(value):
            for field in dataclasses.fields(value):
                walk(f"{prefix}{field.name}.", getattr(value, field.name))
        else:
            leaves[prefix.removesuffix(".")] = value

    walk("", config)
    return leaves


def test_all_recipes() -> None:
    assert set(list_recipes()) == {
        *ROWS,
        *(f"digits_{stage}" for stage in STAGES),
        *(f"digits_pixels_{stage}" for stage in PIXEL_STAGES),
        *(f"own_{stage}" for stage in STAGES),
        "digits_apt_paper",
        "apt_image_1024",
        "apt_video_720p",
        *PUBLIC,
        *ABLATIONS,
    }
    assert list_recipes("apt_*_1024") == ["apt_image_1024"]
    with pytest.raises(InputError, match="did you mean 'digits_apt'"):
        RECIPES.get("digits_atp")


@pytest.mark.parametrize("name", list_recipes())
def test_recipes_say_what_they_are_and_hang_together(name: str) -> None:
    assert RECIPES.summary(name).endswith(".")
    for config in stages(name):
        assert len(stages(name)) > 1 or config.name == name
        assert max(config.snapshot_at, default=0) <= config.num_updates
        if isinstance(config.stage, AdversarialConfig):
            create_loss(config.stage.objective)
            if config.stage.r1.weight:
                create_loss(
                    "approximate_r1", weight=config.stage.r1.weight, sigma=config.stage.r1.sigma
                )


# The paper's values.
PAPER: dict[str, dict[str, Any]] = {
    "apt_image_1024": {
        "data.frames": 1,
        "data.height": 1024,
        "data.width": 1024,
        "data.images": "only",
        "data.native_ratio": True,
        "stage.r1.weight": 100.0,
        "stage.r1.sigma": 0.01,
        "stage.timestep_shift": 1.0,
        "batch_size": 9062,
        "optimizer.learning_rate": 5e-6,
        "num_updates": 350,
    },
    "apt_video_720p": {
        "data.frames": 49,
        "data.height": 720,
        "data.width": 1280,
        "data.fps": 24.0,
        "data.images": "none",
        "data.native_ratio": False,
        "stage.r1.weight": 100.0,
        "stage.r1.sigma": 0.1,
        "stage.timestep_shift": 12.0,
        "stage.generator": "runs/apt_image_1024/export",
        "batch_size": 2048,
        "optimizer.learning_rate": 3e-6,
        "num_updates": 300,
    },
}
PAPER_BOTH: dict[str, Any] = {
    "stage.objective": "non_saturating",
    "stage.head": "attention",
    "stage.layers": (),
    "stage.freeze_discriminator_backbone": False,
    "stage.discriminator_backbone_rate": 1.0,
    "stage.timestep_ensemble": True,
    "stage.discriminator": "",
    "stage.generator_trains": "all",
    "stage.r1.normalize": None,
    "stage.r1.fraction": 1.0,
    "stage.terms.r2.weight": 0.0,
    "stage.terms.exact_r1.weight": 0.0,
    "stage.terms.logit_centring.weight": 0.0,
    "stage.terms.feature_matching.weight": 0.0,
    "stage.terms.mismatched.weight": 0.0,
    "optimizer.name": "rmsprop",
    "optimizer.alpha": 0.9,
    "optimizer.weight_decay": 0.0,
    "optimizer.max_grad_norm": 0.0,
    "optimizer.warmup_updates": 0,
    "ema_decay": 0.995,
    "precision": "bf16",
    "data.source": "folder",
}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_values(name: str) -> None:
    values = flat(recipe(name))
    expected = {**PAPER_BOTH, **PAPER[name]}
    assert {key: values[key] for key in expected} == expected


def test_the_papers_sizes_fit_its_codec_and_patches() -> None:
    for name in PAPER:
        data = recipe(name).data
        assert data.height % data.size_multiple == data.width % data.size_multiple == 0
        assert (data.frames - 1) % 4 == 0


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_differ_in_what_they_name_alone(name: str) -> None:
    base, changed = flat(recipe("digits_apt")), flat(recipe(name))
    assert base.keys() == changed.keys()
    differing = {key: changed[key] for key in base if base[key] != changed[key]}
    assert {key: value for key, value in differing.items() if key not in OWN} == ABLATIONS[name]
    assert changed["run_dir"] != base["run_dir"]


def test_runs_have_folders_of_their_own() -> None:
    names = [*ABLATIONS, "digits_apt", "digits_apt_paper"]
    assert len({recipe(name).run_dir for name in names}) == len(names)
    assert stages("digits_ablations") == [recipe(name) for name in ABLATIONS]


def test_all_ablations_meet_the_first_updates_of_the_long_run() -> None:
    lengths = {recipe(name).num_updates for name in ABLATIONS}
    assert lengths <= set(recipe("digits_apt_long").snapshot_at)
    assert recipe("digits_apt_long").snapshot_at == recipe("digits_apt_no_r1").snapshot_at


def test_ablated_layers_fit_the_digits_model() -> None:
    with torch.device("meta"):
        depth = create_model("mmdit_digits_latent").depth
    layers = paper_layers(depth)
    assert recipe("digits_apt_one_head").stage.layers == layers[-1:]  # type: ignore[union-attr]
    shallow = recipe("digits_apt_shallow").stage.layers  # type: ignore[union-attr]
    assert shallow == paper_layers(depth // 2)


def test_pixels_are_three_stages_in_a_row() -> None:
    pretrain, distill, apt = stages("digits_pixels")
    assert [pretrain, distill, apt] == [recipe(f"digits_pixels_{x}") for x in PIXEL_STAGES]
    check_chain(pretrain, distill, apt)


def test_digits_are_a_codec_and_three_stages_in_its_latents() -> None:
    made = stages("digits")
    assert made == [recipe(f"digits_{stage}") for stage in STAGES]
    codec, pretrain, distill, apt = made
    check_codec(codec, pretrain)
    check_chain(pretrain, distill, apt)
    assert apt.stage.generator_trains == "all", "as in the paper"  # type: ignore[union-attr]
    assert [config.data.setting for config in made] == ["free", "near", "near", "near"]
    assert check_grid(codec, pretrain) == (3, 4, 4)


def test_digits_on_a_gpu_are_the_same_stages_on_larger_clips() -> None:
    codec, *rest = stages("digits_gpu")
    check_codec(codec, rest[0])
    check_chain(*rest)
    assert check_grid(codec, rest[0]) == (5, 8, 8)
    assert {(c.data.clip.frames, c.data.clip.height) for c in (codec, *rest)} == {(17, 64)}
    assert all(config.batch_size >= 512 for config in rest)
    ours, shipped = flat(rest[-1]), flat(recipe("digits_apt"))
    method = [key for key in ours if key.startswith("stage.") and "runs/" not in str(ours[key])]
    assert all(ours[key] == shipped[key] for key in method)


def test_the_papers_way_has_the_papers_values() -> None:
    ours, paper = flat(recipe("digits_apt_paper")), flat(recipe("apt_video_720p"))
    same = [
        *(key for key in ours if key.startswith(("stage.r1.", "stage.terms."))),
        *("stage.objective", "stage.head", "stage.generator_trains"),
        *(key for key in ours if key.startswith("optimizer.") and key != "optimizer.learning_rate"),
    ]
    assert {key: ours[key] for key in same} == {key: paper[key] for key in same}
    start, shipped = ("stage.generator", "stage.discriminator"), flat(recipe("digits_apt"))
    assert [ours[key] for key in start] == [shipped[key] for key in start]


def check_codec(codec: TrainConfig, pretrain: TrainConfig) -> None:
    assert isinstance(codec.stage, AutoencoderConfig)
    assert isinstance(pretrain.stage, PretrainConfig)
    assert pretrain.stage.codec == f"{codec.run_dir}/export"


def check_grid(codec: TrainConfig, pretrain: TrainConfig) -> tuple[int, int, int]:
    """The tokens of a clip."""
    latents, clip = create_codec(codec.model.codec, **codec.model.codec_options), codec.data.clip
    with torch.device("meta"):
        backbone = create_model(pretrain.model.name, **pretrain.model.options)
    assert backbone.in_channels == latents.channels
    size = latents.latent_shape(clip.frames, clip.height, clip.width)
    return backbone.token_grid(size)


def check_chain(pretrain: TrainConfig, distill: TrainConfig, apt: TrainConfig) -> None:
    """Each starts from what the one before exports; D from the diffusion model."""
    assert isinstance(pretrain.stage, PretrainConfig)
    assert isinstance(distill.stage, DistillConfig)
    assert isinstance(apt.stage, AdversarialConfig)
    assert distill.stage.teacher == f"{pretrain.run_dir}/export"
    assert apt.stage.generator == f"{distill.run_dir}/export"
    assert apt.stage.discriminator == f"{pretrain.run_dir}/export"
    assert distill.stage.loss.cfg_scale == pretrain.stage.cfg_scale


def test_walks_are_the_latent_stages_on_a_folder() -> None:
    codec, pretrain, distill, apt = stages("walks")
    assert [Path(c.run_dir).parent for c in (codec, pretrain, distill, apt)] == [
        Path("runs/walks")
    ] * 4
    assert isinstance(pretrain.stage, PretrainConfig)
    assert pretrain.stage.codec == f"{codec.run_dir}/export"
    assert isinstance(apt.stage, AdversarialConfig)
    assert apt.stage.generator == f"{distill.run_dir}/export"
    assert apt.stage.discriminator == f"{pretrain.run_dir}/export"
    assert all(c.data == codec.data for c in (pretrain, distill, apt))
    latents, clip = create_codec(codec.model.codec), codec.data.clip
    size = latents.latent_shape(clip.frames, clip.height, clip.width)
    assert create_model(pretrain.model.name, **pretrain.model.options).token_grid(size)
    encoder = create_text_encoder(
        pretrain.model.text_encoder, **pretrain.model.text_encoder_options
    )
    assert len(encoder(pretrain.sample_prompts)) == len(pretrain.sample_prompts)


def test_the_digits_models_fit_each_other() -> None:
    config = recipe("digits_pixels_pretrain")
    bundle = initial_bundle(config)
    assert bundle.info.stage == "diffusion"
    assert bundle.backbone.in_channels == bundle.codec.channels
    assert bundle.backbone.config.text_dim == bundle.text_encoder.embedding_dim
    text, codec = bundle.info.text_encoder, bundle.info.codec
    rebuilt = create_text_encoder(text.architecture, **text.config)
    assert rebuilt.config == bundle.text_encoder.config
    assert create_codec(codec.architecture, **codec.config).config == bundle.codec.config
    # The prompts of the sample sheets can be read.
    assert len(bundle.text_encoder(config.sample_prompts)) == len(config.sample_prompts)
    weights = sum(p.numel() for m in bundle.modules() for p in m.parameters())
    # A shipped folder is at most 16 MB, in bf16.
    assert weights * 2 < 16e6


@pytest.mark.parametrize(
    ("ours", "paper"),
    [
        ("apt_image_wan", "apt_image_1024"),
        ("apt_video_wan", "apt_video_720p"),
        ("apt_image_sd35", "apt_image_1024"),
    ],
)
def test_recipes_for_public_models_keep_the_papers_method(ours: str, paper: str) -> None:
    """They differ only in models, data and batch, for reasons that the module gives."""
    free = {
        "name", "run_dir", "batch_size", "negative_prompt", "sample_every", "sample_prompts",
        "stage.generator", "stage.discriminator",
        "stage.r1.weight", "stage.r1.sigma",  # of the same product, which survives bf16
    }  # fmt: skip
    one, other = flat(recipe(ours)), flat(recipe(paper))
    assert one.keys() == other.keys()
    different = {key for key in one if one[key] != other[key] and not key.startswith("data.")}
    assert different <= free


@pytest.mark.parametrize("name", PUBLIC)
def test_recipes_for_public_models_start_from_weights_that_are_published(name: str) -> None:
    stage = recipe(name).stage
    source = getattr(stage, stage.names_models[-1])
    assert MODELS.pretrained(source)
    assert recipe(name).data.source == "latents"
    assert not recipe(name).sample_every  # a run on a latent cache has no codec to show them
