"""`pat-bench speculative` measures the worth of a pruned model as the draft of its dense parent.

The dense model checks the draft's tokens and keeps those that it would have chosen itself. So its greedy output stays
the same, and only the time changes. Two engines run in turns, as in the speed-up check.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pat_serve.errors import UsageError, first_line, want
from pat_serve.machine.extras import require
from pat_serve.machine.hardware import describe, serving_dtype
from pat_serve.server.analysis.trace import RequestTrace
from pat_serve.server.analysis.verdict import MIN_ROUNDS
from pat_serve.server.bench.model_source import ModelSource, check_dtype, resolve
from pat_serve.server.bench.scratch import scratch_folder
from pat_serve.server.bench.speculative.result import (
    SpeculativeResult,
    SpeculativeRound,
    SpeculativeSettings,
    summarize_rounds,
)
from pat_serve.server.engine.memory import Batch, engine_memory_bytes, kv_cache_bytes, require_memory
from pat_serve.server.engine.workers.cpu_watch import CpuWatch
from pat_serve.server.engine.workers.process import EngineProcess, start_together
from pat_serve.server.engine.workers.protocol import Start
from pat_serve.tokens.prompts import Messages, prompt_ids
from pat_serve.tokens.vocabulary import Vocabulary

# (stage, steps done, steps in all)
Progress = Callable[[str, int, int], None]

_WARMUP_RUNS = 2


def measure_speculative(
    model: str, draft: str, settings: SpeculativeSettings, prompts: Sequence[Messages], *, progress: Progress
) -> SpeculativeResult:
    """Measure a model with and without a draft.

    Args:
        model: the dense model: folder, hub id, or the name of a shipped shape.
        draft: the pruned model, given in the same way.
        settings: what to measure.
        prompts: conversations to answer, used in turn, as the model's chat template writes them; without any, random
            token ids, which no draft was trained on.
        progress: called with news as it goes.

    Raises:
        MissingExtra: vLLM is not installed.
        UsageError: settings that make no sense, or models with different vocabularies.
        ModelError: a model that is not there or not readable.
        EngineError: not enough memory, or an engine failed; its log is then kept.
    """
    _check_settings(settings)
    require("vllm", "cpu", "cuda", wanted_by="pat-bench speculative")
    date, begun_s = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    dtype = serving_dtype(settings.dtype)
    with scratch_folder() as scratch:
        sources = {}
        for label, name in (("model", model), ("draft", draft)):
            (scratch / label).mkdir()
            sources[label] = resolve(
                name,
                flag=f"--{label}",
                load_format=settings.load_format,
                layers=settings.layers,
                scratch=scratch / label,
            )
        for source in sources.values():
            check_dtype(source, dtype)
        _check_pair(sources["model"], sources["draft"], settings, dtype)
        token_ids = prompt_ids_of(sources["model"], settings, prompts)
        rounds = _measure(sources["model"], sources["draft"], settings, dtype, scratch, token_ids, progress)
    ratio, per_step, acceptance, noise = summarize_rounds(
        rounds, draft_tokens=settings.draft_tokens, seed=settings.seed
    )
    return SpeculativeResult(
        date=date,
        duration_s=time.monotonic() - begun_s,
        machine=describe(),
        model=model,
        draft=draft,
        settings=settings,
        ratio=ratio,
        tokens_per_step=per_step,
        acceptance=acceptance,
        identical=sum(one.identical for one in rounds),
        noise=noise,
        rounds=tuple(rounds),
    )


def _measure(
    model: ModelSource,
    draft: ModelSource,
    settings: SpeculativeSettings,
    dtype: str,
    scratch: Path,
    prompts: Sequence[list[int]],
    progress: Progress,
) -> list[SpeculativeRound]:
    batch = _batch(settings)
    kv_bytes = kv_cache_bytes(model.shape, batch, dtype)
    common = {
        "model": model.path,
        "dtype": dtype,
        "load_format": settings.load_format,
        # This is one more request than is used, because vLLM's drafting pads its batches.
        "batch_size": 2,
        "max_model_tokens": batch.tokens_per_request + settings.draft_tokens + 1,
        "max_step_tokens": settings.prompt_tokens + settings.draft_tokens + 1,
        "enforce_eager": settings.enforce_eager,
        "seed": settings.seed,
    }
    # The second engine loads both models, and a model on the hub may have to be fetched.
    both_on_disk = model.on_disk and draft.on_disk
    with (
        EngineProcess("model", log=scratch / "plain.log", offline=model.on_disk) as plain,
        EngineProcess("model with its draft", log=scratch / "drafted.log", offline=both_on_disk) as drafted,
    ):
        progress("starting two engines", 0, settings.rounds)
        start_together(
            {
                plain: Start.model_validate({**common, "kv_cache_bytes": kv_bytes}),
                drafted: Start.model_validate(
                    {
                        **common,
                        # vLLM shares the cache's memory between both models, page by page.
                        "kv_cache_bytes": 2 * (kv_bytes + kv_cache_bytes(draft.shape, batch, dtype)),
                        "draft": draft.path,
                        "draft_tokens": settings.draft_tokens,
                    }
                ),
            }
        )
        rounds: list[SpeculativeRound] = []
        for index in range(-_WARMUP_RUNS, settings.rounds):
            progress("measuring rounds", max(index, 0), settings.rounds)
            prompt, watch = prompts[index % len(prompts)], CpuWatch()
            order = (plain, drafted) if index % 2 == 0 else (drafted, plain)
            traces: dict[EngineProcess, tuple[RequestTrace, list[int]]] = {}
            for running, waiting in (order, order[::-1]):
                with watch.turn(running, waiting):
                    served = running.serve([prompt], output_tokens=settings.output_tokens, concurrency=1)
                traces[running] = served.requests[0], served.token_ids[0]
            if index >= 0:
                rounds.append(
                    SpeculativeRound(
                        first="plain" if order[0] is plain else "drafted",
                        plain=traces[plain][0],
                        drafted=traces[drafted][0],
                        identical=traces[plain][1] == traces[drafted][1],
                        other_cpu_share=watch.other_share,
                    )
                )
    return rounds


def _batch(settings: SpeculativeSettings) -> Batch:
    tokens = settings.prompt_tokens + settings.output_tokens + settings.draft_tokens + 1
    return Batch(requests=2, prompt_tokens=settings.prompt_tokens, tokens_per_request=tokens)


def prompt_ids_of(model: ModelSource, settings: SpeculativeSettings, prompts: Sequence[Messages]) -> list[list[int]]:
    """Token ids of the prompts, random ones without any; what a chat template makes too long is left out."""
    if not prompts:
        draw = random.Random(settings.seed)
        size = model.shape.vocab
        return [[draw.randrange(size) for _ in range(settings.prompt_tokens)] for _ in range(settings.rounds)]
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model.path)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            "--prompts",
            expected=f"a model with a tokenizer; {model.name} has none that loads",
            found=first_line(error),
            fix="Leave the flag out for random tokens, or give a whole checkpoint as --model.",
        ) from error
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    if getattr(tokenizer, "chat_template", None):
        # A conversation that is cut no longer ends where the answer begins.
        ids = [one for one in ids if len(one) <= settings.prompt_tokens]
        if not ids:
            raise UsageError(
                "--prompt-tokens",
                expected="room for one of the prompts, with what the chat template adds",
                found=str(settings.prompt_tokens),
                fix="Raise it.",
            )
    ids = [one[: settings.prompt_tokens] for one in ids]
    Vocabulary.of(tokenizer, model.shape.vocab).require((one for prompt in ids for one in prompt), "--prompts")
    if not any(ids):
        found = f"{len(ids)} prompts without a token"
        raise UsageError("--prompts", expected="a prompt of at least one token", found=found, fix="Give longer ones.")
    return [one for one in ids if one]


def _check_settings(settings: SpeculativeSettings) -> None:
    want("--draft-tokens", 1 <= settings.draft_tokens <= 16, "1 to 16", settings.draft_tokens, "Try 3.")
    least = 2 * (settings.draft_tokens + 1) + 1
    want("--output-tokens", settings.output_tokens >= least, f"at least {least}", settings.output_tokens, "Raise it.")
    want("--prompt-tokens", settings.prompt_tokens >= 1, "at least 1", settings.prompt_tokens, "Try 64.")
    want("--rounds", settings.rounds >= MIN_ROUNDS, f"at least {MIN_ROUNDS}", settings.rounds, "Try 12.")


def _check_pair(model: ModelSource, draft: ModelSource, settings: SpeculativeSettings, dtype: str) -> None:
    if model.shape.vocab != draft.shape.vocab:
        raise UsageError(
            f"--draft {draft.name}",
            expected=f"the vocabulary of {model.shape.vocab} of {model.name}",
            found=f"a vocab_size of {draft.shape.vocab}",
            fix="Draft with a model that was pruned from it.",
        )
    batch = _batch(settings)
    needed_bytes = 2 * engine_memory_bytes(model.shape, batch, dtype) + engine_memory_bytes(draft.shape, batch, dtype)
    way_out = "Cut both models with --layers N --load-format dummy, or free memory."
    require_memory("two engines and a draft", needed_bytes, dtype=dtype, fix=way_out)
