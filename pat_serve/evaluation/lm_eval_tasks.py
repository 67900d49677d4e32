"""Tasks through lm-eval: a model's answer to every item. Only this file and backends.py import lm_eval."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from functools import cache
from pathlib import Path
from typing import Any, TextIO

from pat_serve.errors import DataError, UsageError
from pat_serve.evaluation.hub_data import loading
from pat_serve.evaluation.outcomes import Answers
from pat_serve.evaluation.paper14 import PREFIX
from pat_serve.machine.extras import require
from pat_serve.terminal.progress import console

TASK_FOLDER = Path(__file__).parent / "paper14" / "tasks"
# lm-eval's own seed.
_FEWSHOT_SEED = 1234
# A task's main figure is the first of these that the task has.
_MAIN_METRICS = ("acc", "exact_match", "mcc", "f1")


def require_lm_eval() -> None:
    """Check that lm-eval is installed, which `Tasks` needs.

    Raises:
        MissingExtra: lm-eval is not installed.
    """
    require("lm_eval", "eval", wanted_by="--tasks", otherwise="leave --tasks out")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval quiet: it logs at length about nothing that the user can mend, and draws bars where nobody looks."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with ExitStack() as stack:
            if not console.is_terminal:
                # lm-eval's bars have no switch: its code shows them whatever TQDM_DISABLE says.
                stack.enter_context(redirect_stderr(_nowhere()))
            yield
    finally:
        logger.setLevel(level)


@cache
def _nowhere() -> TextIO:
    """Open the null device for good: vLLM makes a log handler of it and writes to it until the process ends."""
    return open(os.devnull, "w", encoding="utf-8")


class Tasks:
    """lm-eval's tasks, with the paper's fourteen among them.

    Args:
        names: tasks or groups that will be asked for; no data is loaded yet.
        task_data: folder of local items for the fourteen; None for the hub.

    Raises:
        MissingExtra: lm-eval is not installed.
        UsageError: lm-eval knows no task or group of one of these names.
    """

    def __init__(self, names: Sequence[str], task_data: Path | None = None) -> None:
        require_lm_eval()
        with quiet():
            from lm_eval.tasks import TaskManager

            self._manager = TaskManager(
                include_path=str(TASK_FOLDER),
                # lm-eval's own tasks are thousands of files, which take seconds to list.
                include_defaults=not all(name.startswith(PREFIX) for name in names),
                metadata={"task_data": str(task_data)} if task_data else {},
            )
        self._loaded: dict[str, dict[str, Any]] = {}
        self._check(names)

    def _check(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self._manager.all_tasks:
                close = [known for known in self._manager.all_tasks if name in known][:5]
                raise UsageError(
                    "--tasks",
                    expected="tasks or groups of lm-eval, or pat14 and pat14_ll and their members",
                    found=repr(name),
                    fix=f"Near it: {', '.join(close)}." if close else "`lm-eval ls tasks` lists them.",
                )

    def answers(self, lm: Any, name: str, *, limit: int | None, num_fewshot: int | None) -> Answers:
        """Have a model answer a task, or every task of a group, whose items then count alike.

        Args:
            lm: a model from `backends`.
            name: name of the task or group.
            limit: items of each task at most, the first ones.
            num_fewshot: examples before each question; None leaves it to the task.

        Raises:
            DataError: the task's data has another form, or the task has no score for each item.
            UsageError: a number of examples for a task that takes none.
            HubError: the data could not be loaded.
        """
        with quiet():
            from lm_eval.evaluator import evaluate

            loaded = self._load(name)
            for task in loaded["tasks"].values():
                # lm-eval's simple_evaluate does the same, but also asks pip for all versions, which takes a second.
                own = task.get_config("num_fewshot")
                if own == 0 and num_fewshot:
                    # lm-eval would go on with 0 examples, and the report would name another number.
                    raise UsageError(
                        "--num-fewshot",
                        expected=f"0 or none for {name}, whose author has fixed it at 0",
                        found=str(num_fewshot),
                        fix="Leave it out, or ask for this task in a call of its own.",
                    )
                shots = own if num_fewshot is None else num_fewshot
                task.set_config(key="num_fewshot", value=shots or 0)
                task.set_fewshot_seed(seed=_FEWSHOT_SEED)
            found = evaluate(lm, loaded, limit=limit, bootstrap_iters=0, log_samples=True)
        assert found is not None, "lm-eval answers in the first process, which this one is"
        return _pooled(name, found["samples"], found["versions"])

    def data_sources(self, name: str) -> set[str] | None:
        """Hub ids of all data that a task or a group's tasks read, from their YAML alone; nothing is loaded.

        Returns:
            None where the YAML does not say: a task in Python, one that makes its own data, one that reads files.
        """
        found: set[str] = set()
        waiting: list[Any] = [name]
        while waiting:
            spec = waiting.pop()
            named = spec if isinstance(spec, str) else spec.get("group") or spec.get("task")
            entry = self._manager.task_index.get(named) if isinstance(named, str) else None
            own = entry.cfg or {} if entry is not None else {}
            config = own | (spec if isinstance(spec, dict) else {})
            if entry is not None and entry.cfg is None:
                waiting += sorted(entry.tags)  # a tag is only a list of tasks
                continue
            # A group's settings for data override those of its members.
            if isinstance(config.get("task"), list):
                waiting += config["task"]
                if "dataset_path" not in config:
                    continue
            if "class" in config or "custom_dataset" in config or "data_files" in (config.get("dataset_kwargs") or {}):
                return None
            if not isinstance(config.get("dataset_path"), str):
                return None
            found.add(config["dataset_path"])
        return found

    def _load(self, name: str) -> dict[str, Any]:
        if name not in self._loaded:
            way_out = "Check the network and HF_HUB_OFFLINE; for pat14 tasks local files do: --task-data DIR."
            with loading(f"the data of {name}", fix=way_out):
                self._loaded[name] = self._manager.load([name])
        return self._loaded[name]


def _pooled(name: str, samples: dict[str, list[dict[str, Any]]], versions: dict[str, Any]) -> Answers:
    items: list[str] = []
    right: list[float] = []
    normalized: list[float | None] = []
    gold_nll: list[float | None] = []
    metric = ""
    for task in sorted(samples):
        metric = _main_metric(name, samples[task][0])
        for sample in sorted(_first_filter(samples[task]), key=lambda sample: int(sample["doc_id"])):
            items.append(f"{task}/{sample['doc_id']}/{sample['doc_hash'][:16]}")
            right.append(float(sample[metric]))
            normalized.append(float(sample["acc_norm"]) if "acc_norm" in sample else None)
            gold_nll.append(_gold_nll(sample))
    return Answers(
        items=items,
        right=right,
        metric=metric,
        normalized=_all(normalized),
        gold_nll=_all(gold_nll),
        version="; ".join(sorted({str(versions.get(task)) for task in samples})),
    )


def _first_filter(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each item once: a task with several ways to read an answer (gsm8k: strict, flexible) has a sample for each.

    The sample that the task's author has put first counts.
    """
    return [sample for sample in samples if sample.get("filter") == samples[0].get("filter")]


def _main_metric(name: str, sample: dict[str, Any]) -> str:
    told: list[str] = list(sample.get("metrics", ()))
    scores = [metric for metric in told if isinstance(sample.get(metric), int | float)]
    for metric in (*_MAIN_METRICS, *scores):
        if metric in scores:
            return metric
    raise DataError(
        f"task {name}",
        expected="a score for each item",
        found=", ".join(told) or "none",
        fix="Choose a task with acc or exact_match; for perplexity use --text or --wikitext2.",
    )


def _gold_nll(sample: dict[str, Any]) -> float | None:
    """Negative log-likelihood of a multiple-choice item's right answer; answers are (log-likelihood, is greedy)."""
    gold, answers = sample["target"], sample["filtered_resps"]
    if isinstance(gold, str) and gold.isdigit():
        gold = int(gold)
    if not isinstance(gold, int) or not 0 <= gold < len(answers) or not isinstance(answers[gold], list | tuple):
        return None
    return -float(answers[gold][0])


def _all(values: list[float | None]) -> list[float] | None:
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else None
