"""Measure ops: check every variant against fp64, then time the correct ones in turns."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from apt.bench.accuracy import Deviation, deviation
from apt.bench.ceilings import Ceilings
from apt.bench.facts import attention_facts
from apt.bench.inputs import Inputs, Random, copies, exact
from apt.bench.ops import Function, Op, Outputs, variants_of
from apt.bench.poison import poisoned_memory
from apt.bench.records import Measurement, Status, first_line
from apt.bench.shapes import Shape
from apt.bench.split import profile_split
from apt.bench.timing import Clock, Timing, Work, median, time_interleaved
from apt.errors import InputError
from apt.kernels import watch_attention
from apt.kernels.roofline import Rates

Direction = Literal["forward", "backward"]

COMPILE = "compile"
NOT_COMPARED = Deviation(float("nan"), float("nan"))


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """One op at one shape, in one dtype and direction."""

    op: Op
    shape: Shape
    dtype: torch.dtype
    direction: Direction

    def key(self, variant: str) -> dict[str, str | int]:
        """Return the case as records hold it."""
        return {
            "op": self.op.name,
            "shape": self.shape.name,
            "size": str(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "direction": self.direction,
            "variant": variant,
        }


def cases_of(op: Op, shape: Shape, dtype: torch.dtype | None = None) -> list[OpCase]:
    """Return forward, and backward if the op has one. Dtype None is that of the op or the shape."""
    directions: list[Direction] = ["forward", "backward"] if op.gradients else ["forward"]
    return [
        OpCase(op=op, shape=shape, dtype=dtype or op.dtype or shape.dtype, direction=direction)
        for direction in directions
    ]


def variant_names(op: Op) -> list[str]:
    """Return every variant that `measure_op` reports: ours, torch.compile and peers."""
    return [*variants_of(op), *([COMPILE] if op.compiled else []), *op.peers]


def is_ours(op: Op, variant: str) -> bool:
    """Return whether this variant is ours, so that a wrong result is our mistake."""
    return variant in op.variants


def measure_op(
    case: OpCase,
    *,
    device: torch.device,
    clock: Clock,
    ceilings: Ceilings,
    rounds: int,
    only: Collection[str] | None = None,
    max_seconds: float | None = None,
    seed: int = 0,
) -> list[Measurement]:
    """Measure every variant of an op.

    A variant that cannot run here is skipped, with the reason. A variant whose output or gradient
    is wrong is reported as wrong, without a time.

    Args:
        case: what to measure.
        device, clock: the device and its clock.
        ceilings: rates of this device, for the shares.
        rounds, max_seconds: as in `time_interleaved`.
        only: names of variants; None for all.
        seed: seed of the inputs.

    Raises:
        InputError: if `only` names a variant that the op does not have.
    """
    names = variant_names(case.op)
    unknown = set(only or ()) - set(names)
    if unknown:
        raise InputError(
            f"{case.op.name} has no variant {', '.join(sorted(unknown))}; there are: "
            f"{', '.join(names)}"
        )
    functions = {
        name: function
        for name, function in _functions(case.op).items()
        if only is None or name in only
    }
    if "triton" in functions and device.type != "cuda":
        functions["triton"] = _refuse("needs a CUDA GPU; times in the interpreter mean nothing")
    generator = torch.Generator(device).manual_seed(seed)
    checks = _check(case, functions, generator)
    inputs = _draw(case, case.shape, generator)
    works = {
        name: _work(case, functions[name], inputs)
        for name, check in checks.items()
        if check.status == "measured"
    }
    timings: dict[str, Timing] = {}
    if works:
        timings = time_interleaved(works, clock, rounds=rounds, max_seconds=max_seconds)
    if case.op.compiled:
        torch.compiler.reset()  # otherwise the next shapes count as recompilations of this one
    measurements = []
    for name, check in checks.items():
        key = case.key(name)
        if name not in timings:
            measurements.append(Measurement(case=key, status=check.status, reason=check.reason))
            continue
        timing = timings[name]
        errors = {"error": check.error.whole, "row_error": check.error.row}
        rates = _rates(case, median(timing.samples_ms), ceilings)
        measurements.append(
            Measurement(
                case=key,
                samples_ms=timing.samples_ms,
                metrics=errors | rates | timing.metrics(device),
                facts=_facts(case, name, works[name], device),
            )
        )
    return measurements


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of checking a variant.

    Attributes:
        status: "measured" if the variant may be timed.
        reason: why not.
        error: the largest relative errors of its outputs or gradients.
    """

    status: Status
    reason: str = ""
    error: Deviation = NOT_COMPARED


def check_op(
    case: OpCase, *, device: torch.device, only: Collection[str] | None = None, seed: int = 0
) -> dict[str, Check]:
    """Check each variant against fp64 without timing it; on a CPU, Triton runs interpreted."""
    functions = _functions(case.op)
    chosen = {name: f for name, f in functions.items() if only is None or name in only}
    checks = _check(case, chosen, torch.Generator(device).manual_seed(seed))
    if case.op.compiled:
        torch.compiler.reset()  # as in measure_op
    return checks


def _functions(op: Op) -> dict[str, Function]:
    functions = variants_of(op)
    if op.compiled:
        # fullgraph: the time of a graph with breaks would mean nothing
        functions[COMPILE] = torch.compile(
            lambda inputs: op.call(inputs, "reference"), fullgraph=True, dynamic=False
        )
    return functions | dict(op.peers)


def _refuse(reason: str) -> Function:
    def refuse(_: Inputs) -> Outputs:
        raise InputError(reason)

    return refuse


def _draw(case: OpCase, shape: Shape, generator: torch.Generator) -> Inputs:
    inputs = case.op.draw(shape, Random(generator, case.dtype))
    if case.direction == "backward":
        for name in case.op.gradients:
            inputs[name].requires_grad_()
    return inputs


def _check(
    case: OpCase, functions: Mapping[str, Function], generator: torch.Generator
) -> dict[str, Check]:
    """Check that errors against fp64 are at most twice those of the reference in the same dtype."""
    op, limit = case.op, case.op.check_tokens or case.shape.tokens
    inputs = _draw(case, replace(case.shape, tokens=min(limit, case.shape.tokens)), generator)
    exact_results = _results(case, lambda i: op.call(i, op.exact), exact(inputs))
    reference = _deviations(_results(case, lambda i: op.call(i, op.exact), inputs), exact_results)
    # Slack beyond twice the reference's error: two roundings, as a peer may round once more, and
    # the differences of fp32 sums over thousands of rows in another order
    slack = 2 * torch.finfo(case.dtype).eps + 32 * torch.finfo(torch.float32).eps
    allowed = {
        part: Deviation(*(2 * error + slack for error in errors))
        for part, errors in reference.items()
    }
    checks = {}
    for name, function in functions.items():
        # Dynamo recompiles when the deterministic mode changes, which would take twice the time
        memory = nullcontext() if name == COMPILE else poisoned_memory()
        try:
            with memory:
                found = _deviations(_results(case, function, inputs), exact_results)
        except InputError as error:
            checks[name] = Check(status="skipped", reason=str(error))
            continue
        # One failing variant is reported and must not cost the times of the others
        except Exception as error:
            status: Status = "wrong" if is_ours(op, name) else "skipped"
            checks[name] = Check(status=status, reason=first_line(error))
            continue
        wrong = {part: too for part in found if (too := found[part].exceeds(allowed[part]))}
        largest = Deviation(*map(max, zip(*found.values(), strict=True)))
        if wrong:
            part, figures = next(iter(wrong.items()))
            reason = f"error of {part} {figures}"
            checks[name] = Check(status="wrong", reason=reason, error=largest)
        else:
            checks[name] = Check(status="measured", error=largest)
    return checks


def _results(case: OpCase, function: Function, inputs: Inputs) -> dict[str, Tensor]:
    """Return outputs or gradients by name."""
    if case.op.mutates:
        inputs = copies(inputs)
    if case.direction == "forward":
        with torch.no_grad():
            outputs = _tuple(function(inputs))
        return {f"output {i}": output for i, output in enumerate(outputs)}
    wanted = [inputs[name] for name in case.op.gradients]
    outputs = _tuple(function(inputs))
    gradients = torch.autograd.grad(outputs, wanted, _weights(outputs))
    return {f"d {n}": g for n, g in zip(case.op.gradients, gradients, strict=True)}


def _work(case: OpCase, function: Function, inputs: Inputs) -> Work:
    if case.direction == "forward":

        def forward(_: Any) -> object:
            with torch.no_grad():
                return function(inputs)

        return Work(forward)
    wanted = [inputs[name] for name in case.op.gradients]
    weights: tuple[Tensor, ...] = _weights(_tuple(function(inputs)))
    # A new graph for each sample: compiled backward passes free theirs.
    return Work(
        lambda outputs: torch.autograd.grad(outputs, wanted, weights),
        prepare=lambda: _tuple(function(inputs)),
    )


def _facts(case: OpCase, variant: str, work: Work, device: torch.device) -> dict[str, str]:
    if case.op.name != "attention":
        return {}
    with watch_attention() as seen:
        parts = profile_split(lambda: work.run(work.prepare()), device)
    return attention_facts(device, variant, {use.kernel for use in seen}, parts)


def _weights(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Draw output gradients, with the same values for every variant and dtype."""
    generator = torch.Generator(outputs[0].device).manual_seed(7)
    return tuple(
        torch.randn(o.shape, generator=generator, device=o.device).to(torch.bfloat16).to(o.dtype)
        for o in outputs
    )


def _tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _deviations(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, Deviation]:
    return {name: deviation(found[name], want) for name, want in exact.items()}


def _rates(case: OpCase, milliseconds: float, ceilings: Ceilings) -> dict[str, float]:
    cost = case.op.cost(case.shape, case.dtype, case.direction == "backward")
    gb_s, tflops = cost.bytes / milliseconds / 1e6, cost.flops / milliseconds / 1e9
    rates = Rates(matmul_tflops=ceilings.matmul_tflops, memory_gb_s=ceilings.copy_gb_s)
    return {
        "floor_ms": rates.seconds(cost) * 1e3,
        "bytes": float(cost.bytes),
        "flops": float(cost.flops),
        "gb_s": gb_s,
        "tflops": tflops,
        "share_of_copy": gb_s / ceilings.copy_gb_s,
        "share_of_matmul": tflops / ceilings.matmul_tflops,
    }
