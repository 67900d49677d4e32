"""Drafts: figures from known timestamps, and what is refused before an engine starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from pat_serve.errors import MissingModel, UnsupportedModel, UsageError
from pat_serve.server.analysis.trace import RequestTrace
from pat_serve.server.bench.model_source import resolve
from pat_serve.server.bench.speculative.result import (
    SpeculativeRound,
    SpeculativeSettings,
    seconds_per_token,
    summarize_rounds,
)
from pat_serve.server.bench.speculative.run import measure_speculative, prompt_ids_of
from pat_serve.server.start.draft_check import check_draft
from pat_serve.server.start.settings import ServeSettings, serve_arguments
from pat_serve.tokens.prompts import asked
from tests.tiny_models import save_tiny_llama, tiny_config


def steps(step_s: float, *tokens: int) -> RequestTrace:
    """A request whose steps took so long each and gave so many tokens."""
    times = [0.5 + step_s * index for index, count in enumerate(tokens) for _ in range(count)]
    return RequestTrace(submitted_s=0.0, tokens_s=tuple(times))


def test_seconds_per_token_count_what_came_after_the_first_step() -> None:
    assert seconds_per_token(steps(0.1, 1, 1, 1, 1, 1)) == pytest.approx(0.1)
    assert seconds_per_token(steps(0.12, 1, 3, 3)) == pytest.approx(0.04)
    with pytest.raises(ValueError, match="one step"):
        seconds_per_token(steps(0.1, 4))


def test_speed_up_and_acceptance_of_known_steps() -> None:
    rounds = [
        SpeculativeRound(
            first="plain" if index % 2 == 0 else "drafted",
            plain=steps(0.1, *[1] * 12),
            # Each checking step keeps two of three proposed tokens; the last step is cut short.
            drafted=steps(0.15, 1, 3, 3, 3, 2),
            identical=True,
            other_cpu_share=0.0,
        )
        for index in range(6)
    ]
    ratio, per_step, acceptance, noise = summarize_rounds(rounds, draft_tokens=3, seed=0)
    assert ratio.median == pytest.approx(0.1 / (4 * 0.15 / 11))
    assert per_step == pytest.approx(3.0)
    assert acceptance == pytest.approx(2 / 3)
    assert noise.spread == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("change", "flag"),
    [({"draft_tokens": 0}, "--draft-tokens"), ({"output_tokens": 8}, "--output-tokens"), ({"rounds": 4}, "--rounds")],
)
def test_what_cannot_be_measured_is_refused(change: dict[str, int], flag: str) -> None:
    with pytest.raises(UsageError, match=flag):
        measure_speculative(
            "llama2-7b", "llama2-7b-pat25", SpeculativeSettings.model_validate(change), (), progress=lambda *_: None
        )


def test_prompts_need_a_tokenizer_and_a_token(tmp_path: Path) -> None:
    settings = SpeculativeSettings(load_format="dummy", layers=1)
    shapes = "llama2-7b", "llama2-7b-pat25"
    with pytest.raises(UsageError, match="llama2-7b has none"):
        measure_speculative(*shapes, settings, asked(["a prompt"]), progress=lambda *_: None)
    dense = save_tiny_llama(tmp_path / "dense")
    pruned = save_tiny_llama(tmp_path / "pruned", hidden_size=48)
    with pytest.raises(UsageError, match="prompts without a token"):
        measure_speculative(str(dense), str(pruned), SpeculativeSettings(), asked([""]), progress=lambda *_: None)


def test_a_chat_template_writes_the_prompts_and_is_never_cut(tmp_path: Path) -> None:
    folder = save_tiny_llama(tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for turn in messages %}<{{ turn.content }}>{% endfor %}answer:"
    tokenizer.save_pretrained(folder)
    model = resolve(str(folder), flag="--model", load_format="auto", layers=None, scratch=tmp_path)
    chats = asked(["short", "a much longer question that has no room " * 4])
    [ids] = prompt_ids_of(model, SpeculativeSettings(prompt_tokens=24), chats)
    assert tokenizer.decode(ids) == "<short>answer:"
    with pytest.raises(UsageError, match="--prompt-tokens"):
        prompt_ids_of(model, SpeculativeSettings(prompt_tokens=2), chats)


def folder(path: Path, **overrides: object) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(tiny_config(**overrides).to_dict()))
    (path / "model.safetensors").touch()
    return str(path)


def test_a_draft_must_be_there_be_plain_and_share_the_vocabulary(tmp_path: Path) -> None:
    model = folder(tmp_path / "dense")
    check_draft(model, folder(tmp_path / "pruned", hidden_size=48))
    with pytest.raises(MissingModel):
        check_draft(model, str(tmp_path / "none"))
    with pytest.raises(UsageError, match="vocab_size of 400"):
        check_draft(model, folder(tmp_path / "other", vocab_size=400))
    code = folder(tmp_path / "code", auto_map={"AutoModel": "x.Y"})
    with pytest.raises(UnsupportedModel):
        check_draft(model, code)


def test_vllm_is_told_of_the_draft() -> None:
    settings = ServeSettings(
        model="dense", host="127.0.0.1", port=8000, dtype="float32", max_model_len=None, kv_cache_gib=1.0,
        compiled=False, draft="pruned", draft_tokens=4,
    )  # fmt: skip
    arguments = serve_arguments(settings, on_cpu=True)
    given = json.loads(arguments[arguments.index("--speculative-config") + 1])
    assert given == {"method": "draft_model", "model": "pruned", "num_speculative_tokens": 4}
    assert "--speculative-config" not in serve_arguments(
        ServeSettings(**{**vars(settings), "draft": None}), on_cpu=True
    )
