"""`diffusion-apt evaluate`: evaluate models by a protocol and write a page."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from apt.cli.app import called, parse
from apt.cli.list import SECTIONS, format_section
from apt.cli.output import print_page, printing
from apt.cli.progress import progress_bar
from apt.cli.ranks import ranks
from apt.errors import InputError
from apt.evaluate.choice import parse_model

DIGITS = "digits"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every protocol."""

    model: tyro.conf.UseAppendAction[tuple[str, ...]]
    """A model: a built-in name, a folder (a training run or an export), or a Hub id of ours; a
    published peer by name; or diffusers:FOLDER or diffusers:owner/name for any pipeline. Repeat the
    option for each model. A name can precede the model, and options can follow it: --model digits
    --model two=digits,num_steps=2 --model wan=diffusers:some/wan,cfg_scale=5,fps=16. The options
    are num_steps, cfg_scale, negative_prompt, sampler, batch_size, frames, height and width, as for
    `generate`; fps; and unet (a peer's weights as safetensors)."""
    out: Path
    """Folder for samples, figures and the page. To continue after an interruption, repeat the
    command."""
    device: str | None = None
    """cpu, cuda or cuda:N; None takes a GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of the weights; None is float32, and for a peer that of its model card."""


@dataclass(frozen=True, kw_only=True)
class Overview(Options):
    """Evaluate models by a protocol: diffusion-apt evaluate PROTOCOL --model A --model B --out DIR.

    All models generate the same prompts from the same noise. The results are measured and written
    as a page in Markdown and in HTML, with a JSON file of every figure. Under torchrun, the ranks
    share the samples: torchrun --nproc-per-node 8 -m apt evaluate PROTOCOL ...
    """

    protocol: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROTOCOL")]
    """Name of the protocol, which comes first; `diffusion-apt evaluate` alone lists them."""


def main(args: Sequence[str], *, prog: str) -> None:
    """Evaluate, and print where the page is."""
    if not args:
        with printing():
            print(overview(prog))
        return
    name, *rest = args
    if name == DIGITS and not any(arg.partition("=")[0] == "--model" for arg in rest):
        from apt.cli.evaluate_digits import main as evaluate_digits

        return evaluate_digits(rest, prog=f"{prog} {DIGITS}")
    if name.startswith("-"):
        parse(Overview, args, prog=prog)
        raise InputError(f"the protocol's name comes first: {prog} PROTOCOL [OPTIONS]")
    from apt.evaluate.protocols import PROTOCOLS

    kind: Any = PROTOCOLS.get(name)
    both = dataclasses.make_dataclass(
        "Evaluate",
        [
            ("options", Annotated[Options, tyro.conf.arg(name="")]),
            ("protocol", Annotated[kind, tyro.conf.arg(name="")]),
        ],
        kw_only=True,
        frozen=True,
    )
    asked: Any = parse(both, rest, prog=f"{prog} {name}", description=PROTOCOLS.summary(name))
    _evaluate(asked.protocol, asked.options, called(prog, args))


def overview(prog: str) -> str:
    """Return the usage, with all protocols and peers by name."""
    return "\n".join(
        [
            f"usage: {prog} PROTOCOL --model A --model B ... --out DIR [OPTIONS]",
            "",
            format_section("protocols", SECTIONS["protocols"]()),
            format_section(
                "peers that --model accepts by name, beside models of ours and diffusers:FOLDER",
                SECTIONS["peers"](),
            ),
            f"`{prog} PROTOCOL --help` shows the options.",
        ]
    )


def _evaluate(protocol: Any, options: Options, command: str) -> None:
    models = [parse_model(text) for text in options.model]

    from apt.evaluate.harness import evaluate

    with ranks(options.device) as parallel:
        page = evaluate(
            protocol,
            models,
            options.out,
            device=options.device if parallel is None else parallel.device,
            dtype=options.dtype,
            command=command,
            parallel=parallel,
            progress=progress_bar,
        )
    print_page(page)
