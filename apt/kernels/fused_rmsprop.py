"""RMSProp (APT Sec. 3.5) and the moving average of the weights (Sec. 3.5, App. D) in one pass.

    v   = alpha v + (1 - alpha) g^2            g = dL/dp + weight_decay p
    p   = p - lr g / (sqrt(v) + eps)
    avg = ema_decay avg + (1 - ema_decay) p

Bytes in fp32: p, v and the average are read and written, the gradient is read: 28 per parameter. A
step of torch's foreach kernels moves 52, and a separate average 12 more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from apt.distributed.tensors import local
from apt.errors import CheckpointError, InputError
from apt.kernels.backends import check_backend, resolve_backend, why_not_tensors
from apt.kernels.signatures import RMSpropOptions, RMSpropStep

OP = "fused_rmsprop"
# Options of torch's RMSprop that change its arithmetic or the place of its state.
UNSUPPORTED = ("momentum", "centered", "maximize", "capturable", "differentiable")


class FusedRMSprop(torch.optim.RMSprop):
    """`torch.optim.RMSprop` without momentum that can also keep a moving average of the weights.

    The state dict is that of torch's class, and each class loads the other's. Squares are averaged
    in fp32 also for fp16 and bf16 parameters (torch's class uses the parameter's dtype), and the
    state exists from the start. The reference equals torch's class bit for bit in fp32 (torch's
    loop, its default on the CPU). Sharded parameters (DTensor) are updated shard by shard.

    Args:
        params: parameters or groups, real and floating point.
        lr, alpha, eps, weight_decay: as in torch.
        momentum, centered: must be off.
        ema: average of each parameter, fp32 (or fp64 for fp64 parameters), with the parameter's
            shape and sharding. Parameters without a gradient do not change but are averaged, too.
            Averages belong to the caller and are not part of the state dict.
        ema_decay: decay of the averages, in [0, 1]; the paper uses 0.995.
        backend: "triton": one launch for all fp16, bf16 and fp32 parameters of a group with the
            same dtypes that all have averages or all have none; they must be contiguous.
            "reference": torch, parameter by parameter. None chooses, at each step and for each
            parameter, the kernel for CUDA tensors that it can take, and the reference for others.

    Raises:
        InputError: for options or averages that break these rules, and an unknown backend. At a
            step, for sparse gradients and a backend that cannot run; nothing is changed then.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        ema: Mapping[Tensor, Tensor] | None = None,
        ema_decay: float | None = None,
        backend: str | None = None,
    ) -> None:
        check_backend(OP, backend)
        problem = _unsupported({"momentum": momentum, "centered": centered})
        if problem:
            raise InputError(problem)
        super().__init__(params, lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay)
        if (ema is None) != (ema_decay is None) or not 0.0 <= (ema_decay or 0.0) <= 1.0:
            raise InputError(f"{OP}: pass both ema and an ema_decay in [0, 1], got {ema_decay}")
        self._averages = dict(ema or {})
        self._ema_decay = 0.0 if ema_decay is None else ema_decay
        self._backend = backend
        _check_averages(self.param_groups, self._averages)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as torch does; the state of its parameters is created at once."""
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if p.is_complex():
                raise InputError(f"{OP}: takes real parameters, got {p.dtype}")
            self._create_state(p)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as torch does. Raises CheckpointError for one with unsupported options."""
        for group in state_dict["param_groups"]:
            problem = _unsupported(group)
            if problem:
                raise CheckpointError(problem)
        super().load_state_dict(state_dict)
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(saved, parameters, strict=True):
            self._create_state(p)
            square_avg = self.state[p]["square_avg"]
            if square_avg.dtype != _wide(p):  # torch rounds what it loads to the parameter's dtype
                exact = state_dict["state"][i]["square_avg"]
                self.state[p]["square_avg"] = exact.to(p.device, _wide(p), copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have gradients, and all averages."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # All choices come before any change: if a named backend cannot run, nothing is changed
        for part in [part for group in self.param_groups for part in self._parts(group)]:
            part.update(self._ema_decay)
        for group in self.param_groups:
            still = [p for p in group["params"] if p.grad is None and p in self._averages]
            _average(_local(still), _local([self._averages[p] for p in still]), self._ema_decay)
        return loss

    def _parts(self, group: dict[str, Any]) -> list[_Part]:
        """Group the parameters that have gradients by how they are updated."""
        options = RMSpropOptions(*(float(group[name]) for name in RMSpropOptions._fields))
        alike: dict[tuple[torch.device, bool, str | None], list[_Row]] = {}
        for p in group["params"]:
            if p.grad is not None:
                row = self._row(p)
                kind = row.param.device, row.average is None, _why_not_triton(row)
                alike.setdefault(kind, []).append(row)
        return [
            _Part(resolve_backend(OP, self._backend, rows[0].tensors, limit), rows, options)
            for (*_, limit), rows in alike.items()
        ]

    def _row(self, p: Tensor) -> _Row:
        state = self.state[p]
        touched = [p, _gradient(p), state["square_avg"]]
        if p in self._averages:
            touched.append(self._averages[p])
        return _Row(state["step"], *_local(touched))

    def _create_state(self, p: Tensor) -> None:
        if not self.state[p]:
            self.state[p]["step"] = torch.zeros((), dtype=torch.get_default_dtype())
            self.state[p]["square_avg"] = torch.zeros_like(p, dtype=_wide(p))

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_averages", "_ema_decay", "_backend")
        return super().__getstate__() | {name: self.__dict__[name] for name in kept}


class _Row(NamedTuple):
    """The step count of a parameter, and this rank's shards of all other tensors of a step."""

    step: Tensor
    param: Tensor
    grad: Tensor
    square_avg: Tensor
    average: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that a kernel takes."""
        return [tensor for tensor in self[1:] if tensor is not None]


class _Part(NamedTuple):
    """Rows on one device, all with an average or all without, that one backend updates."""

    backend: str
    rows: list[_Row]
    options: RMSpropOptions

    def update(self, ema_decay: float) -> None:
        torch._foreach_add_([row.step for row in self.rows], 1.0)
        step = RMSpropStep(
            [row.param for row in self.rows],
            [row.grad for row in self.rows],
            [row.square_avg for row in self.rows],
            [row.average for row in self.rows if row.average is not None],
            self.options,
            ema_decay,
        )
        if self.backend == "triton":
            from apt.kernels._triton.fused_rmsprop import fused_rmsprop_op

            fused_rmsprop_op(step)
        else:
            rmsprop_reference(step)


def rmsprop_reference(step: RMSpropStep) -> None:
    """Compute the op in torch, with the operations of torch's own loop, in at least fp32."""
    for row in zip(step.params, step.grads, step.square_avgs, strict=True):
        _update(*row, step.options)
    _average(step.params, step.averages, step.ema_decay)


def _update(p: Tensor, grad: Tensor, square_avg: Tensor, options: RMSpropOptions) -> None:
    value, grad = p.to(_wide(p)), grad.to(_wide(p))
    if options.weight_decay:
        grad = grad.add(value, alpha=options.weight_decay)
    square_avg.mul_(options.alpha).addcmul_(grad, grad, value=1 - options.alpha)
    value.addcdiv_(grad, square_avg.sqrt().add_(options.eps), value=-options.lr)
    if value is not p:
        p.copy_(value)


def _average(params: list[Tensor], averages: list[Tensor], decay: float) -> None:
    """Update averages as `torch.optim.swa_utils.get_ema_multi_avg_fn` does."""
    if averages:
        values = [p.to(average.dtype) for p, average in zip(params, averages, strict=True)]
        torch._foreach_lerp_(averages, values, 1 - decay)


def _wide(p: Tensor) -> torch.dtype:
    return torch.promote_types(p.dtype, torch.float32)


def _local(tensors: list[Tensor]) -> list[Tensor]:
    """Return this rank's shards; plain tensors are returned as is."""
    return [local(tensor) for tensor in tensors]


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    if p.grad.is_sparse:
        raise InputError(f"{OP}: takes dense gradients, got a sparse one")
    shards = [getattr(tensor, "placements", None) for tensor in (p, p.grad)]
    if shards[0] != shards[1]:
        raise InputError(
            f"{OP}: a gradient must be sharded like its parameter, {shards[0]}; got {shards[1]}"
        )
    return p.grad


def _why_not_triton(row: _Row) -> str | None:
    if all(x.is_contiguous() for x in (row.param, row.square_avg, row.average) if x is not None):
        return why_not_tensors(row.tensors)
    return "takes contiguous parameters, states and averages"


def _unsupported(options: Mapping[str, Any]) -> str | None:
    found = [f"{name}={options[name]}" for name in UNSUPPORTED if options.get(name)]
    if not found:
        return None
    return (
        f"{OP}: has no {', '.join(found)}; APT uses RMSProp without them. Leave them out, or use "
        "torch.optim.RMSprop"
    )


def _check_averages(groups: list[dict[str, Any]], averages: Mapping[Tensor, Tensor]) -> None:
    parameters = {p for group in groups for p in group["params"]}
    strangers = sum(p not in parameters for p in averages)
    if strangers:
        raise InputError(f"{OP}: ema has {strangers} parameters that are not optimised")
    for p, average in averages.items():
        fits = average.shape == p.shape and average.device == p.device
        if not fits or average.dtype not in (torch.float32, _wide(p)):
            raise InputError(
                f"{OP}: the average of a parameter {tuple(p.shape)} on {p.device} must be fp32 of "
                f"that shape, got {tuple(average.shape)} {average.dtype} on {average.device}"
            )
