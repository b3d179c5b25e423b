"""G's step on its own captions: an update uses two batches, and can resume between them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from apt.data.digits import MovingDigits
from apt.errors import ConfigError
from apt.methods import AdversarialConfig
from apt.methods.apt import AdversarialPostTraining
from apt.train import checkpoint, loop
from apt.train.config import OptimizerConfig, TrainConfig
from apt.train.logs import LOG_NAME
from apt.train.signals import StopRequest
from apt.train.trainer import run
from tests.train.tiny_methods import save_start

UPDATES, BATCH, STOPS_AT = 3, 2, 2
Drawn = list[tuple[int, str, int, str]]


def config(root: Path, name: str, **stage: Any) -> TrainConfig:
    options: dict[str, Any] = {"generator_captions": "own", **stage}
    options |= {field: str(root / field) for field in ("generator", "discriminator")}
    return TrainConfig(
        name="tiny",
        run_dir=str(root / name),
        stage=AdversarialConfig(**options),
        optimizer=OptimizerConfig(learning_rate=1e-3, eps=1e-3),
        num_updates=UPDATES,
        batch_size=BATCH,
        micro_batch_size=1,
        sample_every=0,
        sample_prompts=(),
        device="cpu",
    )


def trained(
    settings: TrainConfig, patch: pytest.MonkeyPatch, *, stops: bool = False, resume: bool = False
) -> Drawn:
    """Run it; returns what samples were drawn for: update, part, place in the batch and caption."""
    draw, stop = AdversarialPostTraining.draw_fake, StopRequest()
    drawn: Drawn = []

    def watching(stage: Any, batch: Any, c: Any, update: int, stream: str) -> Any:
        drawn.append((update, stream.partition("/")[0], batch.offset, batch.captions[0]))
        if stops and drawn[-1][:3] == (STOPS_AT - 1, "generator", 0):
            stop.request("a test")
        return draw(stage, batch, c, update, stream)

    with patch.context() as here:
        here.setattr(loop, "plot_losses", lambda run_dir: None)
        here.setattr(AdversarialPostTraining, "draw_fake", watching)
        run(settings, stop=stop, resume=resume)
    return drawn


def test_the_generator_gets_the_batch_after_the_discriminators(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_start(tmp_path)
    drawn = trained(config(tmp_path, "whole"), monkeypatch)
    clips = MovingDigits(0)
    order = islice(clips.batches(BATCH, seed=0), 2 * UPDATES)
    parts = [(update, part) for update in range(UPDATES) for part in ("discriminator", "generator")]
    assert drawn == [
        (update, part, place, clips[index].caption)
        for (update, part), batch in zip(parts, order, strict=True)
        for place, index in enumerate(batch)
    ]

    first = trained(config(tmp_path, "halved"), monkeypatch, stops=True)
    found = checkpoint.latest(tmp_path / "halved" / "checkpoints")
    assert found is not None
    assert checkpoint.read_meta(found)["under_way"]["parts"] == ["discriminator"]
    rest = trained(config(tmp_path, "halved"), monkeypatch, resume=True)
    # The micro-batch that was given up is done again.
    assert first[:-1] + rest == drawn
    for name in (LOG_NAME, "export/transformer.safetensors"):
        halved, whole = (tmp_path / run_dir / name for run_dir in ("halved", "whole"))
        assert halved.read_bytes() == whole.read_bytes()

    with pytest.raises(ConfigError, match="generator_captions"):
        shared = config(tmp_path, "whole", generator_captions="shared")
        trained(shared, monkeypatch, resume=True)
