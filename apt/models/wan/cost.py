"""The cost of `Wan.forward`, with one timestep for each row."""

from __future__ import annotations

import math

from apt.errors import InputError
from apt.kernels.costs import OpCost
from apt.models.costs import counts
from apt.models.costs.counting import Counter, Sizes
from apt.models.costs.forward import DiTCost, LayerCost
from apt.models.wan.model import WanConfig

_FP32 = 4


@counts(WanConfig)
def wan_cost(config: WanConfig, sizes: Sizes) -> DiTCost:
    """Count a forward pass, with every prompt padded to the model's text length.

    Raises InputError for latents that are not multiples of the patch or too large, or text that is
    too long.
    """
    if sizes.text_tokens > config.text_length:
        raise InputError(
            f"this model accepts at most {config.text_length} text tokens, got "
            f"{sizes.text_tokens}; it pads all prompts to that length, so use {config.text_length}"
        )
    length = math.prod(config.token_grid(sizes.latent_shape))
    counter = Counter(sizes=sizes, width=config.hidden_size, heads=config.num_heads, norm="layer")
    layer = _attention_to_itself(counter, length)
    layer += _attention_to_text(counter, length, config.text_length)
    layer += _mlp(counter, length, config.mlp_size)
    return DiTCost(
        batch=sizes.batch,
        visual_tokens=length,
        text_tokens=config.text_length,
        head_dim=counter.width // counter.heads,
        layers=(layer,) * config.depth,
        ends=_ends(counter, config, length),
    )


def _attention_to_itself(counter: Counter, length: int) -> LayerCost:
    """Count self-attention, with the norms before and after it."""
    batch, d = counter.sizes.batch, counter.width
    qk = counter.head_norms(batch, length, tensors=2, rope=True, across_heads=True)
    boundary = counter.boundary(length, affine=True)
    return LayerCost(
        linear=4 * counter.linear(batch * length, d, d),
        attention=counter.attention(length, length),
        elementwise=counter.modulated_norm(length) + qk + boundary,
        # The first norm is fused with the gated add of the previous block's MLP.
        elementwise_fused=qk + boundary,
    )


def _attention_to_text(counter: Counter, length: int, text: int) -> LayerCost:
    """Count cross-attention, with keys and values projected once per row, and the norm after it."""
    sizes, d = counter.sizes, counter.width
    norms = counter.head_norms(sizes.batch, length, tensors=1, rope=False, across_heads=True)
    norms += counter.head_norms(sizes.rows, text, tensors=1, rope=False, across_heads=True)
    boundary = counter.boundary(length)
    shared = sizes.rows < sizes.batch  # samples get copies of their row's keys and values
    copies = counter.copies(2 * sizes.batch * text) if shared else OpCost()
    return LayerCost(
        linear=2 * counter.linear(sizes.batch * length, d, d)
        + 2 * counter.linear(sizes.rows * text, d, d),
        attention=counter.attention(length, text),
        elementwise=norms + copies + boundary,
        elementwise_fused=norms + boundary,
    )


def _mlp(counter: Counter, length: int, hidden: int) -> LayerCost:
    """Count the MLP and its gated add: the gate is fp32, so an fp32 sum is written and read."""
    sums = _FP32 * counter.sizes.batch * length * counter.width
    added = counter.gated_add(length)
    if counter.sizes.dtype.itemsize < _FP32:
        added += OpCost(sums, sums, 0)
    return counter.mlp(length, hidden) + LayerCost(
        elementwise=added, elementwise_fused=counter.boundary(length)
    )


def _ends(counter: Counter, config: WanConfig, length: int) -> LayerCost:
    rows, d = counter.sizes.rows, config.hidden_size
    products = counter.linear(rows * config.text_length, d, d) + counter.linear(rows, d, 6 * d)
    return LayerCost(linear=products) + counter.ends(
        length,
        patch=config.in_channels * math.prod(config.patch_size),
        text=config.text_length,
        text_dim=config.text_dim,
        embedded=(config.time_dim,),
    )
