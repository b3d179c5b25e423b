"""Measure ops: check every variant against fp64, then time those that are right, in turns."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from apt.bench.ceilings import Ceilings
from apt.bench.inputs import Inputs, Random, copies, exact
from apt.bench.ops import Function, Op, Outputs, variants_of
from apt.bench.records import Measurement, Status, first_line
from apt.bench.shapes import Shape
from apt.bench.timing import Clock, Work, median, time_interleaved
from apt.errors import InputError

Direction = Literal["forward", "backward"]

COMPILE = "compile"


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """What is measured: one op at one shape, in one dtype and direction."""

    op: Op
    shape: Shape
    dtype: torch.dtype
    direction: Direction

    def key(self, variant: str) -> dict[str, str | int]:
        """As records hold it."""
        return {
            "op": self.op.name,
            "shape": self.shape.name,
            "size": str(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "direction": self.direction,
            "variant": variant,
        }


def cases_of(op: Op, shape: Shape, dtype: torch.dtype | None = None) -> list[OpCase]:
    """Forward, and backward if the op has one; dtype None is that of the op or the shape."""
    directions: list[Direction] = ["forward", "backward"] if op.gradients else ["forward"]
    return [
        OpCase(op=op, shape=shape, dtype=dtype or op.dtype or shape.dtype, direction=direction)
        for direction in directions
    ]


def variant_names(op: Op) -> list[str]:
    """Every variant that `measure_op` reports: ours, torch.compile, peers."""
    return [*variants_of(op), *([COMPILE] if op.compiled else []), *op.peers]


def is_ours(op: Op, variant: str) -> bool:
    """Whether a wrong result of this variant is our mistake, not a peer's."""
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
    """One measurement for each variant.

    A variant that cannot run here is skipped with the reason; one whose output or gradient is wrong
    is reported as wrong, without a time.

    Args:
        case: what to measure.
        device, clock: where, and the device's clock.
        ceilings: of this device, for the shares.
        rounds, max_seconds: as in `time_interleaved`.
        only: names of variants; None for all.
        seed: of the inputs.

    Raises:
        InputError: `only` names a variant that the op does not have.
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
        functions["triton"] = _refuse("needs a CUDA GPU; the interpreter's time says nothing")
    generator = torch.Generator(device).manual_seed(seed)
    checks = _check(case, functions, generator)
    inputs = _draw(case, case.shape, generator)
    works = {
        name: _work(case, functions[name], inputs)
        for name, check in checks.items()
        if check.status == "measured"
    }
    samples: dict[str, tuple[float, ...]] = {}
    if works:
        samples = time_interleaved(works, clock, rounds=rounds, max_seconds=max_seconds)
    if case.op.compiled:
        torch.compiler.reset()  # or the next shapes count as recompilations of this one
    return [
        Measurement(
            case=case.key(name),
            status=check.status,
            reason=check.reason,
            samples_ms=samples.get(name, ()),
            metrics={"error": check.error} | _rates(case, median(samples[name]), ceilings)
            if name in samples
            else {},
        )
        for name, check in checks.items()
    ]


@dataclass(frozen=True, kw_only=True)
class Check:
    """Whether a variant may be timed.

    Attributes:
        status: "measured" if it may.
        reason: why not.
        error: the largest relative error of its outputs or gradients.
    """

    status: Status
    reason: str = ""
    error: float = float("nan")


def check_op(
    case: OpCase, *, device: torch.device, only: Collection[str] | None = None, seed: int = 0
) -> dict[str, Check]:
    """Each variant against fp64, without timing it; on a CPU, Triton in its interpreter."""
    functions = _functions(case.op)
    chosen = {name: f for name, f in functions.items() if only is None or name in only}
    return _check(case, chosen, torch.Generator(device).manual_seed(seed))


def _functions(op: Op) -> dict[str, Function]:
    functions = variants_of(op)
    if op.compiled:
        # fullgraph: a time of half a graph would be nobody's
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
    """Outputs or gradients within twice the same-dtype reference's error against fp64."""
    op, limit = case.op, case.op.check_tokens or case.shape.tokens
    inputs = _draw(case, replace(case.shape, tokens=min(limit, case.shape.tokens)), generator)
    exact_results = _results(case, lambda i: op.call(i, op.exact), exact(inputs))
    reference = _errors(_results(case, lambda i: op.call(i, op.exact), inputs), exact_results)
    eps = torch.finfo(case.dtype).eps
    checks = {}
    for name, function in functions.items():
        try:
            errors = _errors(_results(case, function, inputs), exact_results)
        except InputError as error:
            checks[name] = Check(status="skipped", reason=str(error))
            continue
        # One failing variant must not take the times of all others with it: it is reported
        except Exception as error:
            status: Status = "wrong" if is_ours(op, name) else "skipped"
            checks[name] = Check(status=status, reason=first_line(error))
            continue
        # Beyond twice the reference: two roundings, as a peer may round once more on its way, and
        # what fp32 sums over thousands of rows differ by in another order
        slack = 2 * eps + 32 * torch.finfo(torch.float32).eps
        allowed = {part: 2 * value + slack for part, value in reference.items()}
        # not >, which NaN would pass
        wrong = [part for part in errors if not errors[part] <= allowed[part]]
        if wrong:
            part = wrong[0]
            reason = f"error of {part} {errors[part]:.2g}, allowed {allowed[part]:.2g}"
            checks[name] = Check(status="wrong", reason=reason, error=errors[part])
        else:
            checks[name] = Check(status="measured", error=max(errors.values()))
    return checks


def _results(case: OpCase, function: Function, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs, or gradients, by name."""
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
    # A fresh graph for each sample: compiled backwards give theirs away.
    return Work(
        lambda outputs: torch.autograd.grad(outputs, wanted, weights),
        prepare=lambda: _tuple(function(inputs)),
    )


def _weights(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients to start from: the same values for every variant and every dtype."""
    generator = torch.Generator(outputs[0].device).manual_seed(7)
    return tuple(
        torch.randn(o.shape, generator=generator, device=o.device).to(torch.bfloat16).to(o.dtype)
        for o in outputs
    )


def _tuple(outputs: Outputs) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative error of each part in the Euclidean norm, in fp64; infinite for a wrong shape."""
    errors = {}
    for name, want in exact.items():
        if found[name].shape != want.shape:
            errors[name] = float("inf")
            continue
        norm = want.norm().clamp(min=torch.finfo(torch.float32).tiny)
        errors[name] = float((found[name].double() - want).norm() / norm)
    return errors


def _rates(case: OpCase, milliseconds: float, ceilings: Ceilings) -> dict[str, float]:
    cost = case.op.cost(case.shape, case.dtype, case.direction == "backward")
    gb_s, tflops = cost.bytes / milliseconds / 1e6, cost.flops / milliseconds / 1e9
    return {
        "bytes": float(cost.bytes),
        "flops": float(cost.flops),
        "gb_s": gb_s,
        "tflops": tflops,
        "share_of_copy": gb_s / ceilings.copy_gb_s,
        "share_of_matmul": tflops / ceilings.matmul_tflops,
    }
