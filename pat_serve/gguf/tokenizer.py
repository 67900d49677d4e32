"""Make the fast tokenizer, with its chat template, that a GGUF file's metadata describes.

llama.cpp names a byte-level BPE's pre-tokenizer and keeps its regular expressions in its own source, so they stand here
too. transformers' own reading (5.19) takes GPT-2's for every name that it does not know, and adds no begin token. A
pre-tokenizer that is not in this table is refused: other splits would give other tokens without an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from pat_serve.errors import PatServeError, UnsupportedModel, first_line
from pat_serve.gguf.header import GgufHeader, broken

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# tokenizer.ggml.pre (llama-vocab.cpp) is the key: a regular expression, or None for GPT-2's, which ByteLevel has.
_SPLITS = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "falcon3": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": _TEKKEN,
}
_PROBE = "We'll join  12 lists,\n\tnaïvely: x1 = 1999.5 + 20% (été)   \r\n\n日本語 🙂 DON'T  "
# Each digit is a piece of its own before GPT-2's expression applies.
_SINGLE_DIGITS = ("smollm",)
# With these a word that is a token stays that token, whatever the merges say, and a text begins with the begin token.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")
_BEGIN_BY_DEFAULT = ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken")


def tokenizer_of(header: GgufHeader) -> Any:
    """Make a fast tokenizer (PreTrainedTokenizerFast), chat template included.

    Raises:
        UnsupportedModel: tokenizers of this kind are not known to come out right.
        BrokenCheckpoint: the parts of the tokenizer contradict each other.
    """
    from transformers import PreTrainedTokenizerFast

    fields = _Fields(header)
    try:
        backend = _backend(fields)
    except PatServeError:
        raise
    # The tokenizers library raises bare Exceptions, for example for merges that no vocabulary holds.
    except Exception as error:
        raise broken(header.path, "a whole tokenizer in its metadata", first_line(error)) from error
    special = {
        f"{name}_token": fields.tokens[index]
        for name, index in (("bos", fields.id("bos")), ("eos", fields.id("eos")), ("unk", fields.id("unknown")))
        if index is not None
    }
    if (padding := fields.id("padding")) is not None:
        special["pad_token"] = fields.tokens[padding]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=int(header.metadata.get(f"{header.architecture}.context_length", 2048)),
        clean_up_tokenization_spaces=False,
        **special,
    )
    template = header.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        tokenizer.chat_template = template
    return tokenizer


def _backend(fields: _Fields) -> Tokenizer:
    kind = fields.header.metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend = _byte_level(fields)
    elif kind == "llama":
        backend = _sentencepiece(fields)
    else:
        raise _unsupported(fields.header, f"the tokenizer {kind}")
    _add_tokens(backend, fields)
    _set_template(backend, fields)
    return backend


class _Fields:
    """The tokenizer's part of the metadata."""

    def __init__(self, header: GgufHeader) -> None:
        self.path = header.path
        self.header = header
        self._metadata: Mapping[str, Any] = header.metadata
        self.tokens: list[str] = self._strings("tokens")
        self.pre = str(self._metadata.get("tokenizer.ggml.pre", "default"))
        kinds = self._metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(self.tokens)
        if not isinstance(kinds, list) or len(kinds) != len(self.tokens):
            found = f"{len(kinds)} types" if isinstance(kinds, list) else f"{kinds!r:.40}"
            raise broken(self.path, f"a type for each of {len(self.tokens)} tokens", found)
        self.kinds: list[int] = kinds

    def _strings(self, name: str) -> list[str]:
        value = self._metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(value, list) or not value or not all(isinstance(token, str) for token in value):
            raise broken(self.path, f"tokenizer.ggml.{name} as a list of strings", f"{type(value).__name__}")
        return value

    def id(self, name: str) -> int | None:
        value = self._metadata.get(f"tokenizer.ggml.{name}_token_id")
        # llama.cpp also passes over an id that is no token's.
        return value if type(value) is int and 0 <= value < len(self.tokens) else None

    def flag(self, name: str, default: bool) -> bool:
        value = self._metadata.get(f"tokenizer.ggml.{name}")
        return default if value is None else bool(value)

    def scores(self) -> list[float]:
        scores = self._metadata.get("tokenizer.ggml.scores")
        if not isinstance(scores, list) or len(scores) != len(self.tokens):
            raise broken(self.path, f"a score for each of {len(self.tokens)} tokens", "another number of them")
        return scores

    def merges(self) -> list[tuple[str, str]]:
        pairs = [tuple(merge.split(" ")) for merge in self._strings("merges")]
        if not all(len(pair) == 2 for pair in pairs):
            raise broken(self.path, "merges of two pieces each", "another one")
        return [(first, second) for first, second in pairs]


def _byte_level(fields: _Fields) -> Tokenizer:
    if fields.pre not in _SPLITS:
        raise _unsupported(fields.header, f"the pre-tokenizer {fields.pre}")
    vocabulary = {token: index for index, token in enumerate(fields.tokens)}
    backend = Tokenizer(BPE(vocabulary, fields.merges(), ignore_merges=fields.pre in _WHOLE_WORDS))
    split = _SPLITS[fields.pre]
    parts: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if fields.pre in _SINGLE_DIGITS else []
    if split is not None:
        parts.append(pre_tokenizers.Split(Regex(split), behavior="isolated"))
    if split == _QWEN2:
        # The original does this too; llama.cpp leaves it out.
        backend.normalizer = normalizers.NFC()
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None))
    backend.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: _Fields) -> Tokenizer:
    """Make SentencePiece's BPE as Llama 2's tokenizer.json has it: spaces are U+2581, unknown characters are bytes."""
    vocabulary = {token: index for index, token in enumerate(fields.tokens)}
    unknown = fields.id("unknown")
    backend = Tokenizer(
        BPE(
            vocabulary,
            _merges_by_score(vocabulary, fields.scores()),
            unk_token=fields.tokens[unknown] if unknown is not None else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = fields.flag("add_space_prefix", default=True)
    parts = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*parts, normalizers.Replace(" ", "▁")])
    ends = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *ends])
    return backend


def _merges_by_score(vocabulary: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Make the merges that act like SentencePiece's greedy joining: the pair with the best-scored whole comes first.

    Where several pairs give one piece, their own ids decide, as in the conversion of Llama 2 by transformers.
    """
    merges: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, index in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-scores[index], vocabulary[left], vocabulary[right], (left, right)))
    return [pair for *_, pair in sorted(merges)]


def _add_tokens(backend: Tokenizer, fields: _Fields) -> None:
    """Add the tokens that are matched whole: control tokens, which are special, and tokens of the model's maker."""
    special, plain = [], []
    for token, kind in zip(fields.tokens, fields.kinds, strict=True):
        if kind in (_CONTROL, _UNKNOWN):
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == _USER_DEFINED:
            plain.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)


def _set_template(backend: Tokenizer, fields: _Fields) -> None:
    """Set begin and end tokens, where a text has them. Where the file is silent, llama.cpp's default counts."""
    begins_by_default = fields.pre in _BEGIN_BY_DEFAULT or fields.header.metadata.get("tokenizer.ggml.model") == "llama"
    begin, end = fields.id("bos"), fields.id("eos")
    begins = begin is not None and fields.flag("add_bos_token", begins_by_default)
    ends = end is not None and fields.flag("add_eos_token", False)
    if not begins and not ends:
        # The byte-level post-processor trims offsets and adds nothing.
        if fields.header.metadata.get("tokenizer.ggml.model") == "gpt2":
            backend.post_processor = processors.ByteLevel(trim_offsets=False)
        return
    first = [(fields.tokens[begin], begin)] if begins and begin is not None else []
    last = [(fields.tokens[end], end)] if ends and end is not None else []
    opening, closing = [f"{token}:0" for token, _ in first], [f"{token}:0" for token, _ in last]
    opening_b, closing_b = [f"{token}:1" for token, _ in first], [f"{token}:1" for token, _ in last]
    backend.post_processor = processors.TemplateProcessing(
        single=[*opening, "$A:0", *closing],
        pair=[*opening, "$A:0", *closing, *opening_b, "$B:1", *closing_b],
        special_tokens=[*first, *last],
    )


def require_loadable(folder: Path, tokenizer: Any, header: GgufHeader) -> None:
    """Check that stock transformers loads a tokenizer from the folder that splits text as the saved one does.

    For some model types (qwen2, phi3) transformers loads a class of its own, whatever the files say.

    Raises:
        UnsupportedModel: it splits text otherwise.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    if loaded(_PROBE)["input_ids"] != tokenizer(_PROBE)["input_ids"]:
        raise _unsupported(header, f"another one, in the place of which transformers loads {type(loaded).__name__}")


def _unsupported(header: GgufHeader, found: str) -> UnsupportedModel:
    return UnsupportedModel(
        header.path,
        expected=f"a byte-level BPE with the pre-tokenizer {', '.join(_SPLITS)}, or a SentencePiece BPE",
        found=found,
        fix="Take the checkpoint that the file was made from; its tokenizer.json says how it splits.",
    )
