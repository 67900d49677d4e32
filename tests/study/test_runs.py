"""The study's jobs, tables and folders; its runs are those of commands that other tests cover."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.ablation.__main__ import main as ablation
from benchmarks.study import corpus, measuring, report
from benchmarks.study.__main__ import SIZES, main
from benchmarks.study.methods import DENSE, METHODS, RATIOS, SWEEPS, jobs, settings
from pat_serve.training.config import TrainRecipe
from tests.conftest import tiny_recipe
from tests.study.conftest import base_of_width


def test_every_job_is_a_recipe():
    found = jobs(2, list(SWEEPS))
    # Beside the curve's own: 6 ranks and the dense operator of two recipes less their own ranks, one without the
    # identity loss at two ratios, five of the masks, three with the head or without, three rates of three, and two
    # numbers of rows of two.
    assert len(found) == 2 * (1 + len(METHODS) * len(RATIOS) + 12 + 2 + 5 + 3 + 9 + 4)
    assert (found[0].name, found[0].ratio, found[0].seed) == (DENSE, 0.0, 0)
    for base in SIZES.values():
        for job in found:
            width = round(base.hidden_size * (1 - job.ratio))
            assert width % base.heads == 0
            recipe = TrainRecipe.build(settings(job, width) | {"model": "m", "data": "d", "max_steps": 9}, job.name)
            assert recipe.hidden_size == (None if job.dense else width)
            assert job.dense == (job.ratio == 0)
            assert "head" not in job.name or recipe.resolved(tied=False).lora_head == (", no head" not in job.name)


def test_a_sweep_alone_keeps_what_it_is_compared_with():
    names = {(job.name, job.ratio) for job in jobs(1, ["identity"], curve=False)}
    published = "PAT as published"
    assert names == {
        (DENSE, 0.0),
        *((name, ratio) for name in (published, f"{published}, no identity loss") for ratio in (0.25, 0.5)),
    }
    assert {job.ratio for job in jobs(1, [], ratios=[0.5])} == {0.0, 0.5}
    assert len(jobs(1, [], domain=True)) == 4


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_without_the_identity_loss(weight: float, tiny_base: Path, rows: Path, tmp_path: Path):
    from pat_serve.training.run import start

    start(tiny_recipe(tiny_base, rows, identity_weight=weight, max_steps=12), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any("identity_loss" in line for line in lines) == (weight > 0)
    assert any("count_loss" in line for line in lines)


def test_table_pairs_by_seed():
    lines = [
        {"method": DENSE, "ratio": 0.0, "seed": 0, "steps": 9, "parameters": 100, "ppl(a)": 10.0, "ppl(a)_se": 1.0},
        {"method": DENSE, "ratio": 0.0, "seed": 1, "steps": 9, "parameters": 100, "ppl(a)": 20.0, "ppl(a)_se": 1.0},
        {"method": "x", "ratio": 0.25, "seed": 0, "steps": 9, "parameters": 75, "ppl(a)": 11.0, "speedup": 1.2},
        {"method": "x", "ratio": 0.25, "seed": 1, "steps": 9, "parameters": 75, "ppl(a)": 22.0, "speedup": 1.4},
    ]
    rows = report.table(lines).splitlines()
    assert rows[0] == "| cut | method | seeds | parameters | ppl(a) | times as fast |"
    assert rows[3] == "| 25.0% | x | 2 | 75 | 16.50 ± 7.78 (+10.0 ± 0.0 %) | 1.300 ± 0.141 |"


def test_each_sweep_has_a_table_of_its_own():
    def line(method: str, **more: object) -> dict[str, object]:
        return {"method": method, "ratio": 0.25, "seed": 0, "steps": 9, "parameters": 75, "ppl(a)": 11.0} | more

    lines = [
        line(DENSE, ratio=0.0),
        line("PAT as published", gate_freeze_gap=0.3, polarised_step=None, grad_norm_max=2.0),
        line("PAT as published, no identity loss", gate_freeze_gap=0.1, polarised_step=30, grad_norm_max=3.0),
        line("PAT as published, no identity loss", seed=1, diverged="NaN in step 3"),
        line("the default, dense operator"),
    ]
    costs = {
        "the default, dense operator": {"trained_parameters": 12345, "relative": 1.5, "low": 1.4, "high": 1.6}
    }  # fmt: skip
    curve, *sweeps = report.tables(lines, costs).split("\n\n### ")
    assert "no identity loss" not in curve
    assert [sweep.split("\n")[0] for sweep in sweeps] == [SWEEPS["hio"].question, SWEEPS["identity"].question]
    assert sweeps[0].splitlines()[-1].endswith("| 12,345 | 1.500 [1.400, 1.600] |")
    published, without = sweeps[1].splitlines()[-2:]
    assert published.endswith("| 0.300 | 0 of 1 | 2.00 |")
    assert "| 1, and 1 diverged |" in without
    assert without.endswith("| 0.100 | 1 of 1, at step 30 | 3.00 |")


def test_the_gate_is_decided_once_it_stays_hard(tmp_path: Path):
    def course(*softness: float) -> dict[str, object]:
        lines: list[dict[str, float]] = [{"step": step, "gate_softness": s} for step, s in enumerate(softness, 1)]
        lines.append({"step": 9, "gate_softness": 0.0, "gate_freeze_gap": 0.02, "grad_norm": 3.0})
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return measuring.course(tmp_path)

    # The open gate of the first step is as hard as a closed one.
    assert course(0.0, 0.4, 0.09, 0.2, 0.08, 0.03)["polarised_step"] == 5
    assert course(0.0, 0.4, 0.3)["polarised_step"] is None
    assert course(0.0, 0.4, 0.3)["softness_before_freeze"] == 0.3


def test_curve_is_one_page(tmp_path: Path):
    pytest.importorskip("plotly")
    lines = [
        {"method": DENSE, "ratio": 0.0, "seed": 0, "steps": 9, "parameters": 100, "ppl(a)": 10.0},
        {"method": "x", "ratio": 0.25, "seed": 0, "steps": 9, "parameters": 75, "ppl(a)": 11.0},
    ]
    report.write_curve(lines, tmp_path / "curve.html")
    text = (tmp_path / "curve.html").read_text()
    assert "ppl(a)" in text
    assert "<script src" not in text


def test_some_methods_alone_still_have_a_dense_model_to_be_timed_against(ran: list[str], tmp_path: Path):
    out = base_of_width(tmp_path, SIZES["tiny"].hidden_size)
    main(out, size="tiny", seeds=2, only=["PCA slice"])
    assert ran[0] == DENSE
    assert set(ran) == {DENSE, "PCA slice, then LoRA"}
    assert ran.count(DENSE) == 1
    main(out, size="tiny", seeds=2, only=["PCA slice"])
    assert ran.count(DENSE) == 1, "finished work is not repeated"


def test_parts_share_the_runs_and_the_table(ran: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import typer

    out = base_of_width(tmp_path, SIZES["tiny"].hidden_size)
    for part in ("1/2", "2/2"):
        main(out, size="tiny", seeds=1, ratio=[0.25], part=part)
    assert sorted(ran) == sorted([DENSE, *METHODS]), "each once"
    capsys.readouterr()
    main(out, size="tiny", table=True)
    table = capsys.readouterr().out
    assert all(name in table for name in METHODS)
    main(out, size="tiny", seeds=1, ratio=[0.25])
    assert len(ran) == len(METHODS) + 1, "nothing is left that speed would be measured for"
    for wrong in ("3/2", "0/2", "x"):
        with pytest.raises(typer.BadParameter, match="such as 2/8"):
            main(out, part=wrong)


def test_parts_do_not_train_the_base_side_by_side(ran: list[str], tmp_path: Path):
    import typer

    for command in (main, ablation):
        with pytest.raises(typer.BadParameter, match="with --seeds 0"):
            command(data=tmp_path, out=tmp_path, part="1/2")
        command(data=tmp_path, out=tmp_path, part="1/2", table=True)
    assert not ran


def test_another_size_needs_another_folder(ran: list[str], tmp_path: Path):
    import typer

    with pytest.raises(typer.BadParameter, match="another --out"):
        main(base_of_width(tmp_path, 128), size="small")
    assert not ran


def test_a_folder_holds_one_domain(
    ran: list[str], built: corpus.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import typer

    base = base_of_width(tmp_path / "other", SIZES["tiny"].hidden_size) / "base"
    monkeypatch.setattr("benchmarks.study.__main__.build_domain", lambda *_: built)
    main(tmp_path / "code", size="tiny", seeds=1, domain="code", base=base)
    assert ran == [DENSE, "PAT as published", "the default", "PCA slice, then LoRA"]
    assert (tmp_path / "code/base/config.json").read_text() == (base / "config.json").read_text()
    assert (tmp_path / "code/data/articles.txt").exists()
    with pytest.raises(typer.BadParameter, match="holds the texts of domain code, not None"):
        main(tmp_path / "code", size="tiny")
    with pytest.raises(typer.BadParameter, match="holds the texts of domain None, not code"):
        main(tmp_path / "other", size="tiny", domain="code")
    for wrong in ({"domain": "law"}, {"sweep": ["ranks"]}):
        with pytest.raises(typer.BadParameter, match="one of"):
            main(tmp_path / "code", size="tiny", **wrong)
    assert len(ran) == 4
