"""Families side by side: folders, parts, and a base of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from benchmarks.study import corpus, families, report
from benchmarks.study.__main__ import SIZES, main
from benchmarks.study.methods import DENSE, settings
from pat_serve.demo.tiny.base_model import BaseSettings
from tests.study.conftest import base_of_width


def test_families_each_have_a_folder_and_are_not_repeated(
    ran: list[str], built: corpus.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    trained = []

    def train(texts: list[str], folder: Path, base: BaseSettings) -> None:
        assert texts == built.base_texts
        folder.mkdir()
        trained.append((base.model_type, base.tied))

    monkeypatch.setattr("benchmarks.study.families.train_base", train)
    monkeypatch.setattr("benchmarks.study.__main__.build", lambda _: built)
    out = base_of_width(tmp_path, SIZES["tiny"].hidden_size)
    built.save(out / "data")
    for _ in range(2):
        main(out, size="tiny", seeds=1, sweep=["families"], curve=False)
    # The study's own dense model, and three runs of each family.
    assert ran == [DENSE, *[DENSE, *families.COMPARED] * 6]
    assert trained == [(name, name == "gemma") for name in families.NAMES]
    printed = capsys.readouterr().out
    assert printed.count("#### ") == 12
    assert printed.count("| 25.0% | the default | 1 |") == 12


def test_families_are_done_in_parts_beside_each_other(
    ran: list[str], built: corpus.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    trained = []

    def train(texts: list[str], folder: Path, base: BaseSettings) -> None:
        folder.mkdir()
        trained.append(base.model_type)

    monkeypatch.setattr("benchmarks.study.families.train_base", train)
    monkeypatch.setattr("benchmarks.study.__main__.build", lambda _: built)
    out = base_of_width(tmp_path, SIZES["tiny"].hidden_size)
    built.save(out / "data")
    with pytest.raises(typer.BadParameter, match="families' bases; first with --seeds 0"):
        main(out, size="tiny", seeds=1, sweep=["families"], part="1/2")
    for part in ("1/2", "2/2"):
        main(out, size="tiny", seeds=0, sweep=["families"], curve=False, part=part)
    assert (sorted(trained), ran) == (sorted(families.NAMES), [])
    for part in ("1/2", "2/2"):
        main(out, size="tiny", seeds=1, sweep=["families"], curve=False, without=[DENSE], part=part)
    assert sorted(ran) == sorted([DENSE, *families.COMPARED] * 6)
    assert len(trained) == 6
    for family in families.NAMES:
        folder = families.folder_of(out, family)
        assert not (folder / "results.jsonl").exists()
        assert {line["method"] for line in report.read_all(folder)} == {DENSE, *families.COMPARED}
    main(out, size="tiny", seeds=1, sweep=["families"], curve=False, only=["none"])
    assert ran.count(DENSE) == 6 + 1, "nothing is left that a family's speed would be measured for"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "gemma" else pytest.mark.slow) for name in families.NAMES]
)
def test_a_base_of_each_family_can_be_tuned_as_the_study_does(name: str, built: corpus.Corpus, tmp_path: Path):
    """Two steps show that the table knows the family, and that the default recipe is not refused."""
    from benchmarks.exported import train_and_export

    base = BaseSettings(
        vocab_size=300, hidden_size=64, intermediate_size=96, layers=2, heads=4, kv_heads=2, batch_size=2, steps=2
    )
    built.save(tmp_path / "data")
    folder = families.prepare(tmp_path, name, base, lambda: built.base_texts)
    [job] = [job for family, job in families.jobs(1) if (family, job.name) == (name, "the default")]
    recipe = settings(job, 48) | {
        "model": str(folder / "base"), "data": str(folder / "data/tune.jsonl"), "max_steps": 14,
    }  # fmt: skip
    facts = train_and_export(recipe, "the default", tmp_path / "run", tmp_path / "pruned")
    assert facts["hidden_size"] == 48
