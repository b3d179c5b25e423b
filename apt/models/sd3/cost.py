"""The cost of `SD3.forward`."""

from __future__ import annotations

import math

from apt.kernels.costs import OpCost, elementwise_cost
from apt.models.costs import counts
from apt.models.costs.counting import Counter, Sizes
from apt.models.costs.forward import DiTCost, LayerCost
from apt.models.sd3.model import SD3Config


@counts(SD3Config)
def sd3_cost(config: SD3Config, sizes: Sizes) -> DiTCost:
    """Count a forward pass. Raises InputError for several frames, or latents that do not fit."""
    length = math.prod(config.token_grid(sizes.latent_shape))
    counter = Counter(sizes=sizes, width=config.hidden_size, heads=config.num_heads, norm="layer")
    return DiTCost(
        batch=sizes.batch,
        visual_tokens=length,
        text_tokens=sizes.text_tokens,
        head_dim=counter.width // counter.heads,
        layers=tuple(_layer(counter, config, length, number) for number in range(config.depth)),
        ends=_ends(counter, config, length),
    )


def _layer(counter: Counter, config: SD3Config, length: int, number: int) -> LayerCost:
    sizes, d = counter.sizes, config.hidden_size
    text, last = sizes.text_tokens, number == config.depth - 1
    dual = number in config.dual_attention_layers
    # Shifts, scales and gates of both streams; a text stream without output has no gates and only
    # one shift and scale.
    modulation = counter.linear(sizes.rows, d, (9 if dual else 6) * d)
    modulation += counter.linear(sizes.rows, d, (2 if last else 6) * d)
    queries = length + (0 if last else text)
    joined = sizes.batch * ((0 if last else queries) + 2 * (length + text))
    cost = LayerCost(
        linear=modulation,
        attention=counter.attention(queries, length + text),
        elementwise=counter.copies(joined),  # q, k and v into joint sequences
    )
    cost += _stream(counter, length, output=True, qk_norm=config.qk_norm)
    if dual:
        cost += _second_attention(counter, length, qk_norm=config.qk_norm)
    if text:
        cost += _stream(counter, text, output=not last, qk_norm=config.qk_norm)
    return cost


def _stream(counter: Counter, length: int, *, output: bool, qk_norm: bool) -> LayerCost:
    """Count one modality in a block; without output it has keys and values only."""
    batch, d = counter.sizes.batch, counter.width
    tokens = batch * length
    norm = counter.modulated_norm(length)
    if not output:
        # Only keys are normalised, but by an op that takes two tensors.
        keys, both = (_norms(counter, length, n if qk_norm else 0) for n in (1, 2))
        return LayerCost(
            linear=2 * counter.linear(tokens, d, d),
            elementwise=norm + both,
            elementwise_fused=norm + keys,
        )
    qk = _norms(counter, length, 2 if qk_norm else 0)
    boundary = counter.boundary(length)
    return counter.mlp(length, 4 * d) + LayerCost(
        linear=4 * counter.linear(tokens, d, d),
        elementwise=norm + qk + boundary + counter.gated_add(length),
        # The gated add and the next norm are one fused op.
        elementwise_fused=2 * boundary + qk,
    )


def _second_attention(counter: Counter, length: int, *, qk_norm: bool) -> LayerCost:
    """Count attention among image tokens, on the first attention's input, and its gated add."""
    tokens, d = counter.sizes.batch * length, counter.width
    qk = _norms(counter, length, 2 if qk_norm else 0)
    return LayerCost(
        linear=4 * counter.linear(tokens, d, d),
        attention=counter.attention(length, length),
        elementwise=counter.modulated_norm(length) + qk + counter.gated_add(length),
        # The fused ops around it write a second modulated norm, and read a second update.
        elementwise_fused=qk + counter.copies(tokens),
    )


def _norms(counter: Counter, length: int, tensors: int) -> OpCost:
    if not tensors:
        return OpCost()
    return counter.head_norms(counter.sizes.batch, length, tensors=tensors, rope=False)


def _ends(counter: Counter, config: SD3Config, length: int) -> LayerCost:
    sizes, d = counter.sizes, config.hidden_size
    values = sizes.batch * length * d
    positions = elementwise_cost(values + length * d, values, values, dtype=sizes.dtype)
    return counter.ends(
        length,
        patch=config.in_channels * config.patch_size**2,
        text=sizes.text_tokens,
        text_dim=config.text_dim,
        embedded=(256, config.pooled_dim),  # sinusoids of the timestep, and pooled text
    ) + LayerCost(
        linear=counter.linear(sizes.rows, d, 2 * d),
        elementwise=positions,
        elementwise_fused=OpCost(),
    )
