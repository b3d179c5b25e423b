"""`diffusion-apt train`: train a recipe, with any of its fields changed."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Protocol, TypeVar

import tyro

from apt.cli.app import parse, usage_in_a_line
from apt.cli.usage import UnknownOption
from apt.distributed.parallel import Parallel
from apt.errors import InputError
from apt.train.config import TrainConfig
from apt.train.config_file import plain, read_configs
from apt.train.recipe_names import stages_of
from apt.train.recipes import RECIPES
from apt.train.resolve import check_captions
from apt.train.resume import COLLECTIVES, CONFIG_NAME, Resume
from apt.train.run_state import exit_status
from apt.train.sequence import STAGES_NAME, is_finished, move_runs, read_stages, record_stages
from apt.train.signals import StopRequest
from apt.train.trainer import laid_out, run


class HasConfig(Protocol):
    """The options of a command that takes a recipe."""

    @property
    def config(self) -> TrainConfig: ...


O = TypeVar("O", bound=HasConfig)  # noqa: E741


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that are not fields of the configuration."""

    resume: bool = False
    """Continue from the newest checkpoint that passes verification."""
    continue_: Annotated[bool, tyro.conf.arg(name="continue")] = False
    """Resume if there is a run, else start one, so that a scheduler can use one command for every
    attempt."""
    start_over: bool = False
    """Restart at update 0 if all checkpoints are damaged or missing. The old files are kept in a
    folder beside the run."""
    take_over: bool = False
    """Take the run folder from another process that is using it; that process then stops."""
    print_config: bool = False
    """Print the resolved configuration as JSON, and do not train."""


@dataclass(frozen=True, kw_only=True)
class Overview(Options):
    """Train a recipe: diffusion-apt train RECIPE --any.field value.

    `diffusion-apt list recipes` lists the recipes, and `diffusion-apt train RECIPE --help` the
    fields of one. Under torchrun: torchrun --nproc-per-node 8 -m apt train RECIPE ...

    Instead of RECIPE, `--config FILE` reads the output of --print-config, and `--resume RUN`
    continues the run in that folder, or all stages in it, with its own configuration. Options after
    it change fields; when resuming, only those that do not affect results.
    """

    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """Name of the recipe, which comes first."""


@dataclass(frozen=True, kw_only=True)
class Train(Options):
    """Train this recipe. If it has several stages, every option applies to all of them, and
    --run-dir gets a folder for each stage.

    The exit code is 0 for a finished run, 75 for a run that SIGTERM or Ctrl-C stopped, which is
    saved and can be continued (0 under torchrun, where state.json says "unfinished"), and 2 for an
    error."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]


def main(args: Sequence[str], *, prog: str) -> int:
    """Resolve the recipe, then print it or train its stages one after the other."""
    options, configs = parse_recipe(
        lambda config, resume: Train(config=config, resume=resume), Overview, args, prog
    )
    if options.resume and options.continue_:
        raise InputError(
            "--resume and --continue cannot be used together: --resume needs an existing run, "
            "--continue starts one if there is none"
        )
    if options.print_config:
        resolved = [plain(config) for config in configs]
        print(json.dumps(resolved if len(resolved) > 1 else resolved[0], indent=2))
        return 0
    resume: Resume = "auto" if options.continue_ else options.resume
    finished = train_stages(
        configs, resume=resume, start_over=options.start_over, take_over=options.take_over
    )
    return exit_status(finished)


def parse_recipe(
    make: Callable[[TrainConfig, bool], O], overview: type, args: Sequence[str], prog: str
) -> tuple[O, list[TrainConfig]]:
    """Parse a command's options, and the configurations that it names and changes.

    Args:
        make: builds the options from a configuration, and whether an existing run was named.
        overview: the dataclass whose help is shown if no recipe is named.
        args: of the command.
        prog: the command.
    """
    begun = _begin(args, prog, overview)
    stages = begun.stages
    command = f"{prog} {begun.words}"
    parsed = []
    for stage in stages:
        default = make(_without_options(stage), begun.resume)
        try:
            with usage_in_a_line(begun.rest, prog=command):
                one = tyro.cli(
                    type(default),
                    args=begun.rest,
                    prog=command,
                    description=begun.description(type(default)),
                    default=default,
                    # The kind of a stage is fixed, so its fields are options, not subcommands.
                    # "None" leaves a field open.
                    config=(tyro.conf.AvoidSubcommands,),
                )
        except UnknownOption as error:
            said = _in_its_place(begun.rest)
            if not said and len(stages) == 1:
                raise
            raise UnknownOption(said or f"{error}; {_of_a_row(stages, stage)}") from error
        parsed.append(one)
    configs = [_with_options(one.config, stage) for one, stage in zip(parsed, stages, strict=True)]
    if len(configs) > 1 and len({config.run_dir for config in configs}) == 1:
        configs = move_runs(configs, before=stages)
    return parsed[0], configs


def _in_its_place(args: Sequence[str]) -> str:
    """Return an explanation if an option that replaces the recipe's name comes after a recipe."""
    if any(arg.partition("=")[0] == "--config" for arg in args):
        return "--config FILE replaces the recipe's name; leave the name out"
    if any(a == "--resume" and not b.startswith("-") for a, b in itertools.pairwise(args)):
        return (
            "--resume RUN replaces the recipe's name; leave the name out, or keep it and write "
            "--run-dir RUN --resume"
        )
    return ""


def _of_a_row(stages: Sequence[TrainConfig], stage: TrainConfig) -> str:
    """Return an explanation of an option that one stage among several does not have."""
    return (
        f"that was {stage.name}, one of {len(stages)} stages that all get the same options; pass "
        "options of a single stage to its own recipe: "
        f"{', '.join(each.name for each in stages)}"
    )


def _without_options(stage: TrainConfig) -> TrainConfig:
    """Empty the options of the data source: tyro accepts no new keys for a dict with entries."""
    return dataclasses.replace(stage, data=dataclasses.replace(stage.data, options={}))


def _with_options(config: TrainConfig, stage: TrainConfig) -> TrainConfig:
    """Restore a recipe's data options that the user did not set, unless another source was chosen.

    Raises ConfigError for options that the source does not have.
    """
    if config.data.source == stage.data.source:
        options = {**stage.data.options, **config.data.options}
        data = dataclasses.replace(config.data, options=options)
        config = dataclasses.replace(config, data=data)
    config.data.make_source()
    return config


@dataclass(frozen=True)
class _Begun:
    """The stages that the first words of a command name, and the remaining arguments."""

    stages: list[TrainConfig]
    words: str
    rest: list[str]
    resume: bool = False
    own_options: str = ""

    def description(self, options: type) -> str:
        """Return the help text of a command's options and of the recipe's own."""
        return "\n\n".join(filter(None, [inspect.getdoc(options), self.own_options]))


def _begin(args: Sequence[str], prog: str, overview: type) -> _Begun:
    """Read the recipe, the file of configurations, or the existing run that a command names."""
    first, *rest = args or [""]
    option, equals, value = first.partition("=")
    if option in ("--config", "--resume"):
        value, *rest = [value, *rest] if equals else (rest or [""])
        if value and not value.startswith("-"):
            return _from_file(Path(value), rest) if option == "--config" else _from_run(value, rest)
        needed = "FILE" if option == "--config" else "RUN"
        raise InputError(f"{option} needs a {needed}: {prog} {option} {needed} [OPTIONS]")
    if not first or first.startswith("-"):
        parse(overview, args, prog=prog)
        raise InputError(f"the recipe's name comes first: {prog} RECIPE [OPTIONS]")
    return _from_recipe(first, rest, f"{prog} {first}")


def _from_recipe(name: str, rest: list[str], prog: str) -> _Begun:
    """Create a recipe, taking its own options out of the arguments."""
    recipe = RECIPES.get(name)
    own_options = ""
    if inspect.signature(recipe).parameters:
        # The other arguments are fields of its stages, which also print the help.
        with usage_in_a_line(rest, prog=prog):
            made, rest = tyro.cli(
                recipe, args=rest, prog=prog, return_unknown_args=True, add_help=False
            )
        own_options = _own_options(recipe)
    else:
        made = recipe()
    return _Begun(stages_of(made), name, rest, own_options=own_options)


def _own_options(recipe: Callable[..., Any]) -> str:
    """Return the help of the options of a recipe's function, from its docstring."""
    explained = (inspect.getdoc(recipe) or "").partition("Args:\n")[2]
    defaults = inspect.signature(recipe).parameters
    texts: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(explained).splitlines():
        begins = line.partition(":")[0]
        name = begins if begins in defaults else name
        if name:
            texts[name] = f"{texts[name]} {line.strip()}" if name in texts else line
    return "\n".join(
        [
            "Options of the recipe itself:",
            *(
                f"  --{texts.get(name, name)} (default: {option.default})"
                for name, option in defaults.items()
            ),
        ]
    )


def _from_file(file: Path, rest: list[str]) -> _Begun:
    return _Begun(read_configs(file), f"--config {file}", rest)


def _from_run(name: str, rest: list[str]) -> _Begun:
    """Read the configuration of a run or a sequence, with its current folder."""
    folder = Path(name)
    file = folder / CONFIG_NAME
    if recorded := read_stages(folder):
        return _Begun(recorded, f"--resume {name}", rest, resume=True)
    if stages := sorted(child.parent.name for child in folder.glob(f"*/{CONFIG_NAME}")):
        raise InputError(
            f"{name} holds runs of several stages ({', '.join(stages)}); name one of them, or "
            "repeat the recipe with --resume, which also continues with the next stages"
        )
    if not file.is_file():
        raise InputError(
            f"{name} is not the folder of a run, which has a {CONFIG_NAME}; to resume with a "
            "recipe, put its name first: RECIPE --run-dir RUN --resume"
        )
    (config,) = read_configs(file)
    moved = dataclasses.replace(config, run_dir=name)
    return _Begun([moved], f"--resume {name}", rest, resume=True)


def train_stages(
    configs: Sequence[TrainConfig],
    *,
    resume: Resume,
    start_over: bool = False,
    take_over: bool = False,
) -> bool:
    """Train stages in sequence until a stop request. Return whether all are finished."""
    first = configs[0]
    timeout = timedelta(minutes=first.timeout_minutes)
    joined = Parallel.from_environment(
        first.device,
        config=first.parallel,
        timeout=timeout,
        records=Path(first.run_dir) / COLLECTIVES,
    )
    with joined as parallel, StopRequest() as stop:
        for number, config in enumerate(configs):
            # Errors of a later stage must be reported before the first one trains.
            laid_out(config, parallel)
            if number:
                parallel.from_main(partial(check_captions, config))
        parallel.on_main(partial(record_stages, configs))
        for number, config in enumerate(configs):
            begun = (Path(config.run_dir) / CONFIG_NAME).is_file()
            run_dir = run(
                config,
                resume=resume if begun or number == 0 else False,
                start_over=start_over,
                take_over=take_over,
                parallel=parallel,
                stop=stop,
            )
            parallel.barrier()
            if not is_finished(config):
                if number + 1 < len(configs) and parallel.is_main:
                    _tell_of_the_rest(configs, number)
                return False
            if parallel.is_main:
                print(f"{config.name}: {run_dir / 'export'}")
    return True


def _tell_of_the_rest(configs: Sequence[TrainConfig], number: int) -> None:
    """Print which stages of a sequence have not started, and how to continue them all."""
    folder = Path(configs[number].run_dir).parent
    if not (folder / STAGES_NAME).is_file():
        return
    rest = ", ".join(config.name for config in configs[number + 1 :])
    command = f"diffusion-apt train --resume {shlex.quote(str(folder))}"
    print(f"remaining stages: {rest}; `{command}` continues with all", file=sys.stderr)
