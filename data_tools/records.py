"""What is taken of a record: a text, or a conversation."""

import json
from collections.abc import Iterable
from typing import Any

CONVERSATION_KEYS = ("messages", "prompt", "completion")
# what would change an answer, and is not read
_UNREAD = ("tools", "functions", "documents", "images")


def keys_of(text_key: str | None) -> tuple[str, ...]:
    """The keys or columns that are read: that of the text; those of a conversation where `text_key` is None."""
    return CONVERSATION_KEYS if text_key is None else (text_key,)


def known_columns(text_key: str | None, columns: Iterable[str]) -> list[str]:
    """The columns of a table to read, empty where it has no text or no conversations."""
    wanted = (*keys_of(text_key), *_UNREAD) if text_key is None else keys_of(text_key)
    found = [name for name in columns if name in wanted]
    enough = text_key is not None or "messages" in found or {"prompt", "completion"} <= set(found)
    return found if enough else []


def text_of(record: Any, text_key: str | None) -> tuple[str, str]:
    """Take the text out of a record; gives (text, "") or ("", why not).

    Args:
        record: of any type.
        text_key: where the text is; None: the text is the JSON of a conversation, `{"messages": [...]}` with `role` and
            `content` in each, or `{"prompt": ..., "completion": ...}`. Other keys of the record are not read.
    """
    if not isinstance(record, dict):
        return "", f"not a JSON object but {type(record).__name__}"
    if text_key is None:
        return _conversation_of(record)
    if text_key not in record:
        keys = ", ".join(map(repr, list(record)[:5])) or "none"
        return "", f"no key {text_key!r} (it has {keys}; --text-key names another)"
    text = record[text_key]
    if not isinstance(text, str):
        return "", f"{text_key!r} is not a string but {type(text).__name__}"
    return check_text(text)


def check_text(text: str) -> tuple[str, str]:
    """A text that UTF-8 can hold, as `text_of` gives it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return "", f"lone surrogate at character {error.start}, which no UTF-8 text can hold"
    return text, ""


def _conversation_of(record: dict[str, Any]) -> tuple[str, str]:
    given = {key for key in record if record[key] is not None}
    for key in _UNREAD:
        if record.get(key):
            return "", f"{key!r}, which is not read: answers that need it cannot be learnt"
    if {"prompt", "completion"} <= given and "messages" not in given:
        kept: dict[str, Any] = {}
        for key in ("prompt", "completion"):
            if not isinstance(record[key], str):
                return "", f"{key!r} is not a string but {type(record[key]).__name__}"
            kept[key] = record[key]
    elif "messages" in given and "completion" not in given:
        reason = _check_messages(record["messages"])
        if reason:
            return "", reason
        kept = {
            "messages": [{key: message[key] for key in ("role", "content")} for message in record["messages"]]
        }
    else:
        return "", (
            "must have either 'messages', or 'prompt' and 'completion' (it has "
            f"{', '.join(map(repr, list(record)[:5])) or 'none'})"
        )
    return check_text(json.dumps(kept, ensure_ascii=False))


def _check_messages(messages: Any) -> str:
    """What is wrong with messages, or nothing."""
    if not isinstance(messages, list):
        return f"'messages' is not a list but {type(messages).__name__}"
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            return f"message {number} is not an object but {type(message).__name__}"
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                kind = (
                    f"is not a string but {type(message[key]).__name__}" if key in message else "is missing"
                )
                return f"{key!r} of message {number} {kind}"
        # a table's rows have every key, null where it does not apply
        unknown = [key for key in message if key not in ("role", "content") and message[key] is not None]
        if unknown:
            return f"message {number} has the key {unknown[0]!r}, which is not read"
    return ""
