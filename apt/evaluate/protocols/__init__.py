"""The protocols; importing this package registers them."""

from __future__ import annotations

from apt.evaluate.protocol import PROTOCOLS
from apt.evaluate.protocols.clips import Clips
from apt.evaluate.protocols.coco import Coco
from apt.evaluate.protocols.digits import Digits
from apt.evaluate.protocols.prompts import Prompts
from apt.evaluate.protocols.vbench import VBench
from apt.evaluate.protocols.video import Video

__all__ = ["PROTOCOLS", "Clips", "Coco", "Digits", "Prompts", "VBench", "Video"]
