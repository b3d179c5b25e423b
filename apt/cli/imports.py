"""`--import`: a user's own module, whose models, methods and recipes register themselves."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from apt.errors import InputError

OPTION = "--import"


def take_imports(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the command line into the other arguments and the modules that `--import` names.

    Raises InputError for an `--import` without a module.
    """
    rest: list[str] = []
    modules: list[str] = []
    waiting = iter(args)
    for arg in waiting:
        name, equals, value = arg.partition("=")
        if name != OPTION:
            rest.append(arg)
            continue
        module = value if equals else next(waiting, "")
        if not module or module.startswith("-"):
            raise InputError(f"{OPTION} needs a module: a dotted name, or a .py file")
        modules.append(module)
    return rest, modules


def import_modules(modules: Sequence[str]) -> None:
    """Import dotted names, from this folder too, and .py files.

    Raises InputError for a module that is not there. What its own code raises is its own affair.
    """
    here = str(Path.cwd())
    for module in modules:
        if module.endswith(".py"):
            _import_file(Path(module))
            continue
        if here not in sys.path:
            sys.path.insert(0, here)
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise  # a package that the module itself lacks
            raise InputError(
                f"{OPTION} {module}: there is no such module here ({here}) or among the installed "
                "packages"
            ) from error


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{OPTION} {path}: there is no such file")
    name = path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{OPTION} {path}: it is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
