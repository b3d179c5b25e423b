"""LoRA and its kin: loaded from the files that people have, merged into a model, and written.

    W <- W + strength * change

The change is a LoRA's, a LoHa's or a LoKr's (`apt.checkpoints.lora.layers`), with DoRA's norms if
there are any, or a whole difference (`.diff`, `.diff_b`, `.diff_m`). Spellings: diffusers and peft
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
