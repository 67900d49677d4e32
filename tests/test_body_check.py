"""Fields that a JSON body may send to vLLM's routes."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from typing import Any

import pytest

from pat_serve.server.http.body_check import ModelBounds, check_body, check_containers, valid_request_id
from pat_serve.server.http.errors import InvalidRequestError
from pat_serve.server.http.policy import Feature, Policy

POLICY = Policy(max_sequences=16)
MODEL = ModelBounds(max_model_len=100, vocab_size=384)
TOOL_RESULT = {"type": "tool_result", "tool_use_id": "a"}
IMAGE_PART = {"type": "image", "source": {"type": "url", "url": "http://169.254.169.254/"}}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}]}


def check(fields: Any, policy: Policy = POLICY) -> int:
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return check_body(body, policy, MODEL)


@pytest.mark.parametrize(
    ("fields", "sequences"),
    [
        ({}, 1),
        ({"prompt": "a"}, 1),
        ({"prompt": ["a", "b"], "n": 3}, 6),
        ({"prompt": [1, 2, 3], "n": None}, 1),
        ({"prompt": [[1, 2], [3]]}, 2),
        ({"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100, "logprobs": True, "top_logprobs": 5}, 1),
        ({"messages": [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]}, 2),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "an image_url"}]}]}, 1),
        ({"prompt": "a", "stop": ["x"] * 16, "logprobs": 0, "echo": True, "max_tokens": 0, "seed": -1}, 1),
        ({"response_format": {"type": "text"}, "tool_choice": "auto", "chat_template_kwargs": {"thinking": True}}, 1),
        ({"request_id": "abc-1.2:3_4"}, 1),
        ({"tool_choice": {"type": "auto"}}, 1),
        ({"tool_choice": {"type": "none"}, "output_config": {"effort": "low"}, "text": {"verbosity": "low"}}, 1),
        # The openai package repeats an answer so, and an agent repeats its tools' calls and results so.
        ({"messages": [{"role": "assistant", "content": "a", "audio": None, "refusal": None}]}, 1),
        ({"messages": [{"content": [{"type": "tool_use", "input": {"file": {"type": "image"}}}]}]}, 1),
        ({"messages": [{"content": [TOOL_RESULT | {"content": [{"type": "text", "text": "a"}]}]}]}, 1),
        ({"input": [{"type": "function_call_output", "output": [{"type": "input_text", "text": "a"}]}]}, 1),
        ({"system": [{"type": "text", "text": "a"}], "tools": [{"type": "function", "strict": False}]}, 1),
    ],
)
def test_what_is_let_through_and_how_much_it_is(fields: dict[str, Any], sequences: int) -> None:
    assert check(fields) == sequences


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 10**9}, "n"),
        ({"n": 17}, "n"),
        ({"n": 0}, "n"),
        ({"n": "1000000000"}, "n"),
        ({"n": 1e9}, "n"),
        ({"n": True}, "n"),
        ({"prompt": ["a"] * 9, "n": 2}, "n"),
        ({"best_of": 17}, "best_of"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": "4"}, "max_tokens"),
        ({"max_completion_tokens": 101}, "max_completion_tokens"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"min_tokens": 101}, "min_tokens"),
        ({"logprobs": -1}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"top_logprobs": 10**6}, "top_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ["x"] * 10_000}, "stop"),
        ({"stop": ["x" * 257]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": [1]}, "stop"),
        ({"stop": {"a": 1}}, "stop"),
        ({"bad_words": ["x"] * 17}, "bad_words"),
        ({"stop_token_ids": [1] * 1025}, "stop_token_ids"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        (b'{"temperature": 1e999}', "temperature"),
        (b'{"logit_bias": {"5": -1e999}}', "logit_bias"),
        ({"model": "x" * 257}, "model"),
        ({"user": "a\r\nb"}, "user"),
        ({"request_id": "a\r\nb"}, "request_id"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [384]}, "prompt"),
        ({"prompt": [[1], [384]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [{}] * 10_000}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"messages": [1] * 4000}, "messages"),
        ({"messages": [{}] * 4097}, "messages"),
        ({"messages": [{"content": ["a"]}]}, "messages"),
        ({"messages": [IMAGE]}, "messages"),
        ({"messages": [[IMAGE]]}, "messages"),
        ({"input": [{"content": [{"type": "input_file", "file_id": "x"}]}]}, "input"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"text": {"format": {"type": "json_schema"}}}, "text"),
        ({"structured_outputs": {"regex": "(a+)+"}}, "structured_outputs"),
        ({"guided_grammar": ""}, "guided_grammar"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs"),
        ({"mm_processor_kwargs": {"num_crops": 10**6}}, "mm_processor_kwargs"),
        ({"mm_payload": "tensors"}, "mm_payload"),
        ({"logprob_token_ids": [1] * 1025}, "logprob_token_ids"),
        ({"output_config": {"format": {"type": "json_schema", "schema": {}}}}, "output_config"),
        ({"output_config": {"format": {"schema": {}}}}, "output_config"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": ["auto"]}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a", "strict": True}}]}, "tools"),
        ({"tools": [{"type": "function", "name": "a", "strict": True}]}, "tools"),
        ({"messages": [{"content": [TOOL_RESULT | {"content": [IMAGE_PART]}]}]}, "messages"),
        (
            {"messages": [{"content": [TOOL_RESULT | {"content": [TOOL_RESULT | {"content": [IMAGE_PART]}]}]}]},
            "messages",
        ),
        ({"messages": [{"content": IMAGE_PART}]}, "messages"),
        ({"messages": [{"content": [{"type": "unheard of"}]}]}, "messages"),
        ({"messages": [{"content": [{"type": ["image"]}]}]}, "messages"),
        ({"input": [{"type": "function_call_output", "output": [{"type": "input_image"}]}]}, "input"),
        ({"input": [{"type": "computer_call_output", "output": {"type": "computer_screenshot"}}]}, "input"),
        ({"system": [IMAGE_PART]}, "system"),
        ({"previous_input_messages": [IMAGE]}, "previous_input_messages"),
        ({"kv_transfer_params": {"remote_host": "169.254.169.254"}}, "kv_transfer_params"),
        ({"ec_transfer_params": {}}, "ec_transfer_params"),
        ({"vllm_xargs": {"kv_transfer_params": "a"}}, "kv_transfer_params"),
    ],
)
def test_what_is_refused(fields: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check(fields)
    assert caught.value.param == param
    # A bound is named, what was sent is not.
    assert len(caught.value.message) < 200
    assert "xxxx" not in caught.value.message
    assert "169.254" not in caught.value.message


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[", b"[]", b"1", b"null", b"{}{}", b"\xff",
        b'{"a": NaN}', b'{"a": -Infinity}', b'{"a": "\\ud800"}', b'{"a": "\x00"}', b'{"prompt": "\xed\xa0\x80"}',
        b'{"a": ' + b"[" * 1000 + b"]" * 1000 + b"}", b'{"a": ' + b"9" * 5000 + b"}",
    ],
)  # fmt: skip
def test_what_is_no_json_object(body: bytes) -> None:
    with pytest.raises(InvalidRequestError, match=r"not valid JSON|must be a JSON object"):
        check(body)


@pytest.mark.parametrize(
    ("feature", "fields"),
    [
        (Feature.STRUCTURED_OUTPUT, {"response_format": {"type": "json_object"}, "tool_choice": "required"}),
        (Feature.CHAT_TEMPLATE, {"chat_template": "{{ 1 }}"}),
        (Feature.MEDIA, {"messages": [IMAGE]}),
        (Feature.PROMPT_EMBEDS, {"prompt_embeds": "AAAA"}),
    ],
)
def test_a_feature_can_be_allowed(feature: Feature, fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match=f"--allow {feature}"):
        check(fields)
    assert check(fields, replace(POLICY, allowed=frozenset({feature}))) == 1


def test_request_ids() -> None:
    assert valid_request_id("a" * 128)
    for wrong in ("", "a" * 129, "a b", "a\n", "ü", "a/b"):
        assert not valid_request_id(wrong)


def test_containers_are_counted_outside_of_texts() -> None:
    text = json.dumps({"prompt": '[{"a": "\\\\"}]' * 100_000}).encode()
    check_containers(text)
    for body in (b"[" + b"[]," * 60_000 + b"[]]", b'{"a": ' + b'{"": "]"}, ' * 60_000):
        with pytest.raises(InvalidRequestError, match="lists and objects"):
            check_containers(body)


def test_a_string_that_does_not_end_takes_no_longer_than_it_is() -> None:
    def cpu_s(quotes: int, end: bytes = b"") -> float:
        body = b"[" * 50_001 + b'"' + b'\\"' * quotes + end
        begun_s = time.process_time()
        with pytest.raises(InvalidRequestError):
            check_containers(body)
        return time.process_time() - begun_s

    for end in (b"", b"\\"):
        # Ten times as long. With a square in it this would be a hundred times, and 12 s. The best of three: other
        # processes take caches away, if not time.
        long_s, short_s = (min(cpu_s(quotes, end) for _ in range(3)) for quotes in (20_000, 2000))
        assert long_s < 0.01 + 40 * short_s
