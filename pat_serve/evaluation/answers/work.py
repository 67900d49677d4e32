"""All answers of a call of `pat-eval`: written once by every model, kept, and compared with the first model's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pat_serve.evaluation.answers import arithmetic
from pat_serve.evaluation.answers.agreement import force
from pat_serve.evaluation.answers.generate import Decoding, generate
from pat_serve.evaluation.answers.loops import common_start, ends_in_loop, repeated_share
from pat_serve.evaluation.cache import Cache
from pat_serve.evaluation.compare import score_measure
from pat_serve.evaluation.outcomes import Agreement, Texts
from pat_serve.evaluation.paired import Floats
from pat_serve.evaluation.report import Measure
from pat_serve.evaluation.subject import Subject
from pat_serve.tokens.prompts import Messages, Prompts, asked, prompt_ids

# An answer to a sum is short; a small model goes on with an explanation.
_ARITHMETIC_TOKENS = 64
_OTHER_PROMPTS = "The models make different tokens of the prompts: their answers are not compared."
_NO_KL = "vLLM gives no whole distributions: kl is measured with --backend hf."


@dataclass(frozen=True, kw_only=True)
class AnswerPlan:
    """The answers that are asked for.

    Attributes:
        prompts: to answer, for repetition, length and agreement; None without.
        arithmetic: ask the questions of `arithmetic.py`.
        new_tokens: of an answer to a prompt, at most.
        temperature: of the sampled answers.
        seed: of them.
        limit: prompts and questions, at most.
    """

    prompts: Prompts | None = None
    arithmetic: bool = False
    new_tokens: int = 128
    temperature: float = 0.7
    seed: int = 0
    limit: int | None = None

    def names(self) -> dict[str, set[str]]:
        """Names of data by the metric that is measured on them."""
        found: dict[str, set[str]] = {}
        if self.prompts is not None:
            name = self.prompts.name
            found |= {metric: {name, _sampled(name)} for metric in ("repetition", "rep4", "length")}
            found |= {metric: {name} for metric in ("agreement", "first_divergence", "kl")}
        return found | ({"acc": {arithmetic.NAME}} if self.arithmetic else {})


class AnswerWork:
    """One call's answers.

    Args:
        plan: what is asked for.
        cache: keeps what was written.
        tell: says what is being done.
    """

    def __init__(self, plan: AnswerPlan, cache: Cache, tell: Callable[[Subject, str], None]) -> None:
        self._plan = plan
        self._cache = cache
        self._tell = tell
        self._first: Subject | None = None
        self._texts: dict[str, dict[str, Texts]] = {}
        self._agreement: dict[str, Agreement] = {}
        self._settings: dict[str, dict[str, Any]] = {}

    @property
    def steps(self) -> int:
        """Steps of work for each model."""
        return 3 * (self._plan.prompts is not None) + self._plan.arithmetic

    def measure(self, subject: Subject, common: dict[str, Any]) -> None:
        """Have a model answer everything; the first one that is measured is the reference.

        Args:
            subject: the model.
            common: what every outcome of it depends on, for the cache.
        """
        self._first = self._first or subject
        plan = self._plan
        if plan.prompts is not None:
            chats, name = plan.prompts.chats[: plan.limit], plan.prompts.name
            greedy = Decoding(new_tokens=plan.new_tokens)
            sampled = Decoding(new_tokens=plan.new_tokens, temperature=plan.temperature, seed=plan.seed)
            self._write(subject, name, chats, greedy, common)
            self._write(subject, _sampled(name), chats, sampled, common)
            self._agree(subject, name, chats, common)
        if plan.arithmetic:
            chats = asked([question.text for question in self._questions()])
            self._write(subject, arithmetic.NAME, chats, Decoding(new_tokens=_ARITHMETIC_TOKENS), common)

    def measures(self) -> list[Measure]:
        """Every figure of what was written."""
        found: list[Measure] = []
        if self._plan.prompts is not None:
            name = self._plan.prompts.name
            for of in (name, _sampled(name)):
                found += self._of_texts(of)
            found += self._of_agreement(name)
        if self._plan.arithmetic:
            asked_for = self._questions()
            right = {
                model: [question.right(text) for question, text in zip(asked_for, texts.texts, strict=True)]
                for model, texts in self._texts[arithmetic.NAME].items()
            }
            found.append(self._scored(arithmetic.NAME, "acc", right, higher_is_better=True))
        return found

    def _questions(self) -> list[arithmetic.Question]:
        return arithmetic.questions(self._plan.limit or arithmetic.QUESTIONS)

    def _write(
        self, subject: Subject, of: str, chats: Sequence[Messages], decoding: Decoding, common: dict[str, Any]
    ) -> None:
        self._tell(subject, f"answers({of})")
        settings = {"new_tokens": decoding.new_tokens, "temperature": decoding.temperature, "seed": decoding.seed}
        prompts = [prompt_ids(subject.tokenizer, chat) for chat in chats]
        key = common | {"measure": "answers", "prompts": _sha256(prompts), **settings}

        def write() -> Texts:
            ids, ended = generate(subject, prompts, decoding)
            texts = [str(subject.tokenizer.decode(answer, skip_special_tokens=True)) for answer in ids]
            return Texts(ids=ids, texts=texts, ended=ended, sha256=_sha256(prompts))

        found = self._cache.get_or(None if subject.sha256 is None else key, write)
        assert isinstance(found, Texts)
        self._texts.setdefault(of, {})[subject.name] = found
        self._settings[of] = {name: value for name, value in key.items() if name not in ("model", "measure")}

    def _agree(self, subject: Subject, of: str, chats: Sequence[Messages], common: dict[str, Any]) -> None:
        self._tell(subject, f"agreement({of})")
        assert self._first is not None
        first = self._first
        texts = self._texts[of]
        prompts = [prompt_ids(subject.tokenizer, chat) for chat in chats]
        if texts[subject.name].sha256 != texts[first.name].sha256:
            return
        said = texts[first.name].ids
        # An empty answer has no token to agree on.
        pairs = [(prompt, answer) for prompt, answer in zip(prompts, said, strict=True) if answer]
        identity = _sha256([[*prompt, -1, *answer] for prompt, answer in pairs])

        def measure() -> Agreement:
            found = force(subject, first, [prompt for prompt, _ in pairs], [answer for _, answer in pairs])
            return Agreement(equal=found.equal, kl_nats=found.kl_nats, sha256=identity)

        key = common | {"measure": "agreement", "first": first.sha256, "answers": identity}
        known = subject.sha256 is not None and first.sha256 is not None
        outcome = self._cache.get_or(key if known else None, measure)
        assert isinstance(outcome, Agreement)
        self._agreement[subject.name] = outcome

    def _of_texts(self, of: str) -> list[Measure]:
        texts = self._texts[of]
        ended = {
            model: f"{model} ended {np.mean(each.ended):.0%} of its answers by itself." for model, each in texts.items()
        }
        looped = {model: [ends_in_loop(answer) for answer in each.ids] for model, each in texts.items()}
        repeated = {model: [repeated_share(answer) for answer in each.ids] for model, each in texts.items()}
        length = {model: [len(answer) for answer in each.ids] for model, each in texts.items()}
        return [
            self._scored(of, "repetition", looped, higher_is_better=False),
            self._scored(of, "rep4", repeated, higher_is_better=False),
            # Neither more nor less is better. The report shows the ratio as what was kept.
            self._scored(of, "length", length, [*ended.values()], higher_is_better=True),
        ]

    def _of_agreement(self, of: str) -> list[Measure]:
        texts, found = self._texts[of], self._agreement
        first = next(iter(texts))
        start = {
            model: [common_start(a, b) for a, b in zip(texts[first].ids, each.ids, strict=True)]
            for model, each in texts.items()
        }
        measures = [self._scored(of, "first_divergence", start, higher_is_better=True)]
        same = {model: each.equal for model, each in found.items()}
        notes = [] if len(found) == len(texts) else [_OTHER_PROMPTS]
        measures.insert(0, self._agreed(of, "agreement", same, notes, higher_is_better=True))
        kl = {model: each.kl_nats for model, each in found.items() if each.kl_nats is not None}
        if len(kl) == len(found):
            measures.append(self._agreed(of, "kl", kl, notes, higher_is_better=False))
        else:
            measures[0] = measures[0].model_copy(update={"notes": [*measures[0].notes, _NO_KL]})
        return measures

    def _scored(
        self, of: str, metric: str, scores: dict[str, Any], notes: Sequence[str] = (), *, higher_is_better: bool
    ) -> Measure:
        items = {model: [each.sha256] for model, each in self._texts[of].items()}
        return score_measure(
            of, metric, _arrays(scores), items, self._settings[of], notes, higher_is_better=higher_is_better
        )

    def _agreed(
        self, of: str, metric: str, scores: dict[str, Any], notes: Sequence[str], *, higher_is_better: bool
    ) -> Measure:
        items = {model: [each.sha256] for model, each in self._agreement.items()}
        return score_measure(
            of, metric, _arrays(scores), items, self._settings[of], notes, higher_is_better=higher_is_better
        )


def _sampled(name: str) -> str:
    return f"{name} sampled"


def _arrays(scores: dict[str, Any]) -> dict[str, list[Floats]]:
    return {model: [np.asarray(each, dtype=np.float64)] for model, each in scores.items()}


def _sha256(ids: Sequence[Sequence[int]]) -> str:
    return hashlib.sha256(json.dumps([list(each) for each in ids]).encode()).hexdigest()
