"""Text encoders of public checkpoints: T5, UMT5 and CLIP, through transformers.

They are frozen, and not saved with our models: the config says where to load them from.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from apt.checkpoints.external import (
    DType,
    import_hub_extra,
    load_complete,
    local_folder,
    read_config,
    staged_tokenizer,
    torch_dtype,
)
from apt.condition import EncodedText, PromptCheck, TextEncoder
from apt.errors import CheckpointError, InputError, PromptLengthError, first_line
from apt.models.architectures import TEXT_ENCODERS

# Values of model_type in config.json for each architecture; a whole CLIP includes the text part.
_MODEL_TYPES = {"t5": ("t5",), "umt5": ("umt5",), "clip": ("clip_text_model", "clip")}


@dataclass(frozen=True, kw_only=True)
class TransformersTextConfig:
    """A pretrained text encoder.

    Attributes:
        architecture: "t5", "umt5" or "clip".
        repo: Hub id or local folder.
        revision: branch, tag or commit on the Hub.
        subfolder, tokenizer_subfolder: folders of the parts in the repository; "" for the top.
        dtype: dtype of the weights and the embeddings.
        max_length: S, the longest prompt in tokens, special tokens included.
        truncate: truncate longer prompts instead of raising.
        projection: take CLIP's pooled vector from its text projection, not from its last norm.
        skip_layers: take CLIP's tokens before this many last layers, without the final norm; 0
            takes the normalised output.
        unmasked: pad every prompt to `max_length` and treat padding as text, in the encoder and in
            its output, as in the training of Stable Diffusion 3.
        clean: clean prompts with `clean_prompt`, as in the training of Wan.
    """

    architecture: Literal["t5", "umt5", "clip"]
    repo: str
    revision: str | None = None
    subfolder: str = "text_encoder"
    tokenizer_subfolder: str = "tokenizer"
    dtype: DType = "bfloat16"
    max_length: int = 512
    truncate: bool = False
    projection: bool = False
    skip_layers: int = 0
    unmasked: bool = False
    clean: bool = False

    def build(self) -> TransformersTextEncoder:
        """Load the tokenizer and the weights, and download what is not in the Hub's cache."""
        return TransformersTextEncoder(self)

    def prompt_check(self) -> PromptCheck:
        """Return the encoder's check of prompts, which loads only the tokenizer, no weights."""
        transformers = import_hub_extra("transformers")
        folder = local_folder(self.repo, self.revision, (self.tokenizer_subfolder,))
        tokenizer = load_tokenizer(transformers, folder / self.tokenizer_subfolder)
        return partial(_check, tokenizer, self)


class TransformersTextEncoder(TextEncoder):
    """Encodes prompts with a frozen T5, UMT5 or CLIP. It stays in evaluation mode.

    Embeddings of padding are zero and masked, unless the config sets `unmasked`. CLIP also returns
    a pooled vector.

    Raises:
        MissingPackageError: if transformers is not installed.
        InputError: if max_length, skip_layers or projection do not fit.
        CheckpointError: if the repository, the folder or its weights cannot be used.
    """

    def __init__(self, config: TransformersTextConfig) -> None:
        super().__init__()
        if config.architecture != "clip" and (config.projection or config.skip_layers):
            raise InputError(
                f"projection and skip_layers are for 'clip' only, not {config.architecture!r}; "
                "leave them out"
            )
        transformers = import_hub_extra("transformers")
        parts = (config.subfolder, config.tokenizer_subfolder)
        folder = local_folder(config.repo, config.revision, parts)
        found = read_config(folder / config.subfolder).get("model_type")
        if found not in _MODEL_TYPES[config.architecture]:
            raise CheckpointError(
                f"{folder / config.subfolder} holds a {found!r} model, not "
                f"{config.architecture!r}; choose the text encoder that matches"
            )
        self.config = config
        self.tokenizer = load_tokenizer(transformers, folder / config.tokenizer_subfolder)
        self.model = load_complete(
            getattr(transformers, _class_name(config)),
            folder / config.subfolder,
            dtype=torch_dtype(config.dtype),
            # A whole CLIP's file also has a vision part, and a text projection that may be unused.
            foreign=("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
            if config.architecture == "clip"
            else (),
        )
        self.embedding_dim: int = self.model.config.hidden_size
        self.max_length = config.max_length
        self._check_lengths()
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> TransformersTextEncoder:
        """Stay in evaluation mode: the encoder is frozen, and T5 has dropout."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> EncodedText:
        """Encode prompts.

        Returns tokens (R, S, E), padded to the longest prompt, or to `max_length` if `unmasked`; a
        mask (R, S), or None if there is no padding or `unmasked`; and CLIP's pooled vectors (R, P).

        Raises InputError for no prompts, a prompt that is not a string, and one of more than
        `max_length` tokens, unless the config sets `truncate`.
        """
        ids, mask = _tokenize(self.tokenizer, self.config, prompts)
        if self.config.unmasked:
            ids = F.pad(ids, (0, self.max_length - ids.shape[1]), value=self.tokenizer.pad_token_id)
        # Read while the mask is on the CPU: no sync.
        full = self.config.unmasked or bool(mask.all())
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        output = self.model(
            input_ids=ids,
            attention_mask=None if self.config.unmasked else mask.long(),
            output_hidden_states=self.config.skip_layers > 0,
        )
        if self.config.skip_layers:
            tokens = output.hidden_states[-1 - self.config.skip_layers]
        else:
            tokens = output.last_hidden_state
        if not full:
            tokens = tokens.masked_fill(~mask[..., None], 0.0)
        pooled = None
        if self.config.architecture == "clip":
            pooled = output.text_embeds if self.config.projection else output.pooler_output
        return EncodedText(tokens, None if full else mask, pooled)

    def check(self, prompts: Sequence[str]) -> None:
        """Raise InputError if `forward` would."""
        _check(self.tokenizer, self.config, prompts)

    def _check_lengths(self) -> None:
        config = self.model.config
        positions = getattr(config, "max_position_embeddings", self.max_length)  # T5's are relative
        if not 1 <= self.max_length <= positions:
            raise InputError(
                f"max_length must be in 1 to {positions} for {self.config.repo!r}, got "
                f"{self.max_length}"
            )
        layers = config.num_hidden_layers
        if not 0 <= self.config.skip_layers < layers:
            raise InputError(
                f"skip_layers must be in 0 to {layers - 1} for {self.config.repo!r}, got "
                f"{self.config.skip_layers}"
            )


# As in ftfy: straight quotation marks, and plain instead of full-width letters and punctuation.
_PLAIN: dict[int, str | None] = {
    **dict.fromkeys(map(ord, "\u02bc\u2018\u2019\u201a\u201b"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f"), '"'),
    **{code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFF01, 0xFFF0)},
    0xFEFF: None,
}


def clean_prompt(prompt: str) -> str:
    """Decode HTML entities, collapse white space to single spaces, and straighten quotes.

    Wan's authors, and diffusers with ftfy, clean prompts in this way. Unlike ftfy, this does not
    repair wrongly decoded text.
    """
    text = html.unescape(html.unescape(prompt)).translate(_PLAIN)
    return " ".join(unicodedata.normalize("NFC", text).split())


def _tokenize(
    tokenizer: Any, config: TransformersTextConfig, prompts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Return ids and mask (R, S), padded to the longest prompt."""
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) for p in prompts):
        raise InputError(f"prompts must be a sequence of at least one string, got {prompts!r}")
    encoded = tokenizer(
        [clean_prompt(p) for p in prompts] if config.clean else list(prompts),
        padding="longest",
        truncation=config.truncate,
        max_length=config.max_length if config.truncate else None,
        return_attention_mask=True,
        return_tensors="pt",
    )
    ids, mask = encoded["input_ids"], encoded["attention_mask"].bool()
    lengths = mask.sum(1)
    if int(lengths.max()) > config.max_length:
        worst = int(lengths.argmax())
        raise PromptLengthError(
            f"prompt {worst} has {int(lengths[worst])} tokens, but at most {config.max_length} "
            f"fit: {prompts[worst][:60]!r}...; shorten it, or set truncate=True"
        )
    return ids, mask


def _check(tokenizer: Any, config: TransformersTextConfig, prompts: Sequence[str]) -> None:
    _tokenize(tokenizer, config, prompts)


def _class_name(config: TransformersTextConfig) -> str:
    if config.architecture == "clip":
        return "CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"
    return {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}[config.architecture]


def load_tokenizer(transformers: Any, folder: Path) -> Any:
    """Load a tokenizer that pads on the right. Raises CheckpointError if it cannot be used."""
    with staged_tokenizer(folder) as stage:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                stage, local_files_only=True, trust_remote_code=False
            )
        # The Rust parser of tokenizer.json raises plain Exception.
        except Exception as error:
            reason = first_line(error).replace(str(stage), str(folder))
            raise CheckpointError(f"no usable tokenizer in {folder}: {reason}") from error
    tokenizer.padding_side = "right"
    return tokenizer


@TEXT_ENCODERS.register("t5")
def t5() -> TransformersTextConfig:
    """T5 v1.1 XXL, 4.8 B parameters (Apache-2.0; the copy in Mochi's repository)."""
    return TransformersTextConfig(architecture="t5", repo="genmo/mochi-1-preview", max_length=256)


@TEXT_ENCODERS.register("umt5")
def umt5() -> TransformersTextConfig:
    """UMT5-XXL, 5.7 B parameters, multilingual, as Wan uses it (Apache-2.0).

    Wan attends to padding as zero tokens, which its module adds. Its authors' negative prompt is
    `apt.models.wan.NEGATIVE_PROMPT`.
    """
    return TransformersTextConfig(
        architecture="umt5", repo="Wan-AI/Wan2.1-T2V-1.3B-Diffusers", max_length=512, clean=True
    )


@TEXT_ENCODERS.register("clip")
def clip() -> TransformersTextConfig:
    """CLIP ViT-L/14's text part with its pooled vector (MIT)."""
    return TransformersTextConfig(
        architecture="clip",
        repo="openai/clip-vit-large-patch14",
        subfolder="",
        tokenizer_subfolder="",
        max_length=77,
    )
