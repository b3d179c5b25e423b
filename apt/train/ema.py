"""Exponential moving average of a module's weights (APT Sec. 3.5 and App. D: decay 0.995)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from apt.distributed.tensors import local
from apt.errors import CheckpointError, InputError
from apt.train.state import model_state

__all__ = ["EMA"]


class EMA:
    """Keeps `ema = decay * ema + (1 - decay) * weights` beside a module.

    Floating-point parameters are averaged in fp32 whatever their own dtype; persistent buffers
    and integer tensors are copied as they are; parameters that do not train are left out, as their
    average would be the same in twice the memory. The first value is the module's current one.
    Under FSDP2 every rank averages its own shard, so nothing is communicated and the result is the
    one of a single process.

    Args:
        module: the module to follow; sharding, if any, must already be done.
        decay: in [0, 1]; the paper uses 0.995.
        inside: the module that carries the average, of the same shape and sharded alike, in place
            of memory of its own; what it has now is the first value. Nothing else may move it.
        warmup: in update n, from 0, the decay is at most (1 + n) / (10 + n), so that an average of
            few updates is not one of the weights that it began with.

    Raises:
        InputError: `decay` lies outside [0, 1].
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
            raise InputError(f"EMA decay {decay} is not in [0, 1]; the paper uses 0.995.")
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
        self._inside = inside
        if inside is not None:
            carried = model_state(inside)
            self._shadow = {k: carried[k] for k in kept}
            return
        self._shadow = {
            k: v.to(torch.float32 if k in names else v.dtype, copy=True) for k, v in kept.items()
        }

    def lend(self, module: nn.Module) -> dict[Tensor, Tensor]:
        """Averages by trained parameter, for an optimiser that moves both in one pass.

        From now on whoever has them keeps them up to date, at the constant decay, and `update`
        leaves them out.
        """
        lent: dict[Tensor, Tensor] = {}
        for name, value in module.state_dict(keep_vars=True).items():
            if name in self._averaged and value.requires_grad and value not in lent:
                lent[value] = self._shadow[name]
                self._averaged.remove(name)
        return lent

    @torch.no_grad()
    def update(self, module: nn.Module, update: int = 0) -> None:
        """Move the average one step towards the module's present weights, except what was lent.

        `update` counts from 0; only the warm-up looks at it.
        """
        state = model_state(module)
        if self._inside is not None:
            model_state(self._inside)  # so that it gathers its weights anew, see there
        shadows = [local(self._shadow[k]) for k in self._averaged]
        weights = [local(state[k]).to(torch.float32) for k in self._averaged]
        if shadows:
            decay = min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay
            get_ema_multi_avg_fn(decay)(shadows, weights, None)
        for name in self._copied:
            self._shadow[name].copy_(state[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged tensors by name (live: loading into them in place restores).

        What does not train is not among them; the module has it.
        """
        return dict(self._shadow)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy `state` in; names, shapes and dtypes must match exactly.

        Raises:
            CheckpointError: names, shapes or dtypes differ.
        """
        if state.keys() != self._shadow.keys():
            odd = sorted(state.keys() ^ self._shadow.keys())
            raise CheckpointError(f"the EMA state does not fit the model; differing names: {odd}")
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
        """Write the average into `module`, cast to the module's own dtypes."""
        state = model_state(module)
        for name, value in self._shadow.items():
            state[name].copy_(value)

    @contextmanager
    def applied(self, module: nn.Module) -> Iterator[None]:
        """Let `module` carry the average inside the `with` block; its weights come back."""
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
