"""Methods at work on networks that are small enough for tests, random in every layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from apt.checkpoints.load import ModelBundle
from apt.checkpoints.save import save_bundle
from apt.distributed.parallel import Parallel
from apt.methods.apt import AdversarialConfig, AdversarialPostTraining
from apt.methods.base import MethodConfig, MicroBatch
from apt.methods.consistency import ConsistencyDistillation, DistillConfig
from apt.methods.flow_matching import FlowMatchingPretraining, PretrainConfig
from apt.train.config import ModelConfig, OptimizerConfig, TrainConfig
from apt.train.host import RunHost
from apt.train.initial import initial_bundle
from apt.train.outcome import save_outcome

# 12 channels: a frame's 2x2 pixels in colour.
TINY_MODEL = ModelConfig(
    options={
        "in_channels": 12,
        "hidden_size": 24,
        "depth": 3,
        "num_heads": 2,
        "patch_size": (1, 2, 2),
        "text_dim": 16,
        "pooled_dim": 16,
    },
    text_encoder_options={"width": 16, "depth": 1, "num_heads": 2},
    codec_options={"temporal": 1, "spatial": 2},
)
LATENT_SHAPE = (12, 2, 4, 4)
CAPTIONS = (
    "a red seven moving left",
    "a blue one",
    "a white zero moving up",
    "a green two moving right",
)
# So small that weights stay, and gradients of two ways through the same update can be compared.
FROZEN = OptimizerConfig(learning_rate=1e-12)


def train_config(method: MethodConfig, **changes: Any) -> TrainConfig:
    """A run of a method on the tiny model."""
    defaults: dict[str, Any] = {
        "name": "tiny",
        "run_dir": "unused",
        "model": TINY_MODEL,
        "batch_size": len(CAPTIONS),
        "ema_decay": 0.5,
        "device": "cpu",
    }
    return TrainConfig(stage=method, **{**defaults, **changes})


def random_bundle(seed: int = 0) -> ModelBundle:
    """The tiny model with weights away from their initial zeros."""
    bundle = initial_bundle(train_config(PretrainConfig(), seed=seed))
    randomize(bundle.backbone, seed)  # type: ignore[arg-type]
    return bundle


def randomize(module: torch.nn.Module, seed: int) -> None:
    """Make every parameter normal, so that each input reaches the output."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)


def save_start(folder: Path) -> dict[str, str]:
    """Two models with the same text encoder: where a generator and a discriminator start."""
    start = random_bundle(0)
    generator = save_bundle(folder / "generator", start)
    other = dataclasses.replace(start, backbone=random_bundle(1).backbone)
    discriminator = save_bundle(folder / "discriminator", other)
    return {"generator": str(generator), "discriminator": str(discriminator)}


def single() -> Parallel:
    """One process on the CPU."""
    return Parallel(rank=0, world_size=1, device=torch.device("cpu"), mesh=None)


def build(config: TrainConfig, start: ModelBundle | None = None) -> Any:
    """The method of a run at work on one process."""
    return config.stage.build(start or initial_bundle(config), RunHost(config, single()))


def pretrain(*, method: PretrainConfig | None = None, **changes: Any) -> FlowMatchingPretraining:
    """Flow matching from the tiny model's random weights."""
    config = train_config(method or PretrainConfig(), **changes)
    bundle = initial_bundle(config)
    randomize(bundle.backbone, 0)  # type: ignore[arg-type]
    return build(config, bundle)


def distill(
    folder: Path, *, train: dict[str, Any] | None = None, **options: Any
) -> ConsistencyDistillation:
    """Distillation; `options` are fields of the method's config, `train` those of the run's."""
    teacher = save_start(folder)["generator"]
    config = train_config(DistillConfig(**{"teacher": teacher, **options}), **(train or {}))
    return build(config)


def adversarial(
    folder: Path, *, train: dict[str, Any] | None = None, **options: Any
) -> AdversarialPostTraining:
    """Adversarial post-training, D's new layers random too; arguments as in `distill`."""
    config = train_config(AdversarialConfig(**{**save_start(folder), **options}), **(train or {}))
    method = build(config)
    module: Any = method.trained["discriminator"].module
    randomize(module.project, 2)
    return method


def export_method(method: Any, folder: Path, **options: Any) -> None:
    """Export a method that `build` put to work."""
    save_outcome(method, method.host.config, method.host.parallel, folder, **options)


def micro_batches(
    size: int = len(CAPTIONS), *, captions: Sequence[str] = CAPTIONS, first: int = 0
) -> list[MicroBatch]:
    """The same global batch in parts of `size` samples, whose first has index `first`."""
    x = torch.randn(len(captions), *LATENT_SHAPE, generator=torch.Generator().manual_seed(3))
    return [
        MicroBatch(x=x[i : i + size], captions=list(captions[i : i + size]), offset=first + i)
        for i in range(0, len(captions), size)
    ]


Gradients = Mapping[str, torch.Tensor | None]


def floats(metrics: Mapping[str, float | torch.Tensor]) -> dict[str, float]:
    """Metrics as numbers."""
    return {name: float(value) for name, value in metrics.items()}


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """Copies of the gradients by name."""
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()
    }


def assert_same_gradients(
    left: Gradients, right: Gradients, *, of_largest: float = 0.0, missing: bool = False
) -> None:
    """Equal to rounding, by name, and not all zero.

    Args:
        of_largest: share of a tensor's largest gradient that rounding may reach in all of it: for
            losses that are small differences.
        missing: allow a parameter without a gradient, if both sides have none.
    """
    assert left.keys() == right.keys()
    assert any(value is not None and value.abs().max() > 1e-4 for value in left.values())
    for name, value in left.items():
        other = right[name]
        assert (value is None) == (other is None) and (missing or value is not None), name
        if value is not None and other is not None:
            atol = 2e-5 + of_largest * float(other.abs().max())
            assert torch.allclose(value, other, rtol=2e-3, atol=atol), name


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the weights by name."""
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def unchanged(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that are equal bit for bit."""
    return {name for name, value in before.items() if torch.equal(value, after[name])}
