"""Objects handed to `apt.train.run` in place of the names in its configuration."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import apt.train
from apt.checkpoints.info import read_info
from apt.checkpoints.load import load_bundle
from apt.errors import ConfigError, DataError, InputError
from apt.methods import AdversarialConfig, AutoencoderConfig, DistillConfig, PretrainConfig
from apt.models import CODECS, MODELS, TEXT_ENCODERS
from apt.pipeline import OneStepPipeline
from apt.train.config import DataConfig, LoRAConfig, TrainConfig
from apt.train.logs import read_log
from tests.cli.shell import error_line, invoke
from tests.train.own_classes import (
    CAPTIONS,
    CLIP,
    Bars,
    Fold,
    FoldConfig,
    Mixer,
    MixerConfig,
    Words,
    WordsConfig,
)
from tests.train.tiny_methods import LATENT_SHAPE, save_start


def config(run_dir: Path, stage: Any = None, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "num_updates": 2,
        "batch_size": 2,
        "checkpoint_every": 1,
        "sample_every": 0,
        "ema_decay": 0.5,
        "device": "cpu",
        **changes,
    }
    stage = stage or PretrainConfig()
    return TrainConfig(name="objects", run_dir=str(run_dir), stage=stage, **options)


def objects(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    codec = Fold(FoldConfig())
    codec.scale.fill_(0.25)  # not what its config builds
    made = {"model": Mixer(MixerConfig()), "text_encoder": Words(WordsConfig()), "codec": codec}
    return {**made, "dataset": Bars(6), **changes}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two updates."""
    folder = tmp_path_factory.mktemp("objects") / "run"
    changes = {"sample_every": 2, "sample_prompts": CAPTIONS}
    return apt.train.run(config(folder, **changes), **objects())


@pytest.fixture
def own_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    for registry in (MODELS, TEXT_ENCODERS, CODECS):
        monkeypatch.setattr(registry, "_builders", dict(registry._builders))
    monkeypatch.setattr(MODELS, "_pretrained", dict(MODELS._pretrained))


def test_the_given_weights_are_what_is_trained(tmp_path: Path) -> None:
    given = objects()
    before = {k: v.clone() for k, v in given["model"].state_dict().items()}
    apt.train.run(config(tmp_path / "run", ema_decay=1.0, ema_warmup=False, num_updates=1), **given)
    after = given["model"].state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    exported = load_file(tmp_path / "run" / "export" / "transformer.safetensors")
    assert all(torch.equal(before[k], exported[k]) for k in before)  # an average that never moves


def test_the_run_folder_tells_what_was_given(run_dir: Path) -> None:
    written = json.loads((run_dir / "config.json").read_text())
    assert written["data"]["source"] == "object"
    assert [written["data"][name] for name in ("frames", "height", "width")] == list(CLIP)
    assert written["model"]["name"] == "tests.train.own_classes.Mixer"
    assert written["objects"]["dataset"] == {"class": "Bars", "length": 6}
    assert written["objects"]["model"]["class"] == "Mixer"
    assert (run_dir / "samples" / "00000002.png").is_file()


@pytest.mark.usefixtures("own_registries")
def test_the_export_has_all_parts_and_waits_for_their_registration(run_dir: Path) -> None:
    info = read_info(run_dir / "export")
    assert info.model.architecture == "tests.train.own_classes.Mixer"
    assert (info.codec.weights, info.text_encoder.weights) == (
        "codec.safetensors",
        "text_encoder.safetensors",
    )
    assert (info.sample.frames, info.sample.height, info.sample.width) == CLIP
    with pytest.raises(InputError, match=r"own_classes\.Mixer', which is not registered here"):
        load_bundle(run_dir / "export")
    for registry, part, kind in (
        (MODELS, info.model, MixerConfig),
        (TEXT_ENCODERS, info.text_encoder, WordsConfig),
        (CODECS, info.codec, FoldConfig),
    ):
        registry.register(part.architecture)(kind)
    pipeline = OneStepPipeline.from_pretrained(run_dir / "export", device="cpu")
    assert load_bundle(run_dir / "export").codec.get_parameter("scale").item() == 0.25
    assert pipeline(CAPTIONS[0], seed=0, num_steps=2).shape[-3:-1] == CLIP[1:]


@pytest.mark.usefixtures("own_registries")
def test_a_registered_kind_is_named_as_it_is_registered(tmp_path: Path) -> None:
    MODELS.register("my_mixer")(MixerConfig)
    MODELS.register("my_deep_mixer")(lambda: MixerConfig(depth=3))
    deep = Mixer(MixerConfig(depth=3))
    apt.train.run(config(tmp_path / "run", num_updates=1), **objects(model=deep))
    assert read_info(tmp_path / "run" / "export").model.architecture == "my_deep_mixer"


def test_a_resumed_run_is_an_uninterrupted_one(run_dir: Path, tmp_path: Path) -> None:
    apt.train.run(config(tmp_path / "run", num_updates=1), **objects())
    torch.manual_seed(9)
    fresh = objects(model=Mixer(MixerConfig()), dataset=Bars(6))
    apt.train.run(config(tmp_path / "run"), **fresh, resume=True)
    for name in ("generator/loss", "generator/grad_norm"):
        assert [e[name] for e in read_log(tmp_path / "run")] == [e[name] for e in read_log(run_dir)]
    weights = Path("export", "transformer.safetensors")
    assert (tmp_path / "run" / weights).read_bytes() == (run_dir / weights).read_bytes()


def test_the_command_line_cannot_continue_it_and_says_so(run_dir: Path) -> None:
    line = error_line(invoke("train", "digits_pretrain", "--run-dir", run_dir, "--resume"))
    assert "started in Python with objects that the command line cannot name" in line
    assert "codec (Fold), dataset (Bars), model (Mixer), text_encoder (Words)" in line
    assert "apt.train.run(config, ..., resume=True)" in line
    for alone in (["--resume", run_dir], ["--config", run_dir / "config.json"]):
        line = error_line(invoke("train", *alone))
        assert "which a file cannot hold (codec, dataset, model, text_encoder)" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": Bars(5)}, "another dataset: Bars of 6 clips, but now it is Bars of 5 clips"),
        (
            {"model": Mixer(MixerConfig(depth=3))},
            "another model: Mixer with 1,740 parameters",
        ),
        ({"model": None}, "pass model again"),
    ],
)
def test_other_objects_do_not_continue_it(
    run_dir: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        apt.train.run(config(run_dir, num_updates=3), **objects(**changes), resume=True)


def test_a_run_without_objects_is_not_continued_with_some(tmp_path: Path) -> None:
    tiny = config(tmp_path / "run", num_updates=1)
    model = dataclasses.replace(tiny.model, options={"hidden_size": 24, "depth": 1, "num_heads": 2})
    tiny = dataclasses.replace(tiny, model=model)
    apt.train.run(tiny)
    with pytest.raises(ConfigError, match="was started without dataset; leave that out"):
        apt.train.run(dataclasses.replace(tiny, num_updates=2), dataset=Bars(6), resume=True)


@pytest.mark.parametrize("stage", ["distill", "adversarial"])
def test_bundles_train_as_the_folders_that_they_come_from(stage: str, tmp_path: Path) -> None:
    starts = save_start(tmp_path / "starts")
    loaded = {name: load_bundle(folder) for name, folder in starts.items()}
    if stage == "distill":
        named, bare = DistillConfig(teacher=starts["generator"]), DistillConfig()
        bundles = {"teacher": loaded["generator"]}
    else:
        named, bare = AdversarialConfig(**starts), AdversarialConfig()
        bundles = loaded
    data = DataConfig(frames=CLIP[0], height=CLIP[1], width=CLIP[2])
    for run_dir, method, given in (("named", named, {}), ("given", bare, bundles)):
        changed = config(tmp_path / run_dir, method, data=data)
        apt.train.run(changed, bundles=given, dataset=Bars(4))
    logs = [(tmp_path / name / "log.jsonl").read_bytes() for name in ("named", "given")]
    assert logs[0] == logs[1]
    assert LATENT_SHAPE[0] == loaded["generator"].codec.channels


def test_adapters_on_a_bundle_are_continued(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    folder = save_start(tmp_path / "starts")["generator"]
    lora = LoRAConfig(rank=2)
    for updates in (1, 2):
        one = config(tmp_path / "run", DistillConfig(), lora=lora, num_updates=updates)
        bundles = {"teacher": load_bundle(folder)}
        apt.train.run(one, bundles=bundles, dataset=Bars(4), resume=updates > 1)
    assert [entry["step"] for entry in read_log(tmp_path / "run")] == [1, 2]


def test_one_bundle_may_stand_for_both(tmp_path: Path) -> None:
    bundle = load_bundle(save_start(tmp_path / "starts")["generator"])
    both = {"generator": bundle, "discriminator": bundle}
    one = config(tmp_path / "run", AdversarialConfig(layers=(1,)), num_updates=1)
    apt.train.run(one, bundles=both, dataset=Bars(4))
    assert len(bundle.backbone.block_list()) == 3  # D's copy has lost two


def broken(name: str) -> Mixer:
    model = Mixer(MixerConfig())
    if name == "nan":
        model.out.weight.data[0, 0] = float("nan")
    elif name == "half":
        model.half()
    else:
        model.out = torch.nn.Linear(16, 4)
    return model


@pytest.mark.parametrize(
    ("stage", "given", "message"),
    [
        (PretrainConfig(), {"model": torch.nn.Linear(2, 2)}, "expected apt.models.transformer.Dif"),
        (PretrainConfig(), {"codec": Words(WordsConfig())}, "codec is a Words"),
        (PretrainConfig(), {"model": broken("nan")}, "NaN or infinite, in out.weight"),
        (PretrainConfig(), {"model": broken("half")}, "is float16; pass module.float()"),
        (
            PretrainConfig(),
            {"model": broken("shape")},
            "out.bias is (4,), but (12,) in what build() returns",
        ),
        (PretrainConfig(codec="c"), {"codec": Fold(FoldConfig())}, "leave one of them out"),
        (PretrainConfig(), {"bundles": {"teacher": 1}}, "no model 'teacher'; choose from: start"),
        (DistillConfig(), {"model": Mixer(MixerConfig())}, "bundles={'teacher': apt.ModelBundle"),
        (DistillConfig(), {"bundles": {"teacher": 1}}, "teacher has type int; expected an apt"),
        (DistillConfig(), {}, "--stage.teacher is empty"),
        (AutoencoderConfig(), {"model": Mixer(MixerConfig())}, "trains a codec and has no model"),
    ],
)
def test_bad_objects_are_one_line_and_leave_no_folder(
    stage: Any, given: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        apt.train.run(config(tmp_path / "run", stage), **given)
    assert "\n" not in str(error.value)


def test_clips_of_another_size_than_was_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Bars, item 0 is 5x8x8, but the run asks for 5x8x16"):
        apt.train.run(config(tmp_path / "run", data=DataConfig(width=16)), **objects())
