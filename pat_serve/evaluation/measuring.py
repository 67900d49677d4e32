"""Measure several models: take every outcome from the cache or anew, then compare all models with the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pat_serve.errors import DataError, HubError, UsageError
from pat_serve.evaluation.answers.work import AnswerWork
from pat_serve.evaluation.cache import Cache
from pat_serve.evaluation.compare import answer_measures, perplexity_measure
from pat_serve.evaluation.identity import dataset_commits
from pat_serve.evaluation.lm_eval_tasks import Tasks
from pat_serve.evaluation.outcomes import Answers, Likelihoods, examples_sha256
from pat_serve.evaluation.paper14 import GROUPS, PREFIX, members
from pat_serve.evaluation.paper14.local_items import local_files
from pat_serve.evaluation.paper14.questions import SOURCES
from pat_serve.evaluation.plan import Plan, Text, check_names
from pat_serve.evaluation.report import Measure, Model
from pat_serve.evaluation.subject import Subject
from pat_serve.evaluation.text import DEFAULT_CONTEXT_TOKENS, cut_windows
from pat_serve.run.plan import file_sha256
from pat_serve.terminal.progress import say

# Tokens in a batch of windows. Their logits fill the memory.
_BATCH_TOKENS = 4096


def measure_models(
    names: Sequence[str], plan: Plan, places: Mapping[str, Path] | None = None
) -> tuple[list[Model], list[Measure]]:
    """Measure everything that a plan asks for with every model.

    Args:
        names: folders, hub ids or URLs of servers; the first is the reference.
        plan: what to measure.
        places: folders of models whose names do not tell where they lie now.

    Raises:
        PatServeError: a model, its data or a setting is wrong.
    """
    if len(set(names)) < len(names):
        raise UsageError("MODEL", expected="different models", found="one of them twice", fix="Give each once.")
    places = places or {}
    subjects = [Subject(name, places.get(name, name), plan.backend, plan.load_tokenizer) for name in names]
    work = _Work(subjects, plan)
    for subject in subjects:
        work.measure(subject)
        subject.close()
    return [subject.describe() for subject in subjects], work.measures()


class _Work:
    """One call's work: outcomes by measure and model."""

    def __init__(self, subjects: Sequence[Subject], plan: Plan) -> None:
        self.plan = plan
        self.cache = Cache(plan.out)
        self.names = [subject.name for subject in subjects]
        tasks = [each for name in plan.tasks for each in (members(name) if name in GROUPS else [name])]
        self.missing = {name for name in tasks if not self._is_here(name)}
        self.tasks = [name for name in dict.fromkeys(tasks) if name not in self.missing]
        if plan.tasks and not self.tasks:
            raise DataError(
                str(plan.task_data),
                expected="files of at least one of the tasks",
                found="none",
                fix="Check --task-data; docs/evaluation.md says how the files are called.",
            )
        self.lm_eval = Tasks(self.tasks, plan.task_data) if self.tasks else None
        check_names([part.name for part in (plan.responses, *plan.texts) if part is not None])
        self.context_tokens = _context(subjects, plan.context_tokens) if plan.texts else 0
        if plan.texts and plan.stride is not None and plan.stride > self.context_tokens:
            most = f"at most {self.context_tokens}, the tokens of a window"
            raise UsageError("--stride", expected=most, found=str(plan.stride), fix="Lower it.")
        self.likelihoods: dict[str, dict[str, Likelihoods]] = {}
        self.answers: dict[str, dict[str, Answers]] = {}
        self.settings: dict[str, dict[str, Any]] = {}
        self.written = AnswerWork(plan.answers, self.cache, self._say)
        parts = bool(plan.responses) + len(plan.texts) + len(self.tasks) + self.written.steps
        self.steps = len(subjects) * parts
        self.step = 0

    def measure(self, subject: Subject) -> None:
        plan, common = self.plan, self._common(subject)
        if plan.responses is not None:
            name, identity = plan.responses.name, plan.responses.identity
            settings = {"data": identity, **plan.responses.settings, "limit": plan.limit}
            self._likelihoods(subject, name, common | {"measure": "responses", **settings}, self._responses)
        for text in plan.texts:
            settings = {"context_tokens": self.context_tokens, "stride": plan.stride, "limit": plan.limit}
            key = common | {"measure": "text", "text": text.identity, **settings}
            self._likelihoods(subject, text.name, key, partial(self._windows, text))
        for task in self.tasks:
            if task not in self.missing:
                self._answers(subject, task, common)
        self.written.measure(subject, common)

    def measures(self) -> list[Measure]:
        plan = self.plan
        found = [perplexity_measure(of, each, self.settings[of]) for of, each in self.likelihoods.items()]
        for name in plan.tasks:
            if name not in GROUPS:
                found += answer_measures(name, _listed(self.answers[name]), self.settings[name])
                continue
            parts = [task for task in members(name) if task not in self.missing]
            for task in parts:
                found += answer_measures(task, _listed(self.answers[task]), self.settings[task])[:1]
            if parts:
                found += self._mean(name, parts)
        return found + self.written.measures()

    def _mean(self, group: str, parts: list[str]) -> list[Measure]:
        absent = [task for task in members(group) if task in self.missing]
        note = f"Mean of {len(parts)} of 14 tasks" + (f"; missing: {', '.join(absent)}." if absent else ".")
        outcomes = {model: [self.answers[task][model] for task in parts] for model in self.names}
        return answer_measures(group, outcomes, self.settings[parts[0]] | {"tasks": len(parts)}, [note])

    def _likelihoods(
        self, subject: Subject, of: str, key: dict[str, Any], measure: Callable[[Subject], Likelihoods]
    ) -> None:
        self._say(subject, f"ppl({of})")
        known = subject.sha256 is not None and key.get("data", "") is not None
        found = self.cache.get_or(key if known else None, lambda: measure(subject))
        assert isinstance(found, Likelihoods)
        self.likelihoods.setdefault(of, {})[subject.name] = found
        self.settings[of] = {name: value for name, value in key.items() if name not in ("model", "measure")}

    def _responses(self, subject: Subject) -> Likelihoods:
        assert self.plan.responses is not None
        examples, left_out = self.plan.responses.encode(subject.tokenizer)
        if not examples:
            raise DataError(
                self.plan.responses.name,
                expected="rows whose prompts leave room for a response",
                found=f"none of {left_out}",
                fix="Raise --max-length-tokens.",
            )
        sums, counts = subject.nll(examples, self.plan.backend.batch_size)
        return Likelihoods(sums=sums, counts=counts, sha256=examples_sha256(examples), unit="row", left_out=left_out)

    def _windows(self, text: Text, subject: Subject) -> Likelihoods:
        # The protocol tokenizes all of the text at once, special tokens included.
        ids = subject.tokenizer(text.read(), verbose=False)["input_ids"]
        windows = cut_windows(ids, self.context_tokens, self.plan.stride)[: self.plan.limit]
        if not windows:
            raise DataError(
                text.name,
                expected=f"at least {self.context_tokens} tokens, one window",
                found=f"{len(ids)}",
                fix="Lower --context-tokens, or give a longer text.",
            )
        sums, counts = subject.nll(windows, max(1, _BATCH_TOKENS // self.context_tokens))
        return Likelihoods(sums=sums, counts=counts, sha256=examples_sha256(windows), unit="window")

    def _answers(self, subject: Subject, task: str, common: dict[str, Any]) -> None:
        plan = self.plan
        assert self.lm_eval is not None
        lm_eval = self.lm_eval
        self._say(subject, task)
        key = common | {
            "measure": "task", "task": task, "num_fewshot": plan.num_fewshot, "limit": plan.limit,
            "lm_eval": version("lm-eval"), "task_data": (data := self._task_data(task)),
            "max_length_tokens": plan.backend.max_length_tokens,
        }  # fmt: skip
        try:
            found = self.cache.get_or(
                None if subject.sha256 is None or data is None else key,
                lambda: lm_eval.answers(subject.lm, task, limit=plan.limit, num_fewshot=plan.num_fewshot),
            )
        except HubError as error:
            # The hub may have lost one of a mean's data sets. A task asked for by name must be there.
            if task in plan.tasks or subject.name != self.names[0]:
                raise
            say(f"{task} is left out: {error}")
            self.missing.add(task)
            if all(each in self.missing for each in self.tasks):
                raise
            return
        assert isinstance(found, Answers)
        self.answers.setdefault(task, {})[subject.name] = found
        self.settings[task] = {name: value for name, value in key.items() if name not in ("model", "measure")}

    def _common(self, subject: Subject) -> dict[str, Any]:
        backend = "server" if subject.folder is None else self.plan.backend.backend
        return {"model": subject.sha256, "backend": backend, "dtype": self.plan.backend.dtype}

    def _is_here(self, task: str) -> bool:
        """False for a member of the fourteen whose local files are missing, unless it was asked for by name."""
        folder = self.plan.task_data
        if folder is None or not task.startswith(PREFIX) or task in self.plan.tasks:
            return True
        return bool(local_files(folder, _bare(task)))

    def _task_data(self, task: str) -> list[str] | dict[str, str] | None:
        """Identify a task's items: hashes of local files, or commits of hub data sets; None where nobody knows."""
        if not task.startswith(f"{PREFIX}_"):
            assert self.lm_eval is not None
            return dataset_commits(self.lm_eval.data_sources(task))
        if self.plan.task_data is None:
            return dataset_commits({SOURCES[_bare(task)].path})
        return [file_sha256(path) for path in local_files(self.plan.task_data, _bare(task))]

    def _say(self, subject: Subject, what: str) -> None:
        self.step += 1
        say(f"[{self.step}/{self.steps}] {subject.name}: {what}")


def _bare(task: str) -> str:
    return task.removeprefix(f"{PREFIX}_").removesuffix("_ll")


def _listed(outcomes: dict[str, Answers]) -> dict[str, list[Answers]]:
    return {model: [answers] for model, answers in outcomes.items()}


def _context(subjects: Sequence[Subject], wanted: int | None) -> int:
    """Choose the length of a window: the same for all models, and no more than any of them was made for."""
    told = [(positions, subject.name) for subject in subjects if (positions := subject.positions)]
    most, model = min(told, default=(wanted or DEFAULT_CONTEXT_TOKENS, ""))
    if wanted is not None:
        if wanted > most:
            raise UsageError(
                "--context-tokens",
                expected=f"at most {most}, which {model} was made for",
                found=str(wanted),
                fix="Lower it, or leave it out.",
            )
        return wanted
    if most < DEFAULT_CONTEXT_TOKENS:
        say(f"windows of {most} tokens instead of {DEFAULT_CONTEXT_TOKENS}: {model} was made for no more")
    return min(most, DEFAULT_CONTEXT_TOKENS)
