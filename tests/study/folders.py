"""Small folders of samples, written as generating writes them, and a study of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from apt.media import write_media
from apt.outputs import Output, OutputRecord
from apt.samples import MANIFEST, SampleFolder, SampleKey, read_samples
from apt.study.document import Study
from apt.study.make import MakeConfig, make_study

PROMPTS = ("a red seven", "a <b>blue</b> nine", "x" * 30)
KEYS: tuple[SampleKey, ...] = tuple((prompt, seed) for prompt in PROMPTS for seed in (0, 3))
DEFAULTS = MakeConfig()


def write_samples(
    folder: Path, keys: Sequence[SampleKey] = KEYS, *, look: int = 0, suffix: str = ".mp4"
) -> SampleFolder:
    """Noise of 5 frames of 32×32, or of one; another look is another model."""
    random = np.random.default_rng(look)
    folder.mkdir(parents=True)
    record = OutputRecord(folder / MANIFEST, {"model": f"model {look}"}, resume=False)
    for number, (prompt, seed) in enumerate(keys):
        frames = random.integers(0, 256, (1 if suffix == ".png" else 5, 32, 32, 3), dtype=np.uint8)
        output = Output(path=folder / f"{number}{suffix}", prompt=prompt, seed=seed)
        write_media(output.path, frames, fps=10, scale=1)
        record.add(output)
    return read_samples(folder)


def small_study(
    folder: Path,
    models: Sequence[str] = ("ours", "theirs"),
    keys: Sequence[SampleKey] = KEYS,
    *,
    suffix: str = ".mp4",
    config: MakeConfig = DEFAULTS,
) -> Study:
    """A study in `folder`, of models whose samples lie beside it."""
    folders = {
        name: write_samples(folder.parent / f"of_{name}", keys, look=look, suffix=suffix)
        for look, name in enumerate(models)
    }
    return make_study(folder, folders, config=config)
