"""Tokenizers of the kinds that public models have, trained on the spot, each with its own habit before a text."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    GemmaTokenizer,
    GPTSw3Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

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


def llama_1() -> PreTrainedTokenizerBase:
    """The sign put before a text by a normalizer, as in the tokenizer.json of older Llamas."""
    specials = ["<unk>", "<s>", "</s>"]
    vocabulary, merges = _sentencepiece(specials, pre_tokenizers.Metaspace())
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(content=" ", left=1)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentencepiece_in_python() -> PreTrainedTokenizerBase:
    """A Unigram model run by Python: it knows no offsets."""
    import sentencepiece

    with TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in SENTENCES for line in text.splitlines() if line.strip()),
            model_prefix=f"{folder}/spm", vocab_size=500, model_type="unigram", byte_fallback=True, minloglevel=2,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", eos_piece="<|endoftext|>", bos_piece="<s>",
        )  # fmt: skip
        return GPTSw3Tokenizer(vocab_file=f"{folder}/spm.model")


KINDS = {
    "GPT-2": gpt_2,
    "Llama 3": llama_3,
    "Llama 2": llama_2,
    "Gemma": gemma,
    "Llama 1": llama_1,
    "in Python": sentencepiece_in_python,
}


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
