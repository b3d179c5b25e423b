"""The frame of all diffusion transformers: embed, run the blocks, un-embed.

Both G and D's backbone are such transformers (APT Sec. 3.1, Fig. 1): `forward` returns G's velocity
(Eq. 3), and `hidden_states` the tokens that D's heads read (Sec. 3.3).

A family of models is a folder beside this file with its parts: how latents, timesteps and text
become tokens, one block, and how tokens become a velocity. This file has what all families share:
returning hidden states, recomputing blocks, dropping layers after the last one that is read,
splitting tokens over ranks, and checking inputs. Anything that must happen at every block belongs
in `_walk`.

Shape suffixes: B samples, R rows of conditions, L visual tokens, S text tokens, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from apt.condition import Condition, check_extra
from apt.distributed.sequence import SequenceGroup, TokenSplit
from apt.errors import ConfigError, InputError
from apt.kernels.modulated_norm import take_rows
from apt.models.checkpointing import Checkpointing

_LARGEST_PATCH = 16


class TransformerConfig(Protocol):
    """The fields of a family's config, a frozen dataclass, that this module reads."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def in_channels(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def depth(self) -> int: ...
    @property
    def text_dim(self) -> int: ...

    def token_grid(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """Return tokens along (T, H, W) for a latent (T, H, W); InputError if it does not fit."""
        ...

    def build(self) -> DiffusionTransformer:
        """Build the module, with random weights."""
        ...


def token_grid(latent_shape: Sequence[int], patch_size: Sequence[int]) -> tuple[int, int, int]:
    """Return tokens along (T, H, W); InputError if they are not multiples of the patch size."""
    for name, size, patch in zip(
        ("frames", "height", "width"), latent_shape, patch_size, strict=True
    ):
        if size < patch or size % patch:
            raise InputError(
                f"latent {name} {size} is not a multiple of the patch, {patch}; choose another size"
            )
    t, h, w = (size // patch for size, patch in zip(latent_shape, patch_size, strict=True))
    return t, h, w


def tokens_multiple(backbone_config: Any) -> int:
    """Return how many latents along a frame's side become one token: the side of the patch.

    Raises ConfigError for a patch that is not square, or larger than 16.
    """
    for side in range(1, _LARGEST_PATCH + 1):
        try:
            backbone_config.token_grid((1, side, side))
        except InputError:
            continue
        return side
    raise ConfigError(
        f"{type(backbone_config).__name__} has no square patch of at most 16 latents; set "
        "--data.size-multiple to the number of pixels that become one token"
    )


class Tokens(NamedTuple):
    """Input and output of a block; if tokens are split over ranks, this rank's.

    Attributes:
        visual: (B, L, D).
        text: (B, S, D); or (R, S, D) in families whose blocks read it and return it unchanged.
    """

    visual: Tensor
    text: Tensor


class Context(NamedTuple):
    """Data that all blocks read and none changes; a tuple, in which FSDP finds tensors.

    Attributes:
        embedding: embedding of the timestep, and of pooled text in families that use it: (R, D),
            or (B, L, D) for timesteps per token.
        modulation: the input of shifts, scales and gates: (R, ...), or (B, L, ...).
        rows: (B,) int64, the row of each sample; None if R = B.
        rope: cosines and sines (L, Dh / 2) of the visual tokens, if positions are rotary.
        mask: (B, L + S) bool, True for keys that joint attention uses; None if it uses all.
        visual: how the visual tokens are split over ranks; None if this rank has them all.
        text: how the text tokens are split over ranks; None if this rank has them all.
    """

    embedding: Tensor
    modulation: Tensor
    rows: Tensor | None
    rope: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)
    mask: Tensor | None = None
    visual: TokenSplit | None = None
    text: TokenSplit | None = None

    @property
    def joint(self) -> TokenSplit | None:
        """How visual tokens followed by text tokens are split over ranks."""
        if self.visual is None or self.text is None:
            return self.visual
        return self.visual.beside(self.text)

    def whole(self, h_BLD: Tensor) -> Tensor:
        """Return values for all visual tokens, given those for this rank's."""
        return h_BLD if self.visual is None else self.visual.whole(h_BLD)

    @property
    def modulation_rows(self) -> Tensor | None:
        """`rows` for `embedding` and `modulation`; None for timesteps per token."""
        return self.rows if self.embedding.ndim == 2 else None


class TransformerBlock(nn.Module):
    """One block of a family: the unit of sharding, checkpointing and compilation."""

    def forward(self, tokens: Tokens, context: Context) -> Tokens:
        """Return the tokens after the block."""
        raise NotImplementedError

    def drop_text_output(self) -> None:
        """Delete weights that only the text output needs. Does nothing if text is only read."""


def _apply(block: TransformerBlock, context: Context, visual: Tensor, text: Tensor) -> Tokens:
    return block(Tokens(visual, text), context)


class DiffusionTransformer(nn.Module):
    """A velocity network over latents (B, C, T, H, W) that can also return its hidden tokens.

    A family sets the class variables, makes its layers in `__init__`, and implements `embed` and
    `unembed`. It may set `text_stream` if its blocks pass the context's splits to `attention`, and
    `unembed` calls `Context.whole` on its output.

    Attributes:
        config: the frozen dataclass it was built from.
        hidden_size: D.
        depth: number of blocks.
        in_channels: latent channels C.
        checkpointing: what is saved of blocks that the backward pass recomputes; None saves all
            activations.
        narrow_residual: keep tokens between blocks in the dtype of the embedded tokens. Under
            autocast that is bf16, which fp32 gates would promote.
        origin: where the weights come from that a module on the meta device will get.
        blocks_name: name of the `nn.ModuleList` of `TransformerBlock`s.
        output_names: names of the layers and parameters that only `unembed` uses.
        token_timesteps: whether timesteps may be (R, L), one for each token.
        extra_conditions: names of the further conditions that `embed` reads, besides text.
        text_stream: how text and visual tokens interact. "joint": they attend together, and text
            is split over ranks like visual tokens; "cross": blocks attend to the text, which every
            rank has in full; None: undeclared, so tokens cannot be split.
        sequence: the ranks that share the tokens of a sample; see `split_tokens`.
    """

    blocks_name: ClassVar[str] = "blocks"
    output_names: ClassVar[tuple[str, ...]]
    token_timesteps: ClassVar[bool] = False
    extra_conditions: ClassVar[tuple[str, ...]] = ()
    text_stream: ClassVar[Literal["joint", "cross"] | None] = None

    config: TransformerConfig
    origin: Any

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = config.hidden_size
        self.depth = config.depth
        self.in_channels = config.in_channels
        self.checkpointing: Checkpointing | None = None
        self.narrow_residual = False
        self.origin = None
        self.sequence: SequenceGroup | None = None

    def embed(
        self, x: Tensor, t: Tensor, c: Condition, rows: Tensor | None
    ) -> tuple[Tokens, Context]:
        """Return the tokens before the first block, and the context. Arguments as in `forward`.

        If tokens are split, timesteps per token are those of this rank's tokens. Everything else is
        for the whole sample, and is split afterwards.
        """
        raise NotImplementedError

    def unembed(self, h_BLD: Tensor, context: Context, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity from the visual tokens after the last block.

        `x` and `t` are as in `forward`. If tokens are split, `h_BLD` are this rank's.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, t: Tensor, c: Condition, *, rows: Tensor | None = None) -> Tensor:
        """Return the velocity (B, C, T, H, W).

        Args:
            x: latents (B, C, T, H, W).
            t: timesteps (R,) in [0, 1]; with `token_timesteps` also (R, L).
            c: R conditions.
            rows: (B,) int64, the row of `t` and `c` for each sample; None if R = B.

        Raises:
            InputError: for latents, timesteps, conditions or rows that do not fit the model or each
                other.
        """
        (h_BLD,), context = self._walk(x, t, c, rows, (self.depth,))
        return self.unembed(h_BLD, context, x, t)

    def hidden_states(
        self,
        x: Tensor,
        t: Tensor,
        c: Condition,
        *,
        layers: Sequence[int],
        rows: Tensor | None = None,
    ) -> list[Tensor]:
        """Return visual tokens (B, L, D) after each block of `layers`, counted from 1.

        Blocks after the last of them do not run. If ranks share the tokens, these are this rank's
        (B, l, D); see `token_split`.
        """
        return self._walk(x, t, c, rows, layers)[0]

    def _walk(
        self, x: Tensor, t: Tensor, c: Condition, rows: Tensor | None, layers: Sequence[int]
    ) -> tuple[list[Tensor], Context]:
        """Run the blocks, and return the visual tokens after `layers` and the context."""
        check_layers(layers, self.depth)
        self._check(x, t, c, rows)
        split = self.token_split(x.shape[2:])
        if split is None:
            tokens, context = self.embed(x, t, c, rows)
        else:
            x, t = split.group.alike(x), t if t.ndim == 1 else split.own(t)
            tokens, context = self._split(*self.embed(x, t, c, rows), split)
        kept: dict[int, Tensor] = {}
        dtype = tokens.visual.dtype
        for number, block in enumerate(self.block_list()[: max(layers)], start=1):
            if self.checkpointing and torch.is_grad_enabled():
                tokens = self.checkpointing.run(partial(_apply, block, context), *tokens)
            else:
                tokens = block(tokens, context)
            if self.narrow_residual:
                tokens = Tokens(tokens.visual.to(dtype), tokens.text.to(dtype))
            # Not all layers: the 40 of Wan 14B at 720p would take 31 GB.
            if number in layers:
                kept[number] = tokens.visual
        return [kept[layer] for layer in layers], context

    def _split(
        self, tokens: Tokens, context: Context, visual: TokenSplit
    ) -> tuple[Tokens, Context]:
        """Return this rank's part of what `embed` returned."""
        cos, sin = context.rope
        if cos is not None and sin is not None:
            context = context._replace(rope=(visual.own(cos, 0), visual.own(sin, 0)))
        own = tokens._replace(visual=visual.own(tokens.visual))
        if self.text_stream == "cross":
            return own, context._replace(visual=visual)
        text = visual.group.split(tokens.text.shape[1])
        mask = None if context.mask is None else visual.order(context.mask, text)
        context = context._replace(mask=mask, visual=visual, text=text)
        return own._replace(text=text.own(tokens.text)), context

    def _check(self, x: Tensor, t: Tensor, c: Condition, rows: Tensor | None) -> None:
        if x.ndim != 5 or x.shape[1] != self.in_channels:
            raise InputError(
                f"latents must be (B, {self.in_channels}, T, H, W), got {tuple(x.shape)}"
            )
        length = math.prod(self.token_grid(x.shape[2:]))
        check_rows(x, t, c, rows, num_tokens=length if self.token_timesteps else None)
        check_extra(c, self.extra_conditions)

    def token_grid(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """Return tokens along (T, H, W) for a latent (T, H, W); L is their product.

        Raises InputError for latents that do not fit.
        """
        return self.config.token_grid(latent_shape)

    def token_split(self, latent_shape: Sequence[int]) -> TokenSplit | None:
        """Return how the tokens of a latent (T, H, W) are split over ranks; None if they are not.

        Raises InputError for fewer tokens than ranks.
        """
        if self.sequence is None:
            return None
        length = math.prod(self.token_grid(latent_shape))
        if length < self.sequence.size:
            raise InputError(
                f"latents {tuple(latent_shape)} have {length} tokens, too few for "
                f"{self.sequence.size} ranks; use fewer ranks per sample, or larger samples"
            )
        return self.sequence.split(length)

    def __repr__(self) -> str:
        """Describe the model in one line; `torch.nn.Module.__repr__(model)` lists its layers."""
        from apt.words import described_weights

        return (
            f"{type(self).__name__}(depth={self.depth}, hidden_size={self.hidden_size}, "
            f"in_channels={self.in_channels}, {described_weights(self)})"
        )

    def block_list(self) -> list[TransformerBlock]:
        """Return the blocks in order."""
        blocks: Any = getattr(self, self.blocks_name)
        return list(blocks)

    def set_checkpointing(self, how: bool | Checkpointing) -> None:
        """Recompute blocks in the backward pass instead of saving their activations."""
        self.checkpointing = (Checkpointing() if how else None) if isinstance(how, bool) else how

    def compile_blocks(self, backend: str = "inductor", *, trains: bool = False) -> None:
        """Compile each block with `torch.compile` at its next call; copies are not compiled.

        Identical blocks share the compiled code of the first. Other clip sizes, and calls with and
        without gradients, are compiled separately.

        Args:
            backend: backend of `torch.compile`.
            trains: whether there will be backward passes.
        """
        from torch._dynamo import config as dynamo

        # More than torch's 8: each size compiles with and without shared rows and gradients.
        dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
        # torch 2.13's vectorised code for CPUs computes wrong gradients in SD 3.5's blocks.
        scalar = {"cpp.simdlen": 1} if trains and backend == "inductor" else None
        for block in self.block_list():
            block.compile(backend=backend, options=scalar)

    def split_tokens(self, sequence: SequenceGroup | None) -> None:
        """Split the tokens of each sample over ranks; None stops this.

        All these ranks must then make the same calls, with the same weights, latents, timesteps and
        conditions. Each gets the whole velocity. `apt.distributed.sequence` explains the gradients.

        Raises:
            ConfigError: if the family does not set `text_stream`.
        """
        if sequence is not None and self.text_stream is None:
            raise ConfigError(
                f"{type(self).__name__} does not declare how its tokens can be split over ranks "
                "(text_stream is None); set --parallel.sequence 1"
            )
        self.sequence = sequence

    def keep_hidden_states(self, last_layer: int) -> None:
        """Delete what `hidden_states` up to `last_layer` never uses, so every parameter trains."""
        del getattr(self, self.blocks_name)[last_layer:]
        self.depth = last_layer
        self.block_list()[-1].drop_text_output()
        for name in self.output_names:
            delattr(self, name)


def check_rotary_heads(hidden_size: int, num_heads: int) -> None:
    """Raise ConfigError unless D splits into heads that 3D rotary positions fit."""
    if hidden_size % num_heads or (hidden_size // num_heads) % 2:
        raise ConfigError(
            f"hidden_size {hidden_size} must split into {num_heads} heads of an even size; change "
            "one of them"
        )
    if hidden_size // num_heads < 6:
        raise ConfigError(
            "a head needs at least 6 dimensions for 3D rotary positions; raise hidden_size or "
            "lower num_heads"
        )


def check_layers(layers: Sequence[int], depth: int) -> None:
    """Raise InputError unless `layers` is not empty, and all are in 1..depth."""
    if not layers or min(layers) < 1 or max(layers) > depth:
        raise InputError(f"layers must lie in 1..{depth}, got {list(layers)}")


def check_rows(
    x: Tensor, t: Tensor, c: Condition, rows: Tensor | None, *, num_tokens: int | None = None
) -> None:
    """Raise InputError unless t (R,) and c (R rows) fit x (B, ...) and rows (B,).

    `num_tokens` L also allows a timestep per token, (R, L).
    """
    if rows is not None and (rows.shape != x.shape[:1] or rows.dtype != torch.int64):
        raise InputError(
            f"rows must be ({x.shape[0]},) int64, the row of each sample, got "
            f"{tuple(rows.shape)} {rows.dtype}"
        )
    num_rows = x.shape[0] if rows is None else t.shape[0]
    per_token = num_tokens is not None and t.shape == (num_rows, num_tokens)
    if (t.shape != (num_rows,) and not per_token) or len(c) != num_rows:
        shape = f"({num_rows},)" + (f" or ({num_rows}, {num_tokens})" if num_tokens else "")
        raise InputError(
            f"{x.shape[0]} samples need {num_rows} conditions, and timesteps of shape {shape}; got "
            f"timesteps {tuple(t.shape)} and {len(c)} conditions; pass `rows` to share them"
        )


def joint_mask(c: Condition, rows: Tensor | None, num_visual: int) -> Tensor | None:
    """Return the mask (B, L + S) of keys for joint attention; None if it uses all."""
    if c.text.mask is None:
        return None
    mask = take_rows(c.text.mask, rows)
    return torch.cat([mask.new_ones(len(mask), num_visual), mask], dim=1)
