"""The functions that `benchmarks.worker` calls by name, with the run's context and JSON arguments.

The context is {"device": "cuda" or "cpu", "rehearsal": whether only the harness is tested,
"ceilings": `apt.bench.ceilings.Ceilings.as_dict`, once measured}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from apt.bench.ceilings import Ceilings, measure_ceilings
from apt.bench.dit import Workload, default_variants, measure_dit
from apt.bench.kernels import COMPILE, Direction, OpCase, measure_op, variant_names
from apt.bench.ops import OPS
from apt.bench.shapes import SHAPES
from apt.bench.timing import MINIMUM_ROUNDS, clock_for
from benchmarks import encoders, training

Context = Mapping[str, Any]
Found = dict[str, Any]


def ceilings(context: Context) -> Found:
    """Measure the device's rates."""
    device = torch.device(context["device"])
    return {"ceilings": measure_ceilings(device, clock_for(device)).as_dict()}


def network(context: Context, workload: Found, only: Sequence[str] | None = None) -> Found:
    """Measure one forward pass in all variants, or in those with these labels."""
    device = torch.device(context["device"])
    variants = [v for v in default_variants(device) if only is None or v.label in only]
    if context["rehearsal"]:
        variants = [v for v in variants if v.mode != "compile"]
    found = measure_dit(
        Workload(**workload | {"compression": tuple(workload["compression"])}),
        variants,
        device=device,
        clock=clock_for(device),
        ceilings=Ceilings.from_dict(context["ceilings"]),
        rounds=MINIMUM_ROUNDS if context["rehearsal"] else 5,
        max_seconds=40,
    )
    return told(found)


def op(
    context: Context,
    name: str,
    shape: str,
    dtype: str,
    direction: Direction,
    only: Sequence[str] | None = None,
) -> Found:
    """Measure one op at one shape in all variants, or in these."""
    device, chosen = torch.device(context["device"]), OPS[name]
    variants = only or variant_names(chosen)
    if context["rehearsal"]:
        variants = [v for v in variants if v != COMPILE]
    case = OpCase(op=chosen, shape=SHAPES[shape], dtype=getattr(torch, dtype), direction=direction)
    found = measure_op(
        case,
        device=device,
        clock=clock_for(device),
        ceilings=Ceilings.from_dict(context["ceilings"]),
        rounds=MINIMUM_ROUNDS if context["rehearsal"] else 50,
        only=variants,
        max_seconds=5,
    )
    return told(found)


def curve(context: Context, max_seconds: float) -> Found:
    """Check the first losses in fp32, with kernels and with references, `max_seconds` for each."""
    device, few = torch.device(context["device"]), context["rehearsal"]
    updates = 1 if few else training.CURVE_UPDATES
    return told(
        m
        for k in kernels(few)
        for m in training.check_curve(device, k, updates=updates, max_seconds=max_seconds)
    )


def speed(context: Context, max_seconds: float, only: Sequence[str] | None = None) -> Found:
    """Time updates in bf16, with kernels and with references, `max_seconds` for each."""
    device, few = torch.device(context["device"]), context["rehearsal"]
    chosen = [k for k in kernels(few) if only is None or k in only]
    return told(
        m
        for k in chosen
        for m in training.check_speed(
            device,
            k,
            updates=dict.fromkeys(training.STAGES, 1) if few else training.UPDATES,
            max_seconds=max_seconds,
        )
    )


def large_step(context: Context) -> Found:
    """Time checkpointed updates of a larger network with FusedRMSprop."""
    return told(
        training.check_large_step(torch.device(context["device"]), small=context["rehearsal"])
    )


def vae(context: Context, size: Sequence[int], dtype: str) -> Found:
    """Time decoding a clip."""
    device = torch.device(context["device"])
    few = context["rehearsal"]
    frames, height, width = (5, 16, 24) if few else size
    found = encoders.measure_vae(
        frames,
        height,
        width,
        getattr(torch, dtype),
        device=device,
        clock=clock_for(device),
        config=encoders.TINY_VAE if few else encoders.WAN_VAE,
    )
    return told([found])


def text(context: Context) -> Found:
    """Time encoding a prompt."""
    device = torch.device(context["device"])
    found = encoders.measure_text(
        encoders.PROMPT_TOKENS,
        torch.bfloat16,
        device=device,
        clock=clock_for(device),
        config=encoders.TINY_UMT5 if context["rehearsal"] else encoders.UMT5_XXL,
    )
    return told([found])


def kernels(rehearsal: bool) -> tuple[str, ...]:
    """Return the kernel backends to compare; on a CPU, the references only.

    "auto" is not among them: it takes the references at sizes like the digits'.
    """
    return ("reference",) if rehearsal else ("triton", "reference")


def told(measurements: Any) -> Found:
    """Return measurements as the content of an event."""
    return {"measurements": [asdict(m) for m in measurements]}
