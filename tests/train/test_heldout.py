"""The loss on held-out clips: what it is, and that measuring it does not change training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import apt.train
from apt.checkpoints.load import ModelBundle
from apt.data.clips import check_clips
from apt.data.dataset import Batch, EncodedSample
from apt.data.heldout import hold_out
from apt.errors import ConfigError, DataError
from apt.methods import AutoencoderConfig, PretrainConfig
from apt.methods.base import Host, MicroBatch, Stage, even_timesteps
from apt.methods.flow_matching import FlowMatchingPretraining
from apt.train.config import DataConfig, HeldoutConfig, ModelConfig, TrainConfig
from apt.train.config_file import plain
from apt.train.heldout import HeldOut, divide
from apt.train.host import RunHost
from apt.train.logs import read_log
from apt.train.plots import plot_losses
from apt.train.resume import check_resumable
from tests.train.own_classes import CLIP, Bars, Mixer, MixerConfig, Words, WordsConfig
from tests.train.tiny_methods import (
    adversarial,
    distill,
    micro_batches,
    pretrain,
    single,
    weights,
)

KEYS = {
    "pretrain": {"heldout/generator/loss"},
    "distill": {"heldout/generator/loss"},
    "apt": {
        f"heldout/discriminator/{name}"
        for name in ("loss", "logit_gap", "logit_real", "logit_fake")
    },
}


class Poisoned(Bars):
    """Bars of which some cannot be read."""

    def __init__(self, count: int, poisoned: set[int]) -> None:
        super().__init__(count)
        self.poisoned = poisoned

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        pixels, caption = super().__getitem__(index)
        return (pixels * float("nan") if index in self.poisoned else pixels), caption


Poisoned.__qualname__ = "Bars"  # clips go by the name of their class


def config(run_dir: Path, stage: Any = None, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "name": "held",
        "run_dir": str(run_dir),
        "num_updates": 4,
        "batch_size": 2,
        "checkpoint_every": 1,
        "sample_every": 0,
        "ema_decay": 0.5,
        "device": "cpu",
        "model": ModelConfig(codec_options={"temporal": 1, "spatial": 2}),
    }
    return TrainConfig(stage=stage or PretrainConfig(), **{**options, **changes})


def parts(dataset: Any = None, count: int = 8) -> dict[str, Any]:
    torch.manual_seed(0)
    made = {"model": Mixer(MixerConfig()), "text_encoder": Words(WordsConfig())}
    return {**made, "dataset": Bars(count) if dataset is None else dataset}


HELD = HeldoutConfig(clips=3, every=2)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("held") / "run"
    return apt.train.run(config(folder, heldout=HELD), **parts())


def test_it_is_logged_at_its_interval_and_drawn_beside_the_loss(run_dir: Path) -> None:
    entries = read_log(run_dir)
    found = [entry.get("heldout/generator/loss") for entry in entries]
    assert [value is not None for value in found] == [False, True, False, True]
    plot_losses(run_dir)  # with gaps


def test_they_are_never_trained_on_and_measuring_them_changes_nothing(
    run_dir: Path, tmp_path: Path
) -> None:
    whole = check_clips(Bars(8), DataConfig(frames=CLIP[0], height=8, width=8).request(seed=0))
    held = {item for items in hold_out(whole, clips=3)[1].members.values() for item in items}  # type: ignore[type-var]
    poisoned = held - set(range(4))  # the first are read for the fingerprint too
    assert poisoned
    never = dataclasses.replace(HELD, every=100)
    for updates in (2, 4):  # of more samples than there are, and resumed
        changes = {"heldout": never, "num_updates": updates}
        given = parts(Poisoned(8, poisoned))
        apt.train.run(config(tmp_path / "run", **changes), **given, resume="auto")
    logs = [
        [{k: v for k, v in entry.items() if not k.startswith("heldout")} for entry in read_log(run)]
        for run in (run_dir, tmp_path / "run")
    ]
    assert logs[0] == logs[1]
    name = Path("export", "transformer.safetensors")
    assert (tmp_path / "run" / name).read_bytes() == (run_dir / name).read_bytes()


def test_a_resumed_run_measures_the_same(run_dir: Path, tmp_path: Path) -> None:
    for updates in (3, 4):
        changes = {"heldout": HELD, "num_updates": updates}
        apt.train.run(config(tmp_path / "run", **changes), **parts(), resume="auto")
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == (run_dir / "log.jsonl").read_bytes()


def test_the_log_of_a_stream_is_the_same_with_and_without(tmp_path: Path) -> None:
    logs = []
    for name, heldout in (("without", HeldoutConfig()), ("with", HeldoutConfig(clips=2, every=1))):
        model = ModelConfig(
            options={"hidden_size": 24, "depth": 1, "num_heads": 2, "text_dim": 16,
                     "pooled_dim": 16},
            text_encoder_options={"width": 16, "depth": 1, "num_heads": 2},
        )  # fmt: skip
        changes = {"heldout": heldout, "model": model, "num_updates": 1}
        logs.append(read_log(apt.train.run(config(tmp_path / name, **changes))))
    assert all("heldout/generator/loss" in entry for entry in logs[1])
    for entry in logs[1]:
        del entry["heldout/generator/loss"]
    assert logs[0] == logs[1]


@pytest.fixture
def stages(tmp_path: Path) -> dict[str, Any]:
    return {"pretrain": pretrain(), "distill": distill(tmp_path), "apt": adversarial(tmp_path)}


@pytest.mark.parametrize("name", KEYS)
def test_every_method_measures_the_same_clips_alike(name: str, stages: dict[str, Any]) -> None:
    stage = stages[name]
    stage.update(micro_batches(), 0)
    before = {part: weights(trained.module) for part, trained in stage.trained.items()}
    state = torch.random.get_rng_state()
    held = HeldOut([], [[0, 1, 2, 3]], 4, 1)  # type: ignore[arg-type]
    found = [measured(held, stage), measured(held, stage)]
    assert found[0].keys() == KEYS[name]
    assert found[0] == found[1]
    # One by one, as a smaller micro-batch or more ranks would have it
    alone = measured(dataclasses.replace(held, size=1), stage)
    assert alone == pytest.approx(found[0], rel=1e-4, abs=1e-6)
    assert torch.equal(torch.random.get_rng_state(), state)
    for part, kept in before.items():
        now = weights(stage.trained[part].module)
        assert all(torch.equal(kept[key], now[key]) for key in kept)


def measured(held: HeldOut, stage: Stage) -> dict[str, float]:
    """As `HeldOut.measure`, of the tiny methods' latents."""
    samples = [EncodedSample(batch.x[0], batch.captions[0]) for batch in micro_batches(1)]
    of = dataclasses.replace(held, clips=samples)  # type: ignore[arg-type]

    def prepare(batch: Batch) -> list[MicroBatch]:
        assert batch.latents is not None
        return [MicroBatch(batch.latents, batch.captions, batch.offset)]

    values, problem = of.measure(stage, single(), prepare)
    assert problem is None
    return values


def test_the_loss_is_that_of_the_averaged_weights(stages: dict[str, Any]) -> None:
    stage = stages["pretrain"]
    held = HeldOut([], [[0, 1, 2, 3]], 4, 1)  # type: ignore[arg-type]
    first = measured(held, stage)
    with torch.no_grad():
        for parameter in stage.generator.module.parameters():
            parameter.add_(1.0)  # the average has not moved
    assert measured(held, stage) == first


def test_the_loss_falls_with_training(stages: dict[str, Any]) -> None:
    """A target that the network can reach: the loss on the clips falls with training on them."""
    stage = pretrain(
        optimizer=dataclasses.replace(stages["pretrain"].host.config.optimizer, learning_rate=1e-2)
    )
    held = HeldOut([], [[0, 1, 2, 3]], 4, 1)  # type: ignore[arg-type]
    before = measured(held, stage)["heldout/generator/loss"]
    for update in range(10):
        stage.update(micro_batches(), update)
    assert measured(held, stage)["heldout/generator/loss"] < before


def test_a_codecs_statistics_stay() -> None:
    made = config(Path("unused"), AutoencoderConfig(), model=ModelConfig(codec="digits_ae"))
    stage = made.stage.begin(RunHost(made, single()))
    pixels = torch.rand(2, 3, 5, 16, 16) * 2 - 1
    batch = MicroBatch(pixels, ["", ""], offset=0)
    stage.update([batch], 0)
    before = {name: value.clone() for name, value in stage.extra_state()["statistics"].items()}
    with torch.no_grad():
        found = [stage.heldout(batch) for _ in range(2)]
    assert found[0].keys() == {
        f"codec/{name}" for name in ("pixels", "gradients", "frequencies", "latents")
    }
    assert found[0] == found[1]
    after = stage.extra_state()["statistics"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_timesteps_lie_evenly_and_belong_to_their_sample() -> None:
    batch = MicroBatch(torch.zeros(64, 1), ["x"] * 64, offset=0)
    t = even_timesteps(batch)
    counts = torch.histc(t, 8, 0, 1)
    assert counts.min() >= 7 and counts.max() <= 9
    later = MicroBatch(torch.zeros(4, 1), ["x"] * 4, offset=60)
    assert torch.equal(even_timesteps(later), t[60:])


def test_what_cannot_be_held_out_is_told_before_anything_is_trained(tmp_path: Path) -> None:
    def refused(match: str, stage: Any = None, given: Any = None, **changes: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            apt.train.run(config(tmp_path / "run", stage, **changes), **(given or {}))
        assert not (tmp_path / "run" / "log.jsonl").exists()

    refused("set a number of clips", heldout=HeldoutConfig(share=0.1))
    refused("leaves nothing to train on", given=parts(), heldout=HeldoutConfig(clips=8))
    refused("set only one of them", heldout=HeldoutConfig(clips=8, share=0.1))
    refused(r"heldout\.share must be", heldout=HeldoutConfig(share=1.0))
    refused("this run reads none; use --heldout.clips", heldout=HeldoutConfig(path=str(tmp_path)))


def test_the_folder_that_is_held_out_is_not_one_that_is_trained_on(tmp_path: Path) -> None:
    data = DataConfig(source="folder", path=str(tmp_path))
    for path in (tmp_path, tmp_path / "inside", tmp_path.parent):
        held = config(tmp_path, data=data, heldout=HeldoutConfig(path=str(path)))
        with pytest.raises(ConfigError, match="overlap"):
            divide(held, Bars(3), None, lambda data: Bars(3), ranks=1)  # type: ignore[arg-type,return-value]


def test_a_method_without_a_measure_says_so(tmp_path: Path) -> None:
    class Mute(FlowMatchingPretraining):
        heldout = Stage.heldout

    class MuteConfig(PretrainConfig):
        def build(self, start: ModelBundle, host: Host) -> FlowMatchingPretraining:
            return Mute(self, start, host)

    with pytest.raises(ConfigError, match="has no measures for held-out clips"):
        apt.train.run(config(tmp_path / "run", MuteConfig(), heldout=HELD), **parts())


def test_data_that_changed_cannot_go_on(tmp_path: Path) -> None:
    apt.train.run(config(tmp_path / "run", heldout=HELD, num_updates=1), **parts())

    class Others(Bars):
        def __getitem__(self, index: int) -> Any:
            pixels, caption = super().__getitem__(index)
            return pixels * 0.5, caption

    Others.__qualname__ = "Bars"
    with pytest.raises(ConfigError, match="could be held out now"):
        again = config(tmp_path / "run", heldout=HELD, num_updates=2)
        apt.train.run(again, **parts(Others(8)), resume=True)


def test_a_broken_clip_among_them_stops_with_the_state_saved(tmp_path: Path) -> None:
    def prepare(batch: Any) -> Any:
        raise DataError("item 3 is broken")

    stage = pretrain()
    before = weights(stage.generator.module)
    held = HeldOut([EncodedSample(torch.zeros(1), "")], [[0]], 1, 1)  # type: ignore[arg-type]
    values, problem = held.measure(stage, single(), prepare)
    assert (values, str(problem)) == ({}, "item 3 is broken")
    now = weights(stage.generator.module)
    assert all(torch.equal(before[key], now[key]) for key in before)


def test_runs_from_before_held_out_clips_continue(tmp_path: Path) -> None:
    now = dataclasses.replace(config(tmp_path), ema_warmup=False)
    before = plain(now)
    del before["heldout"]
    meta = {"config": before, "models": {}}
    assert check_resumable(now, meta, tmp_path / "step_00000001", 1) == []
    often = dataclasses.replace(now, heldout=HeldoutConfig(every=7))
    (said,) = check_resumable(often, meta, tmp_path / "step_00000001", 1)
    assert said == "heldout.every (was 100, is 7)"
