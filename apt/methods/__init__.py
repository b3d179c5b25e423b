"""Training methods, one file each, written to read like the paper."""

from __future__ import annotations

from apt.methods.apt import AdversarialConfig
from apt.methods.autoencoder import AutoencoderConfig
from apt.methods.base import Host, Method, MethodConfig, MicroBatch, Stage, StageConfig
from apt.methods.consistency import DistillConfig
from apt.methods.flow_matching import PretrainConfig

__all__ = [
    "AdversarialConfig",
    "AutoencoderConfig",
    "DistillConfig",
    "Host",
    "Method",
    "MethodConfig",
    "MicroBatch",
    "PretrainConfig",
    "Stage",
    "StageConfig",
]
