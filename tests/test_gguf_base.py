"""A GGUF file as a base: read as transformers reads it, or better, and refused where it would be another model."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pat_serve.checkpoints.checkpoint import open_checkpoint
from pat_serve.checkpoints.locate import locate, stock_path
from pat_serve.errors import BrokenCheckpoint, MissingModel, UnsupportedModel
from pat_serve.gguf import folder as gguf_folder
from pat_serve.run.plan import file_sha256
from tests.gguf_files import add, write_gguf
from tests.tiny_models import SENTENCES, save_tiny_family, save_tiny_llama

gguf = pytest.importorskip("gguf")

# Blocks of K-quants are 256 wide.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
PROMPT = torch.randint(3, 384, (2, 24), generator=torch.Generator().manual_seed(5))


def logits(folder: Path, **how) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()
    with torch.no_grad():
        return model(input_ids=PROMPT).logits


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_1", "Q4_K_M"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_every_type_is_read_as_transformers_reads_it(kind: str, tied: bool, tmp_path: Path):
    base = save_tiny_llama(tmp_path / "base", tie_word_embeddings=tied, rope_theta=50000.0, **WIDE)
    (tmp_path / "file").mkdir()
    file = write_gguf(base, tmp_path / "file/model.gguf", kind)
    folder = locate(str(file))
    dtype = {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)
    checkpoint = open_checkpoint(str(file))
    assert (checkpoint.tied, checkpoint.dtype, checkpoint.folder) == (tied, dtype, folder)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).state_dict()
    ours = load_file(folder / "model.safetensors")
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name].to(dtype)), name
    original = load_file(base / "model.safetensors")
    assert set(ours) == set(original)
    step = {"F32": 0, "F16": 1e-3, "BF16": 4e-3, "Q8_0": 5e-3, "Q4_1": 0.07, "Q4_K_M": 0.08}[kind]
    for name, tensor in original.items():
        assert (tensor - ours[name].float()).abs().max() <= step * tensor.abs().max(), name


def test_a_float_file_is_the_model_that_it_was_made_from(tmp_path: Path):
    base = save_tiny_llama(tmp_path / "base", dtype=torch.bfloat16)
    folder = locate(str(write_gguf(base, tmp_path / "model.gguf", "BF16")))
    assert torch.equal(logits(folder), logits(base))
    ours, original = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(base)
    for text in SENTENCES:
        assert ours(text)["input_ids"] == original(text)["input_ids"]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 1


def test_a_file_is_read_once_and_known_by_its_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    base = save_tiny_llama(tmp_path / "base")
    file = write_gguf(base, tmp_path / "model.gguf", "Q8_0")
    folder = locate(str(file))
    assert "reading model.gguf (Q8_0) once: " in capsys.readouterr().err
    copy = tmp_path / "elsewhere/other.gguf"
    copy.parent.mkdir()
    copy.write_bytes(file.read_bytes())
    assert locate(str(copy)) == locate(str(copy.parent)) == folder == Path(stock_path(str(file)))
    assert capsys.readouterr().err == ""
    reference = open_checkpoint(str(file)).reference()
    assert (reference.source, reference.gguf_sha256) == (str(file), file_sha256(file))
    assert set(reference.sha256) == {"config.json", "model.safetensors"}
    # Another file under the same name is another model.
    write_gguf(save_tiny_llama(tmp_path / "second", seed=1), file, "Q8_0")
    assert locate(str(file)) != folder


def test_a_folder_of_the_cache_that_has_lost_files_is_written_anew(tmp_path: Path):
    file = write_gguf(save_tiny_llama(tmp_path / "base", seed=6), tmp_path / "model.gguf", "Q8_0")
    folder = locate(str(file))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "pat_gguf.json"} < set(before)
    for name in before:
        (folder / name).unlink()
        assert locate(str(file)) == folder
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "model.safetensors").write_bytes(before["model.safetensors"][:-1])
    assert (locate(str(file)) / "model.safetensors").read_bytes() == before["model.safetensors"]


def test_what_is_no_whole_file_is_refused(tmp_path: Path):
    base = save_tiny_llama(tmp_path / "base")
    file = write_gguf(base, tmp_path / "model.gguf", "Q8_0")
    whole = file.read_bytes()
    for length in (0, 3, 24, 200, 5000, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(BrokenCheckpoint, match=r"model\.gguf: expected .* found .*byte"):
            locate(str(file))
    file.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(BrokenCheckpoint, match="expected a GGUF file, found one that begins with b'GGML'"):
        locate(str(file))
    for change in (
        lambda writer: writer.add_key_value("split.count", 1.5, gguf.GGUFValueType.FLOAT32),
        lambda writer: writer.add_key_value("split.count", "two", gguf.GGUFValueType.STRING),
    ):
        write_gguf(base, file, "F32", change=change)
        with pytest.raises(BrokenCheckpoint, match=r"split\.count as an integer, found"):
            locate(str(file))
    (tmp_path / "part").mkdir()
    part = tmp_path / "part/model-00001-of-00002.gguf"
    part.write_bytes(whole)
    with pytest.raises(UnsupportedModel, match="one part of several"):
        locate(str(part))
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "part" / name).write_bytes(whole)
    with pytest.raises(MissingModel, match=r"found 3 GGUF files: a\.gguf, b\.gguf.*Name one of them"):
        locate(str(tmp_path / "part"))
    with pytest.raises(
        MissingModel, match=r"a model folder, a \.gguf file or a hub id \(owner/name\), found no such file"
    ):
        locate("nowhere/model.gguf")


FAMILIES = {
    "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma": {"head_dim": 32},
    "phi3": {"pad_token_id": 2, "sliding_window": 64},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_the_model_that_it_was_made_from(family: str, tmp_path: Path):
    base = save_tiny_family(tmp_path / "base", family, **FAMILIES[family])

    def more(writer: Any) -> None:
        if family == "phi3":
            writer.add_sliding_window(64)

    pre = "qwen2" if family.startswith("qwen") else "gpt-2"
    folder = locate(str(write_gguf(base, tmp_path / "model.gguf", "F32", architecture=family, change=more, pre=pre)))
    ours, original = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    assert set(ours) == set(original)
    for name, tensor in original.items():
        # A Gemma's norms are stored as 1 + w, in float32.
        assert torch.allclose(tensor, ours[name], atol=1e-7 if family == "gemma" else 0, rtol=0), name
    assert torch.allclose(logits(folder), logits(base), atol=1e-5 if family == "gemma" else 0, rtol=0)


@pytest.mark.parametrize("kind", ["Q4_K_M", *FAMILIES])
def test_llama_cpp_computes_the_same(kind: str, tmp_path: Path):
    xllamacpp = pytest.importorskip("xllamacpp")
    if kind == "Q4_K_M":
        base = save_tiny_llama(tmp_path / "base", **WIDE)
        file = write_gguf(base, tmp_path / "model.gguf", kind)
    else:
        base = save_tiny_family(tmp_path / "base", kind, **FAMILIES[kind])
        pre = "qwen2" if kind.startswith("qwen") else "gpt-2"
        file = write_gguf(base, tmp_path / "model.gguf", "F32", architecture=kind, pre=pre)
    folder = locate(str(file))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = 256, 1, False
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(parameters)
    ask = {"max_tokens": 1, "n_probs": 3, "temperature": 0, "cache_prompt": False}
    compared = 0
    for text in (sentence[:length] for sentence in SENTENCES for length in (20, 50)):
        ids = tokenizer(text)["input_ids"]
        answer = server.handle_completions(ask | {"prompt": text})
        assert answer["usage"]["prompt_tokens"] == len(ids)
        if answer["choices"][0]["logprobs"] is None:
            continue  # half a character
        compared += 1
        with torch.no_grad():
            expected = model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        for guess in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            # llama.cpp rounds activations to 8 bits where weights are quantised, and keys and values to float16. The
            # unquantised model is up to 1.0 away from the Q4_K_M file's.
            tolerance = 0.2 if kind == "Q4_K_M" else 0.02
            assert guess["logprob"] == pytest.approx(float(expected[guess["id"]]), abs=tolerance)
    assert compared >= 10


def rope_factors(head_dim: int, theta: float, factor: float) -> torch.Tensor:
    """transformers' divisors of the frequencies for Llama 3, from its own tables of both ropes."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    rope = {
        "rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    settings = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "head_dim": head_dim}
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(rope_parameters=rope, **settings), torch.device("cpu"))
    plain = {"rope_type": "default", "rope_theta": theta}
    return LlamaRotaryEmbedding(LlamaConfig(rope_parameters=plain, **settings)).inv_freq / scaled


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_keeps_its_rope(factor: float, tmp_path: Path):
    base = save_tiny_llama(tmp_path / "base", rope_theta=500000.0)
    factors = rope_factors(32, 500000.0, factor).numpy()
    assert factors.max() == factor
    file = write_gguf(
        base, tmp_path / "model.gguf", "F32", change=lambda writer: add(writer, "rope_freqs.weight", factors, "F32")
    )
    rope = AutoConfig.from_pretrained(locate(str(file))).rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("llama3", factor, 500000.0)
    factors[3] *= 1.01
    write_gguf(base, file, "F32", change=lambda writer: add(writer, "rope_freqs.weight", factors, "F32"))
    with pytest.raises(UnsupportedModel, match=r"the rope factors of Llama 3\.1 or 3\.2, found others in rope_freqs"):
        locate(str(file))


def test_a_linear_rope_is_kept(tmp_path: Path):
    def scaled(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(2.0)

    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    base = save_tiny_llama(tmp_path / "base", rope_parameters=rope)
    folder = locate(str(write_gguf(base, tmp_path / "model.gguf", "F32", change=scaled)))
    assert torch.equal(logits(folder), logits(base))


def test_processes_that_ask_at_once_write_one_folder(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    file = write_gguf(save_tiny_llama(tmp_path / "base", seed=4), tmp_path / "model.gguf", "Q8_0")
    write, log = gguf_folder._write, tmp_path / "writes"

    def noted(*arguments: Any) -> None:
        with log.open("a") as lines:
            lines.write("one\n")
        write(*arguments)

    monkeypatch.setattr(gguf_folder, "_write", noted)
    # Forked, so that none of them has minutes of imports ahead of it.
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(3), context.Queue()

    def ask() -> None:
        barrier.wait()
        answers.put(str(locate(str(file))))

    processes = [context.Process(target=ask) for _ in range(3)]
    for process in processes:
        process.start()
    [folder] = {answers.get(timeout=300) for _ in processes}
    for process in processes:
        process.join()
    assert log.read_text() == "one\n"
    assert open_checkpoint(folder).num_layers == 2
    assert not [path for path in (cache / "gguf").iterdir() if ".partial-" in path.name]
