"""Tokenizers out of GGUF files: the tokens of SentencePiece itself, and of the tokenizers that the names stand for."""

from __future__ import annotations

from pathlib import Path

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from pat_serve.checkpoints.locate import locate
from pat_serve.errors import UnsupportedModel
from pat_serve.gguf.header import read_header
from pat_serve.gguf.tokenizer import tokenizer_of
from tests.gguf_files import write_gguf
from tests.tiny_models import SENTENCES, save_tiny_llama, tiny_tokenizer

pytest.importorskip("gguf")

TEXTS = [
    *SENTENCES,
    "def f(x):\n\treturn x + 1  # naïve 1234567",
    "fill:     1.5 and  two  spaces\r\n\n don't WE'LL",
    "  leading, trailing  ",
    "中文 🙂 été",
    "1", " 1", "\n 1 2\n",
]  # fmt: skip


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE as Llama 2's: bytes for unknown characters, digits apart, no normalisation."""
    prefix = tmp_path_factory.mktemp("pieces") / "tokenizer"
    SentencePieceTrainer.Train(
        sentence_iterator=iter(SENTENCES * 20), model_prefix=str(prefix), vocab_size=640, model_type="bpe",
        byte_fallback=True, split_digits=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True, character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    return prefix.with_suffix(".model")


def test_sentencepiece_tokens_are_those_of_sentencepiece(pieces: Path, tmp_path: Path):
    base = save_tiny_llama(tmp_path / "base", vocab_size=640)
    folder = locate(str(write_gguf(base, tmp_path / "model.gguf", sentencepiece=pieces)))
    ours, theirs = AutoTokenizer.from_pretrained(folder), SentencePieceProcessor(str(pieces))
    for text in TEXTS:
        ids = ours(text)["input_ids"]
        assert ids == [theirs.bos_id(), *theirs.EncodeAsIds(text)], text
        assert ours.decode(ids, skip_special_tokens=True) == text
    assert ours("a</s>b")["input_ids"].count(theirs.eos_id()) == 1


def test_smollm_takes_digits_one_by_one_and_the_space_before_them_too(tmp_path: Path):
    base = save_tiny_llama(tmp_path / "base")
    file = write_gguf(base, tmp_path / "model.gguf", pre="smollm")
    # The original's tokenizer.json: Digits(individual_digits), then ByteLevel with GPT-2's expression.
    expected = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    expected.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    ours = tokenizer_of(read_header(file))
    for text in TEXTS:
        assert ours(text)["input_ids"] == expected.encode(text).ids, text


def test_llama_3_begins_a_text_and_keeps_whole_words(tmp_path: Path):
    base = save_tiny_llama(tmp_path / "base")
    file = write_gguf(base, tmp_path / "model.gguf", pre="llama-bpe")
    ours = tokenizer_of(read_header(file))
    split = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
    expected = Tokenizer.from_str(tiny_tokenizer().backend_tokenizer.to_str())
    expected.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    expected.model.ignore_merges = True
    for text in TEXTS:
        assert ours(text)["input_ids"] == [0, *expected.encode(text).ids], text

    def silent(writer) -> None:
        writer.add_add_bos_token(False)

    write_gguf(base, file, pre="llama-bpe", change=silent)
    assert tokenizer_of(read_header(file))("a")["input_ids"] == expected.encode("a").ids


def test_chat_template_special_tokens_and_the_ends_of_an_answer_come_along(tmp_path: Path):
    template = "{% for message in messages %}<s>{{ message['content'] }}</s>{% endfor %}"

    def more(writer) -> None:
        writer.add_chat_template(template)
        writer.add_eot_token_id(2)

    folder = locate(str(write_gguf(save_tiny_llama(tmp_path / "base"), tmp_path / "model.gguf", change=more)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Join"}], tokenize=False)
    assert chat == "<s>Join</s>"
    ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
    assert (ids[0], ids[-1], tokenizer.eos_token, tokenizer.pad_token) == (0, 1, "</s>", "<pad>")
    from transformers import GenerationConfig

    assert GenerationConfig.from_pretrained(folder).eos_token_id == [1, 2]


def test_a_pre_tokenizer_that_is_not_known_is_refused(tmp_path: Path):
    file = write_gguf(save_tiny_llama(tmp_path / "base"), tmp_path / "model.gguf", pre="jais")
    with pytest.raises(UnsupportedModel, match=r"gpt-2, smollm, .* found the pre-tokenizer jais\. Take the checkpoint"):
        locate(str(file))
