"""The model card: metadata that the hub's own client reads back, and figures that are the record's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from pat_serve.errors import RunError
from pat_serve.export.exporter import export_run
from pat_serve.export.record.card import base_license, model_card
from pat_serve.export.record.card_sections import rewrite_card
from tests.test_export_parity import random_run
from tests.tiny_models import save_tiny_llama

SPEEDUP = {
    "dtype": "float32",
    "date": "2026-11-22T12:14:01+00:00",
    "machine": {"vllm": "0.32.0", "cpu_model": "EPYC", "cpu_cores": 2, "accelerator": "none"},
    "baseline": {"name": "/home/me/base"},
    "candidate": {"shape": {"hidden_size": 48}},
    "regimes": [
        {
            "regime": "decode", "batch_size": 1, "context_tokens": 132.5, "ceiling": 1.3315,
            "ratio": {"median": 1.2647, "low": 1.2363, "high": 1.2927},
        }
    ],
}  # fmt: skip
QUALITY = {
    "date": "2026-11-22T12:14:01+00:00",
    "models": [{"name": "/home/me/base", "hidden_size": 64}, {"name": "/home/me/pruned", "hidden_size": 48}],
    "measures": [
        {
            "name": "ppl(heldout.jsonl)",
            "results": [
                {"model": "/home/me/base", "value": 141.9, "items": 55, "versus_first": None},
                {
                    "model": "/home/me/pruned", "value": 103.3, "items": 55,
                    "versus_first": {"ratio": 0.728, "low": 0.7, "high": 0.75},
                },
            ],
        }
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of a base whose card names a licence that asks for a link."""
    folder = tmp_path_factory.mktemp("card")
    base = save_tiny_llama(folder / "base")
    card = "---\nlicense: other\nlicense_name: llama9\nlicense_link: LICENSE\nlanguage: en\n---\n# Base\n"
    (base / "README.md").write_text(card)
    (base / "LICENSE").write_text("terms")
    return export_run(random_run(folder / "run", base), folder / "out", quantize="int8").out


@pytest.fixture
def record(exported: Path) -> dict:
    return json.loads((exported / "pat_export.json").read_text())


def test_metadata_of_a_local_base(exported: Path):
    data = ModelCard.load(exported / "README.md").data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "license_name": "llama9",
        "license_link": "LICENSE",
        "tags": ["pruning", "structured-pruning", "pat-serve", "compressed-tensors", "int8"],
    }
    assert (exported / "LICENSE").read_text() == "terms"


def test_metadata_of_a_hub_base(record: dict):
    record["base"]["source"] = "owner/Model-7B"
    record["recipe"]["data"] = "owner/instructions"
    record["quantization"] = None
    data = ModelCard(model_card(record)).data
    assert (data.base_model, data.base_model_relation) == ("owner/Model-7B", "finetune")
    assert data.datasets == ["owner/instructions"]
    assert data.tags == ["pruning", "structured-pruning", "pat-serve"]


def test_a_name_that_yaml_would_misread(record: dict):
    record["base"]["source"] = "owner/on: [x] # y"
    assert ModelCard(model_card(record)).data.base_model == "owner/on: [x] # y"


def test_figures_are_the_records(exported: Path, record: dict):
    text = (exported / "README.md").read_text()
    figures = record["quantization"]["quality"]
    assert f"{record['parity']['mean_kl_nats']:.2e} nats" in text
    assert f"({figures['perplexity_ratio']:.4f}x) on {figures['tokens']} tokens" in text
    assert f"| hidden_size | 64 | {record['hidden_size']['exported']} |" in text
    assert "int8 (W8A8, compressed-tensors), everything else float32" in text
    assert "pip install compressed-tensors" in text
    assert "Not measured with this checkpoint" in text


def test_an_unchecked_export_says_so(record: dict):
    record["parity"] = None
    assert "**not checked**" in model_card(record)


def test_what_else_was_trained_is_told_and_what_was_not_is_not(record: dict):
    record["recipe"] |= {"train_norms": False, "lr_scale": {}}
    assert "train_norms" not in model_card(record)
    assert "lr_scale" not in model_card(record)
    record["recipe"] |= {"train_norms": True, "lr_scale": {"lora_b": 4.0}}
    assert "- train_norms: True\n- lr_scale: {'lora_b': 4.0}\n" in model_card(record)


def test_no_license_is_not_invented(tmp_path: Path, record: dict):
    assert base_license(tmp_path) == {}
    (tmp_path / "README.md").write_text("---\n- broken: [\n---\n")
    assert base_license(tmp_path) == {}
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    assert base_license(tmp_path) == {"license": "apache-2.0"}
    record["license"] = {}
    card = model_card(record)
    assert "license" not in ModelCard(card).data.to_dict()
    assert "names no license" in card


def test_what_was_extrapolated_is_marked_on_the_card(exported: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    [phase] = [one for one in SPEEDUP["regimes"] if one["regime"] == "decode"]
    whole = {**phase, "ratio": {"median": 1.32, "low": 1.31, "high": 1.33}, "candidate": {"layers": 32}}
    shape = {**SPEEDUP["candidate"]["shape"], "num_layers": 6}
    result = {**SPEEDUP, "candidate": {**SPEEDUP["candidate"], "shape": shape}, "extrapolated": [whole]}
    (tmp_path / "speedup.json").write_text(json.dumps(result))
    rewrite_card(folder, speedup=tmp_path / "speedup.json")
    card = (folder / "README.md").read_text()
    assert "| decode, 32 layers, extrapolated |" in card
    assert "| decode, 6 layers |" in card


def test_measured_speed_and_quality(exported: Path, tmp_path: Path):
    folder = shutil.copytree(exported, tmp_path / "out")
    speedup, quality = tmp_path / "speedup.json", tmp_path / "quality.json"
    speedup.write_text(json.dumps(SPEEDUP))
    quality.write_text(json.dumps(QUALITY))
    rewrite_card(folder, speedup=speedup, quality=quality)
    text = (folder / "README.md").read_text()
    assert "| decode | 1 x 132.5 | 1.265 | 1.236 to 1.293 | 1.331 |" in text
    assert "| ppl(heldout.jsonl) | pruned | 103.3 | 0.728x | 0.700 to 0.750 | 55 |" in text
    assert "/home/me" not in text
    assert "Not measured" not in text
    assert ModelCard.load(folder / "README.md").data.to_dict() == ModelCard.load(exported / "README.md").data.to_dict()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(SPEEDUP | {"candidate": {"shape": {"hidden_size": 56}}}), "hidden_size 48, found hidden_size 56"),
        (json.dumps(QUALITY), "found KeyError"),
        ("[]", "found list"),
        ("{", "Expecting property name"),
    ],
)
def test_a_wrong_measurement_changes_nothing(content: str, message: str, exported: Path, tmp_path: Path):
    before = (exported / "README.md").read_text()
    (tmp_path / "speedup.json").write_text(content)
    with pytest.raises(RunError, match=message):
        rewrite_card(exported, speedup=tmp_path / "speedup.json")
    assert (exported / "README.md").read_text() == before
