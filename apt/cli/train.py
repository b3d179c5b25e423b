"""`diffusion-apt train`: a recipe, with any of its fields changed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from apt.errors import InputError
from apt.train.config import TrainConfig
from apt.train.monitor import TrainingStopped
from apt.train.parallel import Parallel
from apt.train.recipes import RECIPES
from apt.train.sequence import is_finished, move_runs
from apt.train.trainer import plain, run


@dataclass(frozen=True)
class Overview:
    """Train a recipe: diffusion-apt train RECIPE --any.field value.

    `diffusion-apt list recipes` shows the recipes, `diffusion-apt train RECIPE --help` the fields
    of one. Under torchrun: torchrun --nproc-per-node 8 -m apt train RECIPE ...
    """

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """Its name comes first."""
    resume: bool = False
    """Continue from the newest checkpoint that verifies."""
    print_config: bool = False
    """Print the resolved configuration as JSON, and do not train."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train this recipe. If it has several stages, every option applies to each of them, and
    --run-dir is the folder that gets a folder for each."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    resume: bool = False
    """Continue from the newest checkpoint that verifies."""
    print_config: bool = False
    """Print the resolved configuration as JSON, and do not train."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Resolve the recipe, then print it or train its stages one after the other."""
    if not args or args[0].startswith("-"):
        tyro.cli(Overview, args=args, prog=prog)
        raise InputError(f"the recipe's name comes first: {prog} RECIPE [OPTIONS]")
    made = RECIPES.get(args[0])()
    stages = [made] if isinstance(made, TrainConfig) else list(made)
    parsed = [
        tyro.cli(
            Train,
            args=args[1:],
            prog=f"{prog} {args[0]}",
            default=Train(config=stage),
            # A recipe's stage is of one kind; its fields are options, not a choice of kinds.
            config=(tyro.conf.AvoidSubcommands,),
        )
        for stage in stages
    ]
    configs = [one.config for one in parsed]
    if len(configs) > 1 and len({config.run_dir for config in configs}) == 1:
        configs = move_runs(configs, before=stages)
    if parsed[0].print_config:
        resolved = [plain(config) for config in configs]
        print(json.dumps(resolved if len(resolved) > 1 else resolved[0], indent=2))
        return
    train_stages(configs, resume=parsed[0].resume)


def train_stages(configs: Sequence[TrainConfig], *, resume: bool) -> None:
    """Train stages in a row; a stop request ends the row. Raises InputError if training stops."""
    with Parallel.from_environment(configs[0].device) as parallel:
        for number, config in enumerate(configs):
            begun = (Path(config.run_dir) / "config.json").is_file()
            try:
                run_dir = run(config, resume=resume and (begun or number == 0), parallel=parallel)
            except TrainingStopped as error:
                raise InputError(str(error)) from error
            parallel.barrier()
            if not is_finished(config):
                return
            if parallel.is_main:
                print(f"{config.name}: {run_dir / 'export'}")
