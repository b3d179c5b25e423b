"""The text encoder of Stable Diffusion 3 and 3.5: two CLIPs and T5 (arXiv 2403.03206, Sec. 4).

They are frozen, and not saved with our models: the config says where to load them from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from apt.checkpoints.external import DType
from apt.condition import EncodedText, PromptCheck, TextEncoder
from apt.errors import CheckpointError
from apt.models.architectures import TEXT_ENCODERS
from apt.models.text_transformers import TransformersTextConfig

_CLIP_LENGTH = 77


@dataclass(frozen=True, kw_only=True)
class SD3TextConfig:
    """The three encoders of a diffusers repository.

    Attributes:
        repo: Hub id or local folder, with the subfolders text_encoder, text_encoder_2,
            text_encoder_3, tokenizer, tokenizer_2 and tokenizer_3.
        revision: branch, tag or commit on the Hub.
        dtype: dtype of the weights and the embeddings.
        max_length: number of T5 tokens, special tokens included. The CLIPs always read 77 and
            truncate longer prompts.
        truncate: truncate prompts that are too long for T5 instead of raising.
    """

    repo: str = "stabilityai/stable-diffusion-3.5-medium"
    revision: str | None = None
    dtype: DType = "bfloat16"
    max_length: int = 256
    truncate: bool = False

    def build(self) -> SD3TextEncoder:
        """Load tokenizers and weights, and download what is not in the Hub's cache."""
        return SD3TextEncoder(self)

    def prompt_check(self) -> PromptCheck:
        """Return T5's check of prompts; the CLIPs truncate."""
        return self.part("t5").prompt_check()

    def part(self, name: Literal["clip_l", "clip_g", "t5"]) -> TransformersTextConfig:
        """Return the config of one of the three encoders."""
        suffix = {"clip_l": "", "clip_g": "_2", "t5": "_3"}[name]
        is_clip = name != "t5"
        return TransformersTextConfig(
            architecture="clip" if is_clip else "t5",
            repo=self.repo,
            revision=self.revision,
            subfolder=f"text_encoder{suffix}",
            tokenizer_subfolder=f"tokenizer{suffix}",
            dtype=self.dtype,
            max_length=_CLIP_LENGTH if is_clip else self.max_length,
            truncate=is_clip or self.truncate,
            projection=is_clip,
            skip_layers=1 if is_clip else 0,
            unmasked=True,
        )


class SD3TextEncoder(TextEncoder):
    """Encodes prompts for SD3: the channels of both CLIPs side by side, followed by T5's tokens.

    Padding counts as text and there is no mask, as in diffusers' `StableDiffusion3Pipeline`. The
    encoder stays in evaluation mode.

    Raises:
        MissingPackageError: if transformers is not installed.
        CheckpointError: if the repository, the folder or its weights cannot be used.
    """

    def __init__(self, config: SD3TextConfig) -> None:
        super().__init__()
        self.config = config
        # T5 first: users choose its length, so errors about it should come early.
        self.t5 = config.part("t5").build()
        self.clip_l = config.part("clip_l").build()
        self.clip_g = config.part("clip_g").build()
        self.embedding_dim = self.t5.embedding_dim
        self.max_length = config.max_length
        clips = self.clip_l.embedding_dim + self.clip_g.embedding_dim
        if clips > self.embedding_dim:
            raise CheckpointError(
                f"the CLIPs of {config.repo!r} have {clips} dimensions together, but T5 has only "
                f"{self.embedding_dim}; this is not a text encoder of Stable Diffusion 3, so "
                "choose another repository"
            )
        self.eval()

    def train(self, mode: bool = True) -> SD3TextEncoder:
        """Stay in evaluation mode: the encoder is frozen, and T5 has dropout."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> EncodedText:
        """Encode prompts to tokens (R, 77 + max_length, E) and pooled vectors (R, P).

        Raises InputError for no prompts, a prompt that is not a string, and one that is too long
        for T5, unless the config sets `truncate`.
        """
        t5, clip_l, clip_g = self.t5(prompts), self.clip_l(prompts), self.clip_g(prompts)
        assert clip_l.pooled is not None and clip_g.pooled is not None
        clips = torch.cat([clip_l.tokens, clip_g.tokens], dim=2)
        clips = F.pad(clips, (0, self.embedding_dim - clips.shape[2]))
        return EncodedText(
            torch.cat([clips, t5.tokens], dim=1),
            pooled=torch.cat([clip_l.pooled, clip_g.pooled], dim=1),
        )

    def check(self, prompts: Sequence[str]) -> None:
        """Raise InputError if `forward` would."""
        self.t5.check(prompts)


@TEXT_ENCODERS.register("sd3")
def sd3() -> SD3TextConfig:
    """CLIP-L, CLIP-G and T5 v1.1 XXL of Stable Diffusion 3.5 (gated; its community licence)."""
    return SD3TextConfig()
