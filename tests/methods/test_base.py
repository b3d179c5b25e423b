from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from apt.flow import bind
from tests.train.tiny_methods import CAPTIONS, adversarial, distill, micro_batches


@pytest.mark.parametrize("make", [distill, adversarial])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_text_encoder_in_bf16_fits_networks_in_any_precision(
    tmp_path: Path, make: Callable[..., Any], precision: str
) -> None:
    """Public text encoders are in bf16, whatever a run computes in."""
    stage = make(tmp_path, train={"precision": precision})
    stage.start.text_encoder.to(torch.bfloat16)
    c = stage.encode(CAPTIONS)
    assert c.dtype == c.text.pooled.dtype == torch.float32
    x, t = micro_batches()[0].x, torch.full((len(CAPTIONS),), 0.5)
    with stage.host.autocast():
        velocity = bind(stage.generator.module, c)(x, t)
    assert velocity.dtype == torch.float32 and torch.isfinite(velocity).all()
