"""From a conversation to token ids, by vLLM's own renderer over a real tokenizer: no engine runs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pat_serve.server.engine.errors import RequestRefused
from pat_serve.server.engine.online import Engine, chat_settings
from pat_serve.server.engine.serve import parse_serve_arguments
from tests.tiny_models import save_tiny_llama

pytestmark = pytest.mark.vllm

TEMPLATE = (
    "{% for message in messages %}<s>{{ message.role }}: {{ message.content }}</s>{% endfor %}"
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('the user begins') }}{% endif %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a dict?"},
    {"role": "assistant", "content": "A mapping."},
    {"role": "user", "content": "Of what?"},
]


def engine(folder: Path, template: str | None, *flags: str) -> Engine:
    """An engine that can render, and do nothing else."""
    from vllm.config import ModelConfig, VllmConfig
    from vllm.renderers import renderer_from_config
    from vllm.v1.engine.output_processor import OutputProcessor

    save_tiny_llama(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    config = VllmConfig(model_config=ModelConfig(str(folder), max_model_len=64))
    renderer = renderer_from_config(config)
    client: Any = SimpleNamespace(
        model_config=config.model_config,
        vllm_config=config,
        renderer=renderer,
        output_processor=OutputProcessor(renderer.tokenizer, log_stats=False),
    )
    return Engine(client, "tiny", chat_settings(parse_serve_arguments(["--model", str(folder), *flags])))


def test_a_conversation_is_what_transformers_makes_of_it(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made = engine(tmp_path / "model", TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    expected = tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert asyncio.run(made.render(TALK)) == expected
    assert asyncio.run(made.has_chat_template())
    # Longer than the model: whole, so that the refusal can say how long it is.
    long = [{"role": "user", "content": "dict " * 200}]
    assert len(asyncio.run(made.render(long))) > made.max_model_len


def test_the_servers_flag_wins_over_the_tokenizers_template(tmp_path: Path) -> None:
    made = engine(tmp_path / "model", TEMPLATE, "--chat-template", "{{ messages[-1].content }}!")
    ids = asyncio.run(made.render(TALK))
    assert made._client.renderer.tokenizer.decode(ids) == "Of what?!"


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    made = engine(tmp_path / "model", None)
    with pytest.raises(RequestRefused, match=r"no chat template; send prompt, or .*--chat-template") as refused:
        asyncio.run(made.render(TALK))
    assert refused.value.param == "messages"
    assert not asyncio.run(made.has_chat_template())


def test_turns_that_the_template_refuses_are_the_clients_fault(tmp_path: Path) -> None:
    made = engine(tmp_path / "model", TEMPLATE)
    with pytest.raises(RequestRefused, match=r"refuses them: .*the user begins") as refused:
        asyncio.run(made.render(TALK[2:]))
    assert refused.value.param == "messages"


def test_a_template_that_is_broken_is_none(tmp_path: Path) -> None:
    made = engine(tmp_path / "model", "{% for message in messages %}{{ message.content }}")
    with pytest.raises(RequestRefused, match=r"messages: the chat template is broken: .*endfor") as refused:
        asyncio.run(made.render(TALK))
    assert refused.value.param == "messages"
    # The page asks, and offers the raw prompt alone.
    assert not asyncio.run(made.has_chat_template())
