"""The report of `pat-eval`: estimates with standard errors, and every model compared with the first, as JSON.

`version` is the schema's: it rises when a field changes its meaning or goes away.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Part):
    """A model that was measured.

    Attributes:
        name: what the user called it.
        sha256: of its config, weights and tokenizer; None for a server, whose files are not seen.
        parameters: numbers in its weight files; None for a server and for quantized weights.
        hidden_size: of its config.json; None for a server.
    """

    name: str
    sha256: str | None
    parameters: int | None
    hidden_size: int | None


class Comparison(_Part):
    """One model against the first, on the same items.

    Attributes:
        ratio: value / the first model's.
        low: lower end of the ratio's 95 % bootstrap interval; None where the items give none.
        high: upper end.
        p_value: two-sided, of there being no difference; None where there is nothing to test.
        test: test that gave the p-value.
        won: items that this model alone got right (McNemar's test only).
        lost: items that the first model alone got right.
        difference: value - the first model's, of shares and of scores that may be zero.
        difference_low: lower end of its 95 % interval: the score interval of shares, a paired normal one of scores.
        difference_high: upper end.
    """

    ratio: float | None
    low: float | None
    high: float | None
    p_value: float | None
    test: Literal["McNemar, exact", "paired bootstrap"]
    won: int | None = None
    lost: int | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None


class Result(_Part):
    """One model's figure.

    Attributes:
        model: its name.
        value: perplexity, a mean score in [0, 1], for answer_nll and kl nats, for length and first_divergence tokens.
        standard_error: of `value`; for a perplexity, its mean nats' times the value.
        items: rows, windows or questions.
        tokens: number of scored tokens (perplexity only).
        nll_nats: mean negative log-likelihood of a token (perplexity only).
        nll_standard_error_nats: of that mean, over items.
        retention_percent: of the first model's figure that is kept; where less is better, the inverse ratio.
        versus_first: None for the first model, and where the items differ.
    """

    model: str
    value: float
    standard_error: float | None
    items: int
    tokens: int | None = None
    nll_nats: float | None = None
    nll_standard_error_nats: float | None = None
    retention_percent: float | None = None
    versus_first: Comparison | None = None


class Measure(_Part):
    """One figure of merit over all models.

    Attributes:
        name: as a gate names it: ppl(wikitext2), acc(arc_easy), acc_norm(arc_easy), answer_nll(arc_easy).
        metric: ppl, acc, acc_norm, answer_nll, repetition, rep4, length, agreement, first_divergence, kl, or what a
            task calls its own.
        of: the data or task.
        higher_is_better: whether more is better.
        settings: settings that the figure depends on.
        notes: notes for the reader, such as tasks that are missing from a mean.
        results: one for each model, in the order given.
    """

    name: str
    metric: str
    of: str
    higher_is_better: bool
    settings: dict[str, Any]
    notes: list[str]
    results: list[Result]


class BoundResult(_Part):
    """One bound of a gate for one model.

    Attributes:
        bound: as written.
        model: whose figure it is.
        measured: the figure that is bounded: a value, or a ratio to the first model's; None where there is no ratio.
        low: lower end of its 95 % interval; None where there is none.
        high: upper end.
        outcome: pass or fail when the whole interval is on one side, else inconclusive.
    """

    bound: str
    model: str
    measured: float | None
    low: float | None
    high: float | None
    outcome: Literal["pass", "fail", "inconclusive"]


class Report(_Part):
    """Everything that one call of `pat-eval` found.

    Attributes:
        version: of this schema.
        date: UTC, ISO 8601.
        pat_serve: version.
        machine: hardware and library versions.
        models: the first is the reference.
        measures: in the order asked for.
        gate: empty without one.
    """

    version: Literal[2] = 2
    date: str
    pat_serve: str
    machine: dict[str, Any]
    models: list[Model]
    measures: list[Measure]
    gate: list[BoundResult] = []
