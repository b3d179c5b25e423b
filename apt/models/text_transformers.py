"""Text encoders of public checkpoints: T5, UMT5 and CLIP, through transformers.

They are frozen and are not saved with a model of ours: the config names where they come from.
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

# model_type values in config.json that each architecture loads; a whole CLIP holds a text part
_MODEL_TYPES = {"t5": ("t5",), "umt5": ("umt5",), "clip": ("clip_text_model", "clip")}


@dataclass(frozen=True, kw_only=True)
class TransformersTextConfig:
    """A pretrained text encoder.

    Attributes:
        architecture: "t5", "umt5" or "clip".
        repo: Hub id or local folder.
        revision: branch, tag or commit on the Hub.
        subfolder, tokenizer_subfolder: where in the repository the parts are; "" for the top.
        dtype: of the weights and the embeddings.
        max_length: S, the longest prompt in tokens, special tokens included.
        truncate: cut longer prompts instead of raising.
        projection: CLIP's pooled vector comes from its text projection, not from its last norm.
        skip_layers: CLIP's tokens are taken before this many last layers, without the final norm;
            0 takes the normed output.
        unmasked: pad every prompt to `max_length` and treat padding as text, in the encoder and in
            what it returns; Stable Diffusion 3 was trained so.
        clean: see `clean_prompt`; Wan was trained so.
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
        """Load the tokenizer and the weights, downloading what is not in the Hub's cache."""
        return TransformersTextEncoder(self)

    def prompt_check(self) -> PromptCheck:
        """The encoder's own check, of the tokenizer alone: weights are neither read nor fetched."""
        transformers = import_hub_extra("transformers")
        folder = local_folder(self.repo, self.revision, (self.tokenizer_subfolder,))
        tokenizer = load_tokenizer(transformers, folder / self.tokenizer_subfolder)
        return partial(_check, tokenizer, self)


class TransformersTextEncoder(TextEncoder):
    """Prompts to the embeddings of a frozen T5, UMT5 or CLIP. Always in evaluation mode.

    Embeddings at padding are zero and masked, unless the config says `unmasked`. CLIP also gives a
    pooled vector.

    Raises:
        MissingPackageError: transformers is not installed.
        InputError: skip_layers or projection do not fit.
        CheckpointError: the repository, the folder or its weights cannot be used.
    """

    def __init__(self, config: TransformersTextConfig) -> None:
        super().__init__()
        if config.architecture != "clip" and (config.projection or config.skip_layers):
            raise InputError(
                f"projection and skip_layers belong to 'clip', not {config.architecture!r}"
            )
        transformers = import_hub_extra("transformers")
        parts = (config.subfolder, config.tokenizer_subfolder)
        folder = local_folder(config.repo, config.revision, parts)
        found = read_config(folder / config.subfolder).get("model_type")
        if found not in _MODEL_TYPES[config.architecture]:
            raise CheckpointError(
                f"{folder / config.subfolder} holds a {found!r} model, not "
                f"{config.architecture!r}; choose the text encoder that fits it"
            )
        self.config = config
        self.tokenizer = load_tokenizer(transformers, folder / config.tokenizer_subfolder)
        self.model = load_complete(
            getattr(transformers, _class_name(config)),
            folder / config.subfolder,
            dtype=torch_dtype(config.dtype),
            # A whole CLIP's file: its vision part, and the text projection that is not asked for
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
        """Stay in evaluation mode: it is frozen, and T5 has dropout."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, prompts: Sequence[str]) -> EncodedText:
        """Encode prompts: tokens (R, S, E) padded to the longest, or to `max_length` if
        `unmasked`; mask (R, S), or None if all are as long or `unmasked`; CLIP's pooled (R, P).

        Raises InputError for no prompt, a prompt that is no string, or one of more than
        `max_length` tokens unless the config says `truncate`.
        """
        ids, mask = _tokenize(self.tokenizer, self.config, prompts)
        if self.config.unmasked:
            ids = F.pad(ids, (0, self.max_length - ids.shape[1]), value=self.tokenizer.pad_token_id)
        # Asked while it is on the CPU: no synchronisation
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
        """Raise InputError as `forward` would."""
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


# As ftfy does: quotation marks are straight, letters and punctuation of full width are plain.
_PLAIN: dict[int, str | None] = {
    **dict.fromkeys(map(ord, "\u02bc\u2018\u2019\u201a\u201b"), "'"),
    **dict.fromkeys(map(ord, "\u201c\u201d\u201e\u201f"), '"'),
    **{code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFF01, 0xFFF0)},
    0xFEFF: None,
}


def clean_prompt(prompt: str) -> str:
    """HTML entities as characters, white space as single spaces, typographic quotes straightened:
    what the cleaning of Wan's authors, and of diffusers with ftfy, makes of text.

    ftfy also mends wrongly decoded text, which is left as it is here.
    """
    text = html.unescape(html.unescape(prompt)).translate(_PLAIN)
    return " ".join(unicodedata.normalize("NFC", text).split())


def _tokenize(
    tokenizer: Any, config: TransformersTextConfig, prompts: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Ids and mask (R, S), padded to the longest."""
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
            f"prompt {worst} has {int(lengths[worst])} tokens, the longest allowed is "
            f"{config.max_length}: {prompts[worst][:60]!r}...; shorten it, or set truncate=True"
        )
    return ids, mask


def _check(tokenizer: Any, config: TransformersTextConfig, prompts: Sequence[str]) -> None:
    _tokenize(tokenizer, config, prompts)


def _class_name(config: TransformersTextConfig) -> str:
    if config.architecture == "clip":
        return "CLIPTextModelWithProjection" if config.projection else "CLIPTextModel"
    return {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel"}[config.architecture]


def load_tokenizer(transformers: Any, folder: Path) -> Any:
    """A tokenizer that pads on the right. Raises CheckpointError for one that cannot be used."""
    with staged_tokenizer(folder) as stage:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                stage, local_files_only=True, trust_remote_code=False
            )
        # The parser of tokenizer.json, in Rust, raises no other kind.
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

    Wan attends to padding as to words of zeros, which its module adds; its authors' negative prompt
    is `apt.models.wan.NEGATIVE_PROMPT`.
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
