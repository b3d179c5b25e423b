"""Sequences of stages, each of which starts from the models of earlier ones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apt.checkpoints.info import INFO_FILE, read_description
from apt.checkpoints.runs import EXPORT
from apt.errors import InputError
from apt.files import write_text
from apt.train.config import TrainConfig
from apt.train.config_file import plain, read_configs

STAGES_NAME = "stages.json"
"""File in the folder of a sequence with the configurations of its stages, so the folder is enough
to resume it."""


def move_runs(
    configs: Sequence[TrainConfig], *, before: Sequence[TrainConfig]
) -> list[TrainConfig]:
    """Give every stage its own folder inside the one folder that all of them name.

    Args:
        configs: stages with the same `run_dir`, the folder for all.
        before: the same stages with separate folders; the last part of each path is kept.

    Returns:
        The stages; those that start from the model of an earlier one name its new folder.
    """
    places = {
        old.run_dir: str(Path(new.run_dir) / Path(old.run_dir).name)
        for old, new in zip(before, configs, strict=True)
    }

    def moved(value: Any) -> Any:
        for old, new in places.items():
            if isinstance(value, str) and (value == old or value.startswith(f"{old}/")):
                return new + value.removeprefix(old)
        return value

    return [
        dataclasses.replace(
            new,
            run_dir=places[old.run_dir],
            lora=dataclasses.replace(new.lora, base=moved(new.lora.base)),
            stage=dataclasses.replace(
                new.stage,
                **{
                    field.name: moved(getattr(new.stage, field.name))
                    for field in dataclasses.fields(new.stage)
                },
            ),
        )
        for old, new in zip(before, configs, strict=True)
    ]


def record_stages(configs: Sequence[TrainConfig]) -> None:
    """Write `STAGES_NAME` into the folder that all stages share; do nothing if they share none.

    Raises InputError if it cannot be written.
    """
    folders = {Path(config.run_dir).parent for config in configs}
    if len(configs) < 2 or len(folders) > 1:
        return
    file = folders.pop() / STAGES_NAME
    text = json.dumps([plain(config) for config in configs], indent=2)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, f"{text}\n")
    except OSError as error:
        raise InputError(f"cannot write {str(file)!r}: {error.strerror or error}") from error


def read_stages(folder: Path) -> list[TrainConfig]:
    """Return the recorded stages of a sequence, at its current place; empty if there is no record.

    Raises ConfigError for a damaged record.
    """
    file = folder / STAGES_NAME
    if not file.is_file():
        return []
    before = read_configs(file)
    return move_runs(
        [dataclasses.replace(config, run_dir=str(folder)) for config in before], before=before
    )


def is_finished(config: TrainConfig) -> bool:
    """Return whether the run has exported the model of its last update."""
    export = Path(config.run_dir) / EXPORT
    if not (export / INFO_FILE).is_file():
        return False
    return bool(read_description(export).training.get("updates") == config.num_updates)
