"""Networks in training: optimiser, EMA, and tensors by name.

`model_state` and `optimizer_state` return the tensors in training themselves, not copies. So a
checkpoint is restored by loading into them in place, and the same code works in one process (plain
tensors) and under FSDP2 (DTensors, of which each rank holds its shard).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from apt.distributed.sharding import reduce_gradients
from apt.distributed.tensors import is_sharded, local, whole
from apt.errors import CheckpointError, InputError
from apt.kernels import FusedRMSprop
from apt.methods.base import MicroBatch
from apt.train.config import OptimizerConfig
from apt.train.witness import Rehearsed


class NonFiniteGradient(ArithmeticError):
    """Gradients or their norm are NaN or infinite; no weight has changed.

    Attributes:
        names: parameters with such gradients in this rank's shard.
    """

    def __init__(self, module: nn.Module) -> None:
        self.names = [
            name
            for name, p in module.named_parameters()
            if p.grad is not None and not bool(local(p.grad).isfinite().all())
        ]
        super().__init__("a gradient is NaN or infinite")


@dataclass
class Trained:
    """A network in training, with its optimiser and, for generators, its EMA."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    config: OptimizerConfig
    num_updates: int
    ema: EMA | None = None
    sharded: bool = False
    """Whether its tensors are sharded over several ranks"""
    reduces_once: bool = False
    moves: int = 0
    """How often an optimiser step has begun in this process"""
    rehearses: bool = False
    """Whether `step` raises Rehearsed instead of changing anything"""
    _in_last_batch: bool = field(default=True, init=False)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def accumulated(self, batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        """Yield micro-batches whose gradients add up, for a loop of forward and backward passes."""
        for number, batch in enumerate(batches, start=1):
            self._in_last_batch = number == len(batches)
            self._prepare_backward(last=self._in_last_batch)
            yield batch

    def backward_passes(self, number: int) -> Iterator[int]:
        """Yield once before each of several backward passes of a micro-batch.

        What ranks do once per update happens in the last one.
        """
        for turn in range(number):
            self._prepare_backward(last=self._in_last_batch and turn == number - 1)
            yield turn

    def _prepare_backward(self, *, last: bool) -> None:
        if self.sharded:
            reduce_gradients(self.module, last=last, once=self.reduces_once)

    def step(self, update: int) -> float:
        """Clip gradients, update weights and EMA, and return the norm of the gradients.

        `update` counts from 0. Raises NonFiniteGradient before anything has changed.
        """
        if self.rehearses:
            raise Rehearsed
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = self._gradient_norm(parameters)
        if not math.isfinite(norm):
            raise NonFiniteGradient(self.module)
        limit = self.config.max_grad_norm
        if limit:
            scale = min(1.0, limit / (norm + 1e-6))
            for p in parameters:
                if p.grad is not None:
                    p.grad.mul_(scale)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(update) * group["share"]
        self.moves += 1
        self.optimizer.step()
        if self.ema is not None:
            self.ema.update(self.module, update)
        return norm

    def rate(self, update: int) -> float:
        """Return the learning rate of update number `update`, from 0."""
        return learning_rate(self.config, update, self.num_updates)

    def state(self) -> dict[str, Any]:
        """Return everything that training changes, as live tensors by name."""
        state: dict[str, Any] = {
            "weights": model_state(self.module),
            "optimizer": optimizer_state(self.module, self.optimizer),
        }
        if self.ema is not None:
            state["ema"] = self.ema.state_dict()
        return state

    def _gradient_norm(self, parameters: Sequence[Tensor]) -> float:
        """Return the 2-norm of all gradients over all ranks."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            return 0.0
        norm = torch.nn.utils.get_total_norm(gradients)
        return (whole(norm) if self.sharded else norm).item()


def learning_rate(config: OptimizerConfig, update: int, num_updates: int) -> float:
    """Return the learning rate of update number `update`, from 0, of `num_updates`."""
    rise = (update + 1) / max(config.warmup_updates, 1)
    fall = (num_updates - update) / max(config.decay_updates, 1)
    return config.learning_rate * min(1.0, rise, fall if config.decay_updates else 1.0)


def make_optimizer(
    module: nn.Module,
    config: OptimizerConfig,
    ema: EMA | None = None,
    slowed: tuple[nn.Module, float] | None = None,
) -> torch.optim.Optimizer:
    """Create RMSprop (APT Sec. 3.5) or AdamW for the parameters that train.

    If the module has an EMA with constant decay, RMSprop also updates the EMA, in the same pass
    over memory.

    Args:
        module: the network.
        config: the options of the optimiser.
        ema: the EMA of the module, if any.
        slowed: a part of the module, and the factor on its learning rate, which is `share` in its
            parameter group.
    """
    part, share = slowed or (module, 1.0)
    apart = {id(p) for p in part.parameters()}
    groups: list[dict[str, Any]] = [{"params": [], "share": share}, {"params": [], "share": 1.0}]
    for parameter in module.parameters():
        if parameter.requires_grad:
            groups[share == 1.0 or id(parameter) not in apart]["params"].append(parameter)
    chosen = [group for group in groups if group["params"]]
    if config.name == "adamw":
        return torch.optim.AdamW(
            chosen,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
    lent = None if ema is None or ema.warmup else ema
    return FusedRMSprop(
        chosen,
        lr=config.learning_rate,
        alpha=config.alpha,
        eps=config.eps,
        ema=None if lent is None else lent.lend(module),
        ema_decay=None if lent is None else lent.decay,
    )


class EMA:
    """Exponential moving average of a module's weights (APT Sec. 3.5 and App. D: decay 0.995).

    Each update computes `ema = decay * ema + (1 - decay) * weights`.

    Floating-point parameters are averaged in fp32, whatever their own dtype. Persistent buffers and
    integer tensors are copied. Frozen parameters are left out, because their average is the same.
    The average starts at the module's current weights. Under FSDP2, every rank averages its own
    shard, without communication and with the result of a single process.

    Args:
        module: the module to average; shard it first, if at all.
        decay: in [0, 1]; the paper uses 0.995.
        inside: a module that holds the average instead of separate memory, of the same shape and
            sharded in the same way. The average starts at its weights, which nothing else may
            change.
        warmup: limit the decay of update n, from 0, to (1 + n) / (10 + n), so that an average of
            few updates does not consist of the first weights.

    Raises:
        InputError: `decay` is outside [0, 1].
    """

    def __init__(
        self,
        module: nn.Module,
        decay: float,
        *,
        warmup: bool = False,
        inside: nn.Module | None = None,
    ) -> None:
        if not 0.0 <= decay <= 1.0:
            raise InputError(f"EMA decay must be in [0, 1], got {decay}; the paper uses 0.995.")
        self.decay = decay
        self.warmup = warmup
        buffers = {name for name, _ in module.named_buffers()}
        state = model_state(module)
        frozen = {
            name
            for name, value in module.state_dict(keep_vars=True).items()
            if isinstance(value, nn.Parameter) and not value.requires_grad
        }
        kept = {k: v for k, v in state.items() if k not in frozen}
        self._averaged = [k for k, v in kept.items() if k not in buffers and v.is_floating_point()]
        names = set(self._averaged)
        self._copied = [k for k in kept if k not in names]
        self._sharded = any(is_sharded(type(value)) for value in kept.values())
        self._inside = inside
        if inside is not None:
            carried = model_state(inside)
            self._shadow = {k: carried[k] for k in kept}
            return
        self._shadow = {
            k: v.to(torch.float32 if k in names else v.dtype, copy=True) for k, v in kept.items()
        }

    def lend(self, module: nn.Module) -> dict[Tensor, Tensor]:
        """Return averages by trained parameter, for an optimiser that updates both in one pass.

        From then on the optimiser must update them, with the constant decay; `update` skips them.
        """
        lent: dict[Tensor, Tensor] = {}
        for name, value in module.state_dict(keep_vars=True).items():
            if name in self._averaged and value.requires_grad and value not in lent:
                lent[value] = self._shadow[name]
                self._averaged.remove(name)
        return lent

    @torch.no_grad()
    def update(self, module: nn.Module, update: int = 0) -> None:
        """Update the average from the module's weights, except for what was lent.

        `update` counts from 0; only the warm-up uses it.
        """
        state = model_state(module)
        if self._inside is not None:
            model_state(self._inside)  # resets its FSDP state, so that it gathers weights again
        shadows = [self._own(self._shadow[k]) for k in self._averaged]
        weights = [self._own(state[k]).to(torch.float32) for k in self._averaged]
        if shadows:
            decay = min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay
            get_ema_multi_avg_fn(decay)(shadows, weights, None)
        for name in self._copied:
            self._shadow[name].copy_(state[name])

    def _own(self, tensor: Tensor) -> Tensor:
        return local(tensor) if self._sharded else tensor

    def state_dict(self) -> dict[str, Tensor]:
        """Return the averaged tensors by name; they are live, so loading in place restores them.

        Frozen parameters are not included; the module has them.
        """
        return dict(self._shadow)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` into the average; names, shapes and dtypes must match exactly.

        Raises:
            CheckpointError: names, shapes or dtypes differ.
        """
        if state.keys() != self._shadow.keys():
            odd = sorted(state.keys() ^ self._shadow.keys())
            raise CheckpointError(
                f"the EMA state does not fit the model; these names differ: {odd}"
            )
        for name, shadow in self._shadow.items():
            value = state[name]
            if value.shape != shadow.shape or value.dtype != shadow.dtype:
                raise CheckpointError(
                    f"EMA tensor {name!r} is {value.dtype} {tuple(value.shape)}, "
                    f"expected {shadow.dtype} {tuple(shadow.shape)}"
                )
        for name, shadow in self._shadow.items():
            shadow.copy_(state[name])

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Copy the average into `module`, cast to the module's dtypes."""
        state = model_state(module)
        for name, value in self._shadow.items():
            state[name].copy_(value)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Replace the weights of `module` by the average inside the block, then restore them."""
        state = model_state(module)
        kept = {name: state[name].clone() for name in self._shadow}
        self.copy_to(module)
        try:
            yield
        finally:
            state = model_state(module)
            with torch.no_grad():
                for name, value in kept.items():
                    state[name].copy_(value)


def model_state(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, detached but with the same storage.

    Args:
        module: any module, sharded with FSDP2 or not.
    """
    # Only state_dict() is safe under FSDP2: its hook restores the sharded parameters, while
    # named_parameters() yields whole ones after a forward pass that did not reshard.
    return dict(module.state_dict())


def optimizer_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict]:
    """Return the optimiser's tensors as `{parameter name: {state name: tensor}}`, live.

    State that the optimiser has not created yet is created here as zeros, with which RMSprop,
    Adam(W) and SGD with momentum begin. Hyper-parameters are not included; they belong to the
    configuration.

    Args:
        module: owns every parameter that the optimiser updates.
        optimizer: any `torch.optim` optimiser whose state starts at zero.

    Raises:
        ValueError: the optimiser updates a parameter that `module` does not own.
    """
    names: dict[int, str] = {}
    for name, parameter in module.state_dict(keep_vars=True).items():
        names.setdefault(id(parameter), name)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    strangers = sum(id(p) not in names for p in parameters)
    if strangers:
        raise ValueError(
            f"{strangers} of the optimiser's {len(parameters)} parameters are not in the module; "
            "create the optimiser from this module's parameters, after sharding the module."
        )
    _create_missing_state(optimizer, parameters)
    return {
        names[id(p)]: {k: v for k, v in optimizer.state[p].items() if isinstance(v, Tensor)}
        for p in parameters
    }


def _create_missing_state(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    missing = {id(p) for p in parameters if not optimizer.state[p]}
    if not missing:
        return
    gradients = [p.grad for p in parameters]
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for p in parameters:
            # Use ones: with zeros and eps = 0, RMSprop would divide zero by zero.
            p.grad = torch.ones_like(p) if id(p) in missing else None
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
    finally:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
    for p in parameters:
        if id(p) in missing:
            for value in optimizer.state[p].values():
                if isinstance(value, Tensor):
                    value.zero_()
