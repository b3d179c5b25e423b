"""Tokenizers that are trained or written down here: no download."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")


def unigram_tokenizer(sentences: Sequence[str]) -> Any:
    """T5's kind, trained on the sentences."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator(list(sentences) * 5, trainer)
    pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
    return transformers.T5Tokenizer(vocab=[tuple(piece) for piece in pieces], extra_ids=0)


def clip_tokenizer(**options: Any) -> Any:
    """CLIP's kind: letters, of which the last in a word is another token."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(letter + "</w>" for letter in letters), "!"]
    vocab = {word: i for i, word in enumerate(words)}
    # CLIP's own order: the end token has the largest id
    vocab |= {"<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], **options)
