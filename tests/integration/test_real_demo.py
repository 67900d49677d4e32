"""The demo's stages, all of them and as they are, on a tiny chat model in the place of the real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pat_serve.demo.real.model import LICENSE_FILE
from pat_serve.demo.real.pipeline import RealPipeline
from pat_serve.files.atomic import write_json
from tests.integration.pair.conftest import TEMPLATE
from tests.tiny_models import save_tiny_llama

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


class TinyParent(RealPipeline):
    """With a parent that is made and not fetched."""

    shape = "layers=1,ffn=64"

    @property
    def parent(self) -> Path:  # type: ignore[override]
        return self.out / "parent"

    def fetch_parent(self) -> None:
        folder = save_tiny_llama(self.parent, tie_word_embeddings=True, max_position_embeddings=1024)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        (folder / LICENSE_FILE).write_text("Anybody may do anything with it.")


def test_the_demo_goes_from_a_chat_model_to_a_report(tmp_path: Path) -> None:
    demo = TinyParent(tmp_path / "out")
    demo.out.mkdir()
    # Fewer steps than any machine would be granted; the arithmetic has tests of its own.
    granted = {"probe_s": 1.0, "before_s": 0.0, "steps": 3, "fits": True, "rows": 584, "rows_per_step": 16}
    write_json(demo.plan_file, granted)
    demo.run()
    findings = json.loads((demo.out / "report.json").read_text())
    assert findings["models"]["pruned"]["shape"]["num_hidden_layers"] == 1
    assert [line["step"] for line in findings["training"]][-1] == 3
    assert all("distillation" in line for line in findings["training"])
    first = findings["talk"][0]
    assert len(first["questions"]) == len(first["answers"]["parent"]) == len(first["answers"]["pruned"]) == 2
    assert first["answers"]["parent"] != first["answers"]["pruned"]
    assert [regime["regime"] for regime in findings["speedup"]["regimes"]] == ["prefill", "decode"]
    assert set(findings["stage_s"]) == {stage.name for stage in demo.stages()} - {"plan", "report"}
    assert (demo.pruned / "LICENSE").read_text() == "Anybody may do anything with it."
    assert "made by HuggingFaceTB" in (demo.pruned / "NOTICE").read_text()
    html = (demo.out / "report.html").read_text()
    assert "2 to 1 layers, 128 to 64 FFN channels" in html
    assert demo.summary_lines()[1] == "trained:     3 steps of 16 conversations, of 584"
    # Finished stages stay: a second call writes the report anew and nothing else.
    written = {path: path.stat().st_mtime_ns for path in demo.out.glob("*") if path.name.endswith("json")}
    demo.run()
    again = {path: path.stat().st_mtime_ns for path in written}
    assert {path.name for path in written if again[path] != written[path]} <= {
        "report.json",
        "timings.json",
        "demo.json",
    }
