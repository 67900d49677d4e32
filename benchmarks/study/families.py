"""Families side by side: the same small base trained as each family of the table, on the same texts, and cut alike.

Every family has a folder of the study's form, `families/NAME` with base, data and results.jsonl, so that what is
finished is not repeated; its distances are to its own dense LoRA.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.study import report
from benchmarks.study.methods import DENSE, DENSE_METHOD, METHODS, Job
from pat_serve.demo.tiny.base_model import BaseSettings, train_base

SWEEP = "families"
RATIO = 0.25
NAMES = ("llama", "qwen2", "qwen3", "gemma", "mistral", "phi3")
COMPARED = ("PAT as published", "the default")


def folder_of(out: Path, family: str) -> Path:
    """The family's own study below the study's folder."""
    return out / "families" / family


def without_base(out: Path) -> list[str]:
    """Families whose base has not been trained yet."""
    return [family for family in NAMES if not (folder_of(out, family) / "base").exists()]


def prepare(out: Path, family: str, settings: BaseSettings, base_texts: Callable[[], list[str]]) -> Path:
    """Train the family's base, unless that is done, on what the study's own base was trained on.

    Args:
        out: the study's folder, with data/.
        family: of NAMES.
        settings: of the study's base.
        base_texts: gives its texts.

    Returns:
        the family's folder.
    """
    folder = folder_of(out, family)
    if not (folder / "base").exists():
        shutil.copytree(out / "data", folder / "data", dirs_exist_ok=True)
        # Gemma's head is its embedding, as published.
        train_base(base_texts(), folder / "base", replace(settings, model_type=family, tied=family == "gemma"))
    return folder


def results_of(out: Path, family: str, side: str | None = None) -> Path:
    """Where a family's results are kept; parts that run side by side have files of their own."""
    return folder_of(out, family) / (f"results-{side}.jsonl" if side else "results.jsonl")


def jobs(seeds: int) -> Iterator[tuple[str, Job]]:
    """Family and run, seed after seed; a family's dense LoRA comes before what is compared with it."""
    for seed in range(seeds):
        for family in NAMES:
            yield family, Job(name=DENSE, ratio=0.0, seed=seed, method=DENSE_METHOD)
            for name in COMPARED:
                yield family, Job(name=name, ratio=RATIO, seed=seed, method=METHODS[name])


def table(out: Path, steps: int) -> str:
    """Markdown, a table a family; empty where nothing is there yet."""
    sections = []
    for family in NAMES:
        lines = [line for line in report.read_all(folder_of(out, family)) if line["steps"] == steps]
        if lines:
            sections.append(f"#### {family}\n\n{report.table(lines)}")
    return "\n\n".join(["### Families side by side", *sections]) if sections else ""
