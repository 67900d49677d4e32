"""Messages become prompt and completion by the model's chat template: the text that a server makes of the same chat.

The completion is the last answer alone, from where the template's opening of it ends to the end of its turn. It is
always a piece of what the template renders, never put together from the answer and something else. Earlier answers are
learned too where the template marks them (`{% generation %}`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pat_serve.errors import DataError, first_line
from pat_serve.training.data.marks import learned_spans
from pat_serve.training.data.messages import (
    for_template,
    from_json,
    normal_messages,
    squeezed,
    with_system,
    without_typed_ends,
)
from pat_serve.training.data.remarks import Remarks
from pat_serve.training.data.row import Row, Tokenizer, without_nulls

# A message can carry these beside its content. A template that does not show the last answer's would leave it out.
_REASONING = ("reasoning", "reasoning_content", "thinking")
_KNOWN_FIELDS = {"role", "content", "tool_calls", "function_call", *_REASONING}
# Columns beside the messages that a template may take.
TEMPLATE_ARGUMENTS = ("tools", "documents")
# Columns beside the messages that are one more message.
SYSTEM_COLUMNS = ("system", "system_prompt")
_USUAL_ROLES = ("system", "user", "assistant")


def parse_chat(
    row: Mapping[str, Any], messages: Any, where: str, tokenizer: Tokenizer, remarks: Remarks | None = None
) -> Row:
    """Turn messages that end with the assistant's into prompt and completion.

    Args:
        row: for what stands beside the messages: `system`, `tools`, `documents`, `chat_template_kwargs`.
        messages: as OpenAI's API has them: text, a list of text parts, or tool calls without a text; or ShareGPT's.
        where: the row's place.
        tokenizer: with the chat template.
        remarks: takes what is to be said once.

    Raises:
        DataError: the messages have another shape, or the template cannot show all of the row.
    """
    messages = normal_messages(messages, where)
    for name in SYSTEM_COLUMNS:
        messages = with_system(messages, row.get(name))
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise DataError(
            where,
            expected="messages with role and content that end with the assistant's",
            found=f"roles {[message['role'] for message in messages]}",
            fix="Add the response, or leave the row out.",
        )
    if not tokenizer.chat_template:
        raise DataError(
            where,
            expected="a tokenizer with a chat template, for messages",
            found="a tokenizer without one",
            fix="Use prompt/completion rows, or a chat model's tokenizer.",
        )
    if messages[-1].get("weight") == 0:
        raise DataError(
            where, expected="an answer to learn", found="weight 0 of the last message", fix="Leave the row out."
        )
    clock = getattr(tokenizer, "template_clock", {})
    renderer = _Renderer(tokenizer, _template_arguments(row, where) | clock, where)
    messages = for_template(messages, renderer.template())
    whole = renderer.text(messages)
    if (cleaned := without_typed_ends(messages, whole, tokenizer)) != messages:
        messages, whole = cleaned, renderer.text(cleaned)
    if not messages[-1]["content"].strip() and not messages[-1].keys() - {"role", "content"}:
        raise DataError(
            where, expected="a text in the last message's content", found="none", fix="Add it, or leave the row out."
        )
    _check_shown(renderer, messages, whole, where, remarks)
    prompt = renderer.text(messages[:-1], opened=True)
    split = _split(prompt, whole, messages, where, tokenizer, remarks)
    spans = learned_spans(tokenizer, renderer.template(), messages, renderer.arguments, where)
    return replace(split, learned=tuple(span for span in spans if span[1] <= len(split.prompt)))


class _Renderer:
    """The chat template with what stands beside the messages."""

    def __init__(self, tokenizer: Tokenizer, arguments: dict[str, Any], where: str) -> None:
        self._tokenizer = tokenizer
        self.arguments = arguments
        self._where = where

    def template(self) -> Any:
        """The template's source; some models have another one for tools."""
        try:
            return self._tokenizer.get_chat_template(tools=self.arguments.get("tools"))
        except ValueError as error:  # several, and none by default
            raise DataError(
                self._where,
                expected="a tokenizer with a chat template for this row",
                found=first_line(error),
                fix="Name one of its templates default, or use prompt/completion rows.",
            ) from error

    def text(self, messages: list[dict[str, Any]], *, opened: bool = False, without: str | None = None) -> str:
        """The chat as text.

        Args:
            messages: of the chat.
            opened: as a server renders it when it asks for an answer.
            without: an argument to leave out.
        """
        arguments = {name: value for name, value in self.arguments.items() if name != without}
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=opened, **arguments
            )
        # A template is a program of the model's author and may raise what it likes.
        except Exception as error:
            raise DataError(
                self._where,
                expected="messages that the model's chat template takes",
                found=first_line(error),
                fix="Change the row's roles, or leave it out.",
            ) from error

    def is_same(self, whole: str, messages: list[dict[str, Any]], *, without: str | None = None) -> bool:
        """The template makes the same text of other messages or arguments; one that refuses them knows them."""
        try:
            return self.text(messages, without=without) == whole
        except DataError:
            return False


def _template_arguments(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    arguments = {}
    for name in TEMPLATE_ARGUMENTS:
        value = without_nulls(from_json(row.get(name), name, where))
        if value:
            arguments[name] = value
    settings = without_nulls(from_json(row.get("chat_template_kwargs"), "chat_template_kwargs", where)) or {}
    if not isinstance(settings, dict) or "chat_template" in settings:
        raise DataError(
            where,
            expected="chat_template_kwargs as an object of settings of the model's chat template",
            found=f"{settings!r:.60}",
            fix="Put another template into the model's folder (chat_template.jinja), or leave the row out.",
        )
    return arguments | settings


def _check_shown(
    renderer: _Renderer, messages: list[dict[str, Any]], whole: str, where: str, remarks: Remarks | None
) -> None:
    """Whatever carries content changes what the template renders.

    Raises:
        DataError: it leaves out a message, tools, documents, tool calls or the last answer's reasoning.
    """
    shown = squeezed(whole)
    for at, message in enumerate(messages[:-1]):
        content = message["content"]
        if not content.strip() or (message["role"] in _USUAL_ROLES and squeezed(content) in shown):
            continue
        other = [*messages[:at], message | {"content": f"{content} x"}, *messages[at + 1 :]]
        if renderer.is_same(whole, other):
            raise DataError(
                where,
                expected="a chat template that shows every message",
                found=f"one that leaves out message {at + 1}, of the role {message['role']!r:.40}",
                fix="Write it into a message that the template shows, or leave the row out.",
            )
    for name in TEMPLATE_ARGUMENTS:
        if name in renderer.arguments and renderer.is_same(whole, messages, without=name):
            raise _left_out(where, name)
    last = len(messages) - 1
    fields = dict.fromkeys(name for message in messages for name in message)
    for name in fields:
        # An answer's reasoning is no part of a later prompt: templates leave it out of the history.
        holders = [last] if name in _REASONING else range(last + 1)
        if name in ("role", "content") or not any(name in messages[at] for at in holders):
            continue
        names = {"reasoning", "reasoning_content"} if name in ("reasoning", "reasoning_content") else {name}
        changed = [
            {field: value for field, value in message.items() if at not in holders or field not in names}
            for at, message in enumerate(messages)
        ]
        if not renderer.is_same(whole, changed):
            continue
        if name in _KNOWN_FIELDS:
            raise _left_out(where, name)
        if remarks is not None:
            remarks.name_once([name], "fields of messages that the chat template does not show")


def _left_out(where: str, name: str) -> DataError:
    return DataError(
        where,
        expected=f"a chat template that shows {name!r}",
        found="one that leaves it out",
        fix="Write it into a message's content, or leave the row out.",
    )


def _split(
    prompt: str,
    whole: str,
    messages: list[dict[str, Any]],
    where: str,
    tokenizer: Tokenizer,
    remarks: Remarks | None,
) -> Row:
    """The rendering of a whole chat, parted where the last answer begins.

    Mostly the whole begins with the rendering that asks for the answer. A template that opens an answer with more than
    it shows of a finished one (`<think>`) is parted where the two begin to differ.
    """
    content = messages[-1]["content"].strip()
    at = len(prompt)
    if not whole.startswith(prompt):
        pairs = zip(prompt, whole, strict=False)
        at = next((at for at, (one, other) in enumerate(pairs) if one != other), min(len(prompt), len(whole)))
        begins = whole.rfind(content) if content else -1
        at = _before_token(whole, begins if 0 <= begins < at else at, tokenizer)
        asked = next((message["content"] for message in reversed(messages[:-1]) if message["content"].strip()), "")
        if squeezed(asked) not in squeezed(whole[:at]):
            raise DataError(
                where,
                expected="a chat template that renders a conversation alike with its answer and without",
                found="one whose renderings differ before the answer",
                fix="Use prompt/completion rows with the text that you want.",
            )
        if remarks is not None:
            remarks.once(
                f"the chat template opens an answer with {prompt[at:]!r} when a server asks for one, and shows these "
                "rows' answers without it: they are trained as the template shows them"
            )
    turn = whole[at:]
    if squeezed(content) not in squeezed(turn):
        raise DataError(
            where,
            expected="a chat template that shows the whole answer",
            found=f"one that leaves a part of it out; it makes {turn.strip()[:60]!r} of {content[:60]!r}",
            fix="Use prompt/completion rows with the text that you want, or leave the row out.",
        )
    completion, ended = _one_turn(turn, content, tokenizer)
    return Row(prompt=whole[:at], completion=completion, chat=True, ended=ended)


def _before_token(text: str, at: int, tokenizer: Tokenizer) -> int:
    """A place in a text, moved to the start of the special token that it is inside of."""
    for token in map(str, tokenizer.added_tokens_decoder.values()):
        start = text.rfind(token, 0, at + len(token) - 1)
        if 0 <= start < at < start + len(token):
            return start
    return at


def _one_turn(turn: str, content: str, tokenizer: Tokenizer) -> tuple[str, bool]:
    """An answer up to the token that the template ends a turn with: <|im_end|>, <|eot_id|>, </s>.

    The model does not say the separator of turns, which is a line feed mostly.

    Returns:
        the text, and whether it has such a token at its end; the end of text is as good otherwise.
    """
    ends = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
    stripped = turn.rstrip()
    if stripped.endswith(ends) and not (content and stripped.endswith(content)):
        return stripped, True
    # A template without such tokens, or one that opens the next answer whether or not it is asked to.
    for at in _places(turn, content):
        rest = turn[at + len(content) :]
        end = max((token for token in ends if rest.lstrip().startswith(token)), key=len, default=None)
        if end is not None:
            return turn[: turn.index(end, at + len(content)) + len(end)], True
    at = turn.find(content) if content else -1
    return (stripped if at < 0 else turn[: at + len(content)]), False


def _places(text: str, part: str) -> list[int]:
    """Where a part stands in a text, the last place first."""
    places = []
    at = text.rfind(part) if part else -1
    while at >= 0:
        places.append(at)
        at = text.rfind(part, 0, at + len(part) - 1)
    return places
