"""HDR and wide-gamut colours as those of an SDR screen.

Numbers of transfer functions and primaries are those of ITU-T H.273, as in all containers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

UNSPECIFIED, PQ, HLG = 2, 16, 18

BT2020, _DCI_P3, _DISPLAY_P3 = 9, 11, 12

_TO_BT709 = {
    BT2020: (
        (1.660491, -0.587641, -0.072850),
        (-0.124550, 1.132900, -0.008349),
        (-0.018151, -0.100579, 1.118730),
    ),
    _DISPLAY_P3: (
        (1.224940, -0.224940, 0.0),
        (-0.042057, 1.042057, 0.0),
        (-0.019638, -0.078636, 1.098274),
    ),
}
"""Linear light of other primaries in BT.709's, by ITU-R BT.2087 and SMPTE EG 432-1."""

_REFERENCE_WHITE = 203.0
"""Candela per square metre of a white page in PQ, by ITU-R BT.2408."""

_HLG_WHITE = 0.75
"""The HLG signal of the same."""


class ColorTags(NamedTuple):
    """How a source says that its colours are meant."""

    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED

    @property
    def hdr(self) -> bool:
        """Whether numbers mean light up to 10,000 cd/m² (PQ), or 12 times a scene's white (HLG)."""
        return self.transfer in (PQ, HLG)

    @property
    def sdr(self) -> bool:
        """Whether the pixels can be shown as they are."""
        return not self.hdr and self.primaries not in (BT2020, _DCI_P3, _DISPLAY_P3)


def to_sdr(pixels: Tensor, tags: ColorTags) -> Tensor:
    """Pixels as an SDR screen shows them.

    Of HDR, reference white becomes white and what is brighter is clipped, as in the HDR-to-SDR
    hard clip of ITU-R BT.2408; the light below is kept and encoded as sRGB. Of wide gamuts, what
    an SDR screen cannot show is clipped.

    Args:
        pixels: (3, ...) in [-1, 1], R'G'B' as decoded.
        tags: how they are meant.

    Returns:
        Same shape, in [-1, 1].
    """
    if tags.sdr:
        return pixels
    signal = ((pixels + 1) / 2).clamp(0, 1)
    if tags.transfer == PQ:
        light = _pq_light(signal) / _REFERENCE_WHITE
    elif tags.transfer == HLG:
        light = _hlg_light(signal) / _hlg_light(torch.tensor(_HLG_WHITE))
    else:
        light = signal**2.4
    # HDR is BT.2020's unless it says otherwise; the two P3 differ in their white alone.
    primaries = _DISPLAY_P3 if tags.primaries in (_DCI_P3, _DISPLAY_P3) else BT2020
    light = torch.einsum("oi,i...->o...", light.new_tensor(_TO_BT709[primaries]), light)
    light = light.clamp(0, 1)
    signal = _srgb_signal(light) if tags.hdr else light ** (1 / 2.4)
    return signal * 2 - 1


def _pq_light(signal: Tensor) -> Tensor:
    """Signal in [0, 1] to cd/m², SMPTE ST 2084."""
    m1, m2, c1, c2, c3 = 0.1593017578125, 78.84375, 0.8359375, 18.8515625, 18.6875
    power = signal ** (1 / m2)
    return 10000 * ((power - c1).clamp(min=0) / (c2 - c3 * power)) ** (1 / m1)


def _hlg_light(signal: Tensor) -> Tensor:
    """Signal in [0, 1] to the light of the scene in [0, 1], ARIB STD-B67."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return torch.where(signal <= 0.5, signal**2 / 3, (((signal - c) / a).exp() + b) / 12)


def _srgb_signal(light: Tensor) -> Tensor:
    return torch.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
