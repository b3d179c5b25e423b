"""The command line: import the user's modules, run the command, and print errors as one line."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import io
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from apt.cli.help import readable_help
from apt.distributed.launch import is_one_of_many
from apt.errors import AptError, InputError, PeerError
from apt.version import __version__

PROG = "diffusion-apt"

IMPORT_OPTION = "--import"
"""Names a user's own module, whose models, methods and recipes register themselves."""

_imported: list[str] = []  # modules imported for the running command

O = TypeVar("O")  # noqa: E741

EXIT_FAILURE = 1
EXIT_INPUT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141


@dataclass(frozen=True)
class Command:
    """A command's module, and its line in the overview.

    The module has `main(args, *, prog)`, which returns the exit code (None is 0). It is imported
    only when its command is called, so that help and errors need not wait for torch.
    """

    module: str
    summary: str

    def run(self, args: Sequence[str], *, prog: str) -> int:
        """Run the command with `args` and return the exit code."""
        main = cast(Callable[..., int | None], importlib.import_module(self.module).main)
        with readable_help() if _asks_for_help(args) else contextlib.nullcontext():
            return main(args, prog=prog) or 0


COMMANDS = {
    "generate": Command("apt.cli.generate", "generate videos or images from prompts"),
    "tags": Command("apt.cli.tags", "print how a generated file was made"),
    "train": Command("apt.cli.train", "run a training recipe"),
    "plan": Command("apt.cli.plan", "estimate memory, time and layout of a recipe on GPUs"),
    "data digits": Command("apt.cli.data_digits", "write the built-in data set as video files"),
    "data vizdoom": Command("apt.cli.data_vizdoom", "render first-person clips as video files"),
    "data encode": Command("apt.cli.data_encode", "encode videos as latents, once for all runs"),
    "data check": Command("apt.cli.data_check", "report what is in a folder of captioned videos"),
    "evaluate": Command("apt.cli.evaluate", "compare models by an evaluation protocol"),
    "compare": Command("apt.cli.compare", "check that two sets of samples agree"),
    "probe": Command("apt.cli.probe", "measure how much each layer knows about the sample"),
    "traverse": Command("apt.cli.traverse", "interpolate between noises, models side by side"),
    "study make": Command("apt.cli.study_make", "make pairs of samples for a preference study"),
    "study serve": Command("apt.cli.study_serve", "serve the page on which people rate pairs"),
    "study report": Command("apt.cli.study_report", "report scores and agreement of the raters"),
    "bench dit": Command("apt.cli.bench_dit", "time one forward pass, or estimate it for a GPU"),
    "bench kernels": Command("apt.cli.bench_kernels", "time the fused ops on this machine"),
    "export": Command("apt.cli.export", "write a model for this package, diffusers or ComfyUI"),
    "pull": Command("apt.cli.pull", "download a model from the Hub"),
    "push": Command("apt.cli.push", "upload a model to the Hub, with a model card"),
    "list": Command("apt.cli.list", "list registered names, and the kernels that run here"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0 is success, 2 an error that the user can fix (one line on stderr), 130 an interrupt; a command
    may define others. `--debug`, anywhere, also prints the traceback of such an error. Other
    exceptions are not caught. With several ranks, one of them reports an error.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    try:
        with _warnings_in_a_line():
            rest, modules = take_imports([arg for arg in args if arg != "--debug"])
            import_modules(modules)
            _imported[:] = modules
            code = dispatch(rest)
        sys.stdout.flush()
    except PeerError:
        _report(None, debug)
        return EXIT_INPUT_ERROR
    except AptError as error:
        _report(f"error: {' '.join(str(error).split())}", debug)
        return EXIT_INPUT_ERROR
    except KeyboardInterrupt:
        _report("interrupted", debug)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader, such as `head`, closed the pipe. Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except Exception:
        if not is_one_of_many():
            raise
        _report(traceback.format_exc(), False)
        return EXIT_FAILURE
    return code


@contextlib.contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Print UserWarnings as one line, like errors; other warnings keep Python's format."""
    usual = warnings.formatwarning

    def in_a_line(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        if category is not UserWarning:
            return usual(message, category, filename, lineno, line)
        return f"warning: {' '.join(str(message).split())}\n"

    warnings.formatwarning = in_a_line
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _report(text: str | None, debug: bool) -> None:
    """Report an error to the user, once for all ranks; None if another rank reports it."""
    if text is not None and debug:
        text = traceback.format_exc() + text
    if is_one_of_many():
        from apt.distributed.spokesman import report

        report(text)
    else:
        print(text, file=sys.stderr)


def dispatch(args: Sequence[str]) -> int:
    """Run the command that the first one or two words name, and return its exit code.

    Raises InputError for an unknown command.
    """
    if not args or args[0] in ("-h", "--help"):
        print(overview(COMMANDS))
        return 0
    if args[0] == "--version":
        print(f"{PROG} {__version__}")
        return 0
    for words in (1, 2):
        name = " ".join(args[:words])
        if name in COMMANDS:
            return COMMANDS[name].run(args[words:], prog=f"{PROG} {name}")
    group = {name: command for name, command in COMMANDS.items() if name.startswith(f"{args[0]} ")}
    if group and (len(args) == 1 or args[1] in ("-h", "--help")):
        print(overview(group))
        return 0
    asked = " ".join(args[:2]) if group else args[0]
    close = difflib.get_close_matches(asked, group or COMMANDS, n=1)
    raise InputError(
        f"unknown command {asked!r}; "
        + (f"did you mean '{close[0]}'?" if close else f"choose from: {', '.join(COMMANDS)}")
    )


def _asks_for_help(args: Sequence[str]) -> bool:
    return "-h" in args or "--help" in args


def parse(
    kind: Callable[..., O], args: Sequence[str], *, prog: str, description: str | None = None
) -> O:
    """Parse a command's options into a dataclass. The text "None" has no special meaning.

    Raises InputError for unknown options and invalid values.
    """
    import tyro

    config = (tyro.conf.DisallowNone,)
    with usage_in_a_line(args, prog=prog):
        return tyro.cli(kind, args=args, prog=prog, description=description, config=config)


@contextlib.contextmanager
def usage_in_a_line(args: Sequence[str], *, prog: str) -> Iterator[None]:
    """Raise InputError where tyro, within the block, would print its error box and exit."""
    if _asks_for_help(args):
        yield
        return
    said = io.StringIO()
    columns = os.environ.get("COLUMNS")
    try:
        os.environ["COLUMNS"] = "100000"  # so wide that tyro's box wraps no line
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit as end:
        if not end.code:
            raise
        from apt.cli.usage import usage_error

        raise usage_error(said.getvalue(), prog) from end
    finally:
        del os.environ["COLUMNS"]
        if columns is not None:
            os.environ["COLUMNS"] = columns
    sys.stderr.write(said.getvalue())  # a warning


def overview(commands: dict[str, Command]) -> str:
    """Return the text of `--help` for these commands."""
    width = max(map(len, commands))
    return "\n".join(
        [
            f"usage: {PROG} COMMAND [OPTIONS]",
            "",
            "One-step video and image generators by Adversarial Post-Training.",
            "",
            "commands:",
            *(f"  {name:<{width}}  {command.summary}" for name, command in commands.items()),
            "",
            f"`{PROG} COMMAND --help` shows the options of a command.",
            "Anywhere on the line, --import MODULE loads your own models, methods and recipes, and",
            "--debug shows the traceback of an error. --version prints the version.",
            "The exit code is 0 for success, and 2 for an error that you can fix.",
        ]
    )


def take_imports(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the command line into the modules that `--import` names and the other arguments.

    Raises InputError for an `--import` without a module.
    """
    rest: list[str] = []
    modules: list[str] = []
    waiting = iter(args)
    for arg in waiting:
        name, equals, value = arg.partition("=")
        if name != IMPORT_OPTION:
            rest.append(arg)
            continue
        module = value if equals else next(waiting, "")
        if not module or module.startswith("-"):
            raise InputError(f"{IMPORT_OPTION} needs a module: a dotted name, or a .py file")
        modules.append(module)
    return rest, modules


def called(prog: str, args: Sequence[str]) -> str:
    """Return the running command, quoted for a shell, with its `--import` options."""
    imports = [part for module in _imported for part in (IMPORT_OPTION, module)]
    return shlex.join([*prog.split(), *args, *imports])


def import_modules(modules: Sequence[str]) -> None:
    """Import modules: dotted names, also from the current folder, and .py files.

    Raises InputError for a missing module. Exceptions of the module's own code pass through.
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
                raise  # a package that the module itself imports
            raise InputError(
                f"{IMPORT_OPTION} {module}: there is no such module here ({here}) or among the "
                "installed packages; run from its folder, or give the path of its .py file"
            ) from error


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise InputError(f"{IMPORT_OPTION} {path}: there is no such file; check the path")
    name = path.stem
    if name in sys.modules and _same_file(getattr(sys.modules[name], "__file__", None), path):
        return
    if name.isidentifier() and (name in sys.modules or _is_another(name, path)):
        raise InputError(
            f"{IMPORT_OPTION} {path}: another module is named {name!r}; rename the file"
        )
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise InputError(f"{IMPORT_OPTION} {path}: this is not a Python file; name a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)


def _is_another(name: str, path: Path) -> bool:
    """Return whether Python finds another module under the name of a file."""
    found = importlib.util.find_spec(name)
    return found is not None and not _same_file(found.origin, path)


def _same_file(origin: str | None, path: Path) -> bool:
    return origin is not None and os.path.realpath(origin) == os.path.realpath(path)
