"""Tokenizers of the kinds that public models have, trained on the spot, each with its own habit before a text."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import GemmaTokenizer, LlamaTokenizer, PreTrainedTokenizerBase

from tests.tiny_models import SENTENCES, save_tiny_llama, tiny_tokenizer

_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_VOCABULARY = 700


def gpt_2() -> PreTrainedTokenizerBase:
    """Byte-level BPE that names a start and puts none before a text, as GPT-2's, Qwen's and SmolLM2's."""
    return tiny_tokenizer()


def llama_3() -> PreTrainedTokenizerBase:
    """Byte-level BPE whose post-processor writes the start, as Llama 3's."""
    tokenizer = tiny_tokenizer()
    start = ("<s>", tokenizer.convert_tokens_to_ids("<s>"))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[start]
    )
    return tokenizer


def llama_2() -> PreTrainedTokenizerBase:
    """A word-boundary sign before every text and a start token, as Llama 2's, Mistral's and Phi-3's."""
    vocabulary, merges = _sentencepiece(["<unk>", "<s>", "</s>"], pre_tokenizers.Metaspace())
    return LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


def gemma() -> PreTrainedTokenizerBase:
    """Word-boundary signs where spaces are, and a start token, as Gemma's."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocabulary, merges = _sentencepiece(specials, pre_tokenizers.Metaspace(prepend_scheme="never"))
    return GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


KINDS = {"GPT-2": gpt_2, "Llama 3": llama_3, "Llama 2": llama_2, "Gemma": gemma}


def save_model_of_kind(folder: Path, kind: str, **overrides: object) -> Path:
    """A tiny Llama with a tokenizer of a kind."""
    tokenizer = KINDS[kind]()
    save_tiny_llama(folder, vocab_size=len(tokenizer), **overrides)
    tokenizer.save_pretrained(folder)
    return folder


def _sentencepiece(
    specials: list[str], signs: pre_tokenizers.PreTokenizer
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a BPE over characters, with bytes for those that it does not know."""
    tokenizer = Tokenizer(models.BPE(unk_token=specials[0], byte_fallback=True))
    tokenizer.pre_tokenizer = signs
    trainer = trainers.BpeTrainer(vocab_size=_VOCABULARY, special_tokens=[*specials, *_BYTES], show_progress=False)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]
