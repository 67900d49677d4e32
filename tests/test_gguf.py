"""GGUF files, read back by transformers' own GGUF reader, and by llama.cpp itself where xllamacpp is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from pat_serve.errors import MissingExtra, UnsupportedModel, UsageError
from pat_serve.export.exporter import export_run
from pat_serve.export.formats import gguf as formats_gguf
from pat_serve.export.formats.gguf import permute_rotary
from tests.test_export_axes import make_run
from tests.test_export_parity import PROMPT, random_run
from tests.tiny_models import SENTENCES, save_tiny_family, save_tiny_llama

TEXTS = [
    "Join list and dict",
    "def f(x):\n\treturn x + 1  # naïve 1234567",
    "  two  spaces\r\n\n don't WE'LL",
    "中文 🙂 été",
]


def run_of(tmp_path: Path, **overrides) -> Path:
    return random_run(tmp_path / "run", save_tiny_llama(tmp_path / "base", **overrides))


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(formats_gguf._LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=384, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def test_permutation_is_transformers_own_inverse():
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    for heads, shape in ((4, (64, 8)), (2, (32, 8)), (2, (32,))):
        weight = torch.randn(shape)
        back = LlamaTensorProcessor()._reverse_permute_weights(permute_rotary(weight, heads).numpy(), heads)
        assert torch.equal(torch.from_numpy(back), weight)


@pytest.mark.parametrize(
    ("dtype", "overrides"),
    [("float32", {}), ("bfloat16", {"tie_word_embeddings": True}), ("float16", {"rope_theta": 500000.0})],
    ids=["float32", "bfloat16 tied", "float16"],
)
def test_transformers_reads_the_same_model(dtype: str, overrides: dict, tmp_path: Path):
    pytest.importorskip("gguf")
    out = export_run(run_of(tmp_path, **overrides), tmp_path / "out", dtype=dtype, gguf=True).out
    ours = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    read = AutoModelForCausalLM.from_pretrained(out, gguf_file="model.gguf", dtype=torch.float32)
    assert (read.config.hidden_size, read.config.head_dim, read.config.num_key_value_heads) == (48, 32, 2)
    with torch.no_grad():
        difference = (ours(input_ids=PROMPT).logits - read(input_ids=PROMPT).logits).abs().max()
    assert difference < 1e-5
    tokenizers = [AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(out, gguf_file="model.gguf")]
    for text in TEXTS:
        first, second = (tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in tokenizers)
        assert first == second


@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "biases", "every axis, as a Mistral"])
def test_llama_cpp_reads_the_same_model(kind: str, tmp_path: Path):
    pytest.importorskip("gguf")
    xllamacpp = pytest.importorskip("xllamacpp")
    if "axis" in kind:
        # 6 heads do not divide 56: transformers' own reader makes a Llama of it, which it then refuses.
        run = make_run(tmp_path, "llama", {"hidden": 56, "layers": 3, "ffn": 96, "kv_groups": 3})
    else:
        run = run_of(tmp_path, attention_bias=kind == "biases")
    if kind == "llama-bpe":  # which llama.cpp would put a <s> before
        llama3_tokenizer().save_pretrained(tmp_path / "base")
    out = export_run(run, tmp_path / "out", dtype="float32", gguf=True).out
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(out / "model.gguf")
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(parameters)
    ask = {"max_tokens": 1, "n_probs": 3, "temperature": 0, "cache_prompt": False}
    compared = 0
    for text in [*TEXTS, *(sentence[:length] for sentence in SENTENCES for length in (20, 50, 90))]:
        ids = tokenizer(text)["input_ids"]
        by_text, by_ids = (server.handle_completions(ask | {"prompt": prompt}) for prompt in (text, ids))
        assert by_text["usage"]["prompt_tokens"] == by_ids["usage"]["prompt_tokens"] == len(ids)
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        for answer in (by_text, by_ids):  # the same tokens too, or their probabilities would differ
            if answer["choices"][0]["logprobs"] is None:
                continue  # half a character: llama.cpp keeps it to itself
            compared += 1
            for guess in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
                assert guess["logprob"] == pytest.approx(float(expected[guess["id"]]), abs=0.02)
    assert compared >= 10


def test_what_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = run_of(tmp_path)
    monkeypatch.setattr(formats_gguf, "find_spec", lambda name: object())
    with pytest.raises(UsageError, match="llama-quantize"):
        export_run(run, tmp_path / "out", gguf=True, quantize="int8")
    path = tmp_path / "base/tokenizer.json"
    document = json.loads(path.read_text())
    document["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(document))
    with pytest.raises(UnsupportedModel, match="pre-tokenizer of GPT-2 or Llama 3"):
        export_run(run, tmp_path / "out", gguf=True)
    gemma = save_tiny_family(tmp_path / "gemma", "gemma", head_dim=32)
    with pytest.raises(UnsupportedModel, match="model_type llama or mistral for GGUF, found gemma"):
        export_run(random_run(tmp_path / "gemma-run", gemma), tmp_path / "out", gguf=True)
    scaled = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    base = save_tiny_llama(tmp_path / "scaled", rope_parameters=scaled)
    with pytest.raises(UnsupportedModel, match="rope_type default for GGUF, found linear"):
        export_run(random_run(tmp_path / "scaled-run", base), tmp_path / "out", gguf=True)
    monkeypatch.setattr(formats_gguf, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pat-serve\[gguf\]"):
        export_run(run, tmp_path / "out", gguf=True)
    assert not (tmp_path / "out").exists()
