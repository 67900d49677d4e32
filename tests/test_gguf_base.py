"""A GGUF file as a base: read as transformers reads it, or better, and refused where it would be another model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pat_serve.checkpoint import open_checkpoint
from pat_serve.errors import BrokenCheckpoint, MissingModel, UnsupportedModel
from pat_serve.locate import locate, stock_path
from pat_serve.plan import file_sha256
from tests.gguf_files import write_gguf
from tests.tiny_models import SENTENCES, save_tiny_llama

pytest.importorskip("gguf")

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
