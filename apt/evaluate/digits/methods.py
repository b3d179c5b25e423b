"""The methods to compare: samplers of the main models, and the ablations."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from apt.checkpoints.info import INFO_FILE, ModelInfo, read_info

EXPORT, SNAPSHOTS, LOG, SPEED = "export", "snapshots", "log.jsonl", "speed.jsonl"

Group = Literal["main", "extra", "ablation"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A model and how it is sampled.

    Attributes:
        name: key in the results, and part of the names of its pictures.
        label: name in tables and plots.
        run: folder of its run under the root.
        num_steps: sampler steps; 0 reconstructs real clips with the model's codec.
        guided: use the guidance scale that the model was saved with; False is no guidance.
        group: the runs of main methods are required, those of others optional.
        model: model folder inside the run.
    """

    name: str
    label: str
    run: str
    num_steps: int
    guided: bool = False
    group: Group = "main"
    model: str = EXPORT

    def folder(self, root: Path) -> Path:
        """Return the model folder."""
        return root / self.run / self.model

    def was_run(self, root: Path) -> bool:
        """Return whether the model exists."""
        return (self.folder(root) / INFO_FILE).is_file()

    @property
    def evaluations(self) -> int:
        """Network evaluations per sample; guidance takes two per step."""
        return self.num_steps * (2 if self.guided else 1)


CODEC = Method(name="codec", label="the codec's reconstruction", run="pretrain", num_steps=0)
DIFFUSION_GUIDED = Method(
    name="diffusion_25_cfg",
    label="diffusion, 25 steps, CFG",
    run="pretrain",
    num_steps=25,
    guided=True,
)
CONSISTENCY = Method(name="consistency_1", label="consistency, 1 step", run="distill", num_steps=1)
APT = Method(name="apt_1", label="APT, 1 step", run="apt", num_steps=1)
APT_TWO = Method(name="apt_2", label="APT, 2 steps", run="apt", num_steps=2)
APT_PAPER = Method(
    name="apt_paper_1",
    label="APT as the paper writes it, 1 step",
    run="apt_paper",
    num_steps=1,
    group="extra",
)

MAIN_METHODS = (
    CODEC,
    DIFFUSION_GUIDED,
    Method(name="diffusion_1", label="diffusion, 1 step", run="pretrain", num_steps=1),
    CONSISTENCY,
    APT,
    APT_TWO,
    APT_PAPER,
)

LONG, NO_REGULARISER = "long", "no_r1"
ABLATED = (f"ablations/{LONG}", f"ablations/{NO_REGULARISER}")
"""The runs whose training curves are shown."""
# The ablations by folder name: their label, and what the paper says about the change, mostly that
# it makes samples "worse".
ABLATIONS: dict[str, tuple[str, str]] = {
    NO_REGULARISER: ("no regulariser", "worse (Fig. 5)"),
    "no_r2": ("approximated R1 alone, on real clips", "its own form"),
    "no_mismatched": ("no clips under other captions", "hardly different (App. J)"),
    "shallow": ("D of half the depth", "worse (Fig. 6)"),
    "one_head": ("one head, on the last block", "worse (Fig. 7)"),
    "frozen": ("D's backbone frozen", "worse (App. F)"),
    "slow_backbone": ("D's backbone at a tenth of the rate", "worse (App. F)"),
    "distilled_d": ("D from the distilled weights", "worse (Sec. 3.3)"),
    "no_ensemble": ("D sees t = 0 in place of the ensemble", "worse (Sec. 3.3)"),
    "small_batch": ("a quarter of the batch", "worse (App. E)"),
    "low_rates": ("both rates at a third", "slower (App. F)"),
    "high_rates": ("both rates three times as high", "unstable (App. F)"),
}


def updates_of(info: ModelInfo) -> int | None:
    """Return the number of updates of a model's last stage, if it is recorded."""
    updates = info.training.get("updates")
    return updates if isinstance(updates, int) else None


def ablation_methods(root: Path) -> tuple[Method, ...]:
    """Return one-step sampling of every ablation that was run, at the length of the shortest.

    The reference comes first: the whole method at constant rates, after equally many updates.
    """
    names = [name for name in (LONG, *ABLATIONS) if _ablation(name).was_run(root)]
    lengths = [updates_of(read_info(_ablation(name).folder(root))) for name in names]
    known = [length for length in lengths if length is not None]
    shortest = min(known, default=0)
    methods = []
    for name, length in zip(names, lengths, strict=True):
        model = EXPORT if length == shortest else f"{SNAPSHOTS}/{shortest}/ema"
        method = _ablation(name, model)
        if method.was_run(root):
            methods.append(method)
    return tuple(methods)


def _ablation(name: str, model: str = EXPORT) -> Method:
    label = "the whole method" if name == LONG else ABLATIONS[name][0]
    return Method(
        name=f"ablation_{name}",
        label=label,
        run=f"ablations/{name}",
        num_steps=1,
        group="ablation",
        model=model,
    )
