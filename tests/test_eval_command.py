"""pat-eval and the gate of pat-export as a user runs them, in this process."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pat_serve.cli import eval as eval_command
from pat_serve.cli import export as export_command
from pat_serve.evaluation.report import Report
from pat_serve.files.atomic import write_json
from tests.random_runs import random_run
from tests.tiny_models import SENTENCES, save_tiny_llama


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [save_tiny_llama(folder / "dense"), save_tiny_llama(folder / "pruned", seed=1)]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "docs.txt"
    path.write_text("\n".join(SENTENCES))
    return path


def run(monkeypatch: pytest.MonkeyPatch, command, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["pat", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        command.main()
    code = stop.value.code
    return code if isinstance(code, int) else 0


def test_json_table_html_and_resume(
    models: list[Path], text: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    arguments = [*models, "--data", rows, "--text", text, "--context-tokens", 64, "--out", tmp_path / "out"]
    assert run(monkeypatch, eval_command, *arguments, "--html", tmp_path / "r.html", "--json") == 0
    report = Report.model_validate_json(capsys.readouterr().out)
    assert report == Report.model_validate_json((tmp_path / "out/eval.json").read_text())
    assert [measure.name for measure in report.measures] == ["ppl(rows.jsonl)", "ppl(docs.txt)"]
    assert [model.hidden_size for model in report.models] == [64, 64]
    assert report.models[0].sha256 != report.models[1].sha256
    result = report.measures[1].results[1]
    assert result.versus_first is not None
    assert result.retention_percent == pytest.approx(100 / result.versus_first.ratio)
    html = (tmp_path / "r.html").read_text()
    assert "ppl(docs.txt)" in html
    # Nothing that a browser would fetch.
    assert "<script src" not in html
    assert "<link" not in html

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("pat_serve.perplexity.measure_nll", forbidden)
    assert run(monkeypatch, eval_command, *arguments) == 0
    table = capsys.readouterr().out
    assert f"{result.value:.3f}" in table
    assert all(measure.name in table for measure in report.measures), "whole, where stdout is no terminal"
    assert run(monkeypatch, eval_command, *arguments, "--limit", 3) == 1, "other settings are measured anew"


def test_a_changed_model_is_measured_anew(models: list[Path], text: Path, tmp_path: Path, monkeypatch, capsys):
    import shutil

    model = shutil.copytree(models[0], tmp_path / "model")
    arguments = [model, "--text", text, "--context-tokens", 64, "--out", tmp_path / "out", "--json"]
    assert run(monkeypatch, eval_command, *arguments) == 0
    first = json.loads(capsys.readouterr().out)
    shutil.copyfile(models[1] / "model.safetensors", model / "model.safetensors")
    assert run(monkeypatch, eval_command, *arguments) == 0
    second = json.loads(capsys.readouterr().out)
    assert first["measures"][0]["results"] != second["measures"][0]["results"]
    # A damaged file of the cache is as good as none.
    for path in (tmp_path / "out/outcomes").iterdir():
        path.write_text("{")
    assert run(monkeypatch, eval_command, *arguments) == 0
    assert json.loads(capsys.readouterr().out)["measures"] == second["measures"]


@pytest.mark.parametrize(("bound", "code"), [("ppl <= 2x", 0), ("ppl <= 0.5x", 1), ("ppl <= RATIOx", 3)])
def test_gate(bound: str, code: int, models: list[Path], text: Path, tmp_path: Path, monkeypatch, capsys):
    arguments = [*models, "--text", text, "--context-tokens", 64, "--out", tmp_path, "--json"]
    assert run(monkeypatch, eval_command, *arguments) == 0
    ratio = json.loads(capsys.readouterr().out)["measures"][0]["results"][1]["versus_first"]["ratio"]
    (tmp_path / "gate.yaml").write_text(f"bounds: [{bound.replace('RATIO', f'{ratio:.6f}')}]")
    assert run(monkeypatch, eval_command, *arguments, "--gate", tmp_path / "gate.yaml") == code
    [result] = json.loads(capsys.readouterr().out)["gate"]
    assert result["outcome"] == {0: "pass", 1: "fail", 3: "inconclusive"}[code]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "something to measure"),
        (["--text", "absent.txt"], "No such file"),
        (["--text", "TEXT", "--context-tokens", "4096"], "at most 256"),
        (["--text", "TEXT", "--backend", "onnx"], "hf or vllm"),
        (["--text", "TEXT", "--context-tokens", "64", "--stride", "65"], "at most --context-tokens 64"),
        (["--text", "TEXT", "--stride", "257"], "at most 256, the tokens of a window"),
        (["--text", "TEXT", "--text", "TEXT"], "docs.txt more than once"),
        (["--data", "TEXT", "--text", "TEXT"], "docs.txt more than once"),
        (["--tasks", "pat14_cope"], "Near it|lm-eval ls tasks"),
        (["--text", "TEXT", "--gate", "GATE"], "a reference and a model"),
        (["--tasks", "pat14_copa", "--gate", "GATE", "SECOND"], "something that is measured: none is"),
    ],
)
def test_usage(arguments: list[str], message: str, models: list[Path], text: Path, tmp_path, monkeypatch, capsys):
    import re

    (tmp_path / "gate.yaml").write_text("bounds: [ppl <= 1x]")
    filled = [
        {"TEXT": str(text), "GATE": str(tmp_path / "gate.yaml"), "SECOND": str(models[1])}.get(word, word)
        for word in arguments
    ]
    assert run(monkeypatch, eval_command, models[0], *filled) in (1, 2)
    assert re.search(message, capsys.readouterr().err)


def test_without_the_extra(models: list[Path], monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr("pat_serve.machine.extras.find_spec", lambda _: None)
    assert run(monkeypatch, eval_command, models[0], "--tasks", "arc_easy") == 1
    assert 'pip install "pat-serve[eval]", or leave --tasks out' in capsys.readouterr().err


def test_export_keeps_a_model_that_is_good_enough(models: list[Path], rows: Path, tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "out"
    arguments = ["--ckpt", random_run(tmp_path / "run", models[0]), "--out", out, "--quality-data", rows]
    assert run(monkeypatch, export_command, *arguments, "--require-quality", "ppl<=1000x") == 0
    record = json.loads((out / "pat_export.json").read_text())
    assert record["quality"]["gate"][0]["outcome"] == "pass"
    assert [model["name"] for model in record["quality"]["models"]] == ["the base", "out"]
    assert "| ppl(rows.jsonl) | out |" in (out / "README.md").read_text()
    assert str(tmp_path) not in json.dumps(record["quality"]["models"])
    # The card that is written anew keeps the table.
    assert run(monkeypatch, export_command, "card", out) == 0
    assert "| ppl(rows.jsonl) | out |" in (out / "README.md").read_text()


@pytest.mark.parametrize(("bound", "code"), [("ppl<=0.2x", 1), ("ppl<=RATIOx", 3)])
def test_export_leaves_nothing_when_too_much_is_lost(
    bound: str, code: int, models: list[Path], rows: Path, tmp_path: Path, monkeypatch, capsys
):
    ckpt, out = random_run(tmp_path / "run", models[0]), tmp_path / "out"
    arguments = ["--ckpt", ckpt, "--out", out, "--quality-data", rows, "--no-parity"]
    if "RATIO" in bound:
        assert run(monkeypatch, export_command, *arguments, "--require-quality", "ppl<=1000x", "--json") == 0
        [measure] = json.loads(capsys.readouterr().out)["quality"]["measures"]
        bound = bound.replace("RATIO", f"{measure['results'][1]['versus_first']['ratio']:.6f}")
    else:
        out.mkdir()
        write_json(out / "pat_export.json", {"an": "earlier export"})
    earlier = {path.name: path.read_bytes() for path in out.iterdir()}
    assert run(monkeypatch, export_command, *arguments, "--require-quality", bound, "--force") == code
    assert "Nothing was exported" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == earlier
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--require-quality", "ppl<=1.02x"], "--quality-data"),
        (["--require-quality", "acc>=0.9x", "--quality-data", "ROWS"], "a bound on ppl"),
        (["--quality-data", "ROWS"], "together"),
    ],
)
def test_export_gate_usage(flags: list[str], message: str, rows: Path, tmp_path: Path, monkeypatch, capsys):
    filled = [str(rows) if word == "ROWS" else word for word in flags]
    assert run(monkeypatch, export_command, "--ckpt", tmp_path, "--out", tmp_path / "out", *filled) == 2
    assert message in capsys.readouterr().err


def test_quantized_exports_are_measured_too(models: list[Path], rows: Path, tmp_path: Path, monkeypatch, capsys):
    pytest.importorskip("compressed_tensors")
    out = tmp_path / "out"
    arguments = ["--ckpt", random_run(tmp_path / "run", models[0]), "--out", out, "--quantize", "int8", "--no-parity"]
    gate = ["--quality-data", rows, "--require-quality", "ppl<=1000x"]
    assert run(monkeypatch, export_command, *arguments, *gate) == 0
    [measure] = json.loads((out / "pat_export.json").read_text())["quality"]["measures"]
    assert measure["results"][1]["value"] > 1


def test_the_demo_reads_the_report(models: list[Path], rows: Path, tmp_path: Path, monkeypatch, capsys):
    from pat_serve.demo.tiny.findings import _perplexities

    assert run(monkeypatch, eval_command, *models, "--data", rows, "--json") == 0
    (tmp_path / "quality.json").write_text(capsys.readouterr().out)
    first, second = _perplexities(tmp_path / "quality.json")
    assert first["examples"] == second["examples"] == 64
    assert set(first) == {"perplexity", "examples", "tokens", "nll_nats", "nll_standard_error_nats"}


def test_a_model_that_gives_no_numbers_is_told(models: list[Path], text: Path, tmp_path: Path, monkeypatch, capsys):
    """Else the report has a hole where its figure was, and a p-value beside it."""
    from safetensors.torch import load_file, save_file

    broken = save_tiny_llama(tmp_path / "broken")
    for path in broken.glob("*.safetensors"):
        tensors = load_file(path)
        tensors["model.norm.weight"][:] = float("nan")
        save_file(tensors, path, metadata={"format": "pt"})
    assert run(monkeypatch, eval_command, models[0], broken, "--text", text, "--context-tokens", "32") == 1
    assert "finite" in capsys.readouterr().err
