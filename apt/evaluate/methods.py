"""What is compared: samplers of the three main models, and the ablations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from apt.checkpoints.info import INFO_FILE, ModelInfo, read_info

EXPORT, SNAPSHOTS, LOG = "export", "snapshots", "log.jsonl"

Group = Literal["main", "ablation"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A model and how it is sampled.

    Attributes:
        name: key in the results, and in the names of its pictures.
        label: what tables and plots call it.
        run: folder of its run under the root.
        num_steps: sampler steps.
        guided: use the guidance scale that the model was saved with; False is no guidance.
        group: main methods need their run; an ablation may not have been run.
        model: model folder inside the run.
    """

    name: str
    label: str
    run: str
    num_steps: int
    guided: bool = False
    group: Group = "main"
    model: str = EXPORT

    def folder(self, runs: Path) -> Path:
        """The model folder."""
        return runs / self.run / self.model

    def was_run(self, runs: Path) -> bool:
        """Whether the model is there."""
        return (self.folder(runs) / INFO_FILE).is_file()

    @property
    def evaluations(self) -> int:
        """Network evaluations per sample; guidance takes two for each step."""
        return self.num_steps * (2 if self.guided else 1)


DIFFUSION_GUIDED = Method(
    name="diffusion_25_cfg",
    label="diffusion, 25 steps, CFG",
    run="pretrain",
    num_steps=25,
    guided=True,
)
CONSISTENCY = Method(name="consistency_1", label="consistency, 1 step", run="distill", num_steps=1)
APT = Method(name="apt_1", label="APT, 1 step", run="apt", num_steps=1)

MAIN_METHODS = (
    DIFFUSION_GUIDED,
    Method(name="diffusion_25", label="diffusion, 25 steps", run="pretrain", num_steps=25),
    Method(name="diffusion_1", label="diffusion, 1 step", run="pretrain", num_steps=1),
    CONSISTENCY,
    Method(name="consistency_2", label="consistency, 2 steps", run="distill", num_steps=2),
    Method(name="consistency_4", label="consistency, 4 steps", run="distill", num_steps=4),
    APT,
    Method(name="apt_2", label="APT, 2 steps", run="apt", num_steps=2),
)

NO_REGULARISER = "no_r1"
# The ablations of the recipe, by the name of their folder.
ABLATION_LABELS = {
    NO_REGULARISER: "no regulariser",
    "no_r2": "approximated R1 alone",
    "all_layers": "all of the generator trains",
    "shallow": "shallower discriminator",
    "one_head": "one discriminator head",
    "frozen": "frozen discriminator backbone",
    "distilled_d": "discriminator from the distilled weights",
    "small_batch": "small batch",
}


def updates_of(info: ModelInfo) -> int | None:
    """The number of updates that a model says it was trained for in its last stage."""
    updates = info.training.get("updates")
    return updates if isinstance(updates, int) else None


def ablation_methods(runs: Path) -> tuple[Method, ...]:
    """One-step sampling of every known ablation, run or not, and of any other under the root.

    Ablations may be shorter than APT's own run: a snapshot of that after as many updates, where
    there is one, comes first, for a fair comparison.
    """
    folder = runs / "ablations"
    found = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    labels = ABLATION_LABELS | {
        name: name.replace("_", " ") for name in found if name not in ABLATION_LABELS
    }
    ablations = [
        Method(
            name=f"ablation_{name}",
            label=label,
            run=f"ablations/{name}",
            num_steps=1,
            group="ablation",
        )
        for name, label in labels.items()
    ]
    return (*_equally_long(runs, ablations), *ablations)


def _equally_long(runs: Path, ablations: Sequence[Method]) -> list[Method]:
    lengths = {updates_of(read_info(m.folder(runs))) for m in ablations if m.was_run(runs)}
    if APT.was_run(runs):
        lengths.discard(updates_of(read_info(APT.folder(runs))))
    snapshots = [
        Method(
            name=f"apt_1_at_{updates}",
            label=f"APT after {updates} updates",
            run=APT.run,
            num_steps=1,
            group="ablation",
            model=f"{SNAPSHOTS}/{updates}/ema",
        )
        for updates in sorted(length for length in lengths if length is not None)
    ]
    return [method for method in snapshots if method.was_run(runs)]
