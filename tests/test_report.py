"""Results written, read back, compared, and shown on a page."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pat_serve.cli.bench import app
from pat_serve.errors import OutputExists, PatServeError, UsageError
from pat_serve.server.bench.report.compare_table import compared
from pat_serve.server.bench.report.read import read_quality, read_result
from pat_serve.server.bench.report.rows import csv_text, rows_of
from pat_serve.server.bench.speedup.table import print_result
from tests.speedup_records import depths_result, latency_result, load_result, speedup_result, throughput_result

RESULTS = {
    "speedup": speedup_result(),
    "latency": latency_result("dense"),
    "throughput": throughput_result("dense"),
    "load": load_result("dense"),
}


@contextmanager
def console_text() -> Iterator[io.StringIO]:
    """The text that the console prints meanwhile."""
    with redirect_stdout(io.StringIO()) as text:
        yield text


def written(folder: Path, name: str, result: Any) -> Path:
    path = folder / f"{name}.json"
    path.write_text(result.model_dump_json(indent=2))
    return path


@pytest.mark.parametrize("kind", RESULTS)
def test_a_result_is_read_back_as_it_was(kind: str, tmp_path: Path) -> None:
    path = written(tmp_path, kind, RESULTS[kind])
    assert read_result(path) == RESULTS[kind]
    assert json.loads(path.read_text())["schema_version"] >= 1
    assert json.loads(path.read_text())["machine"]["vllm"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("{", "no JSON"),
        ("[]", "another kind"),
        ('{"kind": "training"}', "another kind"),
        ('{"kind": "speedup", "schema_version": 1}', "schema_version 1"),
        ('{"kind": "load", "schema_version": 1}', "Field required"),
    ],
)
def test_what_is_no_result_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_result(path)


def test_records_name_a_models_sizes_as_they_always_have() -> None:
    """Records that users keep, the card and the page read these names."""
    shape = json.loads(speedup_result().model_dump_json())["candidate"]["shape"]
    assert shape == {
        "hidden_size": 3072, "num_layers": 2, "num_heads": 32, "num_kv_heads": 32, "head_dim": 128, "ffn_size": 11008,
        "vocab_size": 32000, "tied_head": False, "linear_bytes": None,
    }  # fmt: skip


def test_a_record_from_before_the_margin_was_judged_strictly(tmp_path: Path) -> None:
    new = speedup_result(margin=0.0)
    old = json.loads(new.model_dump_json())
    old["schema_version"] = 2
    del old["settings"]["margin"], old["strict_verdict"]
    for regime in old["regimes"]:
        del regime["strict_verdict"]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(old))
    read = read_result(path)
    assert read == new.model_copy(update={"schema_version": 2})
    for broken in ({**old, "regimes": 3}, {**old, "settings": None}, {**old, "regimes": [{}]}):
        path.write_text(json.dumps(broken))
        with pytest.raises(UsageError, match="schema_version 2"):
            read_result(path)


def test_a_folder_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Is a directory"):
        read_result(tmp_path)


def test_csv_has_every_figure_with_its_ceiling() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(RESULTS.values()))))
    assert len(rows) == sum(len(list(rows_of(result))) for result in RESULTS.values())
    [ratio] = [row for row in rows if row["figure"] == "speed-up" and row["where"].startswith("decode")]
    regime = RESULTS["speedup"].regimes[1]
    assert float(ratio["value"]) == regime.ratio.median
    assert float(ratio["ceiling"]) == regime.ceiling
    assert {row["figure"] for row in rows if row["kind"] == "latency"} >= {
        "TTFT p99.9",
        "TPOT p50",
        "ITL p99",
        "E2E p90",
    }
    assert {row["kind"] for row in rows} == set(RESULTS)


def test_quality_of_either_form_of_pat_eval_s_report(tmp_path: Path) -> None:
    old = {"data": "x/held.jsonl", "results": [{"model": "a", "perplexity": 10.0, "nll_standard_error_nats": 0.1}]}
    new = {"measures": [{"name": "acc(arc)", "results": [{"model": "a", "value": 0.5, "standard_error": None}]}]}
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(old))
    [figure] = read_quality(path)
    assert (figure.measure, figure.model, figure.value) == ("ppl(held.jsonl)", "a", 10.0)
    assert figure.standard_error == pytest.approx(1.0)
    path.write_text(json.dumps(new))
    [figure] = read_quality(path)
    assert (figure.measure, figure.value, figure.standard_error) == ("acc(arc)", 0.5, None)
    path.write_text('{"something": "else"}')
    with pytest.raises(UsageError, match="pat-eval"):
        read_quality(path)


def test_results_side_by_side_meet_point_by_point() -> None:
    dense, pruned = latency_result("dense"), latency_result("pruned", faster=1.25)
    table = compared([("dense", dense), ("pruned", pruned)])
    ttft = [columns for head, columns in table if head.figure == "TTFT p50"]
    assert len(ttft) == len(dense.cells)
    for first, second in ttft:
        assert first is not None
        assert second is not None
        assert first.value / second.value == pytest.approx(1.25)
    mixed = compared([("dense", dense), ("load", load_result("x"))])
    assert all(columns.count(None) == 1 for _, columns in mixed)


def test_the_page_holds_everything_and_asks_for_nothing(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    files = [written(tmp_path, name, result) for name, result in RESULTS.items()]
    files.append(written(tmp_path, "pruned", latency_result("pruned", faster=1.25)))
    quality, page, table = tmp_path / "eval.json", tmp_path / "page.html", tmp_path / "all.csv"
    figure = {"name": "ppl(held)", "results": [{"model": "<b>dense</b>", "value": 9.0, "standard_error": 0.1}]}
    quality.write_text(json.dumps({"measures": [figure]}))
    arguments = ["compare", *map(str, files), "--quality", str(quality), "--html", str(page), "--csv", str(table)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "TTFT p99.9" in done.output
    assert table.read_text().count("\n") > 50
    html = page.read_text()
    for title in ("Speed-up of", "Latency of a batch", "Throughput", "Latency under load", "Memory", "Quality"):
        assert f"<h2>{title}" in html
    body = html[html.index("</script></head>") :]
    assert "warm-up baseline settled after" in body
    assert f"claim 1.33x, margin 2%. {RESULTS['speedup'].reason}" in body.replace("&#x27;", "'")
    assert f"speedup  claim 1.33x, margin 2%: {RESULTS['speedup'].verdict.value} (strictly: " in done.output
    assert body.count("plotly-graph-div") == 2 + 2 + 1 + 3 + 1 + 1
    # Nothing is fetched, and nothing that a file says becomes markup.
    assert not re.search(r"""<(script|link|img)[^>]*(src|href)=""", html)
    assert "<td><b>dense" not in body
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, OutputExists)


def test_what_is_extrapolated_is_marked_and_what_was_measured_stands_beside_it(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    result = depths_result()
    path, page, table = written(tmp_path, "depths", result), tmp_path / "page.html", tmp_path / "all.csv"
    assert read_result(path) == result
    done = CliRunner().invoke(app, ["compare", str(path), "--html", str(page), "--csv", str(table)])
    assert done.exit_code == 0, done.output
    body = page.read_text()
    body = body[body.index("</script></head>") :]
    assert body.count("<td class=n>32 (extrapolated)</td>") == 2
    assert body.count("<td class=n>2</td>") == body.count("<td class=n>6</td>") == 2
    assert "The verdict is on the whole models, which were not measured" in body
    assert "decode, batch 1, from 2, 6 layers" in body
    assert "decode, batch 1, 32 layers (extrapolated): 10" in body
    [dense, narrow] = result.whole_capacities
    assert f"In the {dense.memory_bytes / 2**30:.2f} GiB of the whole baseline and its batch" in body
    told = [row for row in csv.DictReader(table.open()) if row["where"] == "memory, whole models"]
    held = [row["value"] for row in told if row["figure"] == "requests in equal memory"]
    assert [float(value) for value in held] == [1, narrow.requests]
    marked = [row for row in csv.DictReader(table.open()) if "extrapolated" in row["where"]]
    assert {row["figure"] for row in marked} == {"duration", "fixed", "a layer", "speed-up"}
    with console_text() as text:
        print_result(result)
    shown = text.getvalue()
    assert shown.count("32 (extrapolated)") == 2
    assert "The verdict is on the whole models" in shown
    # A check at one depth says nothing of the kind.
    with console_text() as text:
        print_result(RESULTS["speedup"])
    assert "extrapolated" not in text.getvalue()


def test_labels_must_tell_results_apart(tmp_path: Path) -> None:
    one = written(tmp_path, "one", RESULTS["load"])
    for labels in (["--label", "a"], ["--label", "a", "--label", "a"]):
        done = CliRunner().invoke(app, ["compare", str(one), str(one), *labels])
        assert isinstance(done.exception, PatServeError)
    assert isinstance(CliRunner().invoke(app, ["compare", str(one), str(one)]).exception, UsageError)


def test_a_model_against_itself_keeps_its_roles_apart() -> None:
    result = speedup_result()
    same = result.model_copy(update={"candidate": result.candidate.model_copy(update={"name": result.baseline.name})})
    table = compared([("A/A", same), ("again", same)])
    durations = {head.model for head, _ in table if head.figure == "duration p50"}
    assert durations == {f"{result.baseline.name} ({role})" for role in ("baseline", "candidate")}
    assert all(row is not None for _, columns in table for row in columns)
