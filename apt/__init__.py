"""One-step video and image generators by Adversarial Post-Training (APT, ICML 2025).

This module re-exports the public API. Names and submodules are imported on first use, so
`import apt` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from apt.version import __version__

if TYPE_CHECKING:
    from apt import checkpoints as checkpoints
    from apt import data as data
    from apt import distributed as distributed
    from apt import errors as errors
    from apt import evaluate as evaluate
    from apt import flow as flow
    from apt import hub as hub
    from apt import inside as inside
    from apt import kernels as kernels
    from apt import losses as losses
    from apt import media as media
    from apt import methods as methods
    from apt import metrics as metrics
    from apt import models as models
    from apt import samples as samples
    from apt import study as study
    from apt import train as train
    from apt.checkpoints.export import export_model
    from apt.checkpoints.load import ModelBundle, load_bundle, load_codec, load_model
    from apt.checkpoints.save import save_bundle, save_codec
    from apt.checkpoints.source import list_pretrained
    from apt.condition import Condition, EncodedText
    from apt.errors import AptError
    from apt.generate_options import GenerateOptions
    from apt.hub.pull import pull_from_hub
    from apt.hub.push import push_to_hub
    from apt.losses import create_loss, list_losses
    from apt.methods.apt import generate
    from apt.models import (
        Discriminator,
        create_codec,
        create_discriminator,
        create_model,
        create_text_encoder,
        list_models,
    )
    from apt.pipeline import OneStepPipeline

_MODULES = (
    "checkpoints",
    "data",
    "distributed",
    "errors",
    "evaluate",
    "flow",
    "hub",
    "inside",
    "kernels",
    "losses",
    "media",
    "methods",
    "metrics",
    "models",
    "samples",
    "study",
    "train",
)
_SOURCES = {
    "apt.checkpoints.export": ("export_model",),
    "apt.checkpoints.load": ("ModelBundle", "load_bundle", "load_codec", "load_model"),
    "apt.checkpoints.save": ("save_bundle", "save_codec"),
    "apt.checkpoints.source": ("list_pretrained",),
    "apt.errors": ("AptError",),
    "apt.condition": ("Condition", "EncodedText"),
    "apt.generate_options": ("GenerateOptions",),
    "apt.hub.pull": ("pull_from_hub",),
    "apt.hub.push": ("push_to_hub",),
    "apt.losses": ("create_loss", "list_losses"),
    "apt.methods.apt": ("generate",),
    "apt.models": (
        "Discriminator",
        "create_codec",
        "create_discriminator",
        "create_model",
        "create_text_encoder",
        "list_models",
    ),
    "apt.pipeline": ("OneStepPipeline",),
}
_MODULE_OF = {name: module for module, names in _SOURCES.items() for name in names}

__all__ = [
    "AptError",
    "Condition",
    "Discriminator",
    "EncodedText",
    "GenerateOptions",
    "ModelBundle",
    "OneStepPipeline",
    "__version__",
    "create_codec",
    "create_discriminator",
    "create_loss",
    "create_model",
    "create_text_encoder",
    "export_model",
    "generate",
    "list_losses",
    "list_models",
    "list_pretrained",
    "load_bundle",
    "load_codec",
    "load_model",
    "pull_from_hub",
    "push_to_hub",
    "save_bundle",
    "save_codec",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"apt.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'apt' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
