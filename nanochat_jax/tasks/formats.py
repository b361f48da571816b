"""The formats in which people keep conversations, and what each becomes here.

    messages            {"messages": [{"role": "user", "content": "Hi"}, …]}, or the bare list
    ShareGPT            {"conversations": [{"from": "human", "value": "Hi"}, …]}
    Alpaca              {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    prompt/completion   {"prompt": "Hi", "completion": "Hello"}, also as two lists of messages

Dolly's instruction, context and response are read like Alpaca's, question and answer like the last.
Roles are user (human), assistant (gpt, …) and, at the beginning, system or developer. A content is
a string or a list of text parts; our own parts (tokenizer.py) are kept. "weight": 0 on a message of
the assistant, and the assistant's messages within a prompt, are read but not learned. Whatever else
changes what is learned (other weights, masks, tool calls, images, preferences) is refused by name;
other fields (id, name, metadata, …) are not read. An empty system message is none.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from nanochat_jax.tokenizer import ConversationError

ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "bing", "bard"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
# Names of fields, or words in them, that say what to learn or hold a part of the conversation.
MEANINGFUL = frozenset(
    re.split(
        r"\s+",
        """audio audios chosen function functions history ignore ignored image images label
        labels learn learned loss mask masked masks preferred reasoning refusal rejected
        supervised thinking thought thoughts tool tools train trainable trained video videos
        weight weights""",
    )
)
HARMLESS = frozenset(["parallel_tool_calls"])  # where there are no tools
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
TEXT_PARTS = ("text", "input_text", "output_text")
OWN_PARTS = ("python", "python_output")


class Read(NamedTuple):
    """A conversation in the project's own form, and the format that it was in."""

    format: str
    messages: list[dict[str, Any]]


def read_conversation(value: Any) -> Read:
    """Any of the formats; ConversationError says what is wrong or cannot be honoured."""
    if isinstance(value, list):
        return Read("messages", read_messages(value))
    if not isinstance(value, dict):
        raise ConversationError(
            f"a conversation is an object or a list of messages, not {_short(value)}"
        )
    if preferences := [name for name in value if "rejected" in name or "preferred" in name]:
        raise ConversationError(
            f"it has preferences ({', '.join(preferences)}); supervised fine-tuning learns from "
            "conversations with one answer"
        )
    for name, fields, more, read in _FORMATS:
        if all(field in value for field in fields):
            _refuse_meaningful(value, {*fields, *more})
            system = value.get("system") or value.get("system_prompt")
            return Read(name, _with_system(system, read(value, *fields)))
    _refuse_meaningful(value, set())
    known = "; ".join(" and ".join(fields) for _, fields, _, _ in _FORMATS)
    raise ConversationError(
        f"no conversation: its fields are {', '.join(value) or 'none'}, and not {known}"
    )


def read_messages(values: Any, weight: int | None = None) -> list[dict[str, Any]]:
    """Messages in our form; `weight` is that of the assistant's where they have none."""
    if not isinstance(values, list):
        raise ConversationError(f"the messages are not a list but {_short(values)}")
    messages = [_message(value, f"message {i}", weight) for i, value in enumerate(values)]
    leading = 0
    while leading < len(messages) and messages[leading]["role"] == "system":
        leading += 1
    system = "\n\n".join(filter(str.strip, (one["content"] for one in messages[:leading])))
    return _with_system(system, messages[leading:])


# ---- the formats -----------------------------------------------------------------------------


def _from_list(value: Mapping[str, Any], messages: str) -> list[dict[str, Any]]:
    return read_messages(value[messages])


def _from_task(value: Mapping[str, Any], instruction: str, answer: str) -> list[dict[str, Any]]:
    asked = [_text(value, name) for name in (instruction, "input", "context")]
    question = "\n\n".join(part for part in asked if part)
    return [*_past(value), *_exchange(question, _text(value, answer))]


def _past(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The exchanges before the question, as LLaMA-Factory writes them."""
    past = value.get("history") or []
    if not (isinstance(past, list) and all(_is_pair(pair) for pair in past)):
        raise ConversationError("history is not a list of pairs, a question and its answer each")
    return [message for pair in past for message in _exchange(*pair)]


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(isinstance(one, str) for one in value)
    )


def _from_pair(value: Mapping[str, Any], prompt: str, answer: str) -> list[dict[str, Any]]:
    if isinstance(value[prompt], list) and isinstance(value[answer], list):
        return [*read_messages(value[prompt], weight=0), *read_messages(value[answer])]
    return _exchange(_text(value, prompt), _text(value, answer))


def _exchange(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


_FORMATS: tuple[tuple[str, tuple[str, ...], tuple[str, ...], Callable[..., Any]], ...] = (
    ("messages", ("messages",), (), _from_list),
    ("ShareGPT", ("conversations",), (), _from_list),
    ("Alpaca", ("instruction", "output"), ("history",), _from_task),
    ("Dolly", ("instruction", "response"), (), _from_task),
    ("prompt/completion", ("prompt", "completion"), (), _from_pair),
    ("prompt/response", ("prompt", "response"), (), _from_pair),
    ("question/answer", ("question", "answer"), (), _from_pair),
    ("question/response", ("question", "response"), (), _from_pair),
)


# ---- messages --------------------------------------------------------------------------------


def _message(value: Any, where: str, weight: int | None) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConversationError(f"{where} is not an object but {_short(value)}")
    role_field, content_field = ("from", "value") if "from" in value else ("role", "content")
    if role_field not in value:
        raise ConversationError(f"{where} has no role")
    name = value[role_field]
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    _refuse_meaningful(value, {"weight"}, where)
    if role is None:
        raise ConversationError(
            f"{where} has the role {_short(name)}, which the chat format cannot express; "
            f"known are {', '.join(ROLES)}"
        )
    content = _content(value.get(content_field), role, where)
    message = {"role": role, "content": content}
    weight = (
        _weight(value.get("weight"), role, where) if value.get("weight") is not None else weight
    )
    return message | ({"weight": 0} if weight == 0 and role == "assistant" else {})


def _weight(weight: Any, role: str, where: str) -> int:
    if weight not in (0, 1):
        raise ConversationError(f"{where} has the weight {_short(weight)}; only 0 and 1 are known")
    if weight == 1 and role != "assistant":
        raise ConversationError(
            f"{where}, the {role}'s, has the weight 1, but only the assistant's are learned"
        )
    return int(weight)


def _content(content: Any, role: str, where: str) -> str | list[dict[str, str]]:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise ConversationError(f"the content of {where} must be a string or a list of parts")
    parts = [_part(part, role, where) for part in content]
    if any(part["type"] != "text" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _part(part: Any, role: str, where: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else None
    known = TEXT_PARTS + (OWN_PARTS if role == "assistant" else ())
    if kind not in known:
        raise ConversationError(
            f"{where}, the {role}'s, has a part of type {_short(kind)}; known are "
            f"{', '.join(known)}"
        )
    _refuse_meaningful(part, {"text"}, where)
    if not isinstance(part.get("text"), str):
        raise ConversationError(f"{where} has a part without a text")
    return {"type": kind if kind in OWN_PARTS else "text", "text": part["text"]}


def _with_system(system: Any, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages after a system message, unless it is empty."""
    if system is None or system == "" or (isinstance(system, str) and not system.strip()):
        return messages
    if not isinstance(system, str):
        raise ConversationError(f"the system message is not a string but {_short(system)}")
    if messages and messages[0]["role"] == "system":
        raise ConversationError("there are two system messages, one beside the conversation")
    return [{"role": "system", "content": system}, *messages]


def _text(value: Mapping[str, Any], name: str) -> str:
    text = value.get(name)
    if text is None or isinstance(text, str):
        return text or ""
    raise ConversationError(f"{name} is not a string but {_short(text)}")


def _refuse_meaningful(value: Mapping[str, Any], read: set[str], where: str = "") -> None:
    """ConversationError for a field that would change what is learned; an empty one does not."""
    for name, content in value.items():
        words = {word.lower() for word in _WORD.findall(name)}
        says_nothing = content in (None, "", [], {}) or (name, content) == ("weight", 1)
        if name in read or name in HARMLESS or says_nothing or not words & MEANINGFUL:
            continue
        raise ConversationError(
            f"{where or 'it'} has the field {name!r}, which changes what is learned and cannot be "
            "honoured; remove it if it does not"
        )


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}…"
