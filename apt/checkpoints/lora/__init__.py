"""LoRA and similar adapters: loaded from common file formats, merged into a model, and written.

    W <- W + strength * change

The change is that of a LoRA, LoHa or LoKr (`apt.checkpoints.lora.layers`), possibly with DoRA's
norms, or a full difference (`.diff`, `.diff_b`, `.diff_m`). Formats: diffusers and peft
(`transformer.NAME.lora_A.weight`), ComfyUI and the original Wan repositories
(`diffusion_model.NAME.lora_down.weight`, NAME in the authors' layout), kohya (`lora_unet_NAME` with
underscores for dots), LyCORIS.
"""

from __future__ import annotations

from apt.checkpoints.lora.files import LORA_FILE, find_lora, load_lora, save_lora
from apt.checkpoints.lora.layers import LoRA, LoRALayer, MergedWeights, merge_lora

__all__ = [
    "LORA_FILE",
    "LoRA",
    "LoRALayer",
    "MergedWeights",
    "find_lora",
    "load_lora",
    "merge_lora",
    "save_lora",
]
