"""A small corpus, and a study that trains nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.study import corpus
from benchmarks.study.methods import DENSE, Job
from pat_serve.training.methods import METHODS


@pytest.fixture(autouse=True)
def shipped_methods() -> Iterator[None]:
    """Forget the study's own methods after each test, since tests of the same process count the shipped ones."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "eval").mkdir()
    long = "and more of it"
    sets = (
        ("COPA", 80, long),
        ("lukaemon_mmlu_anatomy", 50, long),
        ("lukaemon_mmlu_virology", 50, long),
        ("piqa", 80, ""),
    )
    for name, count, more in sets:
        items = {
            str(i): {
                "origin_prompt": f"Stem {name} {i}.\nA. right {i}{more}\nB. wrong {i}\nAnswer:",
                "prediction": "X",
                "gold": "A",
            }
            for i in range(count)
        }  # fmt: skip
        (folder / "eval" / f"{name}.json").write_text(json.dumps(items))
    for split in ("valid", "test"):
        lines = [f" Paragraph {split} {i} . {'word ' * 60}" for i in range(150)]
        (folder / f"wikitext2.{split}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def built(texts: Path) -> corpus.Corpus:
    (texts / "library").mkdir()
    (texts / "library/json.py").write_text('def loads(text):\n    """Return the object in text."""\n')
    return corpus.build(texts, library=texts / "library")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the methods that the study would train; nothing is trained or measured."""
    names: list[str] = []

    def run(out: Path, job: Job, steps: int, width: int, part: str | None = None) -> list[dict[str, object]]:
        names.append(job.name)
        if (job.name, job.seed, part) == (DENSE, 0, None):
            (out / "dense").mkdir(exist_ok=True)
        head = {"method": job.name, "ratio": job.ratio, "seed": job.seed, "steps": steps}
        return [head | {"parameters": 1, "ppl(a)": 1.0}]

    monkeypatch.setattr("benchmarks.study.runs.run", run)
    monkeypatch.setattr("benchmarks.study.measuring.quality", lambda *_: {"ppl(a)": 1.0})
    return names


def base_of_width(out: Path, width: int) -> Path:
    (out / "base").mkdir(parents=True)
    (out / "base" / "config.json").write_text(json.dumps({"hidden_size": width}))
    return out
