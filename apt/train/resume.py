"""Decide whether a run starts or resumes, and from which checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from apt.checkpoints.runs import STATE_NAME, model_folder
from apt.checkpoints.source import weights_digest
from apt.distributed.collectives import everywhere, rank
from apt.distributed.mesh import ParallelConfig
from apt.errors import CheckpointError, ConfigError, counted
from apt.models.checkpointing import Checkpointing
from apt.train import checkpoint
from apt.train.config import HeldoutConfig, TrainConfig
from apt.train.config_file import METHOD, OBJECTS, plain
from apt.train.logs import LOG_NAME, read_log
from apt.train.sequence import is_finished

__all__ = [
    "CHECKPOINTS", "COLLECTIVES", "CONFIG_NAME", "Resume", "check_resumable", "find_start",
    "is_done_as_asked", "model_identities", "recorded_objects",
]  # fmt: skip

CHECKPOINTS = "checkpoints"
COLLECTIVES = "collectives"
CONFIG_NAME = "config.json"

Resume = bool | Literal["auto"]
"""Start a run (False), resume one (True), or resume if possible and else start ("auto")"""

# What a resumed run may change: how long it trains, what it writes, and how it computes, but not
# its results.
_FREE_FIELDS = (
    "run_dir",
    "num_updates",
    "device",
    "micro_batch_size",
    "activation_checkpointing",
    "checkpointing",
    "compile_blocks",
    "checkpoint_every",
    "keep_checkpoints",
    "checkpoint_every_minutes",
    "checkpoint_in_background",
    "replay_every",
    "timeout_minutes",
    "snapshot_at",
    "sample_every",
    "sample_prompts",
    "wandb_project",
    "monitor",
    "stage.rounding_every",  # it only changes what is logged
    "parallel",
    "heldout.every",
    "heldout.path",
    "data.path",  # the data's fingerprint shows whether they differ
    "data.max_frames",  # sizes were resolved when the run began
    "data.max_pixels",
    "data.num_workers",
    "data.long_captions",
    "data.strict",
)

_BASE = "lora.base"
_CHANNELS = "model.options.in_channels"

_NEWER_FIELDS = (
    "checkpoint_every_minutes", "checkpoint_in_background", "replay_every", "timeout_minutes",
)  # fmt: skip


def find_start(run_dir: Path, resume: Resume, *, start_over: bool = False) -> Path | None:
    """Return the intact checkpoint to resume from, or None to begin at update 0. Collective.

    With `start_over`, a run whose checkpoints are lost begins again, and its files are moved to a
    subfolder.

    Raises:
        ConfigError: the folder holds a run that could be resumed, but `resume` is False.
        CheckpointError: there is nothing to resume, or no intact checkpoint.
    """
    root = run_dir / CHECKPOINTS
    names = checkpoint.all_names(root)
    newest = checkpoint.latest(root) if names else None
    if newest is not None:
        if not resume:
            raise ConfigError(
                f"{run_dir} already holds a run ({newest.name}); continue it with --resume, or "
                "choose another --run-dir"
            )
        return newest
    lost = _what_is_lost(run_dir, names)
    if lost and not start_over:
        raise CheckpointError(
            f"{lost}; nothing was changed. Restore an intact copy and --resume, choose another "
            "--run-dir, or begin again at update 0 with --start-over, which moves the old files to "
            "a subfolder"
        )
    if lost:
        everywhere(lambda: _set_aside(run_dir) if rank() == 0 else None)
    elif resume is True and not (run_dir / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{run_dir} holds no run to resume; start one without --resume, or with --continue, "
            "which starts or resumes"
        )
    # Otherwise there is no run, or it was stopped before its first checkpoint and begins again.
    return None


# Options of runs from before `apt.methods`, whose stages contained the options of their losses.
_EARLIER_OPTIONS = ("stage.r1_weight", "stage.num_timesteps")


def check_resumable(
    config: TrainConfig, meta: Mapping[str, Any], path: Path, done: int
) -> list[str]:
    """Compare a configuration with that of a checkpoint.

    Args:
        config: a resolved configuration.
        meta: the `meta` of the checkpoint.
        path: the folder of the checkpoint, for messages.
        done: updates of the checkpoint.

    Returns:
        Differences that do not affect results, as "option (was a, is b)".

    Raises:
        ConfigError: the run cannot be resumed with this configuration; the message names every
            option that differs.
    """
    if done > config.num_updates:
        raise ConfigError(
            f"{path} is already at update {done}, but num_updates is {config.num_updates}; set "
            f"--num-updates to at least {done} (nothing was changed)"
        )
    before = meta["config"]
    # Runs of earlier versions had none of these options, and did not name their method.
    given = {
        **_by_option(asdict(ParallelConfig()), "parallel."),
        **_by_option(asdict(Checkpointing()), "checkpointing."),
        "bf16_residual": False,
        "compile_blocks": False,
        "lora.base": "",
        "stage.generator_captions": "shared",
        "stage.discriminator_forwards": 1,
        "stage.discriminator_precision": "run",
        "stage.rounding_every": 0,
        **{name: getattr(config, name) for name in _NEWER_FIELDS},
        "ema_warmup": False,
        "wandb_project": "",
        "data.max_frames": config.data.max_frames,
        "data.max_pixels": config.data.max_pixels,
        f"stage.{METHOD}": config.stage.exports_as,
        **_by_option(asdict(HeldoutConfig()), "heldout."),
        **({f"stage.{config.stage.starts_from}": ""} if config.stage.may_begin_anew else {}),
    }
    now = _by_option(plain(config))
    # Not every stage has all of these options.
    then = {key: value for key, value in given.items() if key in now} | _by_option(before)
    if gone := sorted(key for key in then if key in _EARLIER_OPTIONS):
        raise ConfigError(
            f"{path} was started by an earlier version with other options ({gone[0]}, ...); "
            "finish it with that version, or start a new run in another --run-dir"
        )
    unused = _unused(config)
    differing = [
        key
        for key in sorted(now.keys() | then.keys())
        if now.get(key) != then.get(key) and not f"{key}.".startswith(unused)
    ]
    models, models_then = model_identities(config), meta.get("models", {})
    moved = {_option(f) for f in models if models[f] and models_then.get(f) == models[f]}
    free = [key for key in differing if {key, key.split(".")[0]} & {*_FREE_FIELDS, *moved}]
    said = {key: f"{key} (was {then.get(key)!r}, is {now.get(key)!r})" for key in differing}
    changed = [said[key] for key in differing if key not in free]
    changed += [
        f"{_option(field)} (the model at {str(now[_option(field)])!r} has changed)"
        for field in models
        if models_then.get(field, models[field]) != models[field]
        and _option(field) not in differing
    ]
    if changed:
        raise ConfigError(
            f"the configuration does not fit the checkpoint {path}: {'; '.join(changed)}. Resume "
            "with the same configuration, or start a new run in another --run-dir"
        )
    return [said[key] for key in free]


def recorded_objects(run_dir: Path, found: Path | None) -> dict[str, Any] | None:
    """Return the kinds of objects that the run was given in Python, or None if there is no run.

    They are in its checkpoint, or in config.json before the first checkpoint. Earlier versions
    recorded none.
    """
    if found is not None:
        return dict(checkpoint.read_meta(found).get(OBJECTS, {}))
    file = run_dir / CONFIG_NAME
    if not file.is_file():
        return None
    return dict(json.loads(file.read_text(encoding="utf-8")).get(OBJECTS, {}))


def model_identities(config: TrainConfig) -> dict[str, str]:
    """Return an identity of each model that the stage or `lora.base` names, by field.

    The identity of a folder is a digest of its weights, wherever it is; other files in it may
    change, such as the options of the run that made it. The identity of a built-in or Hub model is
    its name.
    """
    stage = config.stage
    named = {field: str(getattr(stage, field)) for field in stage.names_models}
    if config.lora.base:
        named[_BASE] = config.lora.base
    return {field: _identity(source) for field, source in named.items()}


def _option(field: str) -> str:
    """Return the option for a field of `model_identities`."""
    return field if field == _BASE else f"stage.{field}"


def _identity(source: str) -> str:
    folder = Path(source)
    return weights_digest(model_folder(folder)) if source and folder.is_dir() else source


def _unused(config: TrainConfig) -> tuple[str, ...]:
    """Return prefixes of unused options: of networks that come from the models that it names."""
    if config.stage.start_field is not None:
        return ("model.",)
    return ("model.codec.", "model.codec_options.") if config.stage.trained_codec() else ()


def is_done_as_asked(config: TrainConfig) -> bool:
    """Return whether the run is finished with the same configuration, so there is nothing to do.

    Fields that are left open count as equal, because they were resolved when the run began. The
    result is False for a run that was given objects in Python, and for data at another path, which
    would have to be read first.
    """
    run_dir = Path(config.run_dir)
    try:
        state = json.loads((run_dir / STATE_NAME).read_text(encoding="utf-8"))
        before = json.loads((run_dir / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if state.get("state") != "finished" or before.get(OBJECTS) or not is_finished(config):
        return False
    now, then, unused = _by_option(plain(config)), _by_option(before), _unused(config)
    settled = {key for key, value in now.items() if value is None or value == "auto"}
    free = {*_FREE_FIELDS, *settled, OBJECTS, _CHANNELS} - {"data.path", "heldout.path"}
    return all(
        now.get(key) == then.get(key)
        or not free.isdisjoint((key, key.split(".")[0]))
        or f"{key}.".startswith(unused)
        for key in now.keys() | then.keys()
    )


def _by_option(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested configuration to the names of options: {"stage.r1.weight": value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _by_option(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _what_is_lost(run_dir: Path, damaged: list[str]) -> str:
    """Describe progress of a run that no intact checkpoint has; empty if there is none."""
    if damaged:
        return (
            f"{run_dir} holds a run, but all its checkpoints are damaged (number: {len(damaged)}, "
            f"newest: {damaged[0]})"
        )
    if not (run_dir / LOG_NAME).is_file() or not (run_dir / CONFIG_NAME).is_file():
        return ""
    steps = len(read_log(run_dir))
    config = json.loads((run_dir / CONFIG_NAME).read_text(encoding="utf-8"))
    # With background saving, the first checkpoint may not be complete before the second is due.
    due = 2 if config.get("checkpoint_in_background") else 1
    if steps <= due * config["checkpoint_every"]:
        return ""
    return f"{run_dir} holds a run with {counted(steps, 'update')} in its log, but no checkpoint"


def _set_aside(run_dir: Path) -> None:
    """Move the files of an earlier attempt to a subfolder."""
    number = 1
    while (run_dir / f"before-{number}").exists():
        number += 1
    aside = run_dir / f"before-{number}"
    aside.mkdir()
    for name in (CHECKPOINTS, LOG_NAME):
        if (run_dir / name).exists():
            (run_dir / name).rename(aside / name)
