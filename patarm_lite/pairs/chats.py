"""Prompts and conversations as they stand in records -> turns. A reason in words where that can't be done."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from patarm_lite.records import Turn

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
_SPEAKER = re.compile(r"(?:\A|\n\n)\s*?(Human|Assistant):")


def kind(value: Any) -> str:
    """What stands in a column, in the user's words.

    >>> kind(True), kind(None), kind([]), kind(1.5)
    ('true or false', 'nothing', 'a list', 'a number')
    """
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    for known, words in ((str, "text"), (list, "a list"), (dict, "an object")):
        if isinstance(value, known):
            return words
    return f"a {type(value).__name__}"


def looks_like_messages(value: Any) -> bool:
    """A list whose items are objects with a role and a content (or `from` and `value`)."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in value)
    )


def turns_of_messages(value: Sequence[Any]) -> tuple[Turn, ...] | str:
    """Chat messages -> turns, or the reason why not.

    >>> turns_of_messages([{"from": "human", "value": "hello"}])
    (Turn(role='user', content='hello'),)
    """
    turns = []
    for message in value:
        if not isinstance(message, dict):
            return f"a chat message is {kind(message)}, not an object with role and content"
        said = message.get("role", message.get("from"))
        role = ROLES.get(said.strip().lower()) if isinstance(said, str) else None
        if role is None:
            return f"a chat message has a role that is not system, user or assistant: {str(said)[:30]!r}"
        content = message.get("content", message.get("value"))
        if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            content = "".join(part["text"] for part in content)
        if not isinstance(content, str):
            return f"a chat message's content is {kind(content)}, not text"
        turns.append(Turn(role, content))
    return tuple(turns)


def looks_like_transcript(text: Any) -> bool:
    """Whether a text begins with `Human:` and goes on with `Assistant:`."""
    if not isinstance(text, str) or not text.lstrip().startswith("Human:"):
        return False
    return any(match[1] == "Assistant" for match in _SPEAKER.finditer(text))


def turns_of_transcript(text: str) -> tuple[Turn, ...]:
    r"""A `Human:`/`Assistant:` transcript -> turns; a speaker is named at the start of a paragraph.

    >>> turns_of_transcript("\n\nHuman: hi\n\nAssistant: hello")
    (Turn(role='user', content='hi'), Turn(role='assistant', content='hello'))
    """
    parts = _SPEAKER.split(text)
    named = zip(parts[1::2], parts[2::2], strict=True)
    return tuple(Turn("user" if who == "Human" else "assistant", said.strip()) for who, said in named)


def turns_of_prompt(value: Any, extra: Any = None) -> tuple[Turn, ...] | str:
    """A prompt column -> turns: text, chat messages, or a transcript that ends with `Assistant:`.

    Args:
        extra: the `input` that belongs to an instruction; joined to it after an empty line.
    """
    if looks_like_messages(value):
        return turns_of_messages(value)
    if not isinstance(value, str):
        return f"the prompt is {kind(value)}, not text or chat messages"
    if isinstance(extra, str) and extra.strip():
        value = f"{value}\n\n{extra}"
    if looks_like_transcript(value) and value.rstrip().endswith("\n\nAssistant:"):
        return turns_of_transcript(value)[:-1]
    return (Turn("user", value),)


def before_last_reply(first: Sequence[Turn], second: Sequence[Turn]) -> tuple[tuple[Turn, ...], str, str] | str:
    """Two whole conversations -> (common beginning, last reply of each), or the reason why not."""
    if not first or not second:
        return "a conversation is empty"
    if first[-1].role != "assistant" or second[-1].role != "assistant":
        return "a conversation does not end with an assistant turn"
    if tuple(first[:-1]) != tuple(second[:-1]):
        return "the conversations differ before the last reply"
    return tuple(first[:-1]), first[-1].content, second[-1].content
