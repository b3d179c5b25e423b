"""Log metrics and sample sheets to Weights & Biases, besides the run's own files."""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apt.errors import InputError
from apt.files import write_text

__all__ = ["ID_NAME", "WandbLog"]

ID_NAME = "wandb_id"


class WandbLog:
    """A run in Weights & Biases. A resumed run continues it: the run's folder keeps its ID.

    WANDB_MODE=offline keeps everything in `run_dir/wandb`, for `wandb sync`.

    Args:
        run_dir: folder of the run.
        project: project in Weights & Biases.
        name: name of the run.
        config: the configuration as JSON values.

    Raises:
        InputError: wandb is not installed, or does not start.
    """

    def __init__(self, run_dir: Path, project: str, name: str, config: Mapping[str, Any]) -> None:
        try:
            self._wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            raise InputError(
                f"--wandb-project needs wandb, which cannot be imported ({error}); run "
                "`pip install 'diffusion-apt[wandb]'`, or leave the option out"
            ) from error
        known = run_dir / ID_NAME
        if not known.is_file():
            write_text(known, secrets.token_hex(8) + "\n")
        try:
            self._run = self._wandb.init(
                project=project,
                name=name,
                id=known.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(run_dir),
                config=dict(config),
                settings=self._wandb.Settings(silent=True),
            )
        except self._wandb.errors.Error as error:
            raise InputError(
                f"Weights & Biases does not start ({error}); log in with `wandb login`, set "
                "WANDB_MODE=offline, or leave --wandb-project out"
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record scalars of an update."""
        self._run.log(dict(values), step=step)

    def picture(self, step: int, path: Path) -> None:
        """Record a PNG of an update."""
        from PIL.PngImagePlugin import PngImageFile

        with PngImageFile(path) as image:  # as `RunLog.picture`
            self._run.log({"samples": self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        """Send what is left, and finish the run."""
        self._run.finish()
