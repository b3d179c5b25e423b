"""What the page shows of the models' insides: layers, and paths between noises."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from apt.evaluate.digits.methods import APT, CONSISTENCY, DIFFUSION_GUIDED
from apt.generate_options import GenerateOptions
from apt.inside import probe_layers, traverse
from apt.inside.report import write_probe, write_traversals
from apt.pipeline import OneStepPipeline

FOLDER = "digits_inside"
"""A folder beside the page."""
LAYERS, ERRORS, WAYS = (f"{FOLDER}/{name}.png" for name in ("layers", "errors", "traverse"))

_SEEDS = (0, 1, 2)


def write_inside(out: Path, root: Path, prompts: Sequence[str], *, batch_size: int) -> None:
    """Probe one-step APT of a training run (App. G); traverse noises with all stages (App. I).

    Args:
        out: folder of the page.
        root: of the run.
        prompts: the probe is fitted on them and shows them; traversals use the first.
        batch_size: samples per network call.
    """
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    pipelines = {
        method.label: OneStepPipeline.from_pretrained(method.folder(root))
        for method in (APT, CONSISTENCY, DIFFUSION_GUIDED)
    }
    layers = probe_layers(pipelines[APT.label], prompts, shown=prompts, batch_size=batch_size)
    write_probe(folder, layers, prompts, APT.label)
    ways = {
        label: traverse(
            pipeline, prompts[0], seeds=_SEEDS, options=GenerateOptions(batch_size=batch_size)
        )
        for label, pipeline in pipelines.items()
    }
    write_traversals(folder, ways, prompt=prompts[0], seeds=_SEEDS, fps=12)
