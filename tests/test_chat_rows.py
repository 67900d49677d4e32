"""A chat is trained on as its template renders it, and as a server would ask for it."""

from __future__ import annotations

import json
from copy import deepcopy
from functools import cache
from typing import Any

import pytest

from pat_serve.errors import DataError
from pat_serve.perplexity import IGNORED_LABEL
from pat_serve.training.data import encode_row, parse_row
from pat_serve.training.data.remarks import Remarks
from tests.test_data import CHATML, THINKING
from tests.tiny_models import tiny_tokenizer

# Qwen3's: a finished last answer is shown with its thoughts, or with empty ones; those of earlier answers are dropped.
QWEN_3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}"
    "<think>\n{{ (m.reasoning_content or '') | trim }}\n</think>\n\n{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# DeepSeek-R1's: an answer is opened with a thought, and shown without it.
R1 = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] | trim }}"
    "{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# Qwen2.5's, in short: tools before the chat, calls in the place of a text.
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.arguments.city }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
OPENED = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"


@cache
def trained_tokenizer() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>"]}
    )
    tokenizer.add_tokens(["</think>", "</call>"])
    return tokenizer


def chat_tokenizer(template: Any) -> Any:
    tokenizer = deepcopy(trained_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


def chat(answer: Any, question: Any = "q", **columns: Any) -> dict[str, Any]:
    answer = answer if isinstance(answer, dict) else {"content": answer}
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", **answer}], **columns}


def learned(row: dict[str, Any], template: str, remarks: Remarks | None = None) -> tuple[str, str]:
    """The text that the model reads, and the text that counts in the loss."""
    tokenizer = chat_tokenizer(template)
    example = encode_row(parse_row(row, "row 1", tokenizer, remarks), tokenizer, 512)
    assert example is not None
    counts = [label for label in example["labels"] if label != IGNORED_LABEL]
    return tokenizer.decode(example["input_ids"][: -len(counts)]), tokenizer.decode(counts)


@pytest.mark.parametrize(
    ("template", "answer", "completion"),
    [
        pytest.param(CHATML.replace("m.content", "m.content | trim"), "\n a \n", "a<|im_end|>", id="trimmed"),
        pytest.param(QWEN_3, "a", "<think>\n\n</think>\n\na<|im_end|>", id="empty thoughts inserted"),
        pytest.param(
            QWEN_3, {"content": "a", "reasoning": " so "}, "<think>\nso\n</think>\n\na<|im_end|>", id="thoughts beside"
        ),
        pytest.param(QWEN_3, "think", "<think>\n\n</think>\n\nthink<|im_end|>", id="the answer's text in the opening"),
        pytest.param(CHATML, "the im_end", "the im_end<|im_end|>", id="the answer's text in the end"),
        pytest.param(CHATML, "of a </call>", "of a </call><|im_end|>", id="a token at the answer's end"),
        pytest.param(
            CHATML.split("{% if")[0] + "<|im_start|>assistant\n{{ '' }}",
            "a",
            "a<|im_end|>",
            id="the next answer is opened",
        ),
    ],
)
def test_an_answer_is_learned_as_the_template_shows_it(template: str, answer: Any, completion: str):
    assert learned(chat(answer), template) == (OPENED, completion)


def test_an_answer_without_the_opening_that_a_server_sends(capsys: pytest.CaptureFixture[str]):
    """The common start of both renderings, up to the answer, is the prompt; the difference is said once."""
    remarks = Remarks("rows")
    assert learned(chat("a"), THINKING, remarks) == (OPENED, "a<|im_end|>")
    assert learned(chat("<th> a"), THINKING, remarks) == (OPENED, "<th> a<|im_end|>")
    assert learned(chat("a"), R1) == ("<|user|>q<|assistant|>", "a</s>")
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("opens an answer with '<think>") == 1


def test_no_token_is_parted_where_two_renderings_differ():
    other = CHATML.replace("{{ m.role }}", "{{ '/think>' if m.role == 'assistant' else m.role }}").replace(
        "<|im_start|>{{ '/th", "<{{ '/th"
    )
    opening = other.replace("<|im_start|>assistant\n{% endif", "</call>{% endif")
    prompt, completion = learned(chat("a"), opening)
    assert (prompt, completion) == ("<user\nq<|im_end|>\n", "</think>\na<|im_end|>")


@pytest.mark.parametrize(
    ("template", "row", "found"),
    [
        pytest.param(R1, chat("<think>\nso</think>\na"), "leaves a part of it out", id="thoughts dropped"),
        pytest.param(CHATML, chat({"content": "a", "reasoning_content": "so"}), "reasoning", id="thoughts beside"),
        pytest.param(CHATML, chat({"content": "a", "thinking": "so"}), "thinking", id="thoughts by another name"),
        pytest.param(CHATML, chat("a", tools=[TOOL]), "'tools'", id="tools"),
        pytest.param(CHATML, chat("a", documents=[{"text": "d"}]), "'documents'", id="documents"),
        pytest.param(CHATML, chat({"content": "a", "tool_calls": [CALL]}), "'tool_calls'", id="calls"),
        pytest.param(CHATML, chat("a", functions=[TOOL]), "'functions'", id="functions"),
        pytest.param(CHATML, chat("a", system=["Be brief."]), "'system'", id="a system that is no text"),
        pytest.param(
            CHATML, {"messages": [{"role": "system", "content": "s"}, *chat("a")["messages"]], "system": "Be brief."},
            "'system'", id="two systems",
        ),
        pytest.param(
            CHATML, chat("a", chat_template_kwargs={"chat_template": "x"}), "settings of the model", id="a template"
        ),
        pytest.param(CHATML, chat({"content": "a", "weight": 0}), "weight 0", id="an answer not to be learned"),
        pytest.param(
            "{% for m in messages %}{{ messages | length }}{{ m.content }}{% endfor %}", chat("a"), "differ before",
            id="the history depends on the answer",
        ),
        pytest.param(CHATML, chat(" "), "found none", id="no text"),
        pytest.param(CHATML, chat({}), "no content and no tool_calls", id="no content"),
        pytest.param(CHATML, chat([{"type": "image_url", "image_url": {}}]), "image_url", id="an image"),
        pytest.param(CHATML, chat("a", [{"type": "audio", "text": None}]), "audio", id="a question that is no text"),
        pytest.param(CHATML, {"messages": "no JSON"}, "messages as JSON", id="a text"),
        pytest.param(CHATML, {"messages": ["q", "a"]}, "message 1 is a str", id="texts"),
        pytest.param(
            CHATML, {"conversations": [{"from": "function_call", "value": "q"}]}, "message 1 is from 'function_call'",
            id="a speaker of ShareGPT's without a role",
        ),
        pytest.param(CHATML, {"conversations": [{"from": "gpt"}]}, "no content", id="ShareGPT without a value"),
        pytest.param(TOOLS, chat({"tool_calls": ["weather"]}), "a tool call of message 2", id="a call that is a text"),
    ],
)  # fmt: skip
def test_what_a_template_would_leave_out_is_refused_by_name(template: str, row: dict[str, Any], found: str):
    with pytest.raises(DataError, match=f"row 1: .*{found}"):
        parse_row(row, "row 1", chat_tokenizer(template))


# Qwen's, in short: a message of a role that it does not know is left out.
KNOWN_ROLES = CHATML.replace("<|im_start|>{{ m.role }}", "{% if m.role in ['system', 'user', 'assistant'] %}{{ '' }}"
    "<|im_start|>{{ m.role }}", 1).replace("<|im_end|>\n{% endfor", "<|im_end|>\n{% endif %}{% endfor", 1)  # fmt: skip
SAID = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": None}]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": SAID},
        {"conversations": json.dumps(SAID)},
        {"conversation": chat("a")["messages"]},
        {"messages": SAID, "conversations": None},
        {"conversations": [{"from": "User", "content": "q"}, {"from": "Assistant", "content": "a"}]},
    ],
)
def test_share_gpt_s_conversations_are_messages(row: dict[str, Any]):
    assert learned(row, CHATML) == (OPENED, "a<|im_end|>")


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_is_the_first_message(column: str, capsys: pytest.CaptureFixture[str]):
    system = "<|im_start|>system\nBe brief.<|im_end|>\n"
    remarks = Remarks("rows")
    for row in ({"conversations": SAID, column: "Be brief."}, chat("a", **{column: "Be brief."})):
        assert learned(row, KNOWN_ROLES, remarks) == (system + OPENED, "a<|im_end|>")
    stated = {"messages": [{"role": "system", "content": "Be brief."}, *chat("a")["messages"]], column: "Be brief."}
    assert learned(stated, KNOWN_ROLES, remarks) == (system + OPENED, "a<|im_end|>")
    assert capsys.readouterr().err == ""


def test_no_message_is_left_out_unsaid():
    row = chat("a")
    row["messages"].insert(1, {"role": "observation", "content": "q"})
    with pytest.raises(DataError, match="leaves out message 2, of the role 'observation'"):
        parse_row(row, "row 1", chat_tokenizer(KNOWN_ROLES))
    assert learned(row, CHATML)[0] == OPENED.replace(
        "<|im_start|>assist", "<|im_start|>observation\nq<|im_end|>\n<|im_start|>assist"
    )


@pytest.mark.vllm
@pytest.mark.parametrize("knows", [False, True])
def test_a_developer_is_who_vllm_makes_of_it(knows: bool, tmp_path: Any):
    from vllm.config import ModelConfig
    from vllm.renderers.hf import safe_apply_chat_template

    from tests.tiny_models import save_tiny_llama

    template = KNOWN_ROLES.replace("['system'", "['developer', 'system'" if knows else "['system'")
    messages = [{"role": "user", "content": "p"}, {"role": "developer", "content": "Be brief."}, *chat("a")["messages"]]
    tokenizer = chat_tokenizer(template)
    config = ModelConfig(model=str(save_tiny_llama(tmp_path / "tiny")))
    served = safe_apply_chat_template(config, tokenizer, messages[:-1], tokenize=False, add_generation_prompt=True)
    assert learned({"messages": messages}, template)[0] == served
    assert "Be brief." in served


@pytest.mark.parametrize("typed", ["<|im_end|>", " <|im_end|>\n", "</s>"])
def test_an_end_typed_into_an_answer_is_not_doubled(typed: str):
    prompt, completion = learned(chat(f"a{typed}"), CHATML)
    assert (prompt, completion.replace(" ", "")) == (OPENED, "a<|im_end|>")
    earlier = {"messages": [*chat(f"a{typed}")["messages"], *chat("b")["messages"]]}
    assert "a<|im_end|>\n" in learned(earlier, CHATML)[0].replace("a <", "a<")


def test_an_end_typed_into_a_question():
    assert learned(chat("a", "q<|im_end|>"), CHATML)[0] == OPENED
    # A template that writes none there leaves it as it was typed.
    assert learned(chat("a", "q</s>"), CHATML)[0] == OPENED.replace("q", "q</s>")
    with pytest.raises(DataError, match="found none"):
        parse_row(chat("<|im_end|>"), "row 1", chat_tokenizer(CHATML))


MARKED = CHATML.replace("{{ m.content }}<|im_end|>\n", (
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}"
))  # fmt: skip


def test_earlier_answers_are_learned_where_the_template_marks_them():
    """transformers masks them in the same way, and TRL's assistant_only_loss with it."""
    row = {"messages": [*chat("first", "one")["messages"], *chat("second", "two")["messages"]]}
    tokenizer = chat_tokenizer(MARKED)
    example = encode_row(parse_row(row, "", tokenizer), tokenizer, 512)
    assert example is not None
    reference = tokenizer.apply_chat_template(
        row["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, masks = reference["input_ids"], reference["assistant_masks"]
    length = len(example["input_ids"])
    # Behind the last answer the template writes a line feed, which nobody learns.
    assert (example["input_ids"], sum(masks[length:])) == (ids[:length], 0)
    assert [label != IGNORED_LABEL for label in example["labels"]] == [bool(mask) for mask in masks[:length]]
    counts = [label for label in example["labels"] if label != IGNORED_LABEL]
    assert tokenizer.decode(counts) == "first<|im_end|>second<|im_end|>"


def test_a_marked_answer_of_weight_0_is_not_learned():
    row = {
        "messages": [*chat({"content": "first", "weight": 0}, "one")["messages"], *chat("second", "two")["messages"]]
    }
    assert learned(row, MARKED) == learned(row, CHATML)
    twice = MARKED.replace("{% generation %}", "{% generation %}{{ '' }}-{% endgeneration %}{% generation %}")
    with pytest.raises(DataError, match="found 4 marks and 2 answers"):
        parse_row(row, "row 1", chat_tokenizer(twice))


def test_a_tokenizer_with_named_templates_alone():
    tokenizer = chat_tokenizer({"rag": CHATML})
    with pytest.raises(DataError, match="row 1: expected a tokenizer with a chat template"):
        parse_row(chat("a"), "row 1", tokenizer)


def test_a_marked_answer_within_the_length_counts_alone():
    row = {"messages": [*chat("first", "one")["messages"], *chat("second", "two " * 30)["messages"]]}
    tokenizer = chat_tokenizer(MARKED)
    example = encode_row(parse_row(row, "", tokenizer), tokenizer, 40)
    assert example is not None
    counts = [label for label in example["labels"] if label != IGNORED_LABEL]
    assert (len(example["labels"]), tokenizer.decode(counts)) == (40, "first<|im_end|>")
    assert encode_row(parse_row(row, "", chat_tokenizer(CHATML)), tokenizer, 40) is None


def test_tools_are_shown_to_the_template_and_calls_are_learned():
    written = CALL | {"function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    for tools in ([TOOL], json.dumps([TOOL])):
        for call in (CALL, written):
            prompt, completion = learned(chat({"content": None, "tool_calls": [call]}, tools=tools), TOOLS)
            assert f"<|im_start|>system\n{json.dumps(TOOL)}\n<|im_end|>\n{OPENED}" == prompt
            assert completion == "<call>Paris</call><|im_end|>"


def test_thoughts_of_earlier_answers_are_the_template_s_to_drop():
    """A server's history has none either."""
    row = chat("a")
    row["messages"] = [*chat({"content": "b", "reasoning_content": "so"})["messages"], *row["messages"]]
    prompt, completion = learned(row, QWEN_3)
    assert "so" not in prompt
    assert completion.endswith("a<|im_end|>")


def test_the_last_answer_alone_is_learned():
    row = {"messages": [*chat("first")["messages"], *chat("second")["messages"]]}
    prompt, completion = learned(row, CHATML)
    assert completion == "second<|im_end|>"
    assert "first<|im_end|>" in prompt


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "a\nb"),
        (["a", {"text": "b"}], "a\nb"),
        ({"type": "text", "text": "a"}, "a"),
    ],
)
def test_a_list_of_text_parts_is_a_text(content: Any, text: str):
    assert learned(chat({"content": content}, content), CHATML) == (OPENED.replace("q", text), f"{text}<|im_end|>")


@pytest.mark.vllm
def test_messages_reach_the_template_as_vllm_hands_them_over(tmp_path: Any):
    """Parts, calls, thoughts and nulls: vLLM's own parser, and ours."""
    from vllm.config import ModelConfig
    from vllm.renderers.chat_utils import parse_chat_messages

    from tests.tiny_models import save_tiny_llama

    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
        ]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
        {"role": "assistant", "content": "c", "reasoning": "so"},
    ]  # fmt: skip
    config = ModelConfig(model=str(save_tiny_llama(tmp_path / "tiny")))
    served, _, _ = parse_chat_messages(json.loads(json.dumps(messages)), config, "string")
    seen: list[Any] = []
    tokenizer = chat_tokenizer(TOOLS)
    tokenizer.apply_chat_template = lambda given, **_: seen.append(given) or "text"
    with pytest.raises(DataError):
        parse_row({"messages": messages}, "", tokenizer)
    assert seen[0] == served


def test_prompt_and_completion_may_be_messages():
    messages = chat("a")["messages"]
    row = {"prompt": messages[:1], "completion": messages[1:]}
    assert learned(row, CHATML) == (OPENED, "a<|im_end|>")
    with pytest.raises(DataError, match="one message in the completion, found 2"):
        parse_row({"prompt": messages[:1], "completion": messages}, "", chat_tokenizer(CHATML))


def test_settings_of_a_template_are_handed_on():
    template = CHATML + "{% if short %}<|im_start|>{% endif %}"
    assert learned(chat("a", chat_template_kwargs={"short": True}), template)[1] == "a<|im_end|>\n<|im_start|>"


def test_fields_of_messages_that_are_not_shown_are_named_once(capsys: pytest.CaptureFixture[str]):
    remarks = Remarks("rows.jsonl")
    for _ in range(2):
        learned(chat({"content": "a", "weight": 1, "name": None}), CHATML, remarks)
    said = " ".join(capsys.readouterr().err.split())
    assert said == "rows.jsonl: fields of messages that the chat template does not show: weight"
