"""Small runs of all three stages, and what real ranks hold of them; test_measure.py starts this."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from apt.checkpoints.info import SampleInfo
from apt.distributed.mesh import ParallelConfig
from apt.distributed.parallel import Parallel
from apt.methods.apt import AdversarialConfig
from apt.methods.base import MethodConfig
from apt.methods.consistency import DistillConfig
from apt.methods.flow_matching import PretrainConfig
from apt.models.checkpointing import Checkpointing
from apt.models.mmdit import MMDiTConfig
from apt.plan.compare import counted_usage
from apt.plan.estimate import Job
from apt.plan.measure import Usage
from apt.plan.models import PlannedModel, new_model
from apt.train.config import LoRAConfig, ModelConfig, OptimizerConfig, TrainConfig
from tests.distributed.gang import gang

# Large enough that a norm's statistics or a scalar do not count.
SHAPE = {"hidden_size": 96, "depth": 3, "num_heads": 4, "text_dim": 64}
SAMPLE = SampleInfo(frames=9, height=64, width=64, fps=8)


def job(stage: MethodConfig, **changes: Any) -> Job:
    """A stage on an MMDiT and a cache of latents; pre-training on pixels, and with its text."""
    config = TrainConfig(
        name="small",
        run_dir="unused",
        stage=stage,
        model=ModelConfig(
            options={**SHAPE, "pooled_dim": 64},
            text_encoder_options={"width": 64, "depth": 1, "num_heads": 2},
        ),
        **{"batch_size": 8, "device": "cpu", "ema_warmup": False, **changes},
    )
    if stage.start_field is None:
        return Job(config, new_model(config), {}, SAMPLE)
    model = PlannedModel("mmdit_small", MMDiTConfig(**SHAPE), None, 12, file="start")
    others = {name: dataclasses.replace(model, file=name) for name in stage.names_models[1:]}
    return Job(config, model, others, SAMPLE)


ADAMW = OptimizerConfig(name="adamw")
JOBS = {
    "pretrain": job(PretrainConfig(), optimizer=ADAMW),
    "distill": job(DistillConfig(), precision="bf16"),
    "apt": job(AdversarialConfig(layers=(1, 2, 3)), precision="bf16"),
    "checkpointed": job(
        AdversarialConfig(layers=(1, 2, 3), discriminator_forwards=2),
        activation_checkpointing=True,
        micro_batch_size=1,
    ),
    "attention": job(
        AdversarialConfig(layers=(1, 2, 3)),
        precision="bf16",
        activation_checkpointing=True,
        checkpointing=Checkpointing(saves_attention=True),
    ),
    "adapters": job(
        AdversarialConfig(layers=(1, 2, 3)),
        precision="bf16",
        lora=LoRAConfig(rank=4),
        micro_batch_size=2,
    ),
}
# Deep enough to be planned from a few of its blocks.
JOBS["deep"] = JOBS["checkpointed"].of_depth(12)
RANKS = {
    2: {"shard": ParallelConfig()},
    4: {"copies": ParallelConfig(replicate=2), "sequence": ParallelConfig(sequence=2)},
}
ON_RANKS = ("pretrain", "distill", "apt", "attention", "deep")


def in_layout(name: str, layout: ParallelConfig) -> Job:
    made = JOBS[name]
    return dataclasses.replace(made, config=dataclasses.replace(made.config, parallel=layout))


def described(usage: Usage) -> dict[str, dict[str, float]]:
    """Peaks, and what was sent how often, by name."""
    work = usage.work
    return {
        "peaks": {name: peak.total for name, peak in usage.peaks.items()},
        "calls": {f"{kind.kind} of {kind.ranks}": n for kind, n in work.calls.items()},
        "sent": {f"{kind.kind} of {kind.ranks}": n for kind, n in work.sent.items()},
    }


def main(folder: Path) -> None:
    for world, layouts in RANKS.items():

        def work(parallel: Parallel, layouts: dict[str, ParallelConfig] = layouts) -> None:
            found = {
                f"{name}/{kind}": described(
                    counted_usage(in_layout(name, layout), parallel.laid_out(layout))
                )
                for kind, layout in layouts.items()
                for name in ON_RANKS
            }
            if parallel.is_main:
                (folder / f"{parallel.world_size}.json").write_text(json.dumps(found))

        gang(world, work, ParallelConfig())
